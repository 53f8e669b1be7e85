"""A batch in parts gives what it gives whole. Axes: B batch, H W C image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.vit import VisionTransformer, VitConfig
from vit_distill import forward as module
from vit_distill.forward import forward_parts, make_forward, micro_batches, part_size

CONFIG = VitConfig(depth=2, width=16, num_heads=2, mlp_dim=32, patch_size=8, image_size=16)
VIT_B = VitConfig(depth=12, width=768, num_heads=12, mlp_dim=3072, patch_size=16, image_size=224)
BYTES = 4 * CONFIG.num_tokens * CONFIG.mlp_dim  # of one image


@pytest.fixture(scope="module")
def params():
    return jax.jit(VisionTransformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]


def read(output):
    return list(output.blocks), output.pooled


def test_parts_give_what_the_batch_gives(params, monkeypatch):
    images = np.random.default_rng(0).normal(size=(12, 16, 16, 3)).astype(np.float32)
    whole = jax.jit(make_forward(CONFIG, jnp.float32, read))
    assert "while" not in whole.lower(params, images).as_text()
    monkeypatch.setattr(module, "PART_BYTES", 4 * BYTES)
    parts = jax.jit(make_forward(CONFIG, jnp.float32, read))
    assert "while" in parts.lower(params, images).as_text()
    # The same products of fewer rows: float32 sums may come in another order.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6), parts(params, images), whole(params, images)
    )


def test_several_devices_take_the_batch_whole(params, monkeypatch):
    monkeypatch.setattr(module, "PART_BYTES", BYTES)
    lowered = jax.jit(make_forward(CONFIG, jnp.float32, read, num_devices=2)).lower(params, np.zeros((4, 16, 16, 3)))
    assert "while" not in lowered.as_text()


def test_parts_that_are_asked_for_give_what_the_batch_gives(params):
    """Strided ones; on one CPU its own rule stands, and a batch that they do not divide stays whole."""
    images = np.random.default_rng(0).normal(size=(12, 16, 16, 3)).astype(np.float32)
    whole, parts = (jax.jit(make_forward(CONFIG, jnp.float32, read, 2, parts)) for parts in (1, 3))
    assert "while" in parts.lower(params, images).as_text()
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6), parts(params, images), whole(params, images)
    )
    assert [forward_parts(CONFIG, 12, devices, 3) for devices in (1, 2, 4, 8)] == [1, 3, 3, 1]


@pytest.mark.parametrize(
    ("batch", "part"), [(1, 1), (8, 8), (16, 8), (32, 8), (30, 10), (256, 8), (18, 9), (31, 31), (22, 22)]
)
def test_parts_of_a_vit_b(batch, part):
    """At most ten images; a batch without a divisor above five stays whole."""
    assert part_size(VIT_B, batch) == part


def test_a_small_model_stays_whole():
    assert part_size(CONFIG, 512) == 512
    assert micro_batches(CONFIG, 512, 1) == 1


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (4, 1), (8, 2), (10, 1), (16, 4), (32, 8), (18, 6), (31, 1)])
def test_an_update_of_a_vit_b_is_cut_where_it_leaves_the_caches(batch, count):
    """At most four images at once; a batch without a divisor of three or four is not cut."""
    assert micro_batches(VIT_B, batch, 1) == count
    assert micro_batches(VIT_B, batch, 2) == 1  # devices have the batch in parts already
    assert micro_batches(VIT_B, batch, 1, asked=2) == 2
