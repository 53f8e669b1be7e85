"""What a result came from: versions, devices, seed, git revision, data manifest, time."""

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from core.tree import num_params
from input_pipeline.dataset import Dataset
from mtl_moe.system import System

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "ml-collections")


def provenance(system: System, dataset: Dataset, step: int, seconds: float) -> dict[str, Any]:
    """Plain JSON. `seconds` is the wall time of the evaluation; `step` the checkpoint's."""
    params = jax.eval_shape(system.init_params, jax.random.key(0))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "seed": int(system.config.seed),
        "checkpoint_step": step,
        "num_params": num_params(params),
        "dataset": dataset.name,
        "manifest_hash": dataset.manifest_hash,
        "counts": {name: len(split) for name, split in dataset.splits.items()},
        "devices": [f"{device.platform}:{device.device_kind}" for device in jax.devices()],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "evaluation_seconds": round(seconds, 1),
    }


def git_revision() -> str:
    """Revision of this code with "-dirty" if files differ from it; "unknown" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"
