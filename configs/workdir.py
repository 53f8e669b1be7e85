"""The config a work directory was trained with: --config=configs/workdir.py:WORKDIR (main.py fills it in by itself)."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from configs import common


def get_config(arg):
    """`arg`: the work directory."""
    path = Path(arg) / "config.json"
    if not path.exists():
        raise ValueError(f"no config.json in {arg}: expected the work directory of an earlier training run")
    config = ConfigDict(_tuples(json.loads(path.read_text())))
    if config.get("system") == "mtl_moe" and "compress" not in config:  # trained before detectors could be compressed
        config.compress = common.detector().compress
    if config.get("system") == "mtl_moe":
        if "window" not in config.data:  # written before DICOM files and volumes were read
            config.data.window, config.slices = (), common.detector().slices
        for section in (config.optim, config.compress):
            if "kind" not in section:  # written before there was a choice of optimizers
                section.kind = "adamw"
    return config


def _tuples(value):
    """JSON has lists only; configs use tuples (a list field cannot be overridden on the command line)."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
