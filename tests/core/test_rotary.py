"""Rotary positions against complex numbers, one token and one pair at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import transformer, vit
from core.rotary import Rotary, rotate

GRID, PREFIX, HEADS, HEAD_DIM, BASE = 3, 2, 2, 8, 10.0
ROTARY = Rotary(GRID, PREFIX, BASE)
TOKENS = PREFIX + GRID * GRID
CONFIG = vit.VitConfig(
    depth=1, width=16, num_heads=2, mlp_dim=24, patch_size=4, image_size=12, num_registers=1, position="rotary"
)  # fmt: skip


def _turned(x: np.ndarray) -> np.ndarray:
    """The definition: pair (i, i + Dh / 2) is a complex number; the first half of the pairs goes by row."""
    out = x.astype(np.float64)
    for row in range(GRID):
        for column in range(GRID):
            token = PREFIX + row * GRID + column
            for pair in range(HEAD_DIM // 2):
                along = (row, column)[pair // (HEAD_DIM // 4)]
                centre = 2 * (along + 0.5) / GRID - 1
                period = BASE ** (pair % (HEAD_DIM // 4) / (HEAD_DIM // 4))
                number = x[:, token, :, pair] + 1j * x[:, token, :, pair + HEAD_DIM // 2]
                number = number * np.exp(2j * np.pi * centre / period)
                out[:, token, :, pair], out[:, token, :, pair + HEAD_DIM // 2] = number.real, number.imag
    return out


def test_values_and_gradients() -> None:
    """1e-6: one rounding to float32 of angles up to 2 pi and of products near 1."""
    x = np.random.default_rng(0).normal(size=(2, TOKENS, HEADS, HEAD_DIM)).astype(np.float32)
    found, pull = jax.vjp(lambda x: rotate(x, ROTARY), jnp.asarray(x))
    np.testing.assert_allclose(found, _turned(x), atol=2e-6)
    np.testing.assert_array_equal(found[:, :PREFIX], x[:, :PREFIX])
    (gradient,) = pull(found)  # a rotation's transpose is its inverse
    np.testing.assert_allclose(gradient, x, atol=2e-6)
    half = rotate(jnp.asarray(x, jnp.bfloat16), ROTARY)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), found, atol=0.05)  # two roundings of values up to 4


def test_attention_turns_queries_and_keys_alone() -> None:
    x = np.random.default_rng(1).normal(size=(2, TOKENS, 16)).astype(np.float32)
    module = transformer.SelfAttention(HEADS, key_bias=False, rotary=ROTARY)
    params = module.init(jax.random.key(0), x)["params"]
    assert "bias" not in params["key"]
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.3), params)
    q, k, v = (np.tensordot(x, params[name]["kernel"], 1) for name in ("query", "key", "value"))
    q, v = q + params["query"]["bias"], v + params["value"]["bias"]
    logits = np.einsum("bnkd,bmkd->bknm", _turned(np.asarray(q)), _turned(np.asarray(k))) / np.sqrt(HEAD_DIM)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = np.einsum("bknm,bmkd->bnkd", weights / weights.sum(-1, keepdims=True), v)
    expected = np.tensordot(mixed, params["out"]["kernel"], 2) + params["out"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)


def test_weights_serve_images_of_any_size() -> None:
    """No parameter depends on the number of patches, and where patches lie still matters."""
    params = vit.init_params(CONFIG, jax.random.key(0))
    assert "pos_embedding" not in params
    larger = dataclasses.replace(CONFIG, image_size=24)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, dict(vit.abstract_params(larger)))
    image = np.random.default_rng(2).normal(size=(1, 24, 24, 3)).astype(np.float32)
    apply = jax.jit(vit.VisionTransformer(larger).apply)
    tokens = apply({"params": params}, image).tokens
    mirrored = apply({"params": params}, image[:, ::-1]).tokens
    assert np.abs(tokens[:, 0] - mirrored[:, 0]).max() > 1e-4


@pytest.mark.parametrize("fields", [dict(num_heads=8), dict(rotary_base=1.0)])
def test_impossible_heads_and_bases_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match="rotary positions: expected heads of a multiple of 4 and rotary_base above 1"):
        dataclasses.replace(CONFIG, **fields)
