"""Adapters against the definition written layer by layer in numpy, and their algebra."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from core import tree
from core.vit import VisionTransformer, VitConfig, build_block
from vit_distill import lora as lora_lib
from vit_distill.lora import LoraConfig

CONFIG = VitConfig(depth=2, width=16, num_heads=2, mlp_dim=24, patch_size=8, image_size=16)
ENHANCED = LoraConfig(tuple((target, 3) for target in lora_lib.TARGETS))
LAYERS = {"attn/query": (16, 16), "attn/key": (16, 16), "attn/value": (16, 16), "attn/out": (16, 16),
          "mlp/fc1": (16, 24), "mlp/fc2": (24, 16)}  # fmt: skip


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    images = jnp.zeros((1, 16, 16, 3))
    shapes = jax.eval_shape(VisionTransformer(CONFIG).init, jax.random.key(0), images)["params"]
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes)


def _trained(params, lora, seed=1):
    """Adapters of which no leaf is where it started."""
    rng = np.random.default_rng(seed)
    adapters = lora_lib.init_adapters(jax.random.key(0), params, lora)
    return jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), adapters)


def _matrices(params, adapters, block, layer):
    """(W, A, B) of one layer as float64 matrices."""
    fan_in, fan_out = LAYERS[layer]
    leaves, factors = tree.paths(params), tree.paths(adapters)
    kernel = np.asarray(leaves[f"{block}/{layer}/kernel"], np.float64).reshape(fan_in, fan_out)
    a, b = (np.asarray(factors[f"{block}/{layer}/{name}"], np.float64) for name in "ab")
    return kernel, a.reshape(fan_in, -1), b.reshape(-1, fan_out)


def test_initial_adapters_have_the_methods_shapes_and_distribution(params):
    ranks = {"query": 2, "out": 5, "fc2": 7}
    adapters = lora_lib.init_adapters(jax.random.key(0), params, LoraConfig(tuple(ranks.items())))
    shapes = {path: leaf.shape for path, leaf in tree.paths(adapters).items()}
    assert shapes == {
        f"{block}/{path}": shape
        for block in ("block_00", "block_01")
        for path, shape in {
            "attn/query/a": (16, 2), "attn/query/b": (2, 2, 8), "attn/out/a": (2, 8, 5), "attn/out/b": (5, 16),
            "mlp/fc2/a": (24, 7), "mlp/fc2/b": (7, 16),
        }.items()
    }  # fmt: skip
    for path, leaf in tree.paths(adapters).items():
        assert leaf.dtype == jnp.float32
        if path.endswith("/b"):
            assert not np.any(leaf)
    # Uniform in +-1/sqrt(fan_in): kaiming-uniform with a = sqrt(5). Seen on a layer large enough to tell.
    wide = {"block_00": {"attn": {}, "mlp": {"fc1": {"kernel": np.zeros((100, 400), np.float32)}}}}
    a = lora_lib.init_adapters(jax.random.key(1), wide, LoraConfig((("fc1", 100),)))["block_00"]["mlp"]["fc1"]["a"]
    assert 0.0995 < float(jnp.abs(a).max()) <= 0.1
    assert float(a.std()) == pytest.approx(0.1 / np.sqrt(3), rel=0.02)
    assert abs(float(a.mean())) < 0.002
    # No two layers share their numbers.
    first, second = (adapters[block]["attn"]["query"]["a"] for block in ("block_00", "block_01"))
    assert not np.allclose(first, second)


@pytest.mark.parametrize(
    "options", [{}, {"train_norms": True, "train_biases": True}, {"scaling": "alpha", "alpha": 8.0}]
)
def test_merging_untrained_adapters_changes_nothing(params, options):
    lora = dataclasses.replace(ENHANCED, **options)
    merged = jax.jit(lambda p, a: lora_lib.merge(p, a, lora))(
        params, lora_lib.init_adapters(jax.random.key(0), params, lora)
    )
    jax.tree.map(np.testing.assert_array_equal, merged, params)


@pytest.mark.parametrize(
    ("scaling", "factor"), [("one", 1.0), ("alpha", 6.0 / 3), ("rank_stabilised", 6.0 / np.sqrt(3))]
)
def test_merge_adds_the_scaled_product_to_every_target(params, scaling, factor):
    lora = dataclasses.replace(ENHANCED, scaling=scaling, alpha=6.0)
    adapters = _trained(params, lora)
    merged = tree.paths(lora_lib.merge(params, adapters, lora))
    adapted = set()
    for block in ("block_00", "block_01"):
        for layer, (fan_in, fan_out) in LAYERS.items():
            kernel, a, b = _matrices(params, adapters, block, layer)
            found = np.asarray(merged[f"{block}/{layer}/kernel"]).reshape(fan_in, fan_out)
            np.testing.assert_allclose(found, kernel + factor * a @ b, rtol=0, atol=1e-6)
            adapted.add(f"{block}/{layer}/kernel")
    for path, leaf in tree.paths(params).items():
        if path not in adapted:
            assert merged[path] is leaf


def test_the_merged_model_is_the_adapted_one(params):
    """W x + b + B(A x) in every layer of a block, in float64, against the network with merged kernels."""
    adapters = _trained(params, ENHANCED)
    x = np.random.default_rng(2).normal(size=(1, 5, 16))
    merged = lora_lib.merge(params, adapters, ENHANCED)
    found = build_block(CONFIG).apply({"params": merged["block_01"]}, x.astype(np.float32))[0]
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in tree.paths(params["block_01"]).items()}

    def layer(name, x):
        kernel, a, b = _matrices(params, adapters, "block_01", name)
        return x @ kernel + leaves[f"{name}/bias"].reshape(-1) + (x @ a) @ b

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * leaves[f"{name}/scale"] + leaves[f"{name}/bias"]

    y = norm("norm1", x[0])
    q, k, v = (layer(f"attn/{name}", y).reshape(5, 2, 8) for name in ("query", "key", "value"))
    weights = np.exp(np.einsum("nkd,mkd->knm", q, k) / np.sqrt(8))
    weights /= weights.sum(-1, keepdims=True)
    out = x[0] + layer("attn/out", np.einsum("knm,mkd->nkd", weights, v).reshape(5, 16))
    hidden = layer("mlp/fc1", norm("norm2", out))
    hidden = hidden * (0.5 * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2))))
    np.testing.assert_allclose(found[0], out + layer("mlp/fc2", hidden), rtol=0, atol=2e-5)


def test_dora_is_the_identity_at_the_start_layer_by_layer(params):
    lora = dataclasses.replace(ENHANCED, dora=True)
    adapters = lora_lib.init_adapters(jax.random.key(0), params, lora)
    # The magnitudes of q, k and v are those of their own outputs, not of qkv together.
    for layer in ("query", "key", "value"):
        kernel = params["block_00"]["attn"][layer]["kernel"]
        expected = np.linalg.norm(kernel.reshape(16, 16), axis=0).reshape(2, 8)
        np.testing.assert_allclose(adapters["block_00"]["attn"][layer]["magnitude"], expected, rtol=1e-6)
    merged = lora_lib.merge(params, adapters, lora)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-7, atol=0), merged, params)


def test_dora_scales_directions_and_holds_the_norm_constant_in_the_gradient(params):
    lora = dataclasses.replace(ENHANCED, dora=True, scaling="alpha", alpha=6.0)
    adapters = _trained(params, lora)
    weights = np.random.default_rng(3).normal(size=(24, 16))
    kernel, a, b = _matrices(params, adapters, "block_00", "mlp/fc2")
    magnitude = np.asarray(adapters["block_00"]["mlp"]["fc2"]["magnitude"], np.float64)
    direction = kernel + 2.0 * a @ b
    norm = np.linalg.norm(direction, axis=0)

    def scalar(adapters):
        merged = lora_lib.merge(params, adapters, lora)["block_00"]["mlp"]["fc2"]["kernel"]
        return (merged * weights).sum(), merged

    (_, merged), grads = jax.value_and_grad(scalar, has_aux=True)(adapters)
    np.testing.assert_allclose(merged, magnitude * direction / norm, rtol=0, atol=2e-6)
    found = grads["block_00"]["mlp"]["fc2"]
    upstream = weights * magnitude / norm
    np.testing.assert_allclose(found["a"], 2.0 * upstream @ b.T, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["b"], 2.0 * a.T @ upstream, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["magnitude"], (weights * direction / norm).sum(0), rtol=0, atol=1e-4)


def test_dora_leaves_an_output_without_weights_at_zero():
    params = {"block_00": {"attn": {}, "mlp": {"fc1": {"kernel": np.zeros((4, 3), np.float32)}}}}
    lora = LoraConfig((("fc1", 2),), dora=True)
    adapters = lora_lib.init_adapters(jax.random.key(0), params, lora)

    def total(a):
        return lora_lib.merge(params, a, lora)["block_00"]["mlp"]["fc1"]["kernel"].sum()

    value, grads = jax.value_and_grad(total)(adapters)
    assert value == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_trained_norms_and_biases_replace_those_of_the_base(params):
    lora = LoraConfig((("query", 2), ("fc1", 2)), train_norms=True, train_biases=True)
    adapters = _trained(params, lora)
    leaves = tree.paths(adapters)
    replaced = {path for path in leaves if path.split("/")[-1] in ("scale", "bias")}
    layers = ("attn/query", "attn/key", "attn/value", "attn/out", "mlp/fc1", "mlp/fc2")
    assert replaced == {f"{block}/{path}" for block in ("block_00", "block_01") for path in (
        *(f"{layer}/bias" for layer in layers), "norm1/scale", "norm1/bias", "norm2/scale", "norm2/bias")}  # fmt: skip
    merged = tree.paths(lora_lib.merge(params, adapters, lora))
    for path in replaced:
        assert merged[path] is leaves[path]
    assert merged["norm/scale"] is params["norm"]["scale"]
    # The first values are copies: the update donates its buffers.
    params = jax.tree.map(jnp.asarray, params)
    start = lora_lib.init_adapters(jax.random.key(0), params, lora)["block_00"]["norm1"]["scale"]
    assert start.unsafe_buffer_pointer() != params["block_00"]["norm1"]["scale"].unsafe_buffer_pointer()


@pytest.mark.parametrize("scaling", ["one", "alpha", "rank_stabilised"])
def test_truncation_is_the_best_of_its_rank(params, scaling):
    lora = LoraConfig((("query", 3), ("out", 6), ("fc2", 8)), scaling=scaling, alpha=4.0)
    adapters = _trained(params, lora)
    small, config = lora_lib.truncate(adapters, 4, lora)
    assert dict(config.ranks) == {"query": 3, "out": 4, "fc2": 4}
    before, after = lora_lib.merge(params, adapters, lora), lora_lib.merge(params, small, config)
    for layer, old, new in (("attn/query", 3, 3), ("attn/out", 6, 4), ("mlp/fc2", 8, 4)):
        kernel, a, b = _matrices(params, adapters, "block_01", layer)
        assert small["block_01"][layer.split("/")[0]][layer.split("/")[1]]["a"].shape[-1] == new
        path = f"block_01/{layer}/kernel"
        error = np.linalg.norm(np.asarray(tree.paths(before)[path]) - np.asarray(tree.paths(after)[path]))
        # Eckart and Young: what is lost is the tail of the singular values.
        tail = lora.scale(old) * np.linalg.svd(a @ b)[1][new:]
        assert error == pytest.approx(np.sqrt((tail**2).sum()), abs=2e-5)
        assert np.linalg.norm(kernel) > 0


def test_truncation_keeps_what_has_no_rank(params):
    lora = LoraConfig((("fc1", 4),), dora=True, train_norms=True)
    adapters = _trained(params, lora)
    small, _ = lora_lib.truncate(adapters, 2, lora)
    for path, leaf in tree.paths(adapters).items():
        if not path.endswith(("/a", "/b")):
            assert tree.paths(small)[path] is leaf
    with pytest.raises(ValueError, match="rank of fc1: expected at least 1"):
        lora_lib.truncate(adapters, 0, lora)


def test_singular_values_and_the_rank_they_suggest(params):
    adapters = _trained(params, ENHANCED)
    values = lora_lib.singular_values(adapters)
    assert sorted(values) == sorted(f"{block}/{layer}" for block in ("block_00", "block_01") for layer in LAYERS)
    _, a, b = _matrices(params, adapters, "block_00", "attn/out")
    np.testing.assert_allclose(values["block_00/attn/out"], np.linalg.svd(a @ b)[1][:3], rtol=1e-6)
    # Squares 25, 1, 0 of 26: 96 %; 16, 8, 1 of 25: 64 %, 96 %; 9, 4, 1 of 14: 64 %, 93 %, 100 %.
    spectrum = {1: np.array([5, 1, 0]), 2: np.sqrt([16, 8, 1]), 3: np.array([3, 2, 1])}
    assert lora_lib.suggested_rank(spectrum | {"untrained": np.zeros(3)}) == {1: 1, 2: 2, 3: 3, "untrained": 1}


def _config(**fields) -> ConfigDict:
    config = common.distiller().lora
    config.update(fields)
    return config


def test_configs_become_ranks():
    plain = lora_lib.build_lora_config(_config(preset="plain", rank=8))
    assert plain == LoraConfig((("query", 8), ("value", 8)))
    enhanced = lora_lib.build_lora_config(_config(rank=8, ranks={"fc1": 16}, dora=True, scaling="alpha", alpha=2.0))
    assert dict(enhanced.ranks) == dict.fromkeys(lora_lib.TARGETS, 8) | {"fc1": 16}
    assert (enhanced.dora, enhanced.scale(8)) == (True, 0.25)
    assert lora_lib.build_lora_config(_config(targets=("out", "fc2"), rank=4)).ranks == (("out", 4), ("fc2", 4))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(preset="huge"), "lora.preset.*'huge'"),
        (dict(targets=("qkv",)), "lora.targets.*'qkv'"),
        (dict(targets=("out", "out")), "each target once"),
        (dict(preset="plain", ranks={"fc1": 3}), r"lora.ranks: \['fc1'\] are not adapted"),
        (dict(rank=0), "rank of query: expected at least 1, found 0"),
        (dict(scaling="sqrt"), "lora.scaling.*'sqrt'"),
        (dict(alpha=16.0), "lora.alpha: expected 1 .* found 16.0"),
    ],
)
def test_bad_configs_are_named(fields, match):
    with pytest.raises(ValueError, match=match):
        lora_lib.build_lora_config(_config(**fields))


def test_a_rank_above_the_width_names_the_target(params):
    with pytest.raises(
        ValueError,
        match=r"rank of fc2 \(block_00/mlp/fc2; lora.rank, lora.ranks.fc2\): expected 1 to 16 \(it is 24 x 16\), found",
    ):
        lora_lib.init_adapters(jax.random.key(0), params, LoraConfig((("fc2", 17),)))


def test_adapters_of_another_model_are_refused(params):
    adapters = lora_lib.init_adapters(jax.random.key(0), params, ENHANCED)
    with pytest.raises(ValueError, match="block_01"):
        lora_lib.merge({name: params[name] for name in params if name != "block_01"}, adapters, ENHANCED)
    adapters["block_00"]["mlp"]["fc1"]["a"] = jnp.zeros((15, 3))
    with pytest.raises(ValueError, match=r"block_00/mlp/fc1/kernel \(16, 24\): found \(15, 3\)"):
        lora_lib.merge(params, adapters, ENHANCED)
    with pytest.raises(ValueError, match="blocks"):
        lora_lib.init_adapters(jax.random.key(0), {"norm": params["norm"]}, ENHANCED)


def _loss_and_gradient(params, adapters, lora, place, dtype=jnp.float32):
    images = jax.random.normal(jax.random.key(3), (2, 16, 16, 3))

    def loss(adapters):
        tokens = VisionTransformer(CONFIG, dtype=dtype).apply({"params": place(params, adapters, lora)}, images).tokens
        return (tokens * jnp.sin(jnp.arange(tokens.size, dtype=jnp.float32)).reshape(tokens.shape)).sum()

    return jax.jit(jax.value_and_grad(loss))(adapters)


@pytest.mark.parametrize(
    "lora",
    [
        ENHANCED,
        LoraConfig((("query", 2), ("fc2", 5)), scaling="alpha", alpha=3.0, train_norms=True, train_biases=True),
        LoraConfig((("value", 2), ("out", 3)), dora=True),
    ],
)
def test_attached_adapters_have_the_value_and_the_gradients_of_merged_ones(params, lora):
    """Low-rank gradients against those through whole kernels; sums in another order, relative to the largest entry."""
    adapters = _trained(params, lora)
    value, gradients = _loss_and_gradient(params, adapters, lora, lora_lib.attach)
    wanted, wanted_gradients = _loss_and_gradient(params, adapters, lora, lora_lib.merge)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    found, wanted = tree.paths(gradients), tree.paths(wanted_gradients)
    assert set(found) == set(wanted)
    for path, gradient in wanted.items():
        scale = max(np.abs(gradient).max(), 1e-2)  # the key biases' gradient is 0 but for rounding
        np.testing.assert_allclose(found[path], gradient, rtol=0, atol=2e-5 * scale, err_msg=path)


def test_attached_gradients_in_bfloat16_are_close(params):
    """Kernel and factors apart, each rounded."""
    adapters = _trained(params, ENHANCED)
    _, found = _loss_and_gradient(params, adapters, ENHANCED, lora_lib.attach, jnp.bfloat16)
    _, wanted = _loss_and_gradient(params, adapters, ENHANCED, lora_lib.attach)
    for path, gradient in tree.paths(wanted).items():
        error = np.linalg.norm(tree.paths(found)[path] - gradient) / np.linalg.norm(gradient)
        assert 1e-4 < error < 0.05, f"{path}: {error}"  # a dozen roundings of 2^-9 in a row, and not none


def test_attached_adapters_cost_less(params):
    """What attaching is for: of rank 1, the six layers' weight gradients nearly vanish from the compiled program."""
    lora = LoraConfig(tuple((target, 1) for target in lora_lib.TARGETS))
    adapters = lora_lib.init_adapters(jax.random.key(0), params, lora)
    images = jnp.zeros((64, 16, 16, 3))

    def flops(place):
        def loss(adapters):
            return VisionTransformer(CONFIG).apply({"params": place(params, adapters, lora)}, images).tokens.sum()

        return jax.jit(jax.grad(loss)).lower(adapters).compile().cost_analysis()["flops"]

    rows, weights = 64 * CONFIG.num_tokens, CONFIG.depth * (4 * 16 * 16 + 2 * 16 * 24)
    assert flops(lora_lib.merge) - flops(lora_lib.attach) > 0.5 * 2 * rows * weights
