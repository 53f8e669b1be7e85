"""Losses against float64 numpy written from their definitions, and which tokens they see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from core.vit import VisionTransformer, VitConfig
from vit_distill import losses
from vit_distill.losses import LossConfig
from vit_distill.weight_copy import aligned_targets

CONFIG = VitConfig(depth=4, width=16, num_heads=2, mlp_dim=24, patch_size=8, image_size=16, num_registers=2)


def _softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def _reference(s, t, kind):
    """[B, N] in float64."""
    d = np.abs(s - t)
    p, q = _softmax(t), _softmax(s)
    return {
        "l1": lambda: d.mean(-1),
        "mse": lambda: (d**2).mean(-1),
        "smooth_l1": lambda: np.where(d < 1, d**2 / 2, d - 0.5).mean(-1),
        "cosine": lambda: 1 - (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1),
        "l1_kld": lambda: d.mean(-1) + 0.7 * (p * np.log(p / q)).sum(-1),
    }[kind]()


@pytest.mark.parametrize("cls_weight", [0.0, 0.5])
@pytest.mark.parametrize("kind", losses.KINDS)
def test_every_loss_is_its_definition(kind, cls_weight):
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 3, 7, 16), scale=1.5)
    config = LossConfig(kind=kind, cls_weight=cls_weight, kld_weight=0.7)
    value, metrics = losses.distill_loss([jnp.float32(s)], [jnp.float32(t)], config, CONFIG)
    per_token = _reference(s, t, kind)
    assert value == pytest.approx((1 - cls_weight) * per_token.mean() + cls_weight * per_token[:, 0].mean(), rel=1e-5)
    # The metrics are L1, whatever is trained on; two registers are neither cls nor patches.
    d = np.abs(s - t)
    expected = {"l1": d.mean(), "cls_l1": d[:, 0].mean(), "patch_l1": d[:, 3:].mean()}
    if kind == "l1_kld":
        expected["kld"] = (per_token.mean() - d.mean()) / 0.7
    assert {name: float(v) for name, v in metrics.items()} == pytest.approx(expected, rel=1e-5)


def test_the_divergence_is_not_zero_and_pulls_the_student():
    """The reference calls it without log-targets, where it vanishes."""
    rng = np.random.default_rng(1)
    s, t = jnp.float32(rng.normal(size=(2, 2, 7, 16)))

    def term(s):
        config = LossConfig(kind="l1_kld", kld_weight=1.0)
        both = losses.distill_loss([s], [t], config, CONFIG)[0]
        return both - losses.distill_loss([s], [t], LossConfig(), CONFIG)[0]

    value, grad = jax.value_and_grad(term)(s)
    assert value > 0.1
    np.testing.assert_allclose(grad, (_softmax(np.asarray(s)) - _softmax(np.asarray(t))) / 14, rtol=0, atol=1e-5)
    assert losses.distill_loss([t], [t], LossConfig(kind="l1_kld"), CONFIG)[0] == 0


def test_cosine_is_finite_at_zero_vectors():
    value, grad = jax.value_and_grad(lambda x: losses.cosine(x, jnp.ones((1, 4))).sum())(jnp.zeros((1, 4)))
    assert value == 0
    assert np.isfinite(grad).all()


def test_the_teacher_gets_no_gradient():
    x = jnp.ones((1, 7, 16))
    grad = jax.grad(lambda t: losses.distill_loss([2 * x], [t], LossConfig(), CONFIG)[0])(x)
    assert not np.any(grad)


@pytest.fixture(scope="module")
def teacher():
    rng = np.random.default_rng(2)
    images = jnp.float32(rng.normal(size=(2, 16, 16, 3)))
    params = jax.jit(VisionTransformer(CONFIG).init)(jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), params)
    return params, VisionTransformer(CONFIG).apply({"params": params}, images)


@pytest.mark.parametrize(("blocks", "expected"), [("last", [3]), ("aligned", [1, 3])])
def test_targets_are_the_paired_blocks_before_the_norm(teacher, blocks, expected):
    params, output = teacher
    pairs = aligned_targets((0, 2), CONFIG.depth)
    found = losses.teacher_targets(CONFIG, params, output, LossConfig(blocks=blocks), pairs)
    assert len(found) == len(expected)
    for tokens, i in zip(found, expected, strict=True):
        assert tokens is output.blocks[i]


def test_post_norm_targets_are_the_normed_tokens(teacher):
    params, output = teacher
    config = LossConfig(target="post_norm", blocks="aligned")
    first, last = losses.teacher_targets(CONFIG, params, output, config, (1, 3))
    np.testing.assert_allclose(last, output.tokens, rtol=0, atol=1e-5)
    x = np.asarray(output.blocks[1], np.float64)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    scale, bias = (np.asarray(params["norm"][name]) for name in ("scale", "bias"))
    np.testing.assert_allclose(first, normed * scale + bias, rtol=0, atol=1e-5)


def test_student_blocks_meet_the_ends_of_their_groups(teacher):
    """A student that has every block of the teacher: its pairs are its own blocks, and all losses vanish."""
    params, output = teacher
    config = LossConfig(blocks="aligned")
    student = losses.student_targets(CONFIG, params, output, config)
    assert len(student) == 4
    teacher_tokens = losses.teacher_targets(CONFIG, params, output, config, aligned_targets(range(4), 4))
    assert losses.distill_loss(student, teacher_tokens, config, CONFIG)[0] == 0
    # The mean over pairs: L1 of 1 and of 3.
    x = jnp.zeros((1, 7, 16))
    value, metrics = losses.distill_loss([x + 1, x + 3], [x, x], config, CONFIG)
    assert float(value) == pytest.approx(2)
    assert float(metrics["l1"]) == pytest.approx(3)


def test_what_does_not_fit_is_named(teacher):
    params, output = teacher
    x = jnp.zeros((1, 7, 16))
    pooled = VitConfig(depth=1, width=16, num_heads=2, mlp_dim=24, patch_size=8, image_size=16, class_token=False,
                       final_norm="pooled", pool="mean")  # fmt: skip
    with pytest.raises(ValueError, match=r"cls_weight.*without a cls token"):
        losses.distill_loss([x], [x], LossConfig(cls_weight=0.5), pooled)
    assert sorted(losses.distill_loss([x], [x], LossConfig(), pooled)[1]) == ["l1", "patch_l1"]
    with pytest.raises(ValueError, match="pre-norm target"):
        losses.teacher_targets(pooled, params, output, LossConfig(target="post_norm"), (0,))
    with pytest.raises(ValueError, match="shapes"):
        losses.distill_loss([x], [x, x], LossConfig(), CONFIG)
    with pytest.raises(ValueError, match=r"loss\.kind"):
        LossConfig(kind="l3")
    with pytest.raises(ValueError, match=r"loss\.cls_weight"):
        LossConfig(cls_weight=1.5)


def test_the_config_has_the_fields_of_the_loss():
    assert LossConfig(**common.distiller().loss) == LossConfig()
