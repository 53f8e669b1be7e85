"""From the cells of an ablation to its table: means and deviations over seeds, the paper's claims, the files.

A cell is the JSON of one trained (or copied) and probed student, see table.py.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.files import write_json, write_text
from core.provenance import environment
from core.report import save_png
from core.table import markdown_table, mean_and_std
from vit_distill.report_data import ReportData
from vit_distill.report_figures import cost_figure
from vit_distill.report_page import EDGES, table_cells, table_header, write_page
from vit_distill.table_bench import SEGMENT, Bench

# The paper's ordering, and what truncation and DoRA are compared with.
CLAIMS = (
    ("enhanced", "full"),
    ("full", "copy"),
    ("copy", "scratch"),
    ("enhanced", "plain"),
    ("enhanced", "scratch"),
    ("enhanced", "truncate"),
    ("dora", "enhanced"),
)
# What the paper leaves open, and what it does not try.
QUESTIONS = (
    *((row, "enhanced") for row in ("last", "calibrated", "post", "aligned", "warm", "cls", "recipe")),
    ("full_post", "full"),
    ("full_cls", "full"),
    ("post", "full_post"),
    ("cls", "full_cls"),
)
TIE = 0.01  # less than a point says nothing, however many seeds and test images there are


def summarise(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each (row, ratio, reduction) in the order of the cells.

    Keys of a row: row, title, ratio (None: no images used), reduction, n; accuracy (test), valid_accuracy, l1, cls_l1,
    loss, seconds (means over seeds, None where not measured), each with "_std" (sample deviation, None for one seed);
    params, gflops, num_trained, step_gflops, blocks, learning_rate, at_grid_edge (of the learning rate), metric,
    num_test (test images), num_effective (`Bench.num_effective`); probe_at_grid_edge: whether any seed's probe might do
    better with a wider grid.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["row"], cell["ratio"], cell["reduction"]), []).append(cell)
    rows = []
    for (name, ratio, reduction), members in groups.items():
        row = {"row": name, "ratio": ratio, "reduction": reduction, "n": len(members)}
        for key in (
            "title",
            "params",
            "gflops",
            "num_trained",
            "step_gflops",
            "blocks",
            "learning_rate",
            "at_grid_edge",
            "metric",
            "num_test",
            "num_effective",
        ):
            row[key] = members[0][key]
        row["probe_at_grid_edge"] = any((member["probe"] or {}).get("at_grid_edge") for member in members)
        for key in ("accuracy", "valid_accuracy", "l1", "cls_l1", "loss", "seconds"):
            values = [member[key] for member in members if member[key] is not None]
            row[key], row[f"{key}_std"] = mean_and_std(values)
        rows.append(row)
    return rows


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every pair "a > b" of CLAIMS and QUESTIONS and every ratio and reduction where both rows are: does it hold?

    Returns:
      {claim, where, difference (of mean accuracies), margin, verdict: "holds" | "reversed" | "tie", num_seeds (of the
      row with fewer, but for a row that uses no images)}; a tie is a difference within the margin: TIE, or two standard
      errors where that is more. Errors are those of the seeds and of the test sample, the latter as if the rows saw
      different images: on the same ones it is smaller. A mean AUC or IoU has none of the sample.
    """
    found = []
    trained = [row for row in rows if row["ratio"] is not None and row["accuracy"] is not None]
    settings = sorted({(row["ratio"], row["reduction"]) for row in trained})
    for (better, worse), (ratio, reduction) in itertools.product(CLAIMS + QUESTIONS, settings):
        pair = [_find(rows, name, ratio, reduction) for name in (better, worse)]
        if None in pair:
            continue
        a, b = pair
        difference = a["accuracy"] - b["accuracy"]
        margin = max(TIE, 2 * math.sqrt(sum(_variance(row) for row in pair)))
        verdict = "tie" if abs(difference) <= margin else "holds" if difference > 0 else "reversed"
        found.append(
            {
                "claim": f"{better} > {worse}",
                "where": f"{100 * ratio:g} %, r={reduction}",
                "difference": difference,
                "margin": margin,
                "verdict": verdict,
                "num_seeds": min(row["n"] for row in pair if row["ratio"] is not None),
            }
        )
    return found


def _variance(row: Mapping[str, Any]) -> float:
    """Of a row's mean accuracy: what seeds and the test sample add; one seed says nothing about seeds."""
    sample = row["accuracy"] * (1 - row["accuracy"]) / row["num_effective"] if row["num_effective"] else 0.0
    return (row["accuracy_std"] or 0.0) ** 2 / row["n"] + sample


