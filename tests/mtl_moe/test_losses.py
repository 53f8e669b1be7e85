"""The training loss with a stub for the network: scales, weights, augmentation, teacher, router terms.

Axes: B images, T tasks. The stub answers every task with one learned number, so that losses can be worked out by hand.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_moe.losses import init_extra, make_loss_fn
from mtl_moe.model import build_geometry
from mtl_moe.tasks import build_tasks
from mtl_moe.tasks.base import to_float

BATCH, SIZE = 4, 32
NAMES = ("masked", "denoise", "intensity")
STEPS = 3  # of the warm-up


class StubDetector:
    """Answers every pixel of a task with params[task]; `aux` is what it reports of its routers."""

    dtype = jnp.float32
    config = None
    image_size = SIZE

    def __init__(self, aux=None):
        self.aux = aux or {}
        self.seen = {}

    def apply(self, variables, inputs, train, rngs):
        assert train
        assert set(rngs) == {"router"}
        self.seen = inputs
        outputs = {
            name: jnp.broadcast_to(variables["params"][name], (*view.shape[:-1], 1)) for name, view in inputs.items()
        }
        return outputs, self.aux


@pytest.fixture
def config(tiny_config):
    config = tiny_config()
    config.tasks.names = NAMES
    for name in NAMES:
        config.tasks[name].weight = 1.0
    config.train.scale_steps = STEPS
    return config


@pytest.fixture(scope="module")
def batch():
    return {"image": np.random.default_rng(0).integers(60, 200, (BATCH, SIZE, SIZE, 1), np.uint8)}


def make(config, **kwargs):
    tasks = build_tasks(config.tasks, build_geometry(config))
    model = StubDetector(**kwargs)
    return make_loss_fn(model, config, tasks), model, init_extra(len(tasks))


def params(value=0.0):
    return {name: jnp.float32(value + i) for i, name in enumerate(NAMES)}


def call(loss_fn, params, extra, batch, step, key=0):
    return loss_fn(params, extra, batch, jax.random.key(key), jnp.int32(step))


def test_to_float_is_the_whole_range():
    np.testing.assert_allclose(to_float(jnp.array([0, 51, 255], jnp.uint8)), [0, 0.2, 1], rtol=1e-6)


def test_every_task_weighs_one_however_large_its_loss_is(config, batch):
    loss_fn, _, extra = make(config)
    loss, (metrics, extra) = call(loss_fn, params(), extra, batch, 0)
    np.testing.assert_allclose(loss, 1, rtol=1e-5)
    losses = np.array([metrics[f"loss/{name}"] for name in NAMES])
    assert losses.max() > 5 * losses.min(), "the losses logged are not the unscaled ones"
    np.testing.assert_allclose(extra["loss_sum"], losses, rtol=1e-6)
    # The gradient of each task is that of its own loss over its scale, over the number of tasks.
    fresh = init_extra(len(NAMES))

    def both(p):
        loss, (metrics, _) = call(loss_fn, p, fresh, batch, 0)
        return jnp.stack([loss, *(metrics[f"loss/{name}"] for name in NAMES)])

    grads = jax.jit(jax.jacrev(both))(params())
    for i, name in enumerate(NAMES):
        np.testing.assert_allclose(grads[name][0], grads[name][1 + i] / losses[i] / len(NAMES), rtol=1e-4)


def test_scales_are_the_mean_of_the_warm_up_and_then_frozen(config, batch):
    loss_fn, _, extra = make(config)
    history = []
    for step in range(STEPS + 3):
        loss, (metrics, extra) = call(loss_fn, params(0.3 * step), extra, batch, step, key=step)
        losses = np.array([metrics[f"loss/{name}"] for name in NAMES])
        history.append(losses)
        scale = np.mean(history[:STEPS], axis=0)
        np.testing.assert_allclose(loss, np.mean(losses / scale), rtol=1e-4)
        np.testing.assert_allclose(extra["loss_count"], min(step + 1, STEPS))


def test_weights_are_relative(config, batch):
    found = {}
    extra = {"loss_sum": jnp.array([2.0, 4.0, 8.0]), "loss_count": jnp.float32(2)}
    for factor in (1.0, 10.0):
        for name, weight in zip(NAMES, (1.0, 3.0, 0.0), strict=True):
            config.tasks[name].weight = factor * weight
        loss_fn, _, _ = make(config)
        loss, (metrics, _) = call(loss_fn, params(), extra, batch, STEPS)
        m = [float(metrics[f"loss/{name}"]) for name in NAMES]
        np.testing.assert_allclose(loss, (m[0] / 1 + 3 * m[1] / 2) / 4, rtol=1e-5)
        found[factor] = float(loss)
    np.testing.assert_allclose(found[1.0], found[10.0], rtol=1e-6)


def test_augmentation_is_a_tasks_own(config, batch):
    config.tasks.masked.augment, config.tasks.denoise.augment = "none", "strong"
    config.tasks.denoise.noise_min = config.tasks.denoise.noise_max = 0.0
    config.tasks.masked.ratio = 0.0
    loss_fn, model, extra = make(config)
    call(loss_fn, params(), extra, batch, 0)
    images = np.asarray(batch["image"], np.float32) / 255
    np.testing.assert_allclose(model.seen["masked"][0, ..., :1], images, atol=1e-6)
    assert np.abs(np.asarray(model.seen["denoise"][0, ..., :1]) - images).max() > 0.05
    config.tasks.denoise.augment = "heavy"
    with pytest.raises(ValueError, match=r"augment: expected one of .*found 'heavy'"):
        call(make(config)[0], params(), extra, batch, 0)


@pytest.mark.parametrize("field", ["weight", "augment"])
def test_a_task_without_a_field_of_the_loss_is_an_error(config, field):
    with config.unlocked():
        del config.tasks.denoise[field]
    with pytest.raises(ValueError, match=r"tasks.denoise: expected weight and augment"):
        make(config)


def test_corruption_is_a_function_of_the_key(config, batch):
    loss_fn, model, extra = make(config)
    views = []
    for key in (0, 0, 1):
        call(loss_fn, params(), extra, batch, 0, key=key)
        views.append(model.seen)
    for name in NAMES:
        np.testing.assert_array_equal(views[0][name], views[1][name])
        assert not np.array_equal(views[0][name], views[2][name])


def test_router_losses_are_added_with_their_weights(config, batch):
    config.train.update(balance_weight=0.5, z_weight=0.25)
    stats = {"load_balance": jnp.float32(2), "z_loss": jnp.float32(8), "entropy": jnp.arange(3.0)}
    with_router = call(make(config, aux={"expert_00": stats})[0], params(), init_extra(3), batch, 0)
    without = call(make(config)[0], params(), init_extra(3), batch, 0)
    np.testing.assert_allclose(with_router[0] - without[0], 0.5 * 2 + 0.25 * 8, rtol=1e-6)
    metrics = with_router[1][0]
    assert float(metrics["router/expert_00/balance"]) == 2
    assert [float(metrics[f"router/expert_00/entropy/{name}"]) for name in NAMES] == [0, 1, 2]


def test_pseudo_labels_come_from_the_augmented_copy(config, batch, monkeypatch):
    """The label of a patch must be that of the patch the network sees."""
    config.tasks.names = ("cluster",)
    config.tasks.cluster.update(augment="strong", ratio=0.0)
    asked = []

    def stub_teacher(model_config, state, images, dtype):
        asked.append(np.asarray(images))
        tokens = jnp.zeros((BATCH, 4, 4, 16))
        return types.SimpleNamespace(tokens=tokens, clusters=jnp.zeros((BATCH, 4, 4), jnp.int32))

    monkeypatch.setattr("mtl_moe.losses.make_teacher", stub_teacher)
    loss_fn, model, extra = make(config)
    model.apply = lambda variables, inputs, train, rngs: (
        model.seen.update(inputs) or {"cluster": jnp.zeros((1, BATCH, 4, 4, config.tasks.cluster.num_clusters))},
        {},
    )
    call(loss_fn, {}, extra | {"teacher": None}, batch, 0)
    assert len(asked) == 1
    np.testing.assert_allclose(model.seen["cluster"][0, ..., :1], asked[0], atol=1e-6)
    assert np.abs(asked[0] - batch["image"] / 255).max() > 0.05
