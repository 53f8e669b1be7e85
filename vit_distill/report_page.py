"""The distiller's page: what the student is, what it costs, how near it came, and how to read it.

Everything shown was computed before; this module only words and draws it. Axis alphabet: R rank.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from core import report as page
from vit_distill import report_figures as figures
from vit_distill.report_data import ReportData

EDGES = "* a learning rate, † a probe's hyper-parameter at the edge of its grid: a wider grid might give more"


def write_page(path: str | Path, results: ReportData) -> None:
    """Writes the page as one self-contained HTML file; an earlier page stays whole when this fails."""
    sections = [
        page.Section("Result", _result(results)),
        page.Section("Ablation", _ablation(results)) if results.table else None,
        page.Section("Size and speed", _cost(results)) if results.models else None,
        page.Section("Training", _training(results)) if any("loss" in r for r in results.history) else None,
        page.Section("Blocks", _blocks(results)) if results.blocks_after or results.blocks_before else None,
        page.Section("Choice of blocks", _choice(results)) if results.choice else None,
        page.Section("Adapters", _adapters(results)) if results.singular_values else None,
        page.Section("Model card", _card(results)) if results.facts else None,
        page.Section("Weights that were loaded", _loaded(results)) if results.load_report else None,
        page.Section("Provenance", page.provenance(results.provenance, results.config)),
    ]
    page.write_page(
        path,
        title=results.title,
        subtitle=results.summary,
        sections=[section for section in sections if section is not None],
    )


def _result(results: ReportData) -> Markup:
    cards = []
    teacher, student = (results.models.get(name) for name in ("teacher", "student"))
    if teacher and student:
        cards += [
            page.stat(f"{student['depth']} of {teacher['depth']}", "Blocks kept", _listed(results.blocks)),
            page.stat(f"{student['params'] / 1e6:.2f} M", "Parameters", f"teacher {teacher['params'] / 1e6:.2f} M"),
            page.stat(f"{student['gflops']:.3g}", "GFLOPs an image", f"teacher {teacher['gflops']:.3g}"),
        ]
    if results.latency.keys() >= {"teacher", "student"}:
        size = max(results.latency["student"])
        speed = results.latency["teacher"][size] / results.latency["student"][size]
        cards.append(page.stat(f"{speed:.2f} x", "Measured speed", f"of the teacher's, at batch {size}"))
    if results.blocks_before and results.blocks_after:
        before, after = (rows[-1]["l1"] for rows in (results.blocks_before, results.blocks_after))
        note = f"before training {before:.3g}; on {_measured(results)}"
        cards.append(page.stat(f"{after:.3g}", "L1 to the teacher's features", note))
    guide = page.details(
        "How to read this page",
        page.bullets(
            [
                "The student holds some blocks of the teacher, or from scratch only their shape. Unless it is a mere "
                "copy, it was trained, without labels, to give the teacher's tokens for the same image; L1 is the mean "
                "absolute difference of those features.",
                "L1 is no accuracy: the cls token that most classifiers read is one token of many. What the features "
                "are good for says a probe, a simple classifier on them (configs/vit_distill/probe.py).",
                "FLOPs count two for each multiply-add of the matrix products; latencies are medians on the device "
                "that is named there.",
            ]
        ),
    )
    parts = [page.block(cards, "stats")] if cards else []
    if results.on_training_images:
        text = (
            "Distances to the teacher were measured on training images, as none were held out: expect "
            "larger ones on new images."
        )
        parts.append(page.paragraph(text, "callout warn"))
    return page.join([*parts, guide])


def _measured(results: ReportData) -> str:
    """Which images distances were measured on."""
    chose = ", but chose the learning rate" * ("tuned" in results.facts)
    return f"{results.num_images} images that were {'' if results.on_training_images else 'not '}trained on{chose}"


def _cost(results: ReportData) -> Markup:
    sizes = sorted({size for found in results.latency.values() for size in found})
    header = ["Model", "Blocks", "Parameters", "float32", "GFLOPs an image"]
    header += [f"ms at batch {size}" for size in sizes]
    rows = []
    for name, size in results.models.items():
        found = results.latency.get(name, {})
        cells = [name, f"{size['depth']}", f"{size['params']:,}", f"{size['bytes'] / 2**20:.1f} MiB"]
        cells.append(f"{size['gflops']:.4g}")
        rows.append([*cells, *(f"{1000 * found[s]:.2f}" if s in found else "" for s in sizes)])
    caption = f"Latency: median of several calls on {results.device}." if results.device and sizes else ""
    return page.table(header, rows, caption)


def _training(results: ReportData) -> Markup:
    return page.chart(figures.loss_figure(results.history), "Training loss", "Training loss by update.")


def _blocks(results: ReportData) -> Markup:
    header = ["Student block", "Teacher block"]
    for name in ("L1", "cosine", "CKA"):
        header += [f"{name} before", f"{name} after"]
    count = max(len(results.blocks_before), len(results.blocks_after))
    before, after = (list(rows) or [{}] * count for rows in (results.blocks_before, results.blocks_after))
    rows = []
    for old, new in zip(before, after, strict=True):
        known = new or old
        cells = [str(known["block"]), str(known["teacher_block"])]
        for key in ("l1", "cosine", "cka"):
            cells += [f"{row[key]:.3f}" if row else "" for row in (old, new)]
        rows.append(cells)
    chart = page.chart(
        figures.blocks_figure(results.blocks_before, results.blocks_after),
        "Blocks before and after training",
        "Each student block against the teacher block whose output it stands for; before: the untrained copy. Measured "
        f"on {_measured(results)}.",
    )
    return page.join([chart, page.table(header, rows, text_columns=())])


def _choice(results: ReportData) -> Markup:
    best = min(range(len(results.choice)), key=lambda i: results.choice[i]["loss"])
    rows = [[str(row["rule"]), _listed(row["blocks"]), f"{row['loss']:.4f}"] for row in results.choice]
    caption = "Feature loss of the untrained copy on the calibration images, by rule; the smallest is marked."
    return page.table(["Rule", "Blocks", "Loss"], rows, caption, text_columns=(0, 1), strong=(best,))


def _adapters(results: ReportData) -> Markup:
    rows = []
    for path, values in results.singular_values.items():
        values = np.asarray(values)
        rank = results.suggested_ranks[path]
        rows.append([path, str(len(values)), str(rank), f"{values[0]:.3g}", f"{values[-1]:.3g}"])
    largest = max(results.suggested_ranks.values())
    text = (
        f"Rank {largest} would keep 95 % of the squared singular values of every adapter; "
        f"the median adapter needs {np.median(list(results.suggested_ranks.values())):.0f}."
    )
    chart = page.chart(
        figures.spectra_figure(results.singular_values),
        "Singular values of the adapters",
        "Singular values of A B, a line a block. A flat line up to the rank says that more rank would be used.",
    )
    header = ["Adapter", "Rank", "Suggested rank", "Largest singular value", "Smallest"]
    return page.join([page.paragraph(text), chart, page.details("Every adapter", page.table(header, rows))])


def _ablation(results: ReportData) -> Markup:
    shown = f"{results.metric} of the probe" if results.metric else "L1 to the teacher's features on held-out images"
    chart = page.chart(
        figures.cost_figure(results.table, results.metric),
        "Accuracy against cost" if results.metric else "Distance against cost",
        f"{shown} against the cost of one image; bars: one standard deviation over seeds.",
    )
    best: dict[Any, int] = {}
    for i, row in enumerate(results.table if results.metric else ()):
        group = (row["ratio"], row["reduction"])
        key = "valid_accuracy"
        if row["ratio"] is not None and (group not in best or row[key] > results.table[best[group]][key]):
            best[group] = i
    marked = "valid: mean on the validation images, by which the best of each ratio and r is marked; "
    caption = f"Mean ± standard deviation over n seeds; {marked * bool(results.metric)}{EDGES}."
    cells = table_cells(results.table, results.metric)
    table = page.table(table_header(results.metric), cells, caption, strong=tuple(best.values()))
    parts = [page.key_values(results.shared), chart, table]
    if results.verdicts:
        rows = [[v["claim"], v["where"], f"{v['difference']:+.4f}", v["verdict"]] for v in results.verdicts]
        parts += [
            page.heading("Row against row"),
            page.table(["Claim", "Where", "Difference", "Verdict"], rows, results.verdict_note, text_columns=(0, 1, 3)),
        ]
    return page.join(parts)


def table_header(metric: str) -> list[str]:
    """Of the ablation table; without a probe (metric "") the cls token's distance stands in its place."""
    found = [metric, "valid"] if metric else ["cls L1"]
    return ["Row", "Images", "r", *found, "L1", "Trained", "Parameters", "GFLOPs", "Learning rate", "n"]


