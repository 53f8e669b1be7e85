"""predictions.csv, written beside and renamed."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from input_pipeline.dataset import Split


def write_predictions(
    path: Path, split: Split, scores: np.ndarray, p_values: np.ndarray, evidence: Mapping[str, np.ndarray]
) -> None:
    """CSV with columns name, label, score, p_value and one calibrated score an evidence; label is empty if unknown."""
    temporary = path.with_suffix(".csv.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "label", "score", "p_value", *evidence])
        for i, name in enumerate(split.names):
            label = int(split.labels[i])
            values = [scores[i], p_values[i], *(column[i] for column in evidence.values())]
            writer.writerow([name, label if label >= 0 else "", *(f"{value:.6g}" for value in values)])
    temporary.replace(path)
