"""Mixture-of-Experts MLP: rows are moved to their experts' tiles, multiplied, moved back. Dropless.

There is no capacity and no row is dropped, so an image's output does not depend on the other images of its batch
(beyond the order of floating-point sums inside a matmul). The GELU is the tanh approximation.

Axes: B batch, N tokens of an image (in the functions: rows, B*N flattened), D width, F hidden width, K selected experts
of a row (top_k), E experts, T tasks, A = N * K assignments of rows to experts.
"""

from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from core.dense import activation_dtype
from core.transformer import Mlp
from mtl_moe import routing
from mtl_moe.expert_tiles import Params, apply_tiles, tile_size
from mtl_moe.routing import Gate

Dispatch = Literal["auto", "tiles", "batched", "ragged"]
RouterKind = Literal["shared", "per_task", "fixed"]
TASK_EMBEDDING_DIM = 16
BATCHED_TILE = 512  # rows at most: the copies of matrices are then no larger than the rows where F and D are about that
# Standard deviation of the first logits for rows of norm sqrt(D) (after a LayerNorm). See `Router`.
LOGIT_INIT_STD = 0.01


def active_hidden_dim(hidden_dim: int, top_k: int, shared_expert: bool) -> int:
    """Hidden width of the dense MLP with the same FLOPs per token (router aside)."""
    return hidden_dim * (top_k + shared_expert)


def total_hidden_dim(hidden_dim: int, num_experts: int, shared_expert: bool) -> int:
    """Hidden width of the dense MLP with the same number of weights (router and output biases aside)."""
    return hidden_dim * (num_experts + shared_expert)


def _apply_products(
    x: jax.Array, experts: jax.Array, weights: jax.Array, params: Params, dtype: Any, batched: bool
) -> jax.Array:
    """As `mtl_moe.expert_tiles.apply_tiles`, each of the two products as one operation: for GPU and TPU.

    Batched: every tile with its expert's matrix, which is copied for it. Otherwise `jax.lax.ragged_dot` on tiles of one
    row; XLA's GPU backend turns that into a product of all rows with all experts' matrices, E times the FLOPs.
    """
    num_experts = params["w1"].shape[0]
    tile = tile_size(experts.size, num_experts, BATCHED_TILE) if batched else 1
    plan = routing.plan(experts, num_experts, tile)
    # Tiles that are not used, or hold rows of other devices' experts, choose none: nothing of theirs may reach a sum.
    used = jnp.arange(len(plan.tile_expert)) < plan.num_tiles_used
    chosen = jax.nn.one_hot(plan.tile_expert, num_experts, dtype=x.dtype) * used[:, None]

    def ragged(rows: jax.Array, w: jax.Array) -> jax.Array:
        # ragged_dot promises zeros after the last group neither forward nor, the inner mask, in its gradient.
        rows = jnp.where(used[:, None], rows, 0)
        return jnp.where(used[:, None], jax.lax.ragged_dot(rows, w, plan.group_sizes), 0)

    @jax.checkpoint  # the copies of the matrices are made again for the gradient instead of kept
    def of_tiles(rows: jax.Array, w: jax.Array) -> jax.Array:
        # A one-hot product instead of indexing: its gradient is a product, not a scatter into few rows.
        picked = jnp.einsum("ge,edf->gdf", chosen.astype(dtype), w)
        return jnp.einsum("gmd,gdf->gmf", rows.reshape(len(chosen), tile, -1), picked).reshape(len(rows), -1)

    product = of_tiles if batched else ragged

    def dense(rows: jax.Array, name: str) -> jax.Array:
        bias = chosen @ params[f"b{name}"].astype(x.dtype)
        out = product(rows.astype(dtype), params[f"w{name}"].astype(dtype)).astype(x.dtype)
        return out + jnp.repeat(bias, tile, axis=0)

    hidden = jax.nn.gelu(dense(routing.to_tiles(x, plan), "1"), approximate=True)
    scale = weights.reshape(-1).at[plan.source].get(mode="fill", fill_value=0).astype(x.dtype)
    return routing.from_tiles(dense(hidden, "2") * scale[:, None], plan)


