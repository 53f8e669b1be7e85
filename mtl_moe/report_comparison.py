"""The report's tables of what the fused score is compared with on the same test images: single evidences, floors."""

from markupsafe import Markup

from core import report as page
from mtl_moe.calibration import TEXTURE
from mtl_moe.report_data import ReportData
from mtl_moe.results import MAX_EVIDENCE_MAPS


def tasks_section(results: ReportData) -> Markup:
    """Each evidence alone, and the fused score without its task."""
    alone = results.grouped("task", "image_auroc")
    fused = results.metrics[results.prefix + "image_auroc"]
    best = max((name for name in alone if name != TEXTURE), key=alone.__getitem__, default=TEXTURE)
    rows = [["fused", results.value("image_auroc"), results.value("pixel_auroc"), results.value("aupro"), "", ""]]
    for name in alone:
        without = f"leave_out/{name}/image_auroc"
        key = results.prefix + without
        change = f"{results.metrics[key] - fused:+.3f}" if key in results.metrics else ""
        rows.append(
            [
                name,
                *(results.value(f"task/{name}/{m}") for m in ("image_auroc", "pixel_auroc", "aupro")),
                results.value(without),
                change,
            ]
        )
    header = ["Evidence", "Image AUROC", "Pixel AUROC", "AUPRO", "Fused without it", "Change"]
    rows, header = drop_empty_columns(rows, header)
    note = (
        f"Best single evidence of a task: {best}, {alone[best]:.3f}; found out on the test images, so not a choice one "
        "could have made. Change: a negative number says that the fused score is worse without it. The evidence "
        "texture is no task: it is how far the logarithm of the image's mean gradient is from the normals' median. "
        "Contrast, by which pairs are matched, is the same logarithm."
    )
    if results.grouped("task", "pixel_auroc"):
        note += f" Maps of single evidences: of at most {MAX_EVIDENCE_MAPS} images, evenly spaced."
    return page.join(
        [
            page.table(header, rows, "Each evidence alone, with 95 % intervals", strong=(0,)),
            page.paragraph(note, "note"),
        ]
    )


def floors_section(results: ReportData) -> Markup:
    """What simple statistics and the untrained network reach."""
    floors = results.grouped("floor", "image_auroc")
    fused = results.metrics[results.prefix + "image_auroc"]
    strongest = max(floors, key=floors.__getitem__)
    entries = [(fused, "the detector", "all tasks fused", "")]
    entries += [(value, name, results.floors.get(name, ""), f"floor/{name}/") for name, value in floors.items()]
    entries.sort(key=lambda entry: -entry[0])
    rows = [
        [
            name,
            what,
            *(results.value(start + m) for m in ("image_auroc", "pixel_auroc", "matched_auroc")),
            f"{value - fused:+.3f}" if start else "",
        ]
        for value, name, what, start in entries
    ]
    names = [entry[1] for entry in entries]
    header = ["", "What it is", "Image AUROC", "Pixel AUROC", "AUROC, like contrast", "Against the detector"]
    rows, header = drop_empty_columns(rows, header)
    return page.table(
        header,
        rows,
        "What simple means reach on the same test images; the strongest is marked",
        text_columns=(0, 1) if header[1] == "What it is" else (0,),
        strong=(names.index("the detector"),),
        alert=(names.index(strongest),),
    )


def drop_empty_columns(rows: list[list[str]], header: list[str]) -> tuple[list[list[str]], list[str]]:
    """Rows and header without the columns in which no row has anything."""
    keep = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [[row[i] for i in keep] for row in rows], [header[i] for i in keep]
