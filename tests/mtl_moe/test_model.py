"""The network: shapes, tasks that do not see each other, parameter counts, bfloat16, positions.

Axes: B images, V views, N tokens, h w token grid, D width.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.transformer import patchify
from core.tree import num_params
from mtl_moe.model import Detector, build_geometry, build_model_config
from mtl_moe.tasks import build_tasks

BATCH = 2
SUBSET = ("synthetic", "jigsaw")


def build(config, dtype=jnp.float32):
    tasks = build_tasks(config.tasks, build_geometry(config))
    return Detector(build_model_config(config.model), tasks, config.data.image_size, dtype)


def views_of(model, images, names=None):
    return {task.name: task.views(images) for task in model.tasks if names is None or task.name in names}


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, inputs):
    return model.apply({"params": params}, inputs, train=False)


@pytest.fixture(scope="module")
def config(tiny_config):
    config = tiny_config()
    config.model.num_experts = 4
    return config


@pytest.fixture(scope="module")
def model(config):
    return build(config)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).uniform(size=(BATCH, 32, 32, 1)).astype(np.float32))


@pytest.fixture(scope="module")
def params(model, images):
    """Fresh parameters, with routers that make real choices (at the start they are nearly equal)."""
    params = jax.jit(lambda key: model.init(key, views_of(model, images), train=False)["params"])(jax.random.key(0))
    for block in ("expert_00", "neck_00"):
        router = params[block]["mlp"]["router"]
        router["kernel"] = router["kernel"] * 300
        router["task_kernel"] = 0.5 * jax.random.normal(jax.random.key(1), router["task_kernel"].shape)
    return params


@pytest.fixture(scope="module")
def everything(model, params, images):
    return forward(model, params, views_of(model, images))


def test_every_task_gets_the_output_its_head_describes(model, images, everything):
    outputs, aux = everything
    inputs = views_of(model, images)
    assert set(outputs) == set(inputs)
    for task in model.tasks:
        size = (32, 32) if task.head.kind == "pixels" else (4, 4)
        assert outputs[task.name].shape == (inputs[task.name].shape[0], BATCH, *size, task.head.dim)
        assert outputs[task.name].dtype == jnp.float32
        assert np.isfinite(outputs[task.name]).all()
    assert set(aux) == {"expert_00", "neck_00"}
    for stats in aux.values():
        assert stats["utilisation"].shape == (len(model.tasks), 4)
        np.testing.assert_allclose(np.asarray(stats["utilisation"]).sum(1), 1, rtol=1e-5)


def test_a_task_does_not_see_which_others_run(model, params, images, everything):
    outputs, _ = forward(model, params, views_of(model, images, SUBSET))
    assert set(outputs) == set(SUBSET)
    for name in SUBSET:
        # Rows land in other tiles of the expert matmul: sums in another order.
        np.testing.assert_allclose(outputs[name], everything[0][name], rtol=1e-4, atol=1e-5)


def test_the_trunk_runs_once_for_views_that_are_the_same(model, params, images, everything):
    def solve(shared):
        kept = dict(capture_intermediates=lambda module, _: module.name == "trunk", mutable=["intermediates"])
        views = views_of(model, images)
        (outputs, _), seen = model.apply({"params": params}, views, train=False, shared_views=shared, **kept)
        return outputs, seen["intermediates"]["trunk"]["__call__"][0]

    assert jax.eval_shape(lambda: solve(False))[1].shape[0] == 18 * BATCH
    outputs, tokens = jax.jit(lambda: solve(True))()
    assert tokens.shape[0] == 11 * BATCH  # clean with and without position, seven more symmetries, two masks
    for name, wanted in everything[0].items():
        np.testing.assert_allclose(outputs[name], wanted, rtol=1e-5, atol=1e-5)


def test_the_same_view_is_another_input_for_another_task(config, images):
    """Without router and with equal heads the task embedding alone tells two tasks apart."""
    config = config.copy_and_resolve_references()
    config.tasks.names, config.model.mlp = ("denoise", "intensity"), "dense_active"
    model = build(config)
    inputs = views_of(model, images)
    np.testing.assert_array_equal(inputs["denoise"], inputs["intensity"])
    params = jax.jit(lambda key: model.init(key, inputs, train=False)["params"])(jax.random.key(0))
    params |= {f"{part}_denoise": params[f"{part}_intensity"] for part in ("head", "detail", "norm")}
    outputs = forward(model, params, inputs)[0]
    assert not np.allclose(outputs["denoise"], outputs["intensity"], atol=1e-3)
    assert not np.allclose(outputs["intensity"][:, 0], outputs["intensity"][:, 1], atol=1e-2)
    outputs = forward(model, params | {"task_embedding": 0 * params["task_embedding"]}, inputs)[0]
    np.testing.assert_allclose(outputs["denoise"], outputs["intensity"], rtol=1e-5, atol=1e-6)


def test_a_pixel_head_reads_its_own_patch_of_the_view(config, images):
    """With the tokens' share of the hidden layer at zero an output patch is a function of the same patch seen alone."""
    config = config.copy_and_resolve_references()
    config.tasks.names = ("masked",)
    model = build(config)
    inputs = views_of(model, images)
    params = jax.jit(lambda key: model.init(key, inputs, train=False)["params"])(jax.random.key(0))
    detail, head = params["detail_masked"], params["head_masked"]
    detail = detail | {"kernel": detail["kernel"].at[: config.model.width].set(0), "bias": detail["bias"] + 0.1}
    outputs = forward(model, params | {"detail_masked": detail}, inputs)[0]["masked"]
    view = np.asarray(inputs["masked"])[1, 0]
    cells = view.reshape(4, 8, 4, 8, 2).transpose(0, 2, 1, 3, 4).reshape(16, 128)
    hidden = jax.nn.gelu((2 * cells - 1) @ np.asarray(detail["kernel"])[config.model.width :] + 0.1)
    expected = np.asarray(hidden @ np.asarray(head["kernel"])).reshape(4, 4, 8, 8, 1).transpose(0, 2, 1, 3, 4)
    np.testing.assert_allclose(outputs[1, 0], expected.reshape(32, 32, 1), rtol=1e-4, atol=1e-5)
    assert np.all(view[view[..., 1] == 1, 0] == 0.5)  # what is hidden from the tokens is hidden from the head


