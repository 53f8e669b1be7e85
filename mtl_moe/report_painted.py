"""The section of the detector's report on painted defects: what is noticed where no abnormal image is known."""

from markupsafe import Markup

from core import report as page
from mtl_moe import report_figures as figures
from mtl_moe.painted import TRAINED, criteria
from mtl_moe.painted_check import PaintedCheck


def painted_section(painted: PaintedCheck) -> Markup:
    """What each family's AUROC is, highest first, with an example and its map."""
    means = criteria(painted.aurocs)
    text = (
        f"{painted.num_normals} calibration normals, each with one painted defect, against the same as they are, each "
        "scored by a fit without it. No defect is a disease: this tells whether the detector works at all, and which "
        f"kind of change it notices. Mean AUROC over the families that nothing trained on: {means['unseen']:.3f}; over "
        f"those that the task “synthetic” paints too: {means['trained']:.3f}; at 0.5 a change goes unnoticed. It may "
        "serve to compare settings on one folder of normals, not to promise accuracy on patients."
    )
    pictures = []
    for family, auroc in sorted(painted.aurocs.items(), key=lambda entry: -entry[1]):
        image, blended = figures.overlay(*painted.examples[family], None)
        note = f"{family}{' (of “synthetic”)' if family in TRAINED else ''}: {auroc:.3f}"
        both = [page.picture(image, f"painted: {family}", note), page.picture(blended, f"map over {family}", "its map")]
        pictures.append(page.block([page.block(both, "row")], "card"))
    return page.join([page.paragraph(text), page.block(pictures, "row")])
