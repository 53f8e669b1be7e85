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


def _operands():
    x, w, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(
        [(ROWS, INPUTS), (INPUTS, OUTPUTS), (ROWS, OUTPUTS)]
    ))  # fmt: skip
    return x, w, g


def _value_and_gradients(x, w, g, dtype):
    out, pull = jax.jit(lambda x, w: jax.vjp(lambda x, w: dense.matmul(x, w, dtype), x, w))(x, w)
    return out, *pull(g)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_and_gradients_equal_numpy_on_rounded_operands(dtype):
    """Sums of up to 40 terms in float32: 40 * 2^-24 of values below 20."""
    x, w, g = _operands()
    ours = _value_and_gradients(x, w, g, dtype)
    assert {a.dtype for a in ours} == {jnp.dtype("float32")}
    x, w, g = (np.asarray(a.astype(dtype), np.float64) for a in (x, w, g))
    for found, expected in zip(ours, (x @ w, g @ w.T, x.T @ g), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


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
