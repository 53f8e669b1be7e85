"""The section of the detector's report on its calibration: whether p-values hold for the test images."""

import numpy as np
from markupsafe import Markup

from core import report as page
from mtl_moe import report_figures as figures
from mtl_moe.report_data import ReportData


def calibration_section(results: ReportData) -> Markup:
    """How many test normals are flagged where 5 % are by design, and how both kinds stand to the calibration's."""
    p_values = results.p_values[results.labels == 0]
    # Images of one patient are flagged together: what chance explains follows from the numbers of patients.
    num_test = len({group for group, label in zip(results.groups, results.labels, strict=True) if label == 0})
    num_calibration = results.num_calibration_groups
    rate = 0.05
    flagged = float(np.mean(p_values <= rate))
    error = float(figures.flag_rate_error(rate, num_test, num_calibration))
    text = (
        f"At a false-positive rate of 5 % by design, {100 * flagged:.1f} % of the {len(p_values)} test normals "
        f"({num_test} patients or groups; {num_calibration} calibrate) are flagged"
    )
    if flagged < rate - 2 * error:
        text += (
            ". That is fewer than chance explains: these test normals are easier than the calibration normals (are "
            "they like training images?), and the thresholds are stricter than stated."
        )
        verdict = page.paragraph(text, "callout warn")
    elif flagged > rate + 2 * error:
        text += (
            ". That is more than chance explains: test and calibration normals differ (another device, other patients, "
            "duplicates), and p-values and thresholds do not hold as stated. With normals of the same origin as the "
            "test images, --mode=predict --normals=DIR calibrates anew."
        )
        verdict = page.paragraph(text, "callout warn")
    else:
        verdict = page.paragraph(f"{text}, within what chance explains (± {200 * error:.1f} points).", "callout")
    figure = page.chart(
        figures.calibration_figure(p_values, num_test, num_calibration),
        "Flagged test normals against the rate asked for",
        "On the diagonal, p-values mean what they say. Above it, more normals are flagged than asked for.",
    )
    return page.join([verdict, _against_calibration(results), figure])


def _against_calibration(results: ReportData) -> Markup:
    normal, abnormal = (results.value(name) for name in ("normal_vs_calibration", "abnormal_vs_calibration"))
    if not normal:
        return Markup()
    return page.paragraph(
        f"Against the calibration normals the normal test images have an AUROC of {normal} (0.5: they are alike), the "
        f"abnormal ones of {abnormal}. Whatever sets test images apart from the others is in both numbers.",
        "note",
    )
