"""Proxy tasks, one file each. A new one is a file here and a line in TASKS (see docs/extending.md)."""

import dataclasses
import logging
from typing import Any

from mtl_moe.tasks.base import SCORED_RATIO, Geometry, Head, Task, Teacher
from mtl_moe.tasks.cluster import Cluster
from mtl_moe.tasks.denoise import Denoise
from mtl_moe.tasks.intensity import Intensity
from mtl_moe.tasks.jigsaw import Jigsaw
from mtl_moe.tasks.masked import Masked
from mtl_moe.tasks.self_distill import SelfDistill
from mtl_moe.tasks.synthetic import Synthetic
from mtl_moe.tasks.transform import Transform

TASKS = {
    "masked": Masked,
    "denoise": Denoise,
    "synthetic": Synthetic,
    "jigsaw": Jigsaw,
    "transform": Transform,
    "intensity": Intensity,
    "cluster": Cluster,
    "self_distill": SelfDistill,
}

__all__ = ["TASKS", "Geometry", "Head", "Task", "Teacher", "build_tasks"]


def build_tasks(config: Any, geometry: Geometry) -> tuple[Task, ...]:
    """Tasks named in `config.names`, in that order, each with its options `config.<name>`.

    Raises:
      ValueError: for an unknown or repeated name, or none, a task without weight and augment, or an option it does not
        have.
    """
    names = tuple(config.names)
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(f"tasks.names: expected some of {list(TASKS)}, each once; found {list(names)}")
    built = []
    for name in names:
        section = config.get(name, {})
        if not {"weight", "augment"} <= set(section):  # read by the training loss, not by the task
            raise ValueError(
                f"tasks.{name}: expected weight and augment, found {sorted(section)}: give the task its defaults in "
                f'configs/common.py, {name}=dict(weight=1.0, augment="light")'
            )
        options = {key: value for key, value in section.items() if key not in ("weight", "augment")}
        known = {field.name for field in dataclasses.fields(TASKS[name])} - {"geometry"}
        if set(options) - known:
            raise ValueError(f"tasks.{name}: unknown options {sorted(set(options) - known)}, known: {sorted(known)}")
        built.append(TASKS[name](geometry=geometry, **options))
        if (ratio := getattr(built[-1], "ratio", SCORED_RATIO)) != SCORED_RATIO:
            logging.warning(
                "tasks.%s.ratio=%g: images are always scored with %g of their patches hidden, a share that the network "
                "is then not trained on",
                *(name, ratio, SCORED_RATIO),
            )
    return tuple(built)
