"""The rows of the ablation: what differs from the base in each, and which of them a config asks for."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from mtl_moe.calibration import FUSIONS, task_evidences
from mtl_moe.tasks import Task

BASE = "base"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: a training of its own, or another reading of the base's scores.

    Attributes:
      title: for readers.
      fields: config fields that differ from the base; None: measured from the base's cells, with the rest.
      fusion: another fusion, or "".
      leave_out: evidences that are not fused.
      texture: whether scores are corrected for texture.
      parts: rows whose detectors are fused into one, measured from their cells instead of the base's.
    """

    title: str
    fields: Mapping[str, Any] | None = None
    fusion: str = ""
    leave_out: tuple[str, ...] = ()
    texture: bool = True
    parts: tuple[str, ...] = ()

    @property
    def trained(self) -> bool:
        return self.fields is not None


def known_rows(config: Any, tasks: Sequence[Task]) -> dict[str, Row]:
    """Every row that differs from the base `config`, the base first. Rows with fewer tasks get more updates, so that
    the network sees as many task views of images."""
    names, steps, model = tuple(config.tasks.names), config.train.num_steps, config.model
    rows = {
        BASE: Row("base", {}),
        "dense_active": Row("dense, equal active FLOPs", {"model.mlp": "dense_active"}),
        "dense_params": Row("dense, equal parameters", {"model.mlp": "dense_params"}),
        "router_shared": Row("one router, told the task", {"model.router": "shared"}),
        "router_per_task": Row("a router for each task", {"model.router": "per_task"}),
        "router_fixed": Row(
            "one expert for each task", {"model.router": "fixed", "model.top_k": 1, "model.num_experts": len(names)}
        ),
        "no_shared_expert": Row("no shared expert", {"model.shared_expert": False}),
        "shared_expert": Row("a shared expert", {"model.shared_expert": True}),
        "top_1": Row("one expert a token", {"model.top_k": 1}),
        "top_2": Row("two experts a token", {"model.top_k": 2}),
    }
    for count in (1, 2, 4, 8):
        fields = {"model.num_experts": count, "model.top_k": min(model.top_k, count)}
        rows[f"experts_{count}"] = Row(f"{count} expert{'s' * (count > 1)}", fields)
    for task in names if len(names) > 1 else ():
        others = tuple(name for name in names if name != task)
        for row, kept, title in (
            ("only", (task,), f"{task} alone"),
            ("retrained_without", others, f"trained without {task}"),
        ):
            equal = round(steps * len(names) / len(kept))
            rows[f"{row}_{task}"] = Row(f"{title}, equal task views", {"tasks.names": kept, "train.num_steps": equal})
        rows[f"single_{task}"] = Row(f"{task} alone, equal updates", {"tasks.names": (task,)})
    sizes = {f"model.{name}": model[name] for name in ("width", "num_heads", "mlp_dim", "expert_dim")}
    layers = {f"model.{name}": model[name] for name in ("num_dense_layers", "num_moe_layers", "num_neck_layers")}
    rows["width_half"] = Row("half the width", {name: max(size // 2, 1) for name, size in sizes.items()})
    rows["width_double"] = Row("twice the width", {name: 2 * size for name, size in sizes.items()})
    rows["depth_double"] = Row("twice the layers", {name: 2 * count for name, count in layers.items()})
    for side in (64, 96, 128, 224):
        grid = side // model.patch_size
        tiles = max(n for n in range(1, config.tasks.jigsaw.tiles + 1) if grid % n == 0)  # as near as the grid allows
        fields = {"data.image_size": side, "tasks.jigsaw.tiles": tiles}
        rows[f"image_{side}"] = Row(f"images of {side} pixels", fields)
    side = config.data.image_size
    if not config.data.tile_size:
        fields = {"data.image_size": 2 * side, "data.tile_size": side}
        rows["tiles"] = Row(f"images of {2 * side} pixels in tiles of {side}", fields)
    rows["steps_half"] = Row("half the updates", {"train.num_steps": steps // 2})
    rows["steps_double"] = Row("twice the updates", {"train.num_steps": 2 * steps})
    rows["sampling_groups"] = Row("groups drawn equally often", {"train.sampling": "groups"})
    rows["adamw"] = Row("AdamW at rate 2e-3", {"optim.kind": "adamw", "optim.learning_rate": 2e-3})
    rows["muon"] = Row("Muon", {"optim.kind": "muon"})
    for kind in ("none", "light", "strong"):
        name = "augment_none" if kind == "none" else f"augment_{kind}_all"
        rows[name] = Row(f"augmentation {kind} for all tasks", {f"tasks.{task}.augment": kind for task in names})
    same = [name for name, row in rows.items() if name != BASE and _is_base(config, row)]
    return {name: row for name, row in rows.items() if name not in same} | _scored_rows(config, tasks)


def _is_base(config: Any, row: Row) -> bool:
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(dict(row.fields))
    return changed.to_dict() == config.to_dict()


def _scored_rows(config: Any, tasks: Sequence[Task]) -> dict[str, Row]:
    """Rows that need no training."""
    rows = {f"fusion_{name}": Row(f"fusion {name}", fusion=name) for name in FUSIONS if name != config.score.fusion}
    rows["no_texture_fit"] = Row("scores not corrected for texture", texture=False)
    evidences = task_evidences(tasks)
    if len(tasks) > 1:  # as many task views in all as the base: equal compute, a whole network for each task
        singles = tuple(f"single_{task}" for task in config.tasks.names)
        rows["ensemble"] = Row("a detector for each task, fused, equal task views in all", parts=singles)
    for task, names in evidences.items():
        rows[f"without_{task}"] = Row(f"fused without {task}", leave_out=names)
        for name in names if len(names) > 1 else ():
            rows[f"without_evidence_{name}"] = Row(f"fused without the evidence {name}", leave_out=(name,))
    return rows


def build_rows(config: Any, tasks: Sequence[Task]) -> dict[str, Row]:
    """The rows that the names and patterns of config.ablation.rows choose, and the base, in the order of `known_rows`.

    Raises:
      ValueError: for a name that is no row, or an impossible number of seeds.
    """
    known, wanted = known_rows(config, tasks), tuple(config.ablation.rows)
    unknown = [name for name in wanted if not fnmatch.filter(known, name)]
    if unknown or not wanted:
        raise ValueError(
            f"ablation.rows: no row is called {unknown or 'nothing'}; expected some of {', '.join(known)} (patterns "
            "with * are allowed, and a row that equals the base is left out)"
        )
    if config.ablation.num_seeds < 1 or config.num_seeds != 1:
        raise ValueError(
            f"expected ablation.num_seeds of at least 1 and num_seeds=1 (of a single detector), found "
            f"{config.ablation.num_seeds} and {config.num_seeds}"
        )
    chosen = {BASE}.union(*(fnmatch.filter(known, name) for name in wanted))
    chosen |= {part for name in chosen for part in known[name].parts}
    return {name: row for name, row in known.items() if name in chosen}


def cell_config(config: Any, row: Row, seed: int) -> Any:
    """The config of an ordinary detector for one cell; `seed` counts from config.seed."""
    one = config.copy_and_resolve_references()
    with one.unlocked():
        del one.command, one.ablation
    one.update_from_flattened_dict(dict(row.fields))
    one.seed = config.seed + seed
    return one
