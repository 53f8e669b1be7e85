"""Routing of a Mixture-of-Experts layer in parts: gate, losses, statistics, dispatch plan, moves. Pure functions.

Axes: N rows (tokens of all images), D width, K selected experts of a row (top_k), E experts, T tasks, G tiles of the
plan. All routing is done in float32. Sources: Switch Transformer (Fedus et al., arXiv 2101.03961), V-MoE (Riquelme et
al., arXiv 2106.05974), ST-MoE (Zoph et al., arXiv 2202.08906), MegaBlocks' padded expert runs (arXiv 2211.15841).
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Gate:
    """Which experts each row goes to.

    Attributes:
      weights: float32 [N, K], non-negative factors of the selected experts' outputs.
      experts: int32 [N, K], in order of falling weight, in [0, E).
      probs: float32 [N, E], softmax of the noise-free logits.
      logits: float32 [N, E], noise-free.
    """

    weights: jax.Array
    experts: jax.Array
    probs: jax.Array
    logits: jax.Array


@flax.struct.dataclass
class Plan:
    """Static-shape dispatch: rows sorted by expert, each expert's run padded to whole tiles (see `plan`).

    Attributes:
      tile_expert: int32 [G], the expert of each tile; meaningless from `num_tiles_used` on.
      num_tiles_used: int32 scalar, the tiles that hold rows; always the first ones.
      source: int32 [G * tile], the assignment (row * K + choice) in each place, N * K in padding.
      place: int32 [N, K], inverse of `source`; G * tile for an assignment to no expert of this plan.
      group_sizes: int32 [E], assignments of each expert.
    """

    tile_expert: jax.Array
    num_tiles_used: jax.Array
    source: jax.Array
    place: jax.Array
    group_sizes: jax.Array


def gate(logits: jax.Array, top_k: int, key: jax.Array | None = None) -> Gate:
    """Selects the `top_k` largest logits of each row; equal logits are taken in order of expert number.

    With K > 1 the weights are the softmax over the selected experts: they sum to 1, so the layer's output scale depends
    neither on E nor on how sharp the router is. With K = 1 that would be the constant 1, through which the router could
    not learn, so the weight is the probability itself (Switch). In training Gaussian noise of standard deviation 1/E is
    added to the logits (V-MoE); it decides selection and weights, while `probs` and `logits` stay noise-free.

    Args:
      logits: [N, E], cast to float32.
      top_k: experts per row, K.
      key: key of the noise in training; None for no noise.

    Raises:
      ValueError: if top_k is not in [1, E].
    """
    num_experts = logits.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} with {num_experts} experts: expected 1 <= top_k <= num_experts")
    logits = logits.astype(jnp.float32)
    noisy = logits
    if key is not None:
        noisy = logits + jax.random.normal(key, logits.shape) / num_experts
    selected, experts = jax.lax.top_k(noisy, top_k)
    if top_k == 1:
        weights = jnp.exp(selected - jax.nn.logsumexp(noisy, axis=-1, keepdims=True))
    else:
        weights = jax.nn.softmax(selected, axis=-1)
    return Gate(weights, experts.astype(jnp.int32), jax.nn.softmax(logits, axis=-1), logits)


def fixed_gate(experts: jax.Array, num_experts: int) -> Gate:
    """Gate without a router: row n goes to `experts` [N] with weight 1."""
    probs = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32)
    return Gate(jnp.ones((experts.shape[0], 1)), experts.astype(jnp.int32)[:, None], probs, jnp.log(probs))


def _shares(gate: Gate) -> jax.Array:
    """Share of each row's selections per expert, [N, E]; rows sum to 1."""
    return jax.nn.one_hot(gate.experts, gate.probs.shape[-1], dtype=jnp.float32).mean(axis=1)


def load_balance_loss(gate: Gate) -> jax.Array:
    """E * sum_e (share of selections of e) * (mean probability of e), Switch eq. 4: 1 if balanced, E if collapsed.

    Taken over the whole batch and not per task: balance within each task would forbid experts to specialise on tasks.

    Args:
      gate: of N rows.
    """
    share = jax.lax.stop_gradient(_shares(gate).mean(axis=0))
    return gate.probs.shape[-1] * jnp.sum(share * gate.probs.mean(axis=0))


