"""Transformer parts against numpy in float64: values, and gradients by finite differences of the numpy function."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from core import attention, transformer
from core.attention import attend

BATCH, TOKENS, WIDTH, HEADS, HIDDEN = 2, 5, 8, 2, 12


def _dense(x, p, axes=1):
    return np.tensordot(x, p["kernel"], axes) + p["bias"]


def _norm(x, p, eps=1e-6):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def _attention(x, p, asking=None):
    """One query at a time, one head at a time."""
    q = _dense(x if asking is None else asking, p["query"])
    k, v = (_dense(x, p[name]) for name in ("key", "value"))
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        for head in range(q.shape[2]):
            for n in range(q.shape[1]):
                scores = np.exp(k[b, :, head] @ q[b, n, head] / np.sqrt(q.shape[-1]))
                out[b, n, head] = scores / scores.sum() @ v[b, :, head]
    return _dense(out, p["out"], 2)


def _mlp(x, p):
    h = _dense(x, p["fc1"])
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return _dense(h, p["fc2"])


def _block(x, p):
    x = x + _attention(_norm(x, p["norm1"]), p["attn"])
    return x + _mlp(_norm(x, p["norm2"]), p["mlp"])


def _pool(x, p):
    x = _attention(x, p["attn"], np.repeat(p["query_token"], len(x), 0))[:, 0]
    return x + _mlp(_norm(x, p["norm"]), p["mlp"])


def _randomised(params, seed=0):
    """No leaf at its special initial value (zero biases, unit scales), float64."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), jax.device_get(params))


def _cases():
    block = transformer.EncoderBlock(HEADS, lambda name: transformer.Mlp(HIDDEN, name=name))
    return {
        "attention": (transformer.SelfAttention(HEADS), _attention),
        "mlp": (transformer.Mlp(HIDDEN), _mlp),
        "block": (block, _block),
        "pool": (transformer.AttentionPool(HEADS, HIDDEN), _pool),
    }


