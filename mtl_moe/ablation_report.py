"""What the ablation's page and figure show; everything was computed before."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from core import report as page
from core.table import markdown_table
from mtl_moe.ablation_cell import FUSED

HEADER = (
    "Row",
    "What it is",
    "Image AUROC",
    "Difference to the base (95 %)",
    "Painted, unseen",
    "Painted, trained",
    "Rank: painted / test",
    "Against calibration normals: normal / abnormal",
    "Pixel AUROC",
    "PRO",
    "Parameters",
    "GFLOPs",
    "Updates",
    "Images/s",
    "n",
)
NOTE = (
    "Mean ± standard deviation over n seeds. Difference: of the image AUROC to the base with the same seeds, with the "
    "95 % interval of the paired bootstrap over test images by patient or group; it does not hold the spread of seeds. "
    "Painted: AUROC of the fused score between calibration normals and the same with one painted defect, mean over "
    "families; no abnormal image is in it. Against calibration normals: AUROC of the test split's normal images (0.5: "
    "they are alike) and of its abnormal ones. GFLOPs: matrix products of all views of one image, two for each "
    "multiply-add. Images/s: scoring, compiled, on the machine below."
)


def figure(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Left: each row's difference to the base with its interval. Right: the test split against the painted criterion.

    Rows as `ablation_summary.summarise` gives them.
    """
    found = [entry for entry in table if entry["n"]]
    fig, (left, right) = page.new_axes(12.0, 2.2 + 0.22 * len(found), columns=2)
    colors = [page.COLORS[0] if entry["trained"] else page.COLORS[4] for entry in found]
    for height, (entry, color) in enumerate(zip(found, colors, strict=True)):
        if entry["interval"]:
            left.plot(entry["interval"], [height, height], color=color, linewidth=1.4)
            left.plot([entry["difference"]], [height], color=color, marker="o", markersize=4)
    left.axvline(0.0, color=page.INK, linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(found)), [entry["row"] for entry in found], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("difference to the base in image AUROC, 95 % paired interval", fontsize=9)
    left.grid(axis="x", color=page.GRID, linewidth=0.8)
    for entry, color in zip(found, colors, strict=True):
        point = (entry["painted_unseen"], entry["image_auroc"])
        right.plot(*point, color=color, marker="o", markersize=4, linestyle="")
        right.annotate(entry["row"], point, xytext=(3, 3), textcoords="offset points", fontsize=6, color=page.SOFT)
    right.set_xlabel("AUROC on painted normals, unseen families", fontsize=9)
    right.set_ylabel("image AUROC on the test split", fontsize=9)
    right.grid(color=page.GRID, linewidth=0.8)
    return fig


def choice_in_words(choice: Mapping[str, Any]) -> str:
    """`ablation_summary.choose`'s answer as a sentence or two."""
    text = f"On normal images alone (painted defects of families that nothing trains on) row {choice['chosen']} is best"
    if choice["same"]:
        text += ", and so it is on the test split: the choice would have been the same without abnormal images."
    else:
        text += f"; on the test split {choice['best_on_test']} is"
        if choice["interval"] is None:
            text += "."
        else:
            low, high = choice["interval"]
            text += f". The chosen row's image AUROC differs from it by {choice['difference']:+.3f} ({low:+.3f} to "
            text += f"{high:+.3f}): " + ("not told apart." if low <= 0 <= high else "a worse choice.")
    if choice["spearman"] is not None:
        text += f" Rank correlation of the two over {choice['num_rows']} rows (Spearman): {choice['spearman']:+.2f}"
        text += f", p = {choice['p_value']:.2g}."
    return text