def apply_experts(
    x: jax.Array,
    gate: Gate,
    params: Params,
    dispatch: Dispatch = "auto",
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """sum_k weights[n, k] * MLP of expert experts[n, k] on x[n]; equal to a loop over rows and experts.

    On a mesh each device sorts only its own rows and computes only its own experts; the results are summed over
    `expert`. Nothing is sorted or gathered across devices.

    Args:
      x: [N, D], float32 or bfloat16.
      gate: of the same N rows.
      params: w1 [E, D, F], b1 [E, F], w2 [E, F, D], b2 [E, D].
      dispatch: "tiles" (loop over tiles of one expert each), "batched" (all tiles in one product), "ragged"
        (`jax.lax.ragged_dot`) or "auto": tiles on CPU, ragged on TPU, batched elsewhere. Same result to float rounding.
      mesh: with axes "data" (splits N) and "expert" (splits E), axis types Auto; None for one device.
      dtype: that operands of products are rounded to. Weight gradients are summed in float32 by "tiles"; the others
        leave them in `dtype`, "batched" after rounding each tile's part to it.

    Returns:
      [N, D] in the dtype of x.

    Raises:
      ValueError: if `dispatch` is unknown, or N or E does not divide over the mesh.
    """
    if dispatch not in get_args(Dispatch):
        raise ValueError(f"dispatch={dispatch!r}: expected one of {', '.join(get_args(Dispatch))}")
    if dispatch == "auto":
        dispatch = {"cpu": "tiles", "tpu": "ragged"}.get(jax.default_backend(), "batched")
    apply = apply_tiles if dispatch == "tiles" else partial(_apply_products, batched=dispatch == "batched")
    if mesh is None:
        return apply(x, gate.experts, gate.weights, params, dtype)

    num_experts = params["w1"].shape[0]
    for what, size, axis in (("rows", x.shape[0], "data"), ("experts", num_experts, "expert")):
        if size % mesh.shape[axis]:
            raise ValueError(f"{size} {what} do not divide over mesh axis '{axis}' of size {mesh.shape[axis]}")

    def body(x: jax.Array, experts: jax.Array, weights: jax.Array, params: Params) -> jax.Array:
        first = jax.lax.axis_index("expert") * (num_experts // mesh.shape["expert"])
        return jax.lax.psum(apply(x, experts - first, weights, params, dtype), "expert")

    # check_vma is off because the loops' carries start as constants, which that check takes for equal on all devices.
    shard = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(P("data"), P("data"), P("data"), P("expert")),
        out_specs=P("data"),
        check_vma=False,
    )
    return shard(x, gate.experts, gate.weights, dict(params))


def _router_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    # Not the default precision: TF32 on GPU would let rounding decide between close experts.
    return jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST)


class Router(nn.Module):
    """Linear router on [token, task embedding], or one per task; float32 logits [B*N, E].

    The first logits are nearly but not exactly equal (LOGIT_INIT_STD): a gate of exact zeros (Mod-Squad) would send
    every row to experts 0..K-1 wherever there is no noise, for instance when an untrained model is evaluated. At this
    size the noise of training (1/E) decides the first selections and the weights start at 1/K, as with zeros.
    """

    num_experts: int
    num_tasks: int
    per_task: bool

    @nn.compact
    def __call__(self, tokens: jax.Array, task_ids: jax.Array) -> jax.Array:
        batch, num_tokens, width = tokens.shape
        flat = tokens.reshape(-1, width).astype(jnp.float32)
        init = nn.initializers.normal(LOGIT_INIT_STD * width**-0.5)
        if self.per_task:
            # All tasks' logits in one 2-D matmul, then a selection: cheaper than a batch of small matmuls.
            kernel = self.param("kernel", init, (self.num_tasks, width, self.num_experts))
            logits = _router_dot(flat, kernel.transpose(1, 0, 2).reshape(width, -1))
            logits = logits.reshape(batch, num_tokens, self.num_tasks, self.num_experts)
            own = jax.nn.one_hot(task_ids, self.num_tasks)[:, None, :, None]
            return (logits * own).sum(axis=2).reshape(-1, self.num_experts)
        kernel = self.param("kernel", init, (width, self.num_experts))
        embedding = self.param("task_embedding", nn.initializers.normal(1.0), (self.num_tasks, TASK_EMBEDDING_DIM))
        # [token, embedding] @ [kernel; task_kernel] = token @ kernel + embedding @ task_kernel, without the copy.
        task_kernel = self.param("task_kernel", nn.initializers.zeros, (TASK_EMBEDDING_DIM, self.num_experts))
        offset = (embedding @ task_kernel)[task_ids]
        return _router_dot(flat, kernel) + jnp.repeat(offset, num_tokens, axis=0)