def permuted(images, order, patch=8):
    """Images with their patches in another order."""
    cells = images.reshape(-1, 4, patch, 4, patch, images.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
    cells = cells.reshape(len(images), 16, patch, patch, -1)[:, order].reshape(-1, 4, 4, patch, patch, images.shape[-1])
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)


def test_only_jigsaw_is_blind_to_positions(model, params, images):
    order = np.random.default_rng(1).permutation(16)
    turned = permuted(np.asarray(images), order)
    np.testing.assert_array_equal(patchify(turned, 8), patchify(images, 8)[:, order])
    names = ("jigsaw", "intensity")
    before, after = (forward(model, params, views_of(model, jnp.asarray(x), names))[0] for x in (images, turned))
    tokens = np.asarray(before["jigsaw"]).reshape(1, BATCH, 16, -1)[:, :, order]
    np.testing.assert_allclose(np.asarray(after["jigsaw"]).reshape(tokens.shape), tokens, rtol=1e-4, atol=1e-5)
    pixels = np.asarray(patchify(before["intensity"][0], 8))[:, order]
    assert not np.allclose(patchify(after["intensity"][0], 8), pixels, atol=1e-3)


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_bfloat16_computes_close_to_float32_with_float32_outputs(
    monkeypatch, config, params, images, everything, backend
):
    """With what each backend is given: activations, dispatch of experts, attention; all run on the CPU."""
    views = views_of(build(config), images, SUBSET)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    model = build(config, jnp.bfloat16)  # compiled anew: `forward` keeps what it compiled for another backend
    outputs, _ = jax.jit(lambda: model.apply({"params": params}, views, train=False))()
    for name in SUBSET:
        assert outputs[name].dtype == jnp.float32
        difference = np.abs(np.asarray(outputs[name]) - everything[0][name])
        # Eight bits of mantissa through three blocks; single rows may be routed otherwise.
        assert 0 < np.median(difference) < 0.05


