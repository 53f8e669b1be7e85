"""The compiled update: accumulation, averaging, randomness, extra state, one device and eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.mesh import make_mesh, shard_batch
from core.state import TrainState, init_state
from core.step import make_train_step_fn

KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def one_device():
    return make_mesh(devices=jax.devices()[:1])


def _run(toy, mesh, **options) -> tuple[TrainState, dict]:
    """Two updates on 16 rows each, without noise in the loss."""
    state = init_state(toy.init_fn, jax.random.key(0), toy.tx, mesh)
    step_fn = make_train_step_fn(toy.loss_fn, toy.tx, ema_decay=0.9, **options)
    for step in (1, 2):
        state, metrics = step_fn(state, shard_batch(toy.make_batch(step, noise=0.0, rows=16), mesh), KEY)
    return jax.device_get(state), jax.device_get(metrics)


def _draw(*path: int) -> float:
    """What the toy's loss function reports as drawn when its key is KEY folded with `path`."""
    key = KEY
    for index in path:
        key = jax.random.fold_in(key, index)
    return float(jax.random.normal(jax.random.split(key)[1]))


def _assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


@pytest.fixture(scope="module")
def plain(toy, one_device):
    return _run(toy, one_device)


@pytest.fixture(scope="module")
def accumulated(toy, one_device):
    return _run(toy, one_device, accumulation=2)


def _assert_same_update(found, expected):
    # Same sums in another order. Adam divides a gradient by its own size: float32 rounding, magnified a little.
    _assert_close(found[0].params, expected[0].params, 1e-5)
    _assert_close(found[0].ema_params, expected[0].ema_params, 1e-5)
    _assert_close(found[1]["loss"], expected[1]["loss"], 1e-5)
    _assert_close(found[1]["grad_norm"], expected[1]["grad_norm"], 1e-5)


def test_accumulation_equals_the_full_batch(plain, accumulated):
    _assert_same_update(accumulated, plain)
    # Extra state passes through every micro-batch, one after the other.
    assert (int(plain[0].extra["count"]), int(accumulated[0].extra["count"])) == (2, 4)


@pytest.mark.parametrize(("expert", "accumulation"), [(1, 1), (2, 2)])
def test_eight_devices_give_the_update_of_one(toy, plain, expert, accumulation):
    _assert_same_update(_run(toy, make_mesh(expert), accumulation=accumulation), plain)


def test_a_batch_that_accumulation_does_not_divide_is_refused(toy, one_device):
    with pytest.raises(ValueError, match=r"batch size 16 does not divide by train\.accumulation 3"):
        _run(toy, one_device, accumulation=3)


def test_randomness_is_a_function_of_key_and_step(plain, accumulated):
    """Metrics are those of the second update, which sees one update done before."""
    assert float(plain[1]["updates_before"]) == 1
    assert float(plain[1]["draw"]) == pytest.approx(_draw(1), abs=1e-6)
    # Each micro-batch draws its own.
    assert abs(_draw(1, 0) - _draw(1, 1)) > 0.1
    assert float(accumulated[1]["draw"]) == pytest.approx((_draw(1, 0) + _draw(1, 1)) / 2, abs=1e-6)


def test_average_ramps_up_and_metrics_and_extra_come_back(one_device, toy):
    """Gradient 1 and rate 0.1: parameters are 0, -0.1, -0.2, ... and the average follows by hand."""

    def loss_fn(params, extra, batch, key, step):
        return params["w"] * batch["x"].mean(), ({"twice": 2 * params["w"]}, {"seen": extra["seen"] + batch["x"].sum()})

    def init_fn(key):
        return {"w": jnp.zeros(())}, {"seen": jnp.zeros(())}

    state = init_state(init_fn, jax.random.key(0), toy.sgd, one_device)
    step_fn = make_train_step_fn(loss_fn, toy.sgd, ema_decay=0.3)
    average = 0.0
    for t in range(1, 6):
        state, metrics = step_fn(state, {"x": np.ones(4, np.float32)}, KEY)
        decay = {1: 2 / 11, 2: 3 / 12}.get(t, 0.3)  # (1 + t) / (10 + t) until it passes 0.3 at t = 3: 4 / 13
        average = decay * average + (1 - decay) * -0.1 * t
        assert int(state.step) == t
        assert float(state.params["w"]) == pytest.approx(-0.1 * t, abs=1e-6)
        assert float(state.ema_params["w"]) == pytest.approx(average, abs=1e-6)
        assert float(state.extra["seen"]) == 4 * t
        assert float(metrics["grad_norm"]) == pytest.approx(1.0)
        assert float(metrics["loss"]) == pytest.approx(-0.1 * (t - 1), abs=1e-6)
        assert float(metrics["twice"]) == pytest.approx(-0.2 * (t - 1), abs=1e-6)


def test_another_learning_rate_compiles_nothing(toy, one_device):
    step_fn = make_train_step_fn(toy.loss_fn, toy.tx, ema_decay=0.9)
    start = jax.device_get(init_state(toy.init_fn, jax.random.key(0), toy.tx, one_device))
    batch = toy.make_batch(1, noise=0.0, rows=16)
    moved = []
    for rate in (1e-3, 2e-3):
        state, _ = step_fn(start, batch, KEY, learning_rate=np.float32(rate))
        moved.append(jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, start.params))
    assert step_fn._cache_size() == 1
    # Rounding of the parameters that the update was added to.
    jax.tree.map(lambda one, two: np.testing.assert_allclose(two, 2 * one, rtol=0, atol=1e-6), *moved)