@pytest.mark.parametrize("name", ["attention", "mlp", "block", "pool"])
def test_values_and_gradients_are_those_of_numpy(name):
    module, reference = _cases()[name]
    rng = np.random.default_rng(1)
    x, target = rng.normal(size=(2, BATCH, TOKENS, WIDTH))
    target = target[:, 0] if name == "pool" else target
    params = _randomised(jax.jit(module.init)(jax.random.key(0), jnp.zeros(x.shape))["params"])

    def scalar(params, x):
        out = module.apply({"params": params}, x)
        out = out[0] if isinstance(out, tuple) else out
        return (out * target.astype(np.float32)).sum(), out

    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), (params, x))
    (_, out), grads = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))(*single)
    # float32 rounding over sums of at most 12 terms in a few layers; values are of size 1 to 10.
    np.testing.assert_allclose(out, reference(x, params), rtol=0, atol=2e-5)

    # One random direction for each leaf: a wrong gradient of any leaf cannot hide behind the others.
    leaves, structure = jax.tree.flatten((params, x))
    for i, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
        direction = rng.normal(size=leaf.shape)

        def moved(h, i=i, direction=direction):
            p, y = structure.unflatten([v + h * direction if j == i else v for j, v in enumerate(leaves)])
            return (reference(y, p) * target).sum()

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        np.testing.assert_allclose((grad * direction).sum(), slope, rtol=2e-4, atol=2e-4, err_msg=f"leaf {i}")


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 3e-2)])
def test_attention_on_the_cpu_is_that_of_other_backends(dtype, tolerance):
    """Values, with a gradient and without, and gradients. Tolerances: a few roundings, 2^-24 or 2^-8 each, of averages
    of values below 4."""
    q, k, v, g = jax.random.normal(jax.random.key(0), (4, BATCH, TOKENS, HEADS, 4))

    def run(function):
        out, pull = jax.vjp(function, q, k, v)
        return function(q, k, v), out, *pull(g)

    ours = jax.jit(lambda: run(lambda *x: attend(*x, dtype)))()
    for found, expected in zip(ours, run(jax.nn.dot_product_attention), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_attention_without_a_gradient_stands_large_logits():
    """One key that outweighs the others by e^200, and rows whose largest logit is below -1e4."""
    q, k, v = (
        jnp.tile(jnp.asarray(rows, jnp.float32)[None, :, None, None], (1, 1, 1, 4))
        for rows in ([1, -1], [1e4, 1e4 + 100], [1, 2])
    )
    np.testing.assert_array_equal(attend(q, k, v, jnp.float32)[0, :, 0], [[2.0] * 4, [1.0] * 4])


@pytest.mark.parametrize("name", sorted(transformer.ACTIVATIONS))
def test_activations_and_their_slopes_are_what_their_names_say(name):
    """Against float64, to a few float32 roundings of values up to 9 (timm's own GELU is as far away)."""
    x = np.linspace(-9, 9, 1001)
    wanted = {
        "gelu": x * stats.norm.cdf(x),
        "gelu_tanh": 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "quick_gelu": x / (1 + np.exp(-1.702 * x)),
    }[name]
    found = transformer.ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    slopes = jax.vmap(jax.grad(transformer.ACTIVATIONS[name]))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(slopes[1:-1], (wanted[2:] - wanted[:-2]) / (x[2:] - x[:-2]), rtol=0, atol=1e-4)


def test_attention_on_a_gpu_asks_for_cudnn_where_it_serves(monkeypatch, caplog):
    """Without a GPU: what is asked for, and that a cuDNN which does not compile is done without."""
    asked = []

    def recorded(*qkv, implementation):
        asked.append(implementation)
        return plain(*qkv, implementation="xla" if pretend else implementation)

    plain, pretend = jax.nn.dot_product_attention, False
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    half, full = (jnp.ones((2, 6, 2, 8), dtype) for dtype in (jnp.bfloat16, jnp.float32))
    attention._cudnn_compiles.cache_clear()
    attend(half, half, half, jnp.bfloat16)
    assert asked == ["cudnn", "xla"]  # the trial, and what it led to
    assert "attention without cuDNN's kernel" in caplog.text
    attend(half, half, half, jnp.bfloat16)
    assert asked == ["cudnn", "xla", "xla"]  # tried once
    asked.clear()
    pretend = True
    attention._cudnn_compiles.cache_clear()
    attend(half, half, half, jnp.bfloat16)
    attend(full, full, full, jnp.float32)
    with jax.default_matmul_precision("highest"):
        attend(half, half, half, jnp.bfloat16)
    attend(half[:, :1], half, half, jnp.bfloat16)
    attention._cudnn_compiles.cache_clear()
    # Tried without and with its gradient; not for full or highest precision, nor for fewer queries than keys.
    assert asked == ["cudnn", "cudnn", "cudnn", "xla", "xla", "xla"]


def test_attention_of_an_odd_number_of_tokens_has_the_gradient_of_one_token_more_masked_out(monkeypatch):
    """cuDNN's part, by XLA: with a gradient JAX takes even numbers for cuDNN only."""
    shapes, plain = [], jax.nn.dot_product_attention

    def recorded(*qkv, **options):
        shapes.append(qkv[0].shape[1])
        return plain(*qkv, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    *qkv, g = np.random.default_rng(0).normal(size=(4, 2, 5, 3, 8)).astype(np.float32)
    out, pull = jax.vjp(lambda *x: attention.fused_attention(*x, "xla"), *qkv)
    wanted, pull_plain = jax.vjp(plain, *qkv)
    assert shapes == [6]
    np.testing.assert_array_equal(attention.fused_attention(*qkv, "xla"), plain(*qkv))
    assert shapes == [6, 5]  # without a gradient nothing is copied
    for found, expected in zip((out, *pull(g)), (wanted, *pull_plain(g)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_attention_rejects_a_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="width 8 is not a multiple of num_heads 3"):
        transformer.SelfAttention(3).init(jax.random.key(0), jnp.zeros((1, 2, 8)))


def test_block_hands_arguments_to_its_mlp_and_returns_its_aux():
    class Scaled(nn.Module):
        def __call__(self, x, factor):
            return factor * x, {"factor": factor}

    block = transformer.EncoderBlock(HEADS, lambda name: Scaled(name=name))
    x = jax.random.normal(jax.random.key(1), (1, 3, WIDTH))
    variables = jax.jit(block.init)(jax.random.key(0), x, 2.0)
    apply = jax.jit(block.apply)
    kept, aux = apply(variables, x, 0.0)
    added, _ = apply(variables, x, 2.0)
    assert float(aux["factor"]) == 0.0
    np.testing.assert_allclose(added - kept, 2 * _norm(np.asarray(kept), {"scale": 1, "bias": 0}), atol=1e-5)


def test_patchify_cuts_row_by_row_and_unpatchify_puts_back():
    images = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    patches = np.asarray(transformer.patchify(images, 2))
    assert patches.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            patch = images[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(patches[:, 3 * row + column], patch.reshape(2, -1))
    np.testing.assert_array_equal(transformer.unpatchify(patches, 2, height=4), images)
    with pytest.raises(ValueError, match="image size 4x6 is not a multiple of patch_size 4"):
        transformer.patchify(images, 4)


def test_patch_embed_is_a_strided_convolution():
    images = np.random.default_rng(0).normal(size=(2, 4, 8, 3)).astype(np.float32)
    module = transformer.PatchEmbed(WIDTH, patch_size=4)
    params = _randomised(module.init(jax.random.key(0), images)["params"])
    out = module.apply({"params": params}, images)
    kernel = params["proj"]["kernel"].reshape(4, 4, 3, WIDTH)
    expected = [np.einsum("bhwc,hwcd->bd", images[:, :, i : i + 4], kernel) for i in (0, 4)]
    # Sums of 48 terms in float32.
    np.testing.assert_allclose(out, np.stack(expected, 1) + params["proj"]["bias"], rtol=0, atol=2e-5)


def test_bfloat16_rounds_operands_with_float32_parameters():
    module = transformer.EncoderBlock(
        HEADS, lambda name: transformer.Mlp(HIDDEN, dtype=jnp.bfloat16, name=name), dtype=jnp.bfloat16
    )
    x = jax.random.normal(jax.random.key(1), (BATCH, TOKENS, WIDTH), jnp.bfloat16)
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out, _ = jax.jit(module.apply)({"params": params}, x)
    assert out.dtype == jnp.float32  # activations on a CPU; see core/dense.py
    reference = _block(np.asarray(x, np.float64), jax.tree.map(np.float64, jax.device_get(params)))
    # bfloat16 keeps 8 bits: 2^-8 of values up to 4, a few roundings.
    np.testing.assert_allclose(np.asarray(out, np.float64), reference, rtol=0, atol=0.08)
