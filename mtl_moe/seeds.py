"""Several seeds of one detector: mean and deviation of every metric, and the ensemble of their scores.

Axes: N test images, T seeds.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.bootstrap import bootstrap_interval, possible_resamples
from core.metrics import auroc, average_precision
from input_pipeline.dataset import Split


def summarise(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of each metric over seeds, beside the single values."""
    keys = [key for key in reports[0]["metrics"] if all(key in report["metrics"] for report in reports)]
    values = {key: [float(report["metrics"][key]) for report in reports] for key in keys}
    return {
        "metrics": {key: float(np.mean(v)) for key, v in values.items()},
        "std": {key: float(np.std(v, ddof=1)) for key, v in values.items()},
        "values": values,
        "provenance": [report["provenance"] for report in reports],
    }


def ensemble(name: str, split: Split, folders: Sequence[Path], num_resamples: int) -> dict[str, dict[str, Any]]:
    """Metrics and intervals of the mean of the seeds' fused scores: what all of them together see.

    Fused scores are calibrated, so that they can be averaged. It costs T detectors at inference.

    Args:
      name: of the data set, for the keys test/<name>/ensemble/{image_auroc, image_ap}.
      split: the test images.
      folders: work directories with predictions.csv.

    Returns:
      {"metrics", "intervals"}, both empty without both classes; no intervals without resamples, or where a class is
      of one group.

    Raises:
      ValueError: for a predictions.csv of other images.
    """
    if len(np.unique(split.labels)) < 2:
        return {"metrics": {}, "intervals": {}}
    scores = np.mean([read_scores(folder / "predictions.csv", split.names) for folder in folders], axis=0)
    prefix, groups = f"test/{name}/ensemble/", np.array(split.groups)
    num_resamples = possible_resamples(split.labels, groups, num_resamples)
    metrics = {"image_auroc": auroc, "image_ap": average_precision}
    intervals = {"image_auroc": "auroc", "image_ap": "average_precision"}
    return {
        "metrics": {prefix + key: float(metric(scores, split.labels)) for key, metric in metrics.items()},
        "intervals": {
            prefix + key: bootstrap_interval(metric, scores, split.labels, groups, num_resamples)
            for key, metric in intervals.items()
            if num_resamples
        },
    }


def read_scores(path: Path, names: Sequence[str]) -> np.ndarray:
    """Column "score" of a predictions.csv, float64 [N], whose rows must be of `names`, in their order.

    Raises:
      ValueError: for other rows.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if [row["name"] for row in rows] != list(names):
        raise ValueError(
            f"{path}: expected scores of the {len(names)} test images in their order, found {len(rows)} other rows: "
            f"evaluate it again (--mode=evaluate --workdir={path.parent})"
        )
    return np.array([float(row["score"]) for row in rows])
