"""What a detector's result came from: versions, devices, seed, git revision, data manifest, time."""

import json
from pathlib import Path
from typing import Any

import jax

from core.provenance import environment
from core.tree import num_params
from input_pipeline.dataset import Dataset
from mtl_moe.system import System

COMPRESS_FILE = "compress.json"


def provenance(system: System, dataset: Dataset, workdir: Path, step: int, seconds: float) -> dict[str, Any]:
    """Plain JSON. `seconds` is the wall time of the evaluation; `step` the checkpoint's, in `workdir`."""
    params = jax.eval_shape(system.init_params, jax.random.key(0))
    made_from = compressed_from(workdir)
    result = environment() | {
        "seed": int(system.config.seed),
        "checkpoint_step": step,
        "num_params": num_params(params),
        "dataset": dataset.name,
        "manifest_hash": dataset.manifest_hash,
        "counts": {name: len(split) for name, split in dataset.splits.items()},
        "evaluation_seconds": round(seconds, 1),
    }
    return result | ({"compress": made_from} if made_from else {})


def compressed_from(workdir: Path) -> dict[str, Any]:
    """What `mtl_moe.compress` left about how the detector of `workdir` was made; empty for one that was trained."""
    path = workdir / COMPRESS_FILE
    return json.loads(path.read_text()) if path.exists() else {}