def shapes(config):
    model = build(config)
    inputs = {task.name: jnp.zeros((1, 1, 32, 32, 2)) for task in model.tasks}
    return jax.eval_shape(lambda key: model.init(key, inputs, train=False)["params"], jax.random.key(0))


def mlp_weights(params):
    """Weight matrices (no biases, no router) of the expert block's MLP: {name: shape}."""
    mlp = {k: v for k, v in params["expert_00"]["mlp"].items() if k != "router"}
    return {jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(mlp) if x.ndim > 1 and
            "b1" not in jax.tree_util.keystr(p) and "b2" not in jax.tree_util.keystr(p)}  # fmt: skip


@pytest.mark.parametrize(("shared", "top_k"), [(True, 2), (False, 1)])
def test_dense_controls_have_the_weights_their_names_promise(tiny_config, shared, top_k):
    config = tiny_config()
    config.model.update(num_experts=6, shared_expert=shared, top_k=top_k)
    params = {}
    for mlp in ("moe", "dense_active", "dense_params"):
        config.model.mlp = mlp
        params[mlp] = shapes(config)
    count = {mlp: sum(math.prod(shape) for shape in mlp_weights(p).values()) for mlp, p in params.items()}
    one_expert = 2 * 16 * 16  # two matrices of width 16 and expert_dim 16
    assert count["moe"] == count["dense_params"] == (6 + shared) * one_expert
    assert count["dense_active"] == (top_k + shared) * one_expert
    # What is left, router and biases, is a few per cent even at this size.
    rest = num_params(params["moe"]) - num_params(params["dense_params"])
    assert 0 < rest < 0.1 * num_params(params["moe"])


def test_dense_control_reports_no_router(config, images):
    dense = config.copy_and_resolve_references()
    dense.model.mlp = "dense_active"
    dense.tasks.names = ("intensity",)
    model = build(dense)
    inputs = views_of(model, images)
    shape = jax.eval_shape(lambda key: model.init_with_output(key, inputs, train=False)[0], jax.random.key(0))
    assert shape[1] == {}


def test_a_single_task_model_and_other_channels_build(config):
    config = config.copy_and_resolve_references()
    config.tasks.names = ("transform",)
    assert not any(name.startswith("head_") and name != "head_transform" for name in shapes(config))
    config.data.channels = 3
    config.tasks.names = ("masked",)
    model = build(config)
    inputs = {"masked": jnp.zeros((2, 1, 32, 32, 4))}
    outputs = jax.eval_shape(lambda key: model.init_with_output(key, inputs, train=False)[0], jax.random.key(0))[0]
    assert outputs["masked"].shape == (2, 1, 32, 32, 3)


def test_wrong_fields_and_sizes_are_errors(config):
    wrong = config.copy_and_resolve_references()
    wrong.model.mlp = "sparse"
    with pytest.raises(ValueError, match=r"model.mlp: expected one of .*dense_active.* found 'sparse'"):
        build_model_config(wrong.model)
    with pytest.raises(ValueError, match=r"model: missing \['width'\], unknown \['depth'\]"):
        build_model_config({**{k: v for k, v in config.model.items() if k != "width"}, "depth": 3})
    for name, value, least in (("width", 0, 1), ("num_heads", 0, 1), ("mlp_dim", -1, 1), ("num_moe_layers", -1, 0)):
        with pytest.raises(ValueError, match=f"model.{name}: expected at least {least}, found {value}"):
            build_model_config({**config.model, name: value})
    for size in (30, 4):
        wrong.data.image_size = size
        with pytest.raises(ValueError, match=rf"data.image_size={size} is not a multiple of model.patch_size=8"):
            build_geometry(wrong)
    wrong.model.patch_size = 0
    with pytest.raises(ValueError, match=r"is not a multiple of model\.patch_size=0"):
        build_geometry(wrong)
