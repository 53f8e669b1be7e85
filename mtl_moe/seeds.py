"""Several seeds of one detector: mean and deviation of every metric, and the folder in which all score together.

A run with `num_seeds` above 1 trains each seed in WORKDIR/seed_<n>. WORKDIR/ensemble is a work directory to evaluate
and predict with, whose networks are those of its neighbours: its config.json tells which.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ENSEMBLE = "ensemble"


def seed_folders(config: Any, workdir: Path) -> list[Path]:
    """Where the networks of `workdir` were trained: there, and those of an ensemble's folder in its neighbours."""
    if config.num_seeds == 1:
        return [workdir]
    return [workdir.parent / f"seed_{seed}" for seed in range(config.seed, config.seed + config.num_seeds)]


def seeds_together(config: Any) -> str:
    """What a report's first sentence says of an ensemble; "" for one network."""
    count, first = config.num_seeds, config.seed
    return f" by {count} networks (seeds {first} to {first + count - 1}) that score together" if count > 1 else ""


def check_one_seed(config: Any) -> None:
    """ValueError for an ensemble, where one network is wanted."""
    if config.num_seeds != 1:
        raise ValueError(f"num_seeds={config.num_seeds}: name the folder of one seed, such as --workdir=W/seed_0")


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
