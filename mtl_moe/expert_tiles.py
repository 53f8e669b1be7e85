"""The experts' MLPs on the CPU: expert by expert a loop over its tiles of rows, one such pass forward, one backward.

Both products, GELU, bias and gate of a tile are done in one turn, so that its hidden rows need not go to memory; the
loops' lengths depend on the data, so that unused tiles cost nothing; an expert's matrices are picked, and its weight
gradients put away, once. The backward pass computes the hidden rows again: keeping them was no faster and takes their
memory. What was tried: `benchmarks/NOTES.md`.

Axes: N rows, D width, F hidden width, K selected experts of a row, E experts, G tiles of M rows.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from core.dense import dot, transposed
from mtl_moe import routing
from mtl_moe.routing import Plan

MAX_TILE = 128  # rows; 256 is as fast with few experts and wastes more padding with many

Params = Mapping[str, jax.Array]


def tile_size(num_assignments: int, num_experts: int, most: int = MAX_TILE) -> int:
    """The power of two nearest above the mean rows per expert, in [8, most]: small batches are not all padding."""
    mean = -(-num_assignments // num_experts)
    return min(max(1 << (mean - 1).bit_length(), 8), most)


def apply_tiles(x: jax.Array, experts: jax.Array, weights: jax.Array, params: Params, dtype: Any) -> jax.Array:
    """sum_k weights[n, k] * MLP of expert experts[n, k] on x[n]; choices outside [0, E) contribute nothing.

    Args:
      x: [N, D].
      experts, weights: int32 and float [N, K].
      params: w1 [E, D, F], b1 [E, F], w2 [E, F, D], b2 [E, D].
      dtype: that operands of products are rounded to; sums are float32.

    Returns:
      [N, D] in the dtype of x.
    """
    num_experts = params["w1"].shape[0]
    plan = routing.plan(experts, num_experts, tile_size(experts.size, num_experts))
    return _apply(x, weights, dict(params), plan, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _apply(x: jax.Array, weights: jax.Array, params: Params, plan: Plan, dtype: Any) -> jax.Array:
    rounded = _rounded(params, dtype)
    rows, scale = routing.to_tiles(x.astype(dtype), plan), _to_places(weights, plan)
    tile, ends = _tile_ends(plan)

    def solve(e: jax.Array, out: jax.Array) -> jax.Array:
        w = _of(rounded, e)

        def turn(i: jax.Array, out: jax.Array) -> jax.Array:
            hidden = _gelu(dot(_slice(rows, i, tile), w["w1"], (1, 0)) + w["b1"][None])
            y = (dot(hidden.astype(dtype), w["w2"], (1, 0)) + w["b2"][None]) * _slice(scale, i, tile)[:, None]
            return _put(out, y, i, tile)

        return jax.lax.fori_loop(ends[e], ends[e + 1], turn, out)

    out = jax.lax.fori_loop(0, len(ends) - 1, solve, jnp.zeros(rows.shape, jnp.float32))
    return routing.from_tiles(out, plan).astype(x.dtype)


def _apply_fwd(x: jax.Array, weights: jax.Array, params: Params, plan: Plan, dtype: Any) -> tuple[jax.Array, Any]:
    return _apply(x, weights, params, plan, dtype), (x, weights, params, plan)


def _apply_bwd(dtype: Any, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, Params, None]:
    x, weights, params, plan = saved
    rounded = _rounded(params, dtype)
    rows, scale = routing.to_tiles(x.astype(dtype), plan), _to_places(weights, plan)
    g_rows = routing.to_tiles(g.astype(dtype), plan)
    tile, ends = _tile_ends(plan)

    def solve(e: jax.Array, carry: Any) -> Any:
        w = _of(rounded, e)

        def turn(i: jax.Array, carry: Any) -> Any:
            dx, dscale, dw = carry
            r, s, gi = (_slice(a, i, tile) for a in (rows, scale, g_rows))
            s = s[:, None]
            hidden, pull = jax.vjp(_gelu, dot(r, w["w1"], (1, 0)) + w["b1"][None])
            # y = scale * (hidden w2 + b2): the scale's gradient from what the hidden rows' needs anyway, without y.
            dhidden = dot(gi, w["w2"], (1, 1))
            ds = (hidden * dhidden).sum(-1) + (gi * w["b2"][None]).sum(-1)
            (dpre,) = pull(s * dhidden)
            dw = {
                "w1": dw["w1"] + dot(transposed(r), dpre.astype(dtype), (1, 0)),
                "b1": dw["b1"] + dpre.sum(0),
                "w2": dw["w2"] + dot(transposed((s * hidden).astype(dtype)), gi, (1, 0)),
                "b2": dw["b2"] + (s * gi).sum(0),
            }
            return _put(dx, dot(dpre.astype(dtype), w["w1"], (1, 1)), i, tile), _put(dscale, ds, i, tile), dw

        dx, dscale, dparams = carry
        zeros = {name: jnp.zeros(p.shape[1:], jnp.float32) for name, p in params.items()}
        dx, dscale, dw = jax.lax.fori_loop(ends[e], ends[e + 1], turn, (dx, dscale, zeros))
        put = jax.lax.dynamic_update_index_in_dim
        return dx, dscale, {name: put(d, dw[name], e, 0) for name, d in dparams.items()}

    zeros = {name: jnp.zeros(p.shape, jnp.float32) for name, p in params.items()}
    start = (jnp.zeros(rows.shape, jnp.float32), jnp.zeros(len(rows)), zeros)
    dx, dscale, dparams = jax.lax.fori_loop(0, len(ends) - 1, solve, start)
    dweights = dscale.at[plan.place].get(mode="fill", fill_value=0).astype(weights.dtype)
    dparams = {name: d.astype(params[name].dtype) for name, d in dparams.items()}
    return routing.from_tiles(dx, plan).astype(x.dtype), dweights, dparams, None


_apply.defvjp(_apply_fwd, _apply_bwd)


def _tile_ends(plan: Plan) -> tuple[int, jax.Array]:
    """Rows of a tile, and where each expert's tiles begin: int32 [E + 1], the last the number of tiles in use."""
    tile = len(plan.source) // len(plan.tile_expert)
    return tile, jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(-(-plan.group_sizes // tile))])


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _rounded(params: Params, dtype: Any) -> Params:
    """Matrices in `dtype`, biases in float32."""
    return {name: p.astype(dtype if name[0] == "w" else jnp.float32) for name, p in params.items()}


def _to_places(weights: jax.Array, plan: Plan) -> jax.Array:
    """Gate weights [N, K] in the places of their assignments, float32 [G * M]; 0 in padding."""
    return weights.astype(jnp.float32).reshape(-1).at[plan.source].get(mode="fill", fill_value=0)


def _of(params: Params, expert: jax.Array) -> Params:
    return {name: jax.lax.dynamic_index_in_dim(p, expert, keepdims=False) for name, p in params.items()}


def _slice(x: jax.Array, i: jax.Array, tile: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * tile, tile)


def _put(x: jax.Array, rows: jax.Array, i: jax.Array, tile: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, i * tile, 0)
