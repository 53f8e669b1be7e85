"""The config a work directory was trained with: --config=configs/workdir.py:WORKDIR (main.py fills it in by itself)."""

from pathlib import Path

from ml_collections import ConfigDict

from configs import common
from core.workdir import read_config


def get_config(arg):
    """`arg`: the work directory."""
    if not (Path(arg) / "config.json").exists():
        raise ValueError(f"no config.json in {arg}: expected the work directory of an earlier training run")
    config = ConfigDict(read_config(Path(arg)))
    if config.get("system") == "mtl_moe":
        defaults = common.detector()
        for section in ("compress", "slices"):  # what can be done with a detector since
            if section not in config:
                config[section] = defaults[section]
    return config
