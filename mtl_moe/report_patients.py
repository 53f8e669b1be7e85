"""The report's section on patients who bring several images."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from core import report as page
from mtl_moe.patients import TOP_SHARE, Patients
from mtl_moe.report_comparison import drop_empty_columns

SHOWN = 20


def patients_section(patients: Patients, names: Sequence[str], auroc: str) -> Markup:
    """The oddest patients as a table.

    Args:
      names: of the images.
      auroc: the AUROC of patients with its interval as text, "" where there is none.
    """
    order = np.argsort(-patients.scores, kind="stable")[:SHOWN]
    labels = {1: "abnormal", 0: "normal"}
    rows = [
        [
            patients.names[i],
            labels.get(int(patients.labels[i]), ""),
            str(patients.counts[i]),
            f"{patients.scores[i]:.3f}",
            "" if patients.p_values is None else f"{patients.p_values[i]:.4f}",
            names[patients.oddest[i]],
        ]
        for i in order
    ]
    header = ["Patient or group", "Known as", "Images", "Score", "p-value", "Its oddest image"]
    rows, header = drop_empty_columns(rows, header)
    text = (
        f"A patient's score is the mean of the highest {100 * TOP_SHARE:g} % of the scores of its images, of one at "
        "least. "
    )
    spans = f"these {_span(patients.counts)}, the calibration patients "
    if not len(patients.calibration_counts):
        text += "This calibration does not know its patients, as it was made by an earlier version: --mode=evaluate "
        text += "with the training data writes it anew, and then patients have p-values."
    elif patients.p_values is None:
        text += (
            "There are no p-values of patients, as the highest of many scores is higher than that of few, and the "
            f"calibration patients do not bring about as many images: {spans}{_span(patients.calibration_counts)}. "
            "--mode=predict --normals=DIR calibrates on normal patients, whole ones."
        )
    else:
        text += (
            f"Its p-value is the share of the {len(patients.calibration_counts)} calibration patients at least as odd. "
            "That compares like with like where both bring about as many images: "
            f"{spans}{_span(patients.calibration_counts)}."
        )
    parts = [page.paragraph(text)]
    if auroc:
        parts.append(page.paragraph(f"AUROC of patients, abnormal if one of their images is: {auroc}."))
    caption = f"The {len(rows)} highest of {len(patients.names)}; all of them are in patients.csv."
    columns = tuple(i for i, name in enumerate(header) if name in ("Patient or group", "Known as", "Its oddest image"))
    return page.join([*parts, page.table(header, rows, caption, text_columns=columns)])


def _span(counts: np.ndarray) -> str:
    return f"{counts.min()} to {counts.max()} (median {np.median(counts):g})"
