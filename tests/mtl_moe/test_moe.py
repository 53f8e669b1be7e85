"""The layer against a naive loop over experts, values and gradients; alone and in batches; one device and eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.mesh import make_mesh
from mtl_moe import moe, routing

WIDTH, HIDDEN, EXPERTS = 8, 12, 4


def _normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _params() -> dict[str, jax.Array]:
    shapes = {
        "w1": (EXPERTS, WIDTH, HIDDEN),
        "b1": (EXPERTS, HIDDEN),
        "w2": (EXPERTS, HIDDEN, WIDTH),
        "b2": (EXPERTS, WIDTH),
    }
    return {name: 0.5 * _normal(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}


@jax.jit
def _naive(x: jax.Array, experts: np.ndarray, weights: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    """Every expert on every row, then only the chosen ones."""
    out = jnp.zeros_like(x)
    for e in range(params["w1"].shape[0]):
        hidden = jax.nn.gelu(x @ params["w1"][e] + params["b1"][e][None], approximate=True)
        y = hidden @ params["w2"][e] + params["b2"][e][None]
        out += jnp.where(experts == e, weights, 0).sum(axis=1)[:, None] * y
    return out


def _assert_close(a, b, tolerance):
    """Every leaf to `tolerance` of its own largest value: float32 sums in another order, no more."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = max(float(jnp.abs(y).max()), 1e-6)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=str(path))


def _choices(kind: str, rows: int, top_k: int) -> np.ndarray:
    rng = np.random.default_rng(rows)
    if kind == "one_takes_all":
        return np.full((rows, 1), 3, np.int32)
    pool = [e for e in range(EXPERTS) if kind != "one_gets_none" or e != 1]
    return np.stack([rng.permutation(pool)[:top_k] for _ in range(rows)]).astype(np.int32)


def _value_and_gradients(function, rows, experts):
    x, target, weights = _normal(1, rows, WIDTH), _normal(2, rows, WIDTH), _normal(3, *experts.shape)

    @jax.jit
    def run(*args):
        out, pull = jax.vjp(function, *args)
        return out, pull(out - target)

    return run(x, weights, _params())


@pytest.mark.parametrize(
    ("kind", "rows", "top_k", "dispatches"),
    [
        ("random", 61, 2, ("tiles", "batched", "ragged")),  # 122 rows in tiles of 32
        ("one_takes_all", 37, 1, ("tiles", "batched", "ragged")),
        ("one_gets_none", 29, 3, ("tiles", "batched", "ragged")),
        ("random", 1, 2, ("tiles",)),
    ],
)
def test_values_and_all_gradients_equal_the_naive_loop(kind, rows, top_k, dispatches):
    experts = _choices(kind, rows, top_k)
    naive = _value_and_gradients(lambda x, weights, params: _naive(x, experts, weights, params), rows, experts)
    for dispatch in dispatches:

        def ours(x, weights, params, dispatch=dispatch):
            return moe.apply_experts(x, routing.Gate(weights, jnp.asarray(experts), x, x), params, dispatch)

        _assert_close(_value_and_gradients(ours, rows, experts), naive, 3e-6)


def test_unknown_dispatch_is_refused():
    gate = routing.gate(jnp.zeros((4, EXPERTS)), 2)
    with pytest.raises(ValueError, match="dispatch='dense': expected"):
        moe.apply_experts(jnp.zeros((4, WIDTH)), gate, _params(), "dense")


@functools.partial(jax.jit, static_argnums=(0, 4))
def _apply(layer, variables, tokens, tasks, deterministic=True, rngs=None):
    return layer.apply(variables, tokens, tasks, deterministic, rngs=rngs)


def _init(layer, tokens, tasks):
    return jax.jit(lambda key: layer.init(key, tokens, tasks, True))(jax.random.key(4))


@functools.cache
def _layer_and_variables(**kwargs):
    layer = moe.MoeMlp(num_experts=4, hidden_dim=HIDDEN, num_tasks=3, **kwargs)
    tokens = _normal(3, 8, 6, WIDTH)
    tasks = jnp.arange(8, dtype=jnp.int32) % 3
    shapes = jax.eval_shape(lambda key: layer.init(key, tokens, tasks, True), jax.random.key(0))
    # Far from the first values, where router and biases are about zero and an error in them would not show.
    rng = np.random.default_rng(5)
    variables = jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), shapes)
    return layer, variables, tokens, tasks


@pytest.mark.parametrize("dispatch", ["tiles", "batched", "ragged"])
def test_an_image_does_not_depend_on_its_batch(dispatch):
    layer, variables, tokens, tasks = _layer_and_variables(dispatch=dispatch)
    together = _apply(layer, variables, tokens, tasks)[0]
    for i in (0, 5):
        _assert_close(_apply(layer, variables, tokens[i : i + 1], tasks[i : i + 1])[0], together[i : i + 1], 1e-6)
    crowd = jnp.concatenate([tokens[:1]] + [tokens[1:2]] * 7)  # all batch mates want the same experts
    _assert_close(_apply(layer, variables, crowd, jnp.zeros(8, jnp.int32))[0][:1], together[:1], 1e-6)