def verdict_note(rows: Sequence[Mapping[str, Any]], judged: Sequence[Mapping[str, Any]]) -> str:
    """What the margins of `verdicts` stand on, one sentence."""
    sample = f"{rows[0]['num_test']} test images"
    if not rows[0]["num_effective"]:
        metric = {"miou": "mean IoU"}.get(rows[0]["metric"], "mean AUC")
        sample += f" (whose chance is not in the margin of a {metric})"
    seeds = "" if all(v["num_seeds"] > 1 for v in judged) else "; with one seed what seeds change is unknown"
    return f"A tie is within {100 * TIE:g} point or two standard errors over seeds and {sample}{seeds}."


def _find(rows: Sequence[Mapping[str, Any]], name: str, ratio: float, reduction: int) -> Mapping[str, Any] | None:
    """The row of that name; one that used no images stands for every ratio."""
    return next(
        (r for r in rows if r["row"] == name and r["reduction"] == reduction and r["ratio"] in (None, ratio)), None
    )


def markdown(title: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The table, what is the same in all its rows (`facts`), and the verdicts, as Markdown."""
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += markdown_table(table_header(metric), table_cells(rows, metric))
    lines += ["", f"Mean ± standard deviation over n seeds; {EDGES}.", ""]
    judged = verdicts(rows)
    if judged:
        cells = [
            [v["claim"], v["where"], f"{v['difference']:+.4f}", f"{v['margin']:.4f}", v["verdict"]] for v in judged
        ]
        lines += ["## Row against row", ""]
        lines += [*markdown_table(["claim", "where", "difference", "margin", "verdict"], cells), ""]
        lines += [verdict_note(rows, judged), ""]
    return "\n".join(lines)


def shared_facts(bench: Bench) -> dict[str, Any]:
    """What all rows share, for readers."""
    config, section, train = bench.config, bench.config.table, bench.config.train
    sizes = ", ".join(f"{100 * ratio:g} % = {len(images)}" for ratio, images in bench.few_shot.items())
    names = ("train", "valid", "test")
    probe_sizes = ", ".join(f"{len(images)} {name}" for name, images in zip(names, bench.probe_sets, strict=False))
    facts = {
        "teacher": f"{bench.teacher.name}, sha256 {bench.teacher.report.sha256[:12]}...",
        "images to distil on": f"{next(iter(bench.few_shot.values())).name}, {sizes} (few-shot seed "
        f"{config.few_shot.seed})",
        "budget of each row": f"{train.num_steps} updates of {train.batch_size} images, seeds {config.seed} to "
        f"{config.seed + section.num_seeds - 1}",
        "target": f"{config.loss.kind}, {config.loss.target}, {config.loss.blocks} block, cls weight "
        f"{config.loss.cls_weight:g}; rank {config.lora.rank}; blocks {config.student.blocks}",
        "learning rates": f"of {tuple(section.learning_rates)} by the loss on {len(bench.held_out)} held-out images, "
        f"{section.tune_steps or train.num_steps} updates each",
    }
    if not bench.probe_sets:
        return facts | {"probe": "none: the images have no labels"}
    read = "patch tokens" if section.probe.kind == SEGMENT else "pooled feature"
    about = f"{section.probe.kind} on the {read} after the final norm, {bench.probe_sets[0].name}"
    return facts | {"probe": f"{about}, {probe_sizes} images"}


def write_tables(bench: Bench, cells: Sequence[Mapping[str, Any]], workdir: Path) -> list[dict[str, Any]]:
    """Writes table.md and table.json of the cells there are; returns the rows of `summarise`."""
    rows = summarise(cells)
    text = markdown(f"Students of {bench.teacher.name}", shared_facts(bench), rows, bench.metric)
    write_text(workdir / "table.md", text)
    content = {"metric": bench.metric, "facts": shared_facts(bench), "rows": rows, "verdicts": verdicts(rows)}
    write_json(workdir / "table.json", content | {"cells": list(cells), "provenance": environment()})
    return rows


def write_report(bench: Bench, cells: Sequence[Mapping[str, Any]], workdir: Path) -> list[dict[str, Any]]:
    """As `write_tables`, with table.png and report.html; prints the table."""
    rows = write_tables(bench, cells, workdir)
    judged = verdicts(rows)
    save_png(workdir / "table.png", cost_figure(rows, bench.metric))
    write_page(
        workdir / "report.html",
        ReportData(
            title=f"Ablation: students of {bench.teacher.name}",
            table=rows,
            metric=bench.metric,
            verdicts=judged,
            verdict_note=verdict_note(rows, judged) if judged else "",
            shared=shared_facts(bench),
            load_report=bench.teacher.report.lines(),
            provenance=environment(),
            config=bench.config.to_dict(),
        ),
    )
    print((workdir / "table.md").read_text(encoding="utf-8"))
    print(f"table: {workdir / 'table.md'}, table.json, table.png; report: {workdir / 'report.html'}")
    return rows
