"""What a detector's result came from: versions, devices, seed, git revision, data manifest, time."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from core.provenance import environment
from core.tree import num_params
from mtl_moe.system import System

COMPRESS_FILE = "compress.json"


def provenance(system: System, data: Mapping[str, Any], workdir: Path, step: int, seconds: float) -> dict[str, Any]:
    """Plain JSON.

    Args:
      data: what was scored: "source", see `check_source`, and what else is to be told of it.
      step: the checkpoint's, in `workdir`.
      seconds: wall time of the evaluation.
    """
    params = jax.eval_shape(system.init_params, jax.random.key(0))
    made_from = compressed_from(workdir)
    result = environment() | {
        "seed": int(system.config.seed),
        **({"num_seeds": int(system.config.num_seeds)} if system.config.num_seeds > 1 else {}),
        "checkpoint_step": step,
        "num_params": num_params(params) * int(system.config.num_seeds),
        **data,
        "evaluation_seconds": round(seconds, 1),
    }
    return result | ({"compress": made_from} if made_from else {})


def unfinished(system: System, step: int) -> str:
    """A sentence, logged too, where the checkpoint of `step` is not the end of its training; else ""."""
    total = system.config.train.num_steps
    if step >= total:
        return ""
    logging.warning("the training is unfinished: the newest checkpoint is of step %d of %d", step, total)
    return f" Its training is unfinished: step {step} of {total}."


def check_source(folder: Path, source: str, advice: str) -> None:
    """ValueError if the report.json of `folder` is of images from another place, so that no result is overwritten."""
    path = folder / "report.json"
    found = json.loads(path.read_text())["provenance"].get("source", source) if path.exists() else source
    if found != source:
        raise ValueError(f"{folder} holds the results of {found}, not those of {source}: {advice}")


def compressed_from(workdir: Path) -> dict[str, Any]:
    """What `mtl_moe.compress` left about how the detector of `workdir` was made; empty for one that was trained."""
    path = workdir / COMPRESS_FILE
    return json.loads(path.read_text()) if path.exists() else {}
