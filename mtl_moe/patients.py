"""Scores of patients from those of their images, where some bring several: slices of a volume, views, visits.

Axes: N images, G patients, n calibration normals.
"""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.files import replacing
from core.metrics import p_values
from mtl_moe.calibration import Calibration

TOP_SHARE = 0.1  # of a patient's images: a lesion lies in some slices of a volume, one odd slice is chance


@dataclasses.dataclass(frozen=True)
class Patients:
    """The patients (or groups) of a set of images, in the order of their first ones.

    Attributes:
      names: [G].
      counts: [G], images of each.
      labels: [G], 1 if an image of the patient is abnormal, 0 if all are normal, else -1.
      scores: [G], mean of the highest TOP_SHARE of the patient's image scores, of one at least; higher is odder.
      p_values: [G], share of the calibration patients at least as odd by the same score; None where the calibration
        does not know its patients (an earlier version's), or these bring much fewer or more images (`comparable`).
      oddest: [G], row of the image with the highest score.
      calibration_counts: images of each calibration patient.
    """

    names: tuple[str, ...]
    counts: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    p_values: np.ndarray | None
    oddest: np.ndarray
    calibration_counts: np.ndarray


def patients_of(
    groups: Sequence[str], labels: np.ndarray, fused: np.ndarray, calibration: Calibration
) -> Patients | None:
    """What the image scores say of patients; None where each has one image alone.

    Args:
      groups, labels, fused: [N], patient, label (1 abnormal, 0 normal, -1 unknown) and score of each image.
    """
    rows = _rows(groups)
    if len(rows) == len(groups):
        return None
    scores = _scores(fused, rows.values())
    own = _rows(calibration.groups.tolist()).values()
    normals = _scores(calibration.fused, own)
    counts, own_counts = (np.array([len(of_patient) for of_patient in found]) for found in (rows.values(), own))
    return Patients(
        names=tuple(rows),
        counts=counts,
        labels=np.array([_label(labels[of_patient]) for of_patient in rows.values()]),
        scores=scores,
        p_values=p_values(scores, normals) if len(normals) and comparable(counts, own_counts) else None,
        oddest=np.array([of_patient[fused[of_patient].argmax()] for of_patient in rows.values()]),
        calibration_counts=own_counts,
    )


def comparable(counts: np.ndarray, calibration_counts: np.ndarray) -> bool:
    """Whether the scores of patients who bring so many images are alike by chance, but for a factor below 2 in p.

    Up to 1 / TOP_SHARE images the score is their maximum, which grows with their number: 5 % of normal patients of ten
    images would be 15 to 42 % against calibration patients of one. Beyond that it is a mean of the same share.
    """
    few, many = sorted(min(np.median(found), 1 / TOP_SHARE) for found in (counts, calibration_counts))
    return bool(many < 2 * few)


def _rows(groups: Sequence) -> dict:
    """Patient -> rows of its images."""
    found: dict = {}
    for row, group in enumerate(groups):
        found.setdefault(group, []).append(row)
    return {group: np.array(rows) for group, rows in found.items()}


def _scores(fused: np.ndarray, rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([np.sort(fused[r])[-int(np.ceil(TOP_SHARE * len(r))) :].mean() for r in rows])


def _label(labels: np.ndarray) -> int:
    return 1 if (labels == 1).any() else 0 if (labels == 0).all() else -1


def write_patients(path: Path, patients: Patients | None, names: Sequence[str]) -> None:
    """CSV with columns patient, label, images, score, p_value and oddest_image, a row each; beside and renamed.

    Args:
      patients: None: the file goes where a report.json beside it says that it is of earlier images; these have none.
      names: of the images, which `patients.oddest` points to.
    """
    if patients is None:
        if (path.parent / "report.json").exists():
            path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "label", "images", "score", "p_value", "oddest_image"])
        for i, name in enumerate(patients.names):
            label = int(patients.labels[i])
            p = "" if patients.p_values is None else f"{patients.p_values[i]:.6g}"
            row = [name, label if label >= 0 else "", int(patients.counts[i]), f"{patients.scores[i]:.6g}", p]
            writer.writerow([*row, names[patients.oddest[i]]])