def table_cells(table: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of `summarise` as text, for HEADER."""
    lines = []
    for entry in table:
        low_high = "" if not entry["interval"] else " ({:+.3f} to {:+.3f})".format(*entry["interval"])
        difference = "" if entry["difference"] is None else f"{entry['difference']:+.3f}{low_high}"
        against = [entry[key] for key in ("normal_vs_calibration", "abnormal_vs_calibration") if entry[key] is not None]
        ranks = "" if entry["rank_test"] is None else f"{entry['rank_painted']} / {entry['rank_test']}"
        lines.append(
            [
                entry["row"],
                entry["title"] + ("" if entry["trained"] else " (no training)"),
                _spread(entry, "image_auroc") or "does not train",
                difference,
                _spread(entry, "painted_unseen"),
                _spread(entry, "painted_trained"),
                ranks,
                " / ".join(f"{value:.3f}" for value in against),
                _spread(entry, "pixel_auroc"),
                _spread(entry, "aupro"),
                f"{entry['num_params'] / 1e6:.2f} M",
                f"{entry['gflops']:.3g}",
                str(entry["num_steps"]),
                "" if entry["score_images_per_second"] is None else f"{entry['score_images_per_second']:.0f}",
                str(entry["n"]),
            ]
        )
    return lines


def _spread(entry: Mapping[str, Any], key: str) -> str:
    if entry[key] is None:
        return ""
    deviation = entry[f"{key}_std"]
    return f"{entry[key]:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def markdown(
    title: str, facts: Mapping[str, str], table: Sequence[Mapping[str, Any]], choice: Mapping[str, Any] | None
) -> str:
    """The table, what is the same in all its rows, and the choice, as Markdown."""
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += [*markdown_table(HEADER, table_cells(table)), "", NOTE, ""]
    lines += ["## The choice without abnormal images", "", choice_in_words(choice), ""] if choice else []
    lines += [f"- {entry['row']}: {entry['error']}" for entry in table if entry["error"]]
    return "\n".join(lines)


def write_page(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    table: Sequence[Mapping[str, Any]],
    choice: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    """Writes the page as one self-contained HTML file; an earlier page stays whole when this fails."""
    chosen = [i for i, entry in enumerate(table) if entry["rank_painted"] == 1]
    failed = [i for i, entry in enumerate(table) if not entry["n"]]
    chart = page.chart(
        figure(table),
        "Differences of the rows to the base, and their test AUROC against the criterion on painted normals",
        "Blue: trained; orange: the base's scores read in another way.",
    )
    parts = [
        page.paragraph(choice_in_words(choice), "lead") if choice else Markup(""),
        page.key_values(facts),
        chart,
        page.table(HEADER, table_cells(table), text_columns=(0, 1), strong=chosen, alert=failed),
        page.paragraph(f"{NOTE} Marked: the row that the painted criterion chooses.", "note"),
    ]
    errors = [f"{entry['row']}: {entry['error']}" for entry in table if entry["error"]]
    parts += [page.bullets(errors)] if errors else []
    sections = [
        page.Section("Rows", page.join(parts)),
        page.Section("Evidences", _evidences(table)),
        page.Section("Painted defects", _painted(table)),
        page.Section("Provenance", page.provenance(provenance, config, "Configuration of the base")),
    ]
    page.write_page(path, title=title, subtitle=facts["data"], sections=sections)


def _evidences(table: Sequence[Mapping[str, Any]]) -> Markup:
    trained = [entry for entry in table if entry["trained"] and entry["n"]]
    names = list(dict.fromkeys(name for entry in trained for name in entry["evidences"]))
    rows = [[entry["row"], *(_number(entry["evidences"].get(name)) for name in names)] for entry in trained]
    caption = "Image AUROC on the test split of each evidence by itself, mean over seeds; empty where the row has none."
    return page.table(["Row", *names], rows, caption)


def _painted(table: Sequence[Mapping[str, Any]]) -> Markup:
    found = [entry for entry in table if entry["n"]]
    families = list(found[0]["painted"][FUSED]) if found else []
    rows = [[entry["row"], *(_number(entry["painted"][FUSED][name]) for name in families)] for entry in found]
    parts = [page.table(["Row", *families], rows, "Fused scores: AUROC by painted family, mean over seeds.")]
    for entry in found[:1]:
        by_evidence = [[name, *map(_number, values.values())] for name, values in entry["painted"].items()]
        caption = "The base: AUROC by evidence and painted family. The first families are those of the task synthetic."
        parts.append(page.table(["Evidence", *families], by_evidence, caption))
    return page.join(parts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
