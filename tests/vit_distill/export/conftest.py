"""A tiny teacher and students of it, no weight at a special value, with every architecture option on request."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.tree import map_with_path
from core.vit import VisionTransformer, VitConfig
from vit_distill.lora import LoraConfig, init_adapters, merge
from vit_distill.preprocessing import Preprocessing
from vit_distill.student import Student
from vit_distill.weight_copy import copy_blocks

# Options that together reach every branch of the graph.
ARCHITECTURES = {
    "vit": {},
    "mean": dict(activation="gelu_tanh", pool="mean", final_norm="pooled", class_token=False),
    "dinov2": dict(mlp="swiglu", layer_scale=True, num_registers=3, position_on_prefix=False, num_classes=0),
    "dinov3": dict(
        layer_scale=True,
        num_registers=3,
        position="rotary",
        rotary_base=30.0,
        key_bias=False,
        num_classes=0,
        norm_eps=1e-5,
    ),
    "siglip": dict(activation="gelu_tanh", pool="attention", class_token=False, num_classes=0),
    "clip": dict(
        pre_norm=True, activation="quick_gelu", patch_bias=False, qkv_bias=False, head_bias=False, norm_eps=1e-5
    ),
}
SHAPE = dict(depth=4, width=16, num_heads=2, mlp_dim=24, patch_size=4, image_size=16, num_classes=5)


def _random(make: Callable[[], Any], seed: int) -> Any:
    """The tree that `make` would give, its shapes alone (nothing is compiled), with random values; scales around 1."""
    rng = np.random.default_rng(seed)
    around_one = ("scale", "magnitude", "ls1", "ls2")
    return map_with_path(
        lambda path, leaf: np.float32(path.endswith(around_one) + 0.3 * rng.normal(size=leaf.shape)),
        jax.eval_shape(make),
    )


def _teacher(**options: Any) -> SimpleNamespace:
    """What vit_distill.teacher.Teacher holds and students need of it."""
    config = VitConfig(**(SHAPE | options))
    images = jnp.zeros((1, config.image_size, config.image_size, config.in_channels))
    params = _random(lambda: VisionTransformer(config).init(jax.random.key(0), images)["params"], 0)
    preprocessing = Preprocessing(config.image_size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 0.8)
    return SimpleNamespace(config=config, params=params, preprocessing=preprocessing)


def _student(
    teacher: SimpleNamespace | None = None, blocks: tuple[int, ...] = (0, 2), lora: Any = ..., **options: Any
) -> Student:
    teacher = teacher or _teacher(**options)
    config, base = copy_blocks(teacher.config, teacher.params, blocks)
    lora = LoraConfig((("query", 2), ("out", 3), ("fc2", 4)), scaling="rank_stabilised") if lora is ... else lora
    adapters = None if lora is None else _random(lambda: init_adapters(jax.random.key(1), base, lora), 1)
    return Student(
        config=config,
        params=base if lora is None else jax.device_get(merge(base, adapters, lora)),
        preprocessing=teacher.preprocessing,
        blocks=blocks,
        method="copy" if lora is None else "lora",
        base=base,
        adapters=adapters,
        lora=lora,
        facts={
            "teacher": dict(name="tiny", depth=4, file="tiny.npz", sha256="ab" * 32, licence="CC-BY-NC-4.0"),
            "few_shot": dict(hash="cd" * 32, num_images=12),
            "loss": dict(kind="l1", target="pre_norm"),
            "seed": 3,
            "updates": 2,
            "num_steps": 300,
            "metrics": {"test": {"top1": 0.51234}},
        },
    )


@pytest.fixture(scope="session")
def make_teacher() -> Callable[..., SimpleNamespace]:
    """Factory: make_teacher(**fields of VitConfig)."""
    return _teacher


@pytest.fixture(scope="session")
def make_student() -> Callable[..., Student]:
    """Factory: make_student(teacher, blocks, lora, **fields of VitConfig); lora=None for a plain copy."""
    return _student


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each of ARCHITECTURES in turn."""
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """uint8 [3, 20, 20, 3], the students' resize_size."""
    return np.random.default_rng(5).integers(0, 256, (3, 20, 20, 3), np.uint8)