class Experts(nn.Module):
    """Parameters of the experts, each initialised as a dense MLP of its own (fan-in of one expert)."""

    num_experts: int
    hidden_dim: int

    @nn.compact
    def __call__(self, width: int) -> dict[str, jax.Array]:
        e, f = self.num_experts, self.hidden_dim
        init, zeros = nn.initializers.lecun_normal(batch_axis=(0,)), nn.initializers.zeros
        shapes = {"w1": (e, width, f), "b1": (e, f), "w2": (e, f, width), "b2": (e, width)}
        return {name: self.param(name, init if name[0] == "w" else zeros, shape) for name, shape in shapes.items()}


class MoeMlp(nn.Module):
    """MLP of a transformer block as a mixture of experts.

    Parameters: router/{kernel, task_embedding, task_kernel}; experts/{w1, b1, w2, b2}; shared/{fc1, fc2}.

    Attributes:
      num_experts: routed experts, E.
      hidden_dim: hidden width F of each expert.
      num_tasks: T.
      top_k: routed experts per token; must be 1 for the router "fixed".
      shared_expert: adds an always-on dense expert of the same hidden width.
      router: "shared" (one router on token and task embedding), "per_task" (a router for each task) or "fixed" (no
        router: task t goes to expert t % E).
      dtype: of the computation; routing is always float32.
      mesh: see `apply_experts`; the batch must divide over its axis "data" (not asked of `init`).
      dispatch: see `apply_experts`.
    """

    num_experts: int
    hidden_dim: int
    num_tasks: int
    top_k: int = 2
    shared_expert: bool = True
    router: RouterKind = "shared"
    dtype: Any = jnp.float32
    mesh: Mesh | None = None
    dispatch: Dispatch = "auto"

    @nn.compact
    def __call__(
        self, tokens: jax.Array, task_ids: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Applies the layer; in training (not deterministic) it draws from the random stream "router".

        Args:
          tokens: [B, N, D].
          task_ids: int32 [B], the task of each view, in [0, T).
          deterministic: no router noise.

        Returns:
          tokens [B, N, D] in `activation_dtype(dtype)`, and {load_balance [], z_loss [], utilisation [T, E],
          entropy [T]}, float32, over the whole batch on all devices (see `routing`); both losses are 0 for the router
          "fixed".
        """
        batch, num_tokens, width = tokens.shape
        row_tasks = jnp.repeat(task_ids, num_tokens)
        gate = self._gate(tokens, task_ids, row_tasks, deterministic)

        mesh = None if self.is_initializing() else self.mesh
        if mesh is not None and batch % mesh.shape["data"]:
            raise ValueError(f"batch of {batch} does not divide over mesh axis 'data' of size {mesh.shape['data']}")
        params = Experts(self.num_experts, self.hidden_dim, name="experts")(width)
        flat = tokens.reshape(-1, width).astype(activation_dtype(self.dtype))
        out = apply_experts(flat, gate, params, self.dispatch, mesh, self.dtype).reshape(tokens.shape)
        if self.shared_expert:
            out = out + Mlp(self.hidden_dim, dtype=self.dtype, name="shared")(tokens)[0]

        learned = self.router != "fixed"
        utilisation, entropy = routing.router_stats(gate, row_tasks, self.num_tasks)
        return out, {
            "load_balance": routing.load_balance_loss(gate) if learned else jnp.zeros(()),
            "z_loss": routing.z_loss(gate) if learned else jnp.zeros(()),
            "utilisation": utilisation,
            "entropy": entropy,
        }

    def _gate(self, tokens: jax.Array, task_ids: jax.Array, row_tasks: jax.Array, deterministic: bool) -> Gate:
        if self.router == "fixed":
            if self.top_k != 1:
                raise ValueError(f"router='fixed' gives each task one expert: expected top_k=1, found {self.top_k}")
            return routing.fixed_gate(row_tasks % self.num_experts, self.num_experts)
        if self.router not in ("shared", "per_task"):
            raise ValueError(f"router={self.router!r}: expected 'shared', 'per_task' or 'fixed'")
        router = Router(self.num_experts, self.num_tasks, self.router == "per_task", name="router")
        key = None if deterministic else self.make_rng("router")
        return routing.gate(router(tokens, task_ids), self.top_k, key)