def table_cells(rows: Sequence[Mapping[str, Any]], metric: str) -> list[list[str]]:
    """Cells of the ablation table as text, for `table_header`."""
    cells = []
    for row in rows:
        if metric:
            edge = "†" if row["probe_at_grid_edge"] else ""
            found = [spread(row["accuracy"], row["accuracy_std"], 4) + edge, f"{row['valid_accuracy']:.4f}"]
        else:
            found = ["" if row["cls_l1"] is None else spread(row["cls_l1"], row["cls_l1_std"], 3)]
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}{'*' if row['at_grid_edge'] else ''}"
        cells.append(
            [
                row["title"],
                "" if row["ratio"] is None else f"{100 * row['ratio']:g} %",
                str(row["reduction"]),
                *found,
                "" if row["l1"] is None else spread(row["l1"], row["l1_std"], 3),
                f"{row['num_trained'] / 1e6:.2f} M" if row["num_trained"] else "",
                f"{row['params'] / 1e6:.2f} M",
                f"{row['gflops']:.3g}",
                rate,
                str(row["n"]),
            ]
        )
    return cells


def spread(mean: float, std: float | None, digits: int) -> str:
    """ "0.512 ± 0.003"; without the deviation where there is none."""
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def _card(results: ReportData) -> Markup:
    own_section = ("choice", "teacher_loading")
    facts = {key: value for key, value in results.facts.items() if key not in own_section}
    parts = []
    for key, title in (("teacher", "Teacher"), ("few_shot", "Few-shot images"), ("metrics", "Metrics")):
        found = facts.pop(key, None)
        if found:
            parts += [page.heading(title), page.key_values(found)]
    return page.join([page.key_values(facts), *parts])


def _loaded(results: ReportData) -> Markup:
    return Markup("<pre>{}</pre>").format("\n".join(results.load_report))


def _listed(blocks: Sequence[int]) -> str:
    return ", ".join(str(block) for block in blocks)
