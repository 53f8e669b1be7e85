"""Mixture-of-Experts MLP: rows are moved to their experts' tiles, multiplied, moved back. Dropless.

There is no capacity and no row is dropped, so an image's output does not depend on the other images of its batch
(beyond the order of floating-point sums inside a matmul). The GELU is the tanh approximation, as in `core.vit.Mlp`.

Axes: B batch, N tokens of an image (in the functions: rows, B*N flattened), D width, F hidden width, K selected experts
of a row (top_k), E experts, T tasks, A = N * K assignments of rows to experts.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from core.dense import activation_dtype
from core.vit import Mlp
from mtl_moe import routing
from mtl_moe.routing import Gate, Plan
from mtl_moe.tiles import Params, apply_tiles

Dispatch = Literal["auto", "tiles", "ragged"]
RouterKind = Literal["shared", "per_task", "fixed"]
TASK_EMBEDDING_DIM = 16
# Standard deviation of the first logits for rows of norm sqrt(D) (after a LayerNorm). See `Router`.
LOGIT_INIT_STD = 0.01


def active_hidden_dim(hidden_dim: int, top_k: int, shared_expert: bool) -> int:
    """Hidden width of the dense MLP with the same FLOPs per token (router aside)."""
    return hidden_dim * (top_k + shared_expert)


def total_hidden_dim(hidden_dim: int, num_experts: int, shared_expert: bool) -> int:
    """Hidden width of the dense MLP with the same number of weights (router and output biases aside)."""
    return hidden_dim * (num_experts + shared_expert)


def _ragged_matmul(x: jax.Array, w: jax.Array, plan: Plan, dtype: Any) -> jax.Array:
    """Row n of x [A, D] times its expert's matrix of w [E, D, F], for a plan of tile 1: [A, F], 0 in unused rows."""
    # ragged_dot does not promise zeros after the last group, which is where rows of other devices' experts lie.
    used = jnp.arange(x.shape[0]) < plan.num_tiles_used
    out = jax.lax.ragged_dot(x.astype(dtype), w.astype(dtype), plan.group_sizes)
    return jnp.where(used[:, None], out, 0).astype(x.dtype)


def _apply_ragged(x: jax.Array, experts: jax.Array, weights: jax.Array, params: Params, dtype: Any) -> jax.Array:
    """As `mtl_moe.tiles.apply_tiles`, by `jax.lax.ragged_dot`: for GPU and TPU."""
    num_experts = params["w1"].shape[0]
    plan = routing.plan(experts, num_experts, tile=1)
    chosen = jax.nn.one_hot(plan.tile_expert, num_experts, dtype=x.dtype)

    def dense(rows: jax.Array, name: str) -> jax.Array:
        # A one-hot matmul instead of indexing: its gradient is a matmul, not a scatter into few rows.
        return _ragged_matmul(rows, params[f"w{name}"], plan, dtype) + chosen @ params[f"b{name}"].astype(x.dtype)

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
      dispatch: "tiles" (loop over tiles of one expert each), "ragged" (`jax.lax.ragged_dot`) or "auto": tiles on CPU,
        ragged elsewhere. Same result to float rounding.
      mesh: with axes "data" (splits N) and "expert" (splits E), axis types Auto; None for one device.
      dtype: that operands of products are rounded to; weight gradients are summed in float32.

    Returns:
      [N, D] in the dtype of x.

    Raises:
      ValueError: if `dispatch` is unknown, or N or E does not divide over the mesh.
    """
    if dispatch not in ("auto", "tiles", "ragged"):
        raise ValueError(f"dispatch={dispatch!r}: expected 'auto', 'tiles' or 'ragged'")
    if dispatch == "auto":
        dispatch = "tiles" if jax.default_backend() == "cpu" else "ragged"
    apply = apply_tiles if dispatch == "tiles" else _apply_ragged
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
