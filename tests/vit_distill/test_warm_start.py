"""The regression against an independent solution, the start against updates that it must find, and against the copy."""

import jax
import numpy as np
import pytest

from core import tree
from core.vit import VisionTransformer, VitConfig
from vit_distill.lora import TARGETS, LoraConfig, init_adapters, merge
from vit_distill.warm_start import low_rank_ridge, warm_start
from vit_distill.weight_copy import aligned_targets, copy_blocks

CONFIG = VitConfig(depth=4, width=16, num_heads=2, mlp_dim=24, patch_size=8, image_size=16, layer_scale=True)


@pytest.fixture(scope="module")
def teacher():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 16, 16, 3)).astype(np.float32)
    shapes = jax.eval_shape(VisionTransformer(CONFIG).init, jax.random.key(0), images)["params"]
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes), images


def _blocks(config, params, images):
    return jax.jit(lambda p, x: VisionTransformer(config).apply({"params": p}, x).blocks)(params, images)


def test_ridge_of_low_rank_is_the_projected_fit_of_the_augmented_problem():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 9)) * np.linspace(0.1, 2, 9)
    y = x @ rng.normal(size=(9, 7)) + 0.3 * rng.normal(size=(60, 7))
    ridge = 0.1
    a, b = low_rank_ridge(x.T @ x, x.T @ y, 3, ridge)
    # The penalty as rows of data, then Eckart and Young on what least squares fits.
    penalty = ridge * (x**2).sum(0).mean()
    augmented = np.vstack([x, np.sqrt(penalty) * np.eye(9)])
    full = np.linalg.lstsq(augmented, np.vstack([y, np.zeros((9, 7))]), rcond=None)[0]
    leading = np.linalg.svd(augmented @ full)[2][:3]
    np.testing.assert_allclose(a @ b, full @ leading.T @ leading, rtol=0, atol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-10)

    def objective(m):
        return ((x @ m - y) ** 2).sum() + penalty * (m**2).sum()

    best = objective(a @ b)
    for _ in range(20):
        assert objective((a + 0.01 * rng.normal(size=a.shape)) @ (b + 0.01 * rng.normal(size=b.shape))) > best
    # Nothing to learn: a product of 0 without a division by 0.
    zero = low_rank_ridge(x.T @ x, np.zeros((9, 7)), 3, ridge)
    assert not np.any(zero[0] @ zero[1])
    assert np.isfinite(zero[1]).all()


@pytest.mark.parametrize(
    "lora", [LoraConfig((("fc2", 3),), scaling="alpha", alpha=6.0), LoraConfig((("fc2", 3), ("query", 2)), dora=True)]
)
def test_an_update_of_the_rank_is_found_again(teacher, lora):
    """The teacher is the student with another fc2 in every block, of rank 3: the start must give its outputs."""
    params, images = teacher
    rng = np.random.default_rng(2)
    changed = dict(params)
    for name in params:
        if name.startswith("block_"):
            update = rng.normal(size=(24, 3)) @ rng.normal(size=(3, 16)) * 0.3
            fc2 = params[name]["mlp"]["fc2"]
            fc2 = fc2 | {"kernel": fc2["kernel"] + update.astype(np.float32)}
            changed[name] = params[name] | {"mlp": params[name]["mlp"] | {"fc2": fc2}}
    targets = _blocks(CONFIG, changed, images)
    start = init_adapters(jax.random.key(0), params, lora)
    adapters = warm_start(CONFIG, params, start, lora, images, targets, ridge=1e-9, batch_size=20)
    merged = merge(params, adapters, lora)
    for found, expected in zip(_blocks(CONFIG, merged, images), targets, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)  # features of size 1 to 20
    for name in ("block_00", "block_03"):
        np.testing.assert_allclose(
            merged[name]["mlp"]["fc2"]["kernel"], changed[name]["mlp"]["fc2"]["kernel"], rtol=0, atol=5e-3
        )
    before, after = tree.paths(start), tree.paths(adapters)
    assert list(before) == list(after)
    for path, leaf in before.items():
        assert after[path].shape == leaf.shape
        if "fc2" not in path:
            assert after[path] is leaf


def test_a_copy_comes_closer_and_out_helps_more(teacher):
    params, images = teacher
    blocks = (0, 2)
    config, base = copy_blocks(CONFIG, params, blocks)
    outputs = _blocks(CONFIG, params, images)
    targets = [np.asarray(outputs[i]) for i in aligned_targets(blocks, 4)]

    def errors(ranks, batch_size=20):
        lora = LoraConfig(ranks)
        adapters = init_adapters(jax.random.key(0), base, lora)
        if batch_size:
            adapters = warm_start(config, base, adapters, lora, images, targets, batch_size=batch_size)
        found = _blocks(config, merge(base, adapters, lora), images)
        return [float(np.square(x - y).mean()) for x, y in zip(found, targets, strict=True)]

    copy, fc2 = errors((("fc2", 4),), 0), errors((("fc2", 4),))
    both = errors(tuple((target, 4) for target in TARGETS))
    assert fc2[0] < 0.8 * copy[0]
    assert fc2[1] < 0.8 * copy[1]
    # The first block sees the same inputs in both, so the candidate that leaves out alone is fc2's own result.
    assert both[0] <= fc2[0]
    assert both[1] < 0.8 * copy[1]
    assert errors((("fc2", 4),), 15) == pytest.approx(fc2, rel=1e-3)  # batches of 15, 15 and 10


def test_what_cannot_start_is_named(teacher):
    params, images = teacher
    lora = LoraConfig((("query", 2),))
    adapters = init_adapters(jax.random.key(0), params, lora)
    with pytest.raises(ValueError, match="fc2"):
        warm_start(CONFIG, params, adapters, lora, images, [])
    lora = LoraConfig((("fc2", 2),))
    adapters = init_adapters(jax.random.key(0), params, lora)
    with pytest.raises(ValueError, match=r"4 targets of shape \(40, 5, 16\), found \[\(40, 4, 16\)\]"):
        warm_start(CONFIG, params, adapters, lora, images, [np.zeros((40, 4, 16))])
