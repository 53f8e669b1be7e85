"""A teacher of four blocks and a table's config that run in seconds."""

from typing import Any

import jax
import jax.numpy as jnp

from configs.vit_distill.table import get_config
from core.vit import VisionTransformer, VitConfig
from vit_distill.preprocessing import Preprocessing
from vit_distill.teacher import LoadReport, Teacher

NANO = VitConfig(depth=4, width=16, num_heads=2, mlp_dim=32, patch_size=8, image_size=16)


def make_teacher(sha256: str = "a" * 64, config: VitConfig = NANO) -> Teacher:
    params = VisionTransformer(config).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    report = LoadReport(("all",), (), (), (), sha256, "random")
    return Teacher("nano", config, params, Preprocessing(16, (0.5,) * 3, (0.5,) * 3), {}, report)


def small_config(**fields) -> Any:
    config = get_config()
    config.teacher.checkpoint = "nano"
    config.data.kind = "digits"
    config.lora.rank = 2
    config.train.update(batch_size=8, num_steps=2)
    config.table.update(ratios=(0.02,), reductions=(2,), num_seeds=2, held_out=32, learning_rates=(0.001, 0.01, 0.1))
    config.table.probe.update(kind="knn", per_class=4, batch_size=64)
    config.table.update(fields)
    return config
