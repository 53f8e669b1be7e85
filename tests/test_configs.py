"""Every config goes through one abstract training update: shapes and dtypes only, no data, no compilation.

Axis alphabet: B batch, H W C image.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import common, workdir
from configs.mtl_moe import ablation, bmad, folder, quickstart
from core.files import write_json
from core.optim import build_optimizer
from core.tree import num_params, spec
from core.workdir import LOGGING, READING, check_config
from mtl_moe import ablation as detectors_ablation
from mtl_moe import ablation_cell, compress, run
from mtl_moe.system import build_system
from mtl_moe.train import make_update_fn

CONFIGS = {
    "brain": lambda: bmad.get_config("brain"),
    "camelyon16,preset=base": lambda: bmad.get_config("camelyon16,preset=base"),
    "name=rsna,preset=tiny": lambda: bmad.get_config("name=rsna,preset=tiny"),
    "folder": folder.get_config,
    "ablation": ablation.get_config,
    "quickstart": quickstart.get_config,
}


def abstract_step(config: ConfigDict) -> tuple[Any, Any, dict[str, jax.ShapeDtypeStruct]]:
    """(state before, state after, metrics) of one update, as shapes."""
    system = build_system(config)
    tx = build_optimizer(config.optim, config.train.num_steps)
    size = config.data.image_size
    image = jax.ShapeDtypeStruct((config.train.batch_size, size, size, config.data.channels), jnp.uint8)
    before = system.abstract_state(tx)
    after, metrics = jax.eval_shape(make_update_fn(system, tx), before, {"image": image}, jax.random.key(0))
    return before, after, metrics


def check_step(config: ConfigDict) -> Any:
    """One update keeps every shape and dtype, with float32 parameters, and reports every task's loss."""
    before, after, metrics = abstract_step(config)
    assert spec(before) == spec(after)
    assert {leaf.dtype for leaf in jax.tree.leaves(before.params)} == {jnp.dtype("float32")}
    assert {f"loss/{name}" for name in config.tasks.names} | {"loss", "grad_norm"} <= set(metrics)
    assert all(value.shape == () for value in metrics.values())
    return before


@pytest.mark.parametrize("name", CONFIGS)
def test_config_takes_a_training_step(name: str):
    check_step(CONFIGS[name]())