def _router_logits(kind, params, tokens, tasks):
    """Image by image, on the concatenation the paper names."""
    params = jax.tree.map(np.asarray, params)
    logits = []
    for image, task in zip(np.asarray(tokens), np.asarray(tasks), strict=True):
        if kind == "per_task":
            logits.append(image @ params["kernel"][task])
        else:
            both = np.concatenate([image, np.tile(params["task_embedding"][task], (len(image), 1))], axis=1)
            logits.append(both @ np.concatenate([params["kernel"], params["task_kernel"]]))
    return jnp.asarray(np.concatenate(logits))


@pytest.mark.parametrize("kind", ["shared", "per_task"])
def test_layer_equals_router_loop_and_shared_expert_written_out(kind):
    layer, variables, tokens, tasks = _layer_and_variables(router=kind)
    out, aux = _apply(layer, variables, tokens, tasks)
    params = variables["params"]
    gate = jax.jit(routing.gate, static_argnums=1)(_router_logits(kind, params["router"], tokens, tasks), 2)
    flat = tokens.reshape(-1, WIDTH)
    fc1, fc2 = params["shared"]["fc1"], params["shared"]["fc2"]
    shared = {"w1": fc1["kernel"], "b1": fc1["bias"], "w2": fc2["kernel"], "b2": fc2["bias"]}
    expected = _naive(flat, np.asarray(gate.experts), gate.weights, params["experts"])
    expected += _naive(
        flat, np.zeros((len(flat), 1)), jnp.ones((len(flat), 1)), {n: p[None] for n, p in shared.items()}
    )
    _assert_close(out.reshape(-1, WIDTH), expected, 3e-6)
    assert float(aux["load_balance"]) == pytest.approx(float(routing.load_balance_loss(gate)), rel=1e-5)
    assert aux["utilisation"].shape == (3, 4)
    assert aux["entropy"].shape == (3,)


def test_fixed_router_gives_each_task_its_expert_and_no_losses():
    layer, variables, tokens, tasks = _layer_and_variables(router="fixed", top_k=1, shared_expert=False)
    out, aux = _apply(layer, variables, tokens, tasks, False)  # no random stream needed in training
    assert set(variables["params"]) == {"experts"}
    experts = np.repeat(tasks, 6)[:, None]
    expected = _naive(tokens.reshape(-1, WIDTH), experts, jnp.ones(experts.shape), variables["params"]["experts"])
    _assert_close(out.reshape(-1, WIDTH), expected, 3e-6)
    assert (float(aux["load_balance"]), float(aux["z_loss"])) == (0, 0)
    np.testing.assert_allclose(aux["utilisation"], np.eye(3, 4), atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"router": "fixed"}, "expected top_k=1, found 2"), ({"router": "switch"}, "router='switch': expected")],
)
def test_wrong_router_settings_are_refused(kwargs, message):
    layer = moe.MoeMlp(num_experts=4, hidden_dim=4, num_tasks=2, **kwargs)
    with pytest.raises(ValueError, match=message):
        layer.init(jax.random.key(0), jnp.zeros((1, 2, 4)), jnp.zeros(1, jnp.int32), True)


def test_parameters_have_explicit_paths_and_each_expert_its_own_fan_in():
    layer = moe.MoeMlp(num_experts=16, hidden_dim=64, num_tasks=3)
    params = _init(layer, jnp.zeros((1, 2, 32)), jnp.zeros(1, jnp.int32))["params"]
    shapes = {"/".join(k.key for k in path): p.shape for path, p in jax.tree_util.tree_leaves_with_path(params)}
    assert shapes == {
        "router/kernel": (32, 16),
        "router/task_embedding": (3, moe.TASK_EMBEDDING_DIM),
        "router/task_kernel": (moe.TASK_EMBEDDING_DIM, 16),
        "experts/w1": (16, 32, 64),
        "experts/b1": (16, 64),
        "experts/w2": (16, 64, 32),
        "experts/b2": (16, 32),
        "shared/fc1/kernel": (32, 64),
        "shared/fc1/bias": (64,),
        "shared/fc2/kernel": (64, 32),
        "shared/fc2/bias": (32,),
    }
    # 16 * 2048 draws: the standard deviation is known to 0.4 %.
    assert float(params["experts"]["w1"].std()) == pytest.approx(32**-0.5, rel=0.03)
    assert float(params["experts"]["w2"].std()) == pytest.approx(64**-0.5, rel=0.03)
    assert not jnp.allclose(params["experts"]["w1"][0], params["experts"]["w1"][1])


