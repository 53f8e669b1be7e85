"""The distiller's configs: each loads, and an update of the paper's size goes through as shapes alone."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from configs import workdir
from configs.vit_distill import distill, probe, quickstart, segment, table, teacher
from core.files import write_json
from core.mesh import check_batch_size, make_mesh
from core.optim import build_optimizer, build_schedule
from core.state import TrainState
from core.step import make_train_step_fn
from core.tree import num_params, spec
from core.vit import VitConfig, abstract_params
from core.workdir import LOGGING, READING, check_config, save_config
from vit_distill import probe_command, run, student_io, supervised
from vit_distill import table as run_table
from vit_distill.distill import Distiller, make_loss_fn
from vit_distill.lora import build_lora_config, init_adapters
from vit_distill.losses import LossConfig

CONFIGS = {
    **{f"distill:{name}": lambda name=name: distill.get_config(name) for name in distill.RECIPES},
    "probe": probe.get_config,
    "segment": segment.get_config,
    "table": table.get_config,
    **{f"teacher:{name}": lambda name=name: teacher.get_config(name) for name in teacher.PRESETS},
    **{
        f"quickstart:{step}": lambda step=step: quickstart.get_config(step)
        for step in ("teacher", "half", "third", "probe", "probe_third")
    },
}
VIT_B = VitConfig(depth=6, width=768, num_heads=12, mlp_dim=3072, patch_size=16, image_size=224)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_names_a_command_of_the_distiller(name):
    config = CONFIGS[name]()
    assert config.system == "vit_distill"
    assert config.command in ("distill", *run.COMMANDS)
    config.to_json_best_effort()


@pytest.mark.parametrize(
    ("config", "fields", "bound"),
    [
        (distill.get_config(), student_io.FREE_FIELDS, ()),
        (table.get_config(), run_table.FREE_FIELDS, ()),
        (teacher.get_config(), supervised.FREE_FIELDS, ("data.skip_corrupt",)),
        (probe.get_config(), probe_command.FREE_FIELDS, LOGGING),  # which it has not
    ],
)
def test_reading_and_logging_bind_no_work_directory(config, fields, bound, tmp_path):
    save_config(config, tmp_path)
    other = {"data.root": "moved", "data.memory_limit_gb": 1.0, "data.skip_corrupt": True}
    other |= {"train.log_every": 3, "train.save_every": 7, "train.tensorboard": False}
    assert {*READING, *LOGGING} == set(other)
    config.update_from_flattened_dict({name: value for name, value in other.items() if name not in bound})
    check_config(config, tmp_path, fields)


@pytest.mark.parametrize(
    ("module", "arg"), [(distill, "r=2"), (distill, "recipe=huge"), (teacher, "preset=huge"), (quickstart, "quarter")]
)
def test_an_unknown_argument_is_an_error(module, arg):
    with pytest.raises(ValueError, match="expected"):
        module.get_config(arg)


def test_the_papers_recipe_is_ten_epochs_of_a_hundredth_of_imagenet():
    config, small = distill.get_config("recipe=paper"), distill.get_config()
    train, optim = config.train, config.optim
    assert train.batch_size // train.accumulation == 128
    assert train.num_steps == int(10 * 12_811 / train.batch_size)
    assert optim.warmup_steps == train.num_steps * 2 // 10
    assert optim.learning_rate == pytest.approx(1e-3 * train.batch_size / 256)
    assert optim.clip_norm == 0
    changed = {key for key, value in config.to_dict().items() if value != small.to_dict()[key]}
    assert changed == {"data", "train", "optim"}
    assert config.data.valid_fraction == config.data.test_fraction == 0  # the share is of all training images
    rate = build_schedule(optim, train.num_steps)
    assert rate(24) == pytest.approx(4e-3)
    check_batch_size(train.batch_size, train.accumulation, make_mesh())


@pytest.mark.parametrize(
    ("preset", "dtype", "millions"),
    [("enhanced", "float32", 10.62), ("plain", "float32", 2.36), ("enhanced", "bfloat16", 10.62)],
)
def test_the_papers_student_updates_its_adapters_alone(preset, dtype, millions):
    """ViT-B/16, r=2, R=128: 43.27 M kept weights and 10.62 M (enhanced) or 2.36 M (plain) adapters, as published."""
    config = distill.get_config()
    config.lora.preset, config.train.dtype = preset, dtype
    lora, base = build_lora_config(config.lora), abstract_params(VIT_B)
    assert num_params(base) == pytest.approx(43.27e6, rel=1e-3)
    distiller = Distiller(config, SimpleNamespace(config=VIT_B), (), (), VIT_B, base, lora, LossConfig(), (11,), None)
    tx = build_optimizer(config.optim, 10)

    def build(key, base):
        adapters = init_adapters(key, base, lora)
        return TrainState(jnp.zeros((), jnp.int32), adapters, adapters, tx.init(adapters), {})

    before = jax.eval_shape(build, jax.random.key(0), base)
    assert num_params(before.params) == pytest.approx(millions * 1e6, rel=1e-3)
    views = jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32)
    batch = {"views": views, "targets": (jax.ShapeDtypeStruct((8, 197, 768), jnp.float32),)}
    step = make_train_step_fn(make_loss_fn(distiller), tx, ema_decay=0.0)
    after, metrics = jax.eval_shape(step, before, batch, jax.random.key(0), base)
    assert spec(before) == spec(after)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    assert {"loss", "l1", "cls_l1", "patch_l1", "grad_norm"} <= set(metrics)


def test_a_table_of_before_its_probe_had_all_settings_is_read(tmp_path: Path):
    config = table.get_config().to_dict()
    for name in ("neighbours", "learning_rates", "linear_batch_size", "epochs", "warmup_epochs", "segment"):
        del config["table"]["probe"][name]
    del config["table"]["probe_data"]["groups"]
    write_json(tmp_path / "config.json", config)
    found = workdir.get_config(str(tmp_path))
    assert found.table == table.get_config().table
    check_config(found, tmp_path, ())