def z_loss(gate: Gate) -> jax.Array:
    """Mean squared log-sum-exp of the router's logits (ST-MoE eq. 5), which keeps them small."""
    return (jax.nn.logsumexp(gate.logits, axis=-1) ** 2).mean()


def router_stats(gate: Gate, task_ids: jax.Array, num_tasks: int) -> tuple[jax.Array, jax.Array]:
    """Use of the experts by each task.

    Args:
      gate: of N rows.
      task_ids: int32 [N], the task of each row, in [0, T).
      num_tasks: T.

    Returns:
      utilisation [T, E]: share of the task's selections that went to each expert; rows sum to 1. entropy [T]: mean
      entropy of the router's probabilities, in nats, from 0 to log E. Both are 0 for a task without rows.
    """
    member = jax.nn.one_hot(task_ids, num_tasks, dtype=jnp.float32)
    total = member.sum(axis=0)
    member = member / jnp.where(total > 0, total, 1.0)[None, :]
    entropy = jax.scipy.special.entr(gate.probs).sum(axis=-1)
    return member.T @ _shares(gate), member.T @ entropy


def max_tiles(num_assignments: int, num_experts: int, tile: int) -> int:
    """Most tiles that any assignment of rows to experts can need: sum_e ceil(count_e / tile) at its largest."""
    return min((num_assignments + num_experts * (tile - 1)) // tile, num_assignments)


def plan(experts: jax.Array, num_experts: int, tile: int) -> Plan:
    """Plans a dropless dispatch: assignments sorted by expert (stable), each expert's run padded to whole tiles.

    Every tile then belongs to one expert and is one dense matmul; no row is ever dropped, because G is the most that
    any assignment can need (`max_tiles`). `tile` = 1 is the plain sort that a ragged matmul wants. It is a counting
    sort: on a CPU several times as fast as XLA's general one with 8 experts, 1.4 to 1.5 times as slow with 64
    (benchmarks/NOTES.md).

    Args:
      experts: int32 [N, K]; an assignment outside [0, num_experts) gets no place (experts of another device).
      num_experts: E.
      tile: rows per tile.
    """
    num_assignments = experts.size
    num_tiles = max_tiles(num_assignments, num_experts, tile)
    flat = experts.reshape(-1)
    member = (flat[:, None] == jnp.arange(num_experts)[None]).astype(jnp.int32)
    count = jnp.cumsum(member, axis=0)  # of each expert's assignments, up to and with this one
    group_sizes = count[-1]
    tile_end = jnp.cumsum(-(-group_sizes // tile))
    place_start = jnp.concatenate([jnp.zeros(1, jnp.int32), tile_end[:-1]]) * tile
    held = (flat >= 0) & (flat < num_experts)
    place = jnp.where(held, (member * (place_start[None] + count - 1)).sum(axis=1), num_tiles * tile)

    source = jnp.full(num_tiles * tile, num_assignments, jnp.int32)
    source = source.at[place].set(jnp.arange(num_assignments, dtype=jnp.int32), mode="drop")
    tile_expert = jnp.searchsorted(tile_end, jnp.arange(num_tiles), side="right").astype(jnp.int32)
    tile_expert = jnp.minimum(tile_expert, num_experts - 1)
    return Plan(tile_expert, tile_end[-1], source, place.reshape(experts.shape), group_sizes)


@jax.custom_vjp
def to_tiles(x: jax.Array, plan: Plan) -> jax.Array:
    """Copies rows x [N, D] to their places [G * tile, D]; padding is 0. The transpose of `from_tiles`."""
    return x.at[plan.source // plan.place.shape[1]].get(mode="fill", fill_value=0)


@jax.custom_vjp
def from_tiles(y: jax.Array, plan: Plan) -> jax.Array:
    """Sums the K places of each row, y [G * tile, D] -> [N, D]. The transpose of `to_tiles`."""
    return y.at[plan.place].get(mode="fill", fill_value=0).sum(axis=1)


# Each is the other's gradient: both stay gathers, where automatic differentiation would scatter, which is slow.
to_tiles.defvjp(lambda x, plan: (to_tiles(x, plan), plan), lambda plan, g: (from_tiles(g, plan), None))
from_tiles.defvjp(lambda y, plan: (from_tiles(y, plan), plan), lambda plan, g: (to_tiles(g, plan), None))
