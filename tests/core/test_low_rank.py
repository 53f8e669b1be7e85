"""Low-rank updates against products written out, and what does not fit.

Axes: D width, K heads, R rank.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.low_rank import init_low_rank, merge
from core.tree import paths

TARGETS = {r"attn/query/kernel": 1, r"attn/out/kernel": 2}


def parameters() -> dict:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    query, out = {"kernel": draw(6, 2, 3), "bias": draw(2, 3)}, {"kernel": draw(2, 3, 6), "bias": draw(6)}
    return {"attn": {"query": query, "out": out}, "norm": {"scale": draw(6)}}


def test_fresh_factors_change_nothing_and_lie_beside_their_kernels():
    params = parameters()
    adapters = init_low_rank(jax.random.key(0), params, TARGETS, 2)
    assert {path: leaf.shape for path, leaf in paths(adapters).items()} == {
        "attn/query/a": (6, 2), "attn/query/b": (2, 2, 3), "attn/out/a": (2, 3, 2), "attn/out/b": (2, 6)
    }  # fmt: skip
    assert 0 < np.abs(adapters["attn"]["out"]["a"]).max() <= 1 / np.sqrt(6)
    jax.tree.map(np.testing.assert_array_equal, merge(params, adapters), params)


def test_merged_kernels_have_the_product_added():
    params, rng = parameters(), np.random.default_rng(1)
    adapters = init_low_rank(jax.random.key(0), params, TARGETS, 2)
    adapters = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), adapters)
    merged, attn = merge(params, adapters), adapters["attn"]
    query = params["attn"]["query"]["kernel"] + np.einsum("dr,rkh->dkh", attn["query"]["a"], attn["query"]["b"])
    out = params["attn"]["out"]["kernel"] + np.einsum("khr,rd->khd", attn["out"]["a"], attn["out"]["b"])
    np.testing.assert_allclose(merged["attn"]["query"]["kernel"], query, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged["attn"]["out"]["kernel"], out, rtol=1e-5, atol=1e-5)
    assert merged["attn"]["out"]["bias"] is params["attn"]["out"]["bias"]
    assert merged["norm"] is params["norm"]


def test_what_does_not_fit_is_named():
    params = parameters()
    with pytest.raises(ValueError, match=r"attn/out/kernel: expected 1 to 6 \(it is 6 x 6\), found 7"):
        init_low_rank(jax.random.key(0), params, TARGETS, 7)
    with pytest.raises(ValueError, match="no kernel matches"):
        init_low_rank(jax.random.key(0), params, {"mlp/kernel": 1}, 2)
    with pytest.raises(ValueError, match=r"\['mlp'\] expected, found \['attn', 'norm'\]"):
        merge(params, {"mlp": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}})
