"""What a detector's result came from: versions, devices, seed, git revision, data manifest, time."""

from typing import Any

import jax

from core.provenance import environment
from core.tree import num_params
from input_pipeline.dataset import Dataset
from mtl_moe.system import System


def provenance(system: System, dataset: Dataset, step: int, seconds: float) -> dict[str, Any]:
    """Plain JSON. `seconds` is the wall time of the evaluation; `step` the checkpoint's."""
    params = jax.eval_shape(system.init_params, jax.random.key(0))
    return environment() | {
        "seed": int(system.config.seed),
        "checkpoint_step": step,
        "num_params": num_params(params),
        "dataset": dataset.name,
        "manifest_hash": dataset.manifest_hash,
        "counts": {name: len(split) for name, split in dataset.splits.items()},
        "evaluation_seconds": round(seconds, 1),
    }