def test_every_config_file_is_tested():
    """workdir.py and common.py are no configs; each file of configs/mtl_moe is in CONFIGS."""
    files = {path.stem for path in Path(bmad.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == {"ablation", "bmad", "folder", "quickstart"}


@pytest.mark.parametrize("preset", sorted(common.PRESETS))
def test_presets_differ_between_configs_in_data_and_length_only(preset: str):
    """So the configs traced above stand for every set and preset: the traced function reads these fields alone."""
    traced = {"tiny": "name=rsna,preset=tiny", "small": "brain", "base": "camelyon16,preset=base"}
    reference = CONFIGS[traced[preset]]()
    for name in bmad.SETS:
        config = bmad.get_config(f"{name},preset={preset}")
        assert config.data.kind == "bmad"
        assert config.data.name == name
        assert config.data.channels == (3 if name == "camelyon16" else 1)
        config.data.update(name=reference.data.name, channels=reference.data.channels)
        assert config.to_dict() == reference.to_dict()
    for config in (folder.get_config(f"preset={preset}"), ablation.get_config(f"preset={preset}")):
        if "ablation" in config:  # a quarter as long
            config.train.num_steps *= 4
            config.train.refresh_step *= 4
        for section in ("model", "tasks", "optim", "train"):
            assert config[section] == reference[section]
        assert config.data.image_size == reference.data.image_size


@pytest.mark.parametrize("fields", [{"mlp": "dense_active"}, {"mlp": "dense_params"}, {"router": "per_task"}])
def test_controls_take_a_training_step(fields: dict[str, Any], tiny_config: Any):
    config = tiny_config()
    config.model.update(fields)
    config.tasks.names = ("masked", "transform")
    check_step(config)


def test_one_expert_per_task_takes_a_training_step(tiny_config: Any, caplog: pytest.LogCaptureFixture):
    config = tiny_config()
    config.tasks.names = ("masked", "transform", "intensity")
    config.model.update(router="fixed", top_k=1, num_experts=len(config.tasks.names))
    check_step(config)
    assert not caplog.records
    config.model.num_experts = 2
    build_system(config)
    assert "3 tasks, 2 experts: task number t has expert t % 2, and some share one" in caplog.text
    assert "model.num_experts=3 would give each task its own" in caplog.text


@pytest.mark.parametrize("task", common.TASKS)
def test_a_single_task_takes_a_training_step(task: str, tiny_config: Any):
    config = tiny_config()
    config.tasks.names = (task,)
    state = check_step(config)
    assert ("teacher" in state.extra) == (task in ("cluster", "self_distill"))


def test_options_of_training_take_a_step(tiny_config: Any):
    """bfloat16 computes in half width and keeps float32 parameters; accumulation; RGB; every augmentation."""
    config = tiny_config()
    config.train.update(dtype="bfloat16", accumulation=2, batch_size=16)
    config.data.channels = 3
    config.tasks.names = ("masked", "jigsaw", "cluster")
    for task, kind in zip(config.tasks.names, ("none", "light", "strong"), strict=True):
        config.tasks[task].augment = kind
    check_step(config)


def test_dense_controls_match_the_mixture(tiny_config: Any):
    """dense_params has the mixture's parameters to within its router; dense_active fewer."""
    sizes = {}
    for mlp in ("moe", "dense_params", "dense_active"):
        config = tiny_config()
        config.model.update(mlp=mlp, num_experts=8, expert_dim=64)
        system = build_system(config)
        sizes[mlp] = num_params(jax.eval_shape(system.init_params, jax.random.key(0)))
    assert sizes["dense_params"] == pytest.approx(sizes["moe"], rel=0.05)
    assert sizes["dense_active"] < 0.7 * sizes["moe"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.tasks.update(names=("masked", "magic")), "tasks.names: expected some of .*masked.*found .*magic"),
        (lambda c: c.tasks.update(names=("masked", "masked")), "each once"),
        (lambda c: c.tasks.update(names=()), "tasks.names"),
        (lambda c: c.model.update(mlp="sparse"), "model.mlp: expected one of .*dense_active.*found 'sparse'"),
        (lambda c: c.model.update(patch_size=5), "data.image_size=32 is not a multiple of model.patch_size=5"),
        (lambda c: c.train.update(dtype="float16"), "train.dtype: expected one of .*bfloat16.*found 'float16'"),
        (lambda c: c.mesh.update(expert=3), "mesh.expert=3 does not divide the 8 devices"),
        (lambda c: c.model.update(router="none"), "router.*'none'"),
        (lambda c: c.model.update(top_k=3), "top_k"),
        (lambda c: c.tasks.jigsaw.update(tiles=3), "tiles"),
        (lambda c: c.tasks.masked.update(augment="wild"), "wild"),
        (lambda c: c.train.update(accumulation=3), "batch size 8 does not divide by train.accumulation 3"),
        (lambda c: c.optim.update(warmup_steps=0), "optim.warmup_steps"),
    ],
)
def test_a_field_that_does_not_fit_is_named(change: Any, message: str, tiny_config: Any):
    config = tiny_config()
    change(config)
    with pytest.raises(ValueError, match=message):
        abstract_step(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bmad.get_config("lung"), "expected one of .*'brain'.*found 'lung'"),
        (lambda: bmad.get_config("brain,preset=huge"), "preset: expected one of .*'base'.*found 'huge'"),
        (lambda: bmad.get_config("brain,size=3"), "argument 'size': expected one of .*'name'.*'preset'"),
        (lambda: folder.get_config("huge"), "preset.*huge"),
        (lambda: quickstart.get_config("tiny"), "argument 'tiny': expected none"),
        (lambda: common.parse_arg("steps=many", steps=3), "steps='many': expected int"),
    ],
)
def test_a_wrong_config_argument_is_named(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_arguments_have_the_types_of_their_defaults():
    arg = common.parse_arg("7,rate=1e-2,on=true,name=x", steps=3, rate=0.5, on=False, name="")
    assert arg.to_dict() == {"steps": 7, "rate": 0.01, "on": True, "name": "x"}
    assert common.parse_arg(None, steps=3).to_dict() == {"steps": 3}


def types(value: Any) -> Any:
    """The same tree with types for values."""
    if isinstance(value, dict):
        return {key: types(item) for key, item in value.items()}
    return [tuple, *map(types, value)] if isinstance(value, tuple) else type(value)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_config_reads_back_equal(name: str, tmp_path: Path):
    """config.json gives the same values and types (tuples too), and the same fields stay open for --config.field=."""
    config = CONFIGS[name]()
    write_json(tmp_path / "config.json", config.to_dict())
    read = workdir.get_config(str(tmp_path))
    assert isinstance(read, ConfigDict)
    assert read.to_dict() == config.to_dict()
    assert types(read.to_dict()) == types(config.to_dict())


def test_a_folder_without_a_saved_config_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=f"no config.json in {tmp_path}"):
        workdir.get_config(str(tmp_path))


def test_configs_of_before_a_field_was_there_are_read(tmp_path: Path):
    config = common.detector().to_dict()
    del config["optim"]["kind"], config["compress"]["kind"], config["data"]["window"], config["slices"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = workdir.get_config(str(tmp_path))
    assert (found.optim.kind, found.compress.kind) == ("adamw", "adamw")
    assert (found.data.window, found.slices) == ((), common.detector().slices)
    del config["compress"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert workdir.get_config(str(tmp_path)).optim.kind == "adamw"
    config = common.distiller().to_dict()
    del config["teacher"]["overrides"]["position_resize"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = workdir.get_config(str(tmp_path))
    assert found.teacher.overrides.position_resize is None
    check_config(found, tmp_path, ())


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (common.detector, run.FREE_FIELDS),
        (common.detector, compress.FREE_FIELDS),
        (common.detector, ablation_cell.FREE_FIELDS),
        (ablation.get_config, detectors_ablation.FREE_FIELDS),
    ],
)
def test_free_fields_exist(make: Callable[[], ConfigDict], fields: tuple[str, ...]):
    """A renamed field would silently bind a work directory to it; devices, reading and logging bind none."""
    assert {"mesh.", *READING, *LOGGING} <= set(fields)
    config = json.loads(json.dumps(make().to_dict()))
    for field in fields:
        node = config
        for key in filter(None, field.split(".")):
            assert key in node, f"{field} is no field"
            node = node[key]
