"""Dense layers with operands in a given dtype and sums in float32.

"bfloat16" means bfloat16 activations and operands on GPU and TPU. On a CPU it means float32 activations whose matmul
operands are rounded to bfloat16: XLA's CPU backend uses the bfloat16 units (AMX, AVX512-BF16) only for products that
come out as float32, and rounding activations as well costs more time than it saves (benchmarks/NOTES.md). Parameters
are float32 everywhere. Axes: M rows, D inputs, F outputs.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

Dtype = Any


def activation_dtype(dtype: Dtype) -> Dtype:
    """The dtype of what layers of `dtype` give each other; see the module's docstring."""
    on_cpu = jax.default_backend() == "cpu"
    return jnp.float32 if on_cpu and dtype == jnp.bfloat16 else dtype


def matmul(x: jax.Array, w: jax.Array, dtype: Dtype = jnp.float32) -> jax.Array:
    """x [M, D] times w [D, F] with operands in `dtype`; [M, F] in `activation_dtype(dtype)`."""
    if activation_dtype(dtype) != dtype:
        return _rounded_matmul(x.astype(jnp.float32), w.astype(jnp.float32))
    return x.astype(dtype) @ w.astype(dtype)


def transposed(x: jax.Array) -> jax.Array:
    """x [M, D] -> [D, M], written out so in memory where x is bfloat16 on a CPU.

    XLA would fold the transposition into the product that follows, and the bfloat16 units are used for a row-major left
    operand only.
    """
    if jax.default_backend() == "cpu" and x.dtype == jnp.bfloat16:
        return with_layout_constraint(x.T, Layout((0, 1)))
    return x.T


def _dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _rounded_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """float32 x [M, D] @ w [D, F] with both rounded to bfloat16; so are the operands of both gradients."""
    return _dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), (1, 0))


def _rounded_matmul_fwd(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return _dot(x, w, (1, 0)), (x, w)


def _rounded_matmul_bwd(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    g = g.astype(jnp.bfloat16)
    return _dot(g, w, (1, 1)), _dot(transposed(x), g, (1, 0))


_rounded_matmul.defvjp(_rounded_matmul_fwd, _rounded_matmul_bwd)


def dense_params(
    module: nn.Module, inputs: Sequence[int], outputs: Sequence[int], use_bias: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Declares `kernel` [*inputs, *outputs] and `bias` [*outputs] of `module`, float32, started as `nn.DenseGeneral`'s.

    Returns:
      The kernel as [D, F], and the bias as [F] or None.
    """
    flat = (math.prod(inputs), math.prod(outputs))

    def init(key: jax.Array, shape: Sequence[int]) -> jax.Array:
        return nn.initializers.lecun_normal()(key, flat).reshape(shape)

    kernel = module.param("kernel", init, (*inputs, *outputs)).reshape(flat)
    if not use_bias:
        return kernel, None
    return kernel, module.param("bias", nn.initializers.zeros, tuple(outputs)).reshape(flat[1])


def apply_dense(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: Dtype) -> jax.Array:
    """x [M, D] @ kernel [D, F] + bias [F]; see `matmul`."""
    out = matmul(x, kernel, dtype)
    return out if bias is None else out + bias.astype(out.dtype)[None, :]


class Dense(nn.Module):
    """[M, *inputs] -> [M, F] in `activation_dtype(dtype)`; parameters kernel [*inputs, F] and bias [F]."""

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = dense_params(self, x.shape[1:], (self.features,), self.use_bias)
        return apply_dense(x.reshape(x.shape[0], -1), kernel, bias, self.dtype)
