"""Proxy tasks, one file each. A new one is a file here and a line in TASKS (see docs/extending.md)."""

from typing import Any

from mtl_moe.tasks.base import Geometry, Head, Task, Teacher
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
      ValueError: for an unknown or repeated name, or none.
    """
    names = tuple(config.names)
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(f"tasks.names: expected some of {list(TASKS)}, each once; found {list(names)}")
    options = {name: dict(config.get(name, {})) for name in names}
    weights = ("weight", "augment")  # read by the training loss, not by the task
    return tuple(
        TASKS[name](geometry=geometry, **{k: v for k, v in options[name].items() if k not in weights}) for name in names
    )
