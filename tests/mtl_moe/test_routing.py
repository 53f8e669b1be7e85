"""Gate tables and plans written by hand; plans against counting in numpy; losses in their two limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_moe import routing

LOG = np.log
_plan = jax.jit(routing.plan, static_argnums=(1, 2))
_gate = jax.jit(routing.gate, static_argnums=1)


def test_gate_matches_a_table_written_by_hand():
    logits = jnp.array(LOG([[1, 2, 3, 4], [4, 1, 2, 3], [1, 1, 6, 2]]), jnp.float32)
    gate = _gate(logits, 2)
    assert gate.experts.tolist() == [[3, 2], [0, 3], [2, 3]]
    np.testing.assert_allclose(gate.weights, [[4 / 7, 3 / 7], [4 / 7, 3 / 7], [6 / 8, 2 / 8]], rtol=1e-6)
    np.testing.assert_allclose(
        gate.probs, [[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.2, 0.3], [0.1, 0.1, 0.6, 0.2]], rtol=1e-6
    )


def test_one_expert_per_row_keeps_its_probability():
    gate = _gate(jnp.array(LOG([[1, 2, 5], [6, 1, 1]]), jnp.float32), 1)
    assert gate.experts.tolist() == [[2], [0]]
    np.testing.assert_allclose(gate.weights, [[5 / 8], [6 / 8]], rtol=1e-6)


def test_ties_go_to_the_lower_expert_number():
    gate = _gate(jnp.array([[0.0, 0, 0, 0], [1, 2, 2, 1], [5, 0, 5, 5]]), 2)
    assert gate.experts.tolist() == [[0, 1], [1, 2], [0, 2]]
    np.testing.assert_array_equal(gate.weights, np.full((3, 2), 0.5))


def test_noise_changes_selection_and_weights_but_not_probs():
    logits = jnp.zeros((4000, 4))
    gate = _gate(logits, 1, jax.random.key(0))
    share = np.bincount(np.ravel(gate.experts), minlength=4) / 4000
    np.testing.assert_allclose(share, 0.25, atol=0.04)  # six standard deviations of a share of 4000 draws
    np.testing.assert_array_equal(gate.probs, np.full((4000, 4), 0.25))
    np.testing.assert_array_equal(gate.logits, logits)
    # The noise has standard deviation 1/E: two logits 0.5 apart swap with P(N(0, 2/16) > 0.5) = 0.079.
    swapped = _gate(jnp.tile(jnp.array([[0.5, 0.0, -9.0, -9.0]]), (4000, 1)), 1, jax.random.key(1)).experts == 1
    assert float(swapped.mean()) == pytest.approx(0.079, abs=0.02)


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_outside_the_experts_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k} with 4 experts"):
        _gate(jnp.zeros((2, 4)), top_k)


def test_losses_when_balanced_and_when_collapsed():
    balanced = _gate(3.0 * jnp.eye(4), 1)
    collapsed = _gate(jnp.array([[50.0, 0, 0, 0]] * 4), 1)
    assert float(routing.load_balance_loss(balanced)) == pytest.approx(1, rel=1e-6)
    assert float(routing.load_balance_loss(collapsed)) == pytest.approx(4, rel=1e-6)
    assert float(routing.z_loss(collapsed)) == pytest.approx(2500, rel=1e-6)
    assert float(routing.z_loss(_gate(jnp.zeros((3, 4)), 2))) == pytest.approx(LOG(4) ** 2, rel=1e-6)


def test_load_balance_by_hand_and_its_gradient_pushes_towards_balance():
    logits = jnp.array(LOG([[6, 2, 2], [5, 4, 1]]), jnp.float32)
    # top-2 of both rows is {0, 1}: shares 1/2, 1/2, 0; mean probabilities .55, .3, .15
    assert float(routing.load_balance_loss(_gate(logits, 2))) == pytest.approx(3 * (0.55 + 0.3) / 2, rel=1e-6)
    slope = jax.grad(lambda x: routing.load_balance_loss(_gate(x, 2)))(logits)
    assert (slope[:, 2] < 0).all()  # descending raises the logit of the unused expert


def test_router_stats_by_hand():
    logits = jnp.array(LOG([[8, 1, 1], [1, 8, 1], [8, 1, 1]]), jnp.float32)
    utilisation, entropy = routing.router_stats(_gate(logits, 1), jnp.array([0, 0, 2]), 4)
    np.testing.assert_allclose(utilisation, [[0.5, 0.5, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]], rtol=1e-6)
    h = -(0.8 * LOG(0.8) + 0.2 * LOG(0.1))
    np.testing.assert_allclose(entropy, [h, 0, h, 0], rtol=1e-5)


def test_fixed_gate_has_weight_one_and_no_entropy():
    gate = routing.fixed_gate(jnp.array([2, 0, 2]), 3)
    assert gate.experts.tolist() == [[2], [0], [2]]
    assert gate.weights.tolist() == [[1], [1], [1]]
    assert routing.router_stats(gate, jnp.array([0, 1, 0]), 2)[1].tolist() == [0, 0]


def test_plan_matches_indices_written_by_hand():
    experts = jnp.array([[2, 0], [0, 2], [2, 0], [2, 3]])  # assignments 0..7; expert 1 gets none
    plan = _plan(experts, 4, 3)
    assert routing.max_tiles(8, 4, 3) == 5
    assert plan.group_sizes.tolist() == [3, 0, 4, 1]
    assert int(plan.num_tiles_used) == 4
    assert plan.tile_expert[:4].tolist() == [0, 2, 2, 3]
    pad = 8
    assert plan.source.tolist() == [1, 2, 5, 0, 3, 4, 6, pad, pad, 7, pad, pad, pad, pad, pad]
    assert plan.place.tolist() == [[3, 0], [1, 4], [5, 2], [6, 9]]


def test_plan_leaves_out_experts_of_other_devices():
    plan = _plan(jnp.array([[-1, 1], [0, 2], [5, 1]]), 2, 2)
    assert plan.group_sizes.tolist() == [1, 2]
    assert plan.source.tolist() == [2, 6, 1, 5, 6, 6, 6, 6]
    assert plan.place.tolist() == [[8, 2], [0, 8], [8, 3]]


def _check_plan(experts: np.ndarray, num_experts: int, tile: int) -> routing.Plan:
    """Every assignment has one place, in a used tile of its own expert; counts by numpy."""
    plan = jax.tree.map(np.asarray, _plan(jnp.asarray(experts), num_experts, tile))
    counts = np.bincount(experts.ravel(), minlength=num_experts)
    np.testing.assert_array_equal(plan.group_sizes, counts)
    assert plan.num_tiles_used == sum(-(-c // tile) for c in counts) <= len(plan.tile_expert)
    np.testing.assert_array_equal(plan.source[plan.place.ravel()], np.arange(experts.size))
    assert (plan.source == experts.size).sum() == plan.source.size - experts.size
    np.testing.assert_array_equal(plan.tile_expert[plan.place // tile], experts)
    assert plan.place.max() < plan.num_tiles_used * tile
    return plan


@pytest.mark.parametrize(
    ("rows", "top_k", "num_experts", "tile"), [(37, 2, 8, 4), (5, 1, 3, 8), (64, 3, 4, 1), (1, 2, 6, 4)]
)
def test_plan_places_every_row(rows, top_k, num_experts, tile):
    rng = np.random.default_rng(rows)
    experts = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(rows)]).astype(np.int32)
    _check_plan(experts, num_experts, tile)


@pytest.mark.parametrize("expert", [0, 2, 4])
def test_plan_when_one_expert_receives_all_rows(expert):
    plan = _check_plan(np.full((21, 1), expert, np.int32), num_experts=5, tile=4)
    assert (plan.tile_expert[: plan.num_tiles_used] == expert).all()


def test_most_tiles_are_reached_and_never_exceeded():
    tile, num_experts = 4, 3
    worst = {}
    for a in range(12):
        for b in range(12 - a):
            for c in range(12 - a - b):
                n = a + b + c
                worst[n] = max(worst.get(n, 0), sum(-(-x // tile) for x in (a, b, c)))
    assert {n: routing.max_tiles(n, num_experts, tile) for n in worst} == worst


def test_moves_are_each_others_transpose_and_sum_the_choices():
    experts = jnp.array([[2, 0], [0, 2], [2, 0], [2, 1]])
    plan = _plan(experts, 3, 3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
    rows = routing.to_tiles(x, plan)
    np.testing.assert_array_equal(rows[np.ravel(plan.place)], np.repeat(x, 2, axis=0))
    np.testing.assert_array_equal(rows[np.asarray(plan.source) == 8], 0)
    np.testing.assert_allclose(routing.from_tiles(rows, plan), 2 * x, rtol=1e-6)
    # Both are linear: the hand-written gradients must be those of the matrices found by probing.
    y = jnp.asarray(np.random.default_rng(1).normal(size=rows.shape), jnp.float32)
    for move, at, g in ((routing.to_tiles, x, y), (routing.from_tiles, y, x)):
        probe = jax.vmap(lambda e, move=move: move(e, plan).ravel())(jnp.eye(at.size).reshape(-1, *at.shape))
        grad = jax.vjp(lambda v, move=move: move(v, plan), at)[1](g)[0]
        np.testing.assert_allclose(grad.ravel(), probe @ g.ravel(), rtol=1e-5, atol=1e-6)
