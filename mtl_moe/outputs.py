"""Files written for other programs: predictions.csv and JSON, each beside and then renamed."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def write_json(path: Path, content: Any) -> None:
    """Strict JSON: infinite and undefined numbers become null."""
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(_strict(content), indent=2, allow_nan=False) + "\n")
    temporary.replace(path)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
