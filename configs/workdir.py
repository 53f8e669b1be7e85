"""The config a work directory was trained with: --config=configs/workdir.py:WORKDIR (main.py fills it in by itself)."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from configs import common
from configs.vit_distill import table
from core.workdir import LATER_FIELDS


def get_config(arg):
    """`arg`: the work directory."""
    path = Path(arg) / "config.json"
    if not path.exists():
        raise ValueError(f"no config.json in {arg}: expected the work directory of an earlier training run")
    config = ConfigDict(_tuples(json.loads(path.read_text())))
    if config.get("system") == "mtl_moe":
        defaults = common.detector()
    else:
        defaults = table.get_config() if config.get("command") == "table" else common.distiller()
    for section in ("compress", "slices"):  # what can be done with a detector since
        if section in defaults and section not in config:
            config[section] = defaults[section]
    for name, value in LATER_FIELDS.items():
        section, _, field = name.rpartition(".")
        own, known = (_section(found, section) for found in (config, defaults))
        if own is not None and field in (known or ()) and field not in own:
            own[field] = _tuples(value)
    return config


def _section(config, name):
    """The section of a dotted name, None where there is none."""
    for part in name.split("."):
        config = config.get(part) if config is not None else None
    return config


def _tuples(value):
    """JSON has lists only; configs use tuples (a list field cannot be overridden on the command line)."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
