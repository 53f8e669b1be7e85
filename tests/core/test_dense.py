"""core/dense.py against NumPy in float64 and Flax's own layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from core import dense
from core.mesh import make_mesh

ROWS, INPUTS, OUTPUTS = 40, 12, 24


def _operands(outputs=OUTPUTS):
    x, w, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(
        [(ROWS, INPUTS), (INPUTS, outputs), (ROWS, outputs)]
    ))  # fmt: skip
    return x, w, g


def _value_and_gradients(x, w, g, dtype):
    out, pull = jax.jit(lambda x, w: jax.vjp(lambda x, w: dense.matmul(x, w, dtype), x, w))(x, w)
    return out, *pull(g)


@pytest.mark.parametrize("outputs", [24, 6])  # more than the inputs and fewer: other operands are transposed or joined
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_and_gradients_equal_numpy_on_rounded_operands(dtype, outputs):
    """Sums of up to 40 terms in float32: 40 * 2^-24 of values below 20."""
    x, w, g = _operands(outputs)
    ours = _value_and_gradients(x, w, g, dtype)
    assert {a.dtype for a in ours} == {jnp.dtype("float32")}
    x, w, g = (np.asarray(a.astype(dtype), np.float64) for a in (x, w, g))
    for found, expected in zip(ours, (x @ w, g @ w.T, x.T @ g), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("outputs", [24, 6])
def test_an_adapted_kernel_in_bfloat16_equals_numpy_on_rounded_operands(outputs):
    """Every operand is rounded once, x A and g B' after the scale; sums as above."""
    x, w, g = _operands(outputs)
    a, b = jax.random.normal(jax.random.key(3), (INPUTS, 2)), jax.random.normal(jax.random.key(4), (2, outputs))

    def apply(x, a, b):
        return dense.matmul(x, dense.AdaptedKernel(w, a, b, 0.3), jnp.bfloat16)

    out, pull = jax.jit(lambda *args: jax.vjp(apply, *args))(x, a, b)
    rounded = lambda y: np.asarray(jnp.asarray(y, jnp.float32).astype(jnp.bfloat16), np.float64)  # noqa: E731
    x, w, g, a, b = map(rounded, (x, w, g, a, b))
    low, g_low = rounded(0.3 * (x @ a)), rounded(0.3 * (g @ b.T))
    expected = (x @ w + low @ b, g @ w.T + g_low @ a.T, x.T @ g_low, low.T @ g)
    for found, value in zip((out, *pull(g.astype(np.float32))), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("outputs", [24, 6])
@pytest.mark.parametrize("adapted", [False, True])
def test_off_the_cpu_activations_and_their_gradients_are_bfloat16(monkeypatch, outputs, adapted):
    """The arithmetic of a GPU, run on the CPU: against float32, within the rounding of each product to 8 bits."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, w, g = _operands(outputs)
    a, b = jax.random.normal(jax.random.key(3), (INPUTS, 2)), jax.random.normal(jax.random.key(4), (2, outputs))

    def run(dtype):
        def apply(x, w, a, b):
            return dense.matmul(x, dense.AdaptedKernel(w, a, b, 0.3) if adapted else w, dtype)

        out, pull = jax.vjp(apply, x.astype(dense.activation_dtype(dtype)), w, a, b)
        return out, *pull(g.astype(out.dtype))

    found, expected = run(jnp.bfloat16), run(jnp.float32)
    assert [y.dtype for y in found] == ["bfloat16", "bfloat16", "float32", "float32", "float32"]
    for one, other in zip(found, expected, strict=True):
        assert np.linalg.norm(np.float32(one) - other) <= 0.02 * np.linalg.norm(other)


def test_bfloat16_really_rounds():
    x, w, g = _operands()
    whole, rounded = (_value_and_gradients(x, w, g, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    for a, b in zip(whole, rounded, strict=True):
        assert np.abs(a - b).max() > 1e-3


def test_layer_has_the_parameters_and_the_output_of_flax_layers():
    """Same names, shapes and start values; sums in another order."""
    x = jax.random.normal(jax.random.key(0), (ROWS, 3, 4))
    ours, theirs = dense.Dense((OUTPUTS,)), nn.DenseGeneral(OUTPUTS, axis=(-2, -1))
    params = theirs.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(1), x), params)
    np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), rtol=0, atol=1e-5)
    assert set(dense.Dense((OUTPUTS,), use_bias=False).init(jax.random.key(1), x)["params"]) == {"kernel"}


def test_bfloat16_gradients_are_the_same_with_rows_on_eight_devices():
    """The transposed operand's layout does not stop XLA from splitting rows; sums in another order."""
    x, w, g = _operands()
    mesh = make_mesh()
    assert mesh.size == 8
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((x, P("data")), (w, P()), (g, P("data")))]
    for a, b in zip(
        _value_and_gradients(*placed, jnp.bfloat16), _value_and_gradients(x, w, g, jnp.bfloat16), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-5)
