"""What is written for each scored image: predictions.csv, beside and renamed, and its anomaly map."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from core.files import replacing
from input_pipeline.dataset import Split
from mtl_moe.report_figures import overlay


def write_predictions(
    path: Path,
    split: Split,
    scores: np.ndarray,
    p_values: np.ndarray,
    evidence: Mapping[str, np.ndarray],
    skipped: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """CSV with columns name, label, score, p_value, one calibrated score an evidence, and error where any image has
    one; label is empty if unknown. The images of `skipped`, name -> why it could not be read, follow with that alone.
    """
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        error = ["error"] if skipped else []
        writer.writerow(["name", "label", "score", "p_value", *evidence, *error])
        for i, name in enumerate(split.names):
            label = int(split.labels[i])
            values = [scores[i], p_values[i], *(column[i] for column in evidence.values())]
            numbers = [f"{value:.6g}" for value in values]
            writer.writerow([name, label if label >= 0 else "", *numbers, *[""] * len(error)])
        writer.writerows([name, *[""] * (3 + len(evidence)), reason] for name, reason in skipped.items())


def write_maps(folder: Path, names: Sequence[str], images: np.ndarray, maps: np.ndarray) -> None:
    """For each image `folder`/NAME.png, the map laid over the image as in the report, and NAME.npy, float32 [M, M].

    Args:
      names: of N images.
      images: uint8 [N, H, W, C].
      maps: [N, M, M] in calibrated units: 0 the normals' median, 1 their 95th percentile.
    """
    for name, image, values in zip(names, images, maps, strict=True):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(overlay(image, values, None)[1]).save(path)
        np.save(path.with_suffix(".npy"), values)