@pytest.mark.parametrize("per_task", [False, True])
def test_untrained_router_uses_all_experts_without_noise(per_task):
    router = moe.Router(num_experts=4, num_tasks=2, per_task=per_task)
    tokens, tasks = _normal(0, 8, 50, 16), jnp.arange(8, dtype=jnp.int32) % 2
    logits, _ = jax.jit(router.init_with_output)(jax.random.key(1), tokens, tasks)
    gate = routing.gate(logits, 2)
    share = np.bincount(np.ravel(gate.experts), minlength=4) / gate.experts.size
    assert share.min() > 0.1  # exact zeros in the gate would give 0.5, 0.5, 0, 0
    np.testing.assert_allclose(gate.weights, 0.5, atol=0.02)


def test_training_noise_needs_the_router_stream_and_changes_the_output():
    layer, variables, tokens, tasks = _layer_and_variables()
    outs = [_apply(layer, variables, tokens, tasks, False, {"router": jax.random.key(i)})[0] for i in (0, 1)]
    assert not jnp.allclose(outs[0], outs[1])


def test_bfloat16_rounds_operands_and_routes_in_float32():
    layer, variables, tokens, tasks = _layer_and_variables()
    half = layer.clone(dtype=jnp.bfloat16)

    def loss(params, layer):
        out, aux = layer.apply({"params": params}, tokens, tasks, True)
        return (out.astype(jnp.float32) ** 2).mean(), (out, aux)

    gradients = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    grads, (out, aux) = gradients(variables["params"], half)
    _assert_close(grads, gradients(variables["params"], layer)[0], 0.05)
    assert out.dtype == jnp.float32  # activations on a CPU; see core/dense.py
    assert {leaf.dtype for leaf in jax.tree.leaves((aux, grads))} == {jnp.dtype("float32")}
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    # bfloat16 keeps 8 bits: 2^-8 per product, a few of them in a row.
    whole = _apply(layer, variables, tokens, tasks)[0]
    _assert_close(out, whole, 0.03)
    assert jnp.abs(out - whole).max() > 1e-4  # something was rounded


@functools.cache
def _losses_and_gradients(layer):
    _, variables, tokens, tasks = _layer_and_variables()

    def loss(params, x):
        out, aux = layer.apply({"params": params}, x, tasks, False, rngs={"router": jax.random.key(7)})
        return (out**2).sum() + aux["load_balance"] + aux["z_loss"], (out, aux)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], tokens)


@pytest.mark.parametrize(("expert", "dispatch"), [(1, "tiles"), (2, "tiles"), (2, "batched"), (4, "ragged")])
def test_eight_devices_equal_one(expert, dispatch):
    layer = _layer_and_variables()[0]
    on_mesh = layer.clone(mesh=make_mesh(expert), dispatch=dispatch)
    _assert_close(_losses_and_gradients(on_mesh), _losses_and_gradients(layer), 1e-5)


def test_what_ragged_products_leave_after_the_last_group_reaches_nothing(monkeypatch):
    """On a mesh rows of other devices' experts lie there; on GPU and TPU nothing promises zeros, in no direction."""
    product = jax.lax.ragged_dot

    def spoilt(rows, sizes):
        return jnp.where((jnp.arange(len(rows)) < sizes.sum())[:, None], rows, 1e3)

    @jax.custom_vjp
    def careless(rows, w, sizes):
        return spoilt(product(rows, w, sizes), sizes)

    def forward(rows, w, sizes):
        return careless(rows, w, sizes), (rows, w, sizes)

    def backward(saved, g):
        rows, w, sizes = saved
        d_rows, d_w = jax.vjp(lambda rows, w: product(rows, w, sizes), rows, w)[1](g)
        return spoilt(d_rows, sizes), d_w, None

    careless.defvjp(forward, backward)
    layer = _layer_and_variables()[0]
    monkeypatch.setattr(jax.lax, "ragged_dot", careless)
    found = _losses_and_gradients(layer.clone(mesh=make_mesh(2), dispatch="ragged"))
    _assert_close(found, _losses_and_gradients(layer), 1e-5)


def test_batch_or_experts_that_do_not_divide_over_the_mesh_are_refused():
    layer, variables, tokens, tasks = _layer_and_variables()
    with pytest.raises(ValueError, match="batch of 6 does not divide over mesh axis 'data' of size 8"):
        layer.clone(mesh=make_mesh()).apply(variables, tokens[:6], tasks[:6], True)
    with pytest.raises(ValueError, match="4 experts do not divide over mesh axis 'expert' of size 8"):
        layer.clone(mesh=make_mesh(8)).apply(variables, tokens, tasks, True)


def test_dense_controls():
    assert moe.active_hidden_dim(64, top_k=2, shared_expert=True) == 192
    assert moe.active_hidden_dim(64, top_k=2, shared_expert=False) == 128
    assert moe.total_hidden_dim(64, num_experts=8, shared_expert=True) == 576
