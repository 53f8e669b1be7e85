"""The config of a work directory: written once, read and compared ever after."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.files import write_json

# Fields that came later, by system, and the value that says what was done before there was a choice.
LATER_FIELDS = {
    "mtl_moe": {
        "data.window": (),
        "data.groups": "auto",
        "data.tile_size": 0,
        "optim.kind": "adamw",
        "compress.kind": "adamw",
        "train.sampling": "images",
        "score.save_maps": False,
        "score.painted": 64,
    },
    "vit_distill": {
        "data.groups": "auto",
        "optim.kind": "adamw",
        "optim.learning_rates": (),
        "optim.tune_steps": 0,
        "teacher.overrides.position_resize": None,
        "table.probe_data.groups": "",
        "table.probe.neighbours": (1, 5, 10, 20, 50),
        "table.probe.learning_rates": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        "table.probe.linear_batch_size": 512,
        "table.probe.epochs": 90,
        "table.probe.warmup_epochs": 10,
        "table.probe.segment": {
            "num_steps": 1000,
            "warmup_steps": 50,
            "batch_size": 16,
            "weight_decay": 0.01,
            "learning_rates": (3e-4, 1e-3, 3e-3, 1e-2),
        },
    },
}

# Free fields of most commands (`check_config`): folders move, damaged files are left out by name, logs change nothing.
READING = ("data.root", "data.memory_limit_gb", "data.skip_corrupt")
LOGGING = ("train.log_every", "train.save_every", "train.tensorboard")


def plain(config: Any) -> dict[str, Any]:
    """A ConfigDict as JSON has it: lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


def save_config(config: Any, workdir: Path) -> None:
    """Writes `workdir/config.json`, making the folder; of several hosts the first one does."""
    import jax  # here, so that configs need not wait for it

    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "config.json", plain(config))


def read_config(workdir: Path) -> dict[str, Any]:
    """`workdir/config.json` with tuples for lists, and the fields that came later in sections it has."""
    config = _tuples(json.loads((workdir / "config.json").read_text()))
    for name, value in LATER_FIELDS.get(config.get("system"), {}).items():
        *path, field = name.split(".")
        section = config
        for part in path:
            section = section.get(part) if section is not None else None
        if section is not None:
            section.setdefault(field, value)
    return config


def _tuples(value: Any) -> Any:
    """JSON has lists only; configs use tuples (a list field cannot be overridden on the command line)."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def check_config(config: Any, workdir: Path, free_fields: Sequence[str]) -> None:
    """Compares with `workdir/config.json` if there is one.

    Args:
      free_fields: starts of the names of fields that may differ. train.num_steps must be among them to grow; it never
        shrinks, since what is trained cannot be taken back.

    Raises:
      ValueError: naming the fields that differ, if the work directory was made with another config.
    """
    if not (workdir / "config.json").exists():
        return
    old, new = _flat(read_config(workdir)), _flat(plain(config))
    later = tuple(f"{name}." for name in LATER_FIELDS.get(config.get("system"), ()))
    # Less what a config was made without; a section's fields are flat too.
    old = {name: value for name, value in old.items() if name in new or not f"{name}.".startswith(later)}
    names = sorted({name for name, _ in old.items() ^ new.items() if not name.startswith(tuple(free_fields))})
    steps = "train.num_steps"
    if steps in old and steps in new and int(new[steps]) < int(old[steps]):
        names.append(steps)
    if names:
        lines = [f"  {name}: there {old.get(name)}, now {new.get(name)}" for name in names]
        raise ValueError(
            f"{workdir} was made with another config; use another --workdir, or the same fields:\n" + "\n".join(lines)
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value)
    return flat
