"""Schedule and optimizer against AdamW written out in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from core import tree
from core.mesh import make_mesh, shardings
from core.optim import build_optimizer, build_schedule, matrix_axes

NUM_STEPS = 20


def _config(**changes) -> ConfigDict:
    defaults = dict(kind="adamw", learning_rate=0.01, warmup_steps=4, weight_decay=0.1, b2=0.95, clip_norm=1.0)
    return ConfigDict(defaults | changes)


def _rate(update: int, num_steps: int = NUM_STEPS, warmup: int = 4) -> float:
    """Rate of update 1, 2, ...: linear to the peak at `warmup`, cosine to 0 at one after the last."""
    if update <= warmup:
        return 0.01 * update / warmup
    return 0.005 * (1 + math.cos(math.pi * (update - warmup) / (num_steps + 1 - warmup)))


def test_schedule_ramps_from_the_first_update_and_ends_near_zero():
    schedule = build_schedule(_config(), NUM_STEPS)
    rates = [float(schedule(step)) for step in range(NUM_STEPS + 1)]
    np.testing.assert_allclose(rates, [_rate(i) for i in range(1, NUM_STEPS + 2)], rtol=1e-5, atol=1e-8)
    assert rates[0] > 0
    assert rates[3] == max(rates)
    assert 0 < rates[NUM_STEPS - 1] < 0.01 * max(rates)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_a_run_shorter_than_the_warm_up_still_learns(num_steps):
    schedule = build_schedule(_config(warmup_steps=100), num_steps)
    rates = [float(schedule(step)) for step in range(num_steps)]
    expected = [_rate(i, num_steps, max(num_steps // 2, 1)) for i in range(1, num_steps + 1)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert min(rates) > 0
    assert max(rates) == pytest.approx(0.01)


def test_a_warm_up_or_a_run_below_one_is_refused():
    with pytest.raises(ValueError, match=r"optim\.warmup_steps must be at least 1, found 0"):
        build_schedule(_config(warmup_steps=0), NUM_STEPS)
    with pytest.raises(ValueError, match=r"num_steps must be at least 1, found 0"):
        build_optimizer(_config(), 0)


def test_only_kernels_and_expert_matrices_decay():
    leaf = jnp.ones((2, 2))
    params = {
        "block": {
            "attn": {"query": {"kernel": leaf, "bias": leaf}},
            "norm1": {"scale": leaf, "bias": leaf},
            "mlp": {
                "experts": {"w1": leaf, "b1": leaf, "w2": leaf, "b2": leaf},
                "router": {"kernel": leaf, "task_kernel": leaf, "task_embedding": leaf},
            },
        },
        "pos_embedding": leaf,
    }
    tx = build_optimizer(_config(), NUM_STEPS)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    # Without gradient only decay moves a parameter: by rate * decay * 1.
    moved = {path: float(leaf[0, 0]) for path, leaf in tree.paths(updates).items() if leaf.any()}
    assert set(moved) == {
        "block/attn/query/kernel",
        "block/mlp/experts/w1",
        "block/mlp/experts/w2",
        "block/mlp/router/kernel",
    }
    assert all(value == pytest.approx(-_rate(1) * 0.1) for value in moved.values())


def test_updates_are_adamw_with_clipping_by_the_global_norm():
    rng = np.random.default_rng(0)
    params = {"x": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}}
    # One far above the clipping norm, one below it: without clipping the first would rule the moments.
    grads = [jax.tree.map(lambda p, s=s: s * rng.normal(size=p.shape), params) for s in (1000.0, 0.1, 3.0)]

    tx = build_optimizer(_config(), NUM_STEPS)
    single = jax.tree.map(jnp.float32, params)
    opt_state = tx.init(single)
    for grad in grads:
        updates, opt_state = tx.update(jax.tree.map(jnp.float32, grad), opt_state, single)
        single = optax.apply_updates(single, updates)

    values, first, second = dict(params["x"]), {"kernel": 0.0, "bias": 0.0}, {"kernel": 0.0, "bias": 0.0}
    for t, grad in enumerate(grads, 1):
        norm = math.sqrt(sum((g**2).sum() for g in grad["x"].values()))
        for name, g in grad["x"].items():
            g = g / max(norm, 1.0)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            step = first[name] / (1 - 0.9**t) / (np.sqrt(second[name] / (1 - 0.95**t)) + 1e-8)
            decay = 0.1 * values[name] if name == "kernel" else 0.0
            values[name] = values[name] - _rate(t) * (step + decay)
    # float32 against float64 over three updates of 0.01.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), single["x"], values)


def test_muon_takes_each_matrix_of_a_block_and_leaves_the_rest_to_adam():
    shapes = {
        "trunk/block_00/attn/query/kernel": (8, 2, 3),
        "neck_00/attn/out/kernel": (2, 3, 8),
        "block_00/mlp/fc1/kernel": (8, 12),
        "detail_masked/kernel": (6, 4),
        "expert_00/mlp/experts/w1": (3, 8, 5),
        "expert_00/mlp/experts/b1": (3, 5),
        "expert_00/mlp/router/kernel": (8, 3),
        "trunk/embed/proj/kernel": (4, 8),
        "head_masked/kernel": (4, 6),
        "head/kernel": (8, 2),
        "trunk/block_00/attn/query/bias": (2, 3),
        "expert_00/norm1/scale": (8,),
    }
    params = traverse_util.unflatten_dict({tuple(k.split("/")): jnp.zeros(v) for k, v in shapes.items()})
    matrices = {path: axes[:2] for path, axes in _matrix_axes(params).items()}
    assert matrices == {
        "trunk/block_00/attn/query/kernel": (0, (1, 2)),
        "neck_00/attn/out/kernel": ((0, 1), 2),
        "block_00/mlp/fc1/kernel": (0, 1),
        "detail_masked/kernel": (0, 1),
        "expert_00/mlp/experts/w1": (1, 2),
    }


def _matrix_axes(params) -> dict:
    is_axes = lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(matrix_axes(params), is_leaf=is_axes)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_muon_treats_each_expert_as_a_matrix_of_its_own():
    rng = np.random.default_rng(0)
    # The second expert's gradient is a thousand times the first's: together they would not share one scale.
    grad = (rng.normal(size=(2, 8, 6)) * np.array([1.0, 1000.0])[:, None, None]).astype(np.float32)
    params = {"experts": {"w1": jnp.zeros(grad.shape)}}
    tx = build_optimizer(_config(kind="muon", clip_norm=1e9, weight_decay=0.0), NUM_STEPS)
    updates, _ = tx.update({"experts": {"w1": jnp.asarray(grad)}}, tx.init(params), params)
    for update in np.asarray(updates["experts"]["w1"]):
        # Singular values near one (the quintic iteration's range), times rate and Liu et al.'s scale.
        values = np.linalg.svd(update, compute_uv=False) / (_rate(1) * 0.2 * 8**0.5)
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_muon_on_experts_split_over_devices_is_muon_on_one():
    mesh = make_mesh(4)
    grads = {"mlp": {"experts": {"w1": jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 6)), jnp.float32)}}}
    tx = build_optimizer(_config(kind="muon"), NUM_STEPS)
    params = jax.tree.map(jnp.ones_like, grads)

    @jax.jit
    def update(grads, params):
        return tx.update(grads, tx.init(params), params)[0]

    split = [jax.device_put(x, shardings(x, mesh)) for x in (grads, params)]
    assert split[0]["mlp"]["experts"]["w1"].sharding.spec == P("expert")
    jax.tree.map(
        # Rounding, through five iterations that multiply small singular values by up to 3.4 each.
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        update(*split),
        update(grads, params),
    )


def test_another_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"optim\.kind: expected one of \('muon', 'adamw'\), found 'sgd'"):
        build_optimizer(_config(kind="sgd"), NUM_STEPS)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_rate_given_to_the_update_is_that_of_the_config(kind):
    rng = np.random.default_rng(0)
    params = {"attn": {"out": {"a": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)}}, "bias": jnp.ones(3)}
    grads = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params) for _ in range(4)]

    def run(own: float, **given):
        tx = build_optimizer(_config(kind=kind, learning_rate=own), NUM_STEPS)
        update = jax.jit(tx.update)
        now, state = params, tx.init(params)
        for grad in grads:
            updates, state = update(grad, state, now, **given)
            now = optax.apply_updates(now, updates)
        return now, state

    expected, found = run(3e-3), run(0.1, learning_rate=np.float32(3e-3))
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), found, expected)


@pytest.mark.parametrize(
    "field", [dict(learning_rate=-1e-2), dict(weight_decay=-0.1), dict(clip_norm=-1.0), dict(b2=1.5)]
)
def test_numbers_with_which_nothing_would_be_learned_are_refused(field):
    with pytest.raises(ValueError, match=r"optim: expected learning_rate, .*\(0: no clipping\)"):
        build_optimizer(_config(**field), NUM_STEPS)


def test_without_a_norm_nothing_is_clipped():
    params = {"kernel": jnp.ones((2, 2))}
    grads = {"kernel": jnp.full((2, 2), 1e3)}
    found = [build_optimizer(_config(clip_norm=norm, b2=0.9), NUM_STEPS) for norm in (0.0, 1e9)]
    updates = [tx.update(grads, tx.init(params), params)[0]["kernel"] for tx in found]
    np.testing.assert_array_equal(*updates)
    assert jax.tree.structure(found[0].init(params)) == jax.tree.structure(found[1].init(params))
    moments = optax.tree.get(found[0].update(grads, found[0].init(params), params)[1], "mu")
    np.testing.assert_allclose(moments["kernel"], 100.0, rtol=1e-5)  # 0.1 of the whole gradient
