"""Dense layers with operands in a given dtype and sums in float32.

"bfloat16" means bfloat16 activations and operands on GPU and TPU. On a CPU it means float32 activations whose matmul
operands are rounded to bfloat16: XLA's CPU backend uses the bfloat16 units (AMX, AVX512-BF16) only for products that
come out as float32, and rounding activations as well costs more time than it saves (benchmarks/NOTES.md). Parameters
are float32 everywhere. Axes: M rows, D inputs, F outputs, R rank.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

Dtype = Any
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}  # by their names in configs


def named_dtype(name: str, field: str) -> Dtype:
    """The dtype that `field` of a config names.

    Raises:
      ValueError: for another than those of DTYPES: float16 would need a scaled loss.
    """
    if name not in DTYPES:
        raise ValueError(f"{field}: expected one of {sorted(DTYPES)}, found {name!r}")
    return DTYPES[name]


@flax.struct.dataclass
class AdaptedKernel:
    """A frozen kernel and low-rank factors beside it, in place of a layer's kernel: W + scale * AB.

    The gradients of a and b need products of rank R only; through the sum W + scale * AB they would need the whole
    kernel's gradient first. W comes first: Flax compares a parameter's first leaf with the declared shape.

    Attributes:
      kernel: W [*inputs, *outputs], constant in the gradient.
      a, b: [*inputs, R] and [R, *outputs].
    """

    kernel: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False)

    def reshape(self, shape: tuple[int, int]) -> "AdaptedKernel":
        """The same with one input and one output axis."""
        a, b = self.a.reshape(shape[0], -1), self.b.reshape(-1, shape[1])
        return AdaptedKernel(self.kernel.reshape(shape), a, b, self.scale)


Kernel = jax.Array | AdaptedKernel


def activation_dtype(dtype: Dtype) -> Dtype:
    """The dtype of what layers of `dtype` give each other; see the module's docstring."""
    on_cpu = jax.default_backend() == "cpu"
    return jnp.float32 if on_cpu and dtype == jnp.bfloat16 else dtype


def rounded_kernels(params: Any, dtype: Dtype) -> Any:
    """Parameters with every "kernel" in `dtype`, which layers of that dtype would round it to in each call."""

    def rounded(path: Any, leaf: jax.Array) -> jax.Array:
        return jnp.asarray(leaf, dtype) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(rounded, params)


def in_bfloat16_units(x: jax.Array) -> bool:
    """Whether products of x are those of a CPU's bfloat16 units, where operands' layouts and copies decide the time."""
    return jax.default_backend() == "cpu" and x.dtype == jnp.bfloat16


def transposed(x: jax.Array) -> jax.Array:
    """x [..., M, D] -> [..., D, M], written out so in memory where x is bfloat16 on a CPU.

    XLA would fold the transposition into the product that follows, and the bfloat16 units are used for a row-major left
    operand only.
    """
    if in_bfloat16_units(x):
        return with_layout_constraint(x.mT, Layout(tuple(range(x.ndim))))
    return x.mT


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int], dtype: Dtype = jnp.float32) -> jax.Array:
    """Product of operands of one dtype over the named axes, in `dtype`: rounded to it as it is written, where it is
    narrower than the sums, instead of in a second pass."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=dtype)


def outer(x: jax.Array, g: jax.Array) -> jax.Array:
    """x^T g, [M, D] and [M, F] -> [D, F] float32: a weight's gradient. What has to be written out is the narrower."""
    if x.shape[1] <= g.shape[1] or not in_bfloat16_units(x):
        return dot(transposed(x), g, (1, 0))
    # Without the barrier XLA would make x^T g of it again.
    return jax.lax.optimization_barrier(dot(transposed(g), x, (1, 0))).T


def matmul(x: jax.Array, kernel: Kernel, dtype: Dtype = jnp.float32) -> jax.Array:
    """x [M, D] times kernel [D, F] with operands in `dtype`; [M, F] in `activation_dtype(dtype)`."""
    x = x.astype(activation_dtype(dtype))
    if not isinstance(kernel, AdaptedKernel):
        return _matmul(x, kernel, dtype)
    w, a, b, scale = kernel.kernel, kernel.a, kernel.b, kernel.scale
    # One product of the sum is fewer FLOPs; but rounding the sum to bfloat16 would lose what small factors add to it.
    merged = jnp.dtype(dtype) == jnp.float32
    if merged:
        product = jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
        w = jax.lax.stop_gradient(w + scale * product)
    return _low_rank_matmul(x, w, a, b, scale, merged, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, w: jax.Array, dtype: Dtype) -> jax.Array:
    return dot(x.astype(dtype), w.astype(dtype), (1, 0), x.dtype)


def _matmul_bwd(dtype: Dtype, saved: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array) -> tuple[Any, Any]:
    # What does not train (a frozen kernel, the first layer's input) is not used: XLA drops its product.
    x, w, example = saved
    g = g.astype(dtype)
    dx = dot(g, w.astype(dtype), (1, 1), example.dtype)
    return dx, outer(x, g).astype(w.dtype)


_matmul.defvjp(
    lambda x, w, dtype: (_matmul(x, w, dtype), (x.astype(dtype), w, jnp.zeros((), x.dtype))),
    _matmul_bwd,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _low_rank_matmul(
    x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: float, merged: bool, dtype: Dtype
) -> jax.Array:
    """x @ w where w holds scale * AB already (merged), else x @ w + scale * (x @ a) @ b."""
    rounded, w = x.astype(dtype), w.astype(dtype)
    if merged:
        return dot(rounded, w, (1, 0), x.dtype)
    low = (scale * dot(rounded, a.astype(dtype), (1, 0))).astype(dtype)
    return _sum_of_products(rounded, w, low, b.astype(dtype), 0, x.dtype)


def _sum_of_products(x: jax.Array, w: jax.Array, low: jax.Array, b: jax.Array, axis: int, dtype: Dtype) -> jax.Array:
    """x w + low b over the given axis of w and b: x [M, D] and low [M, R] -> [M, F] in `dtype`.

    In a CPU's bfloat16 units, where the result is wider than x, it is one product of what is joined: a second result
    would be written and read.
    """
    if w.shape[1 - axis] <= w.shape[axis] or not in_bfloat16_units(x):
        return dot(x, w, (1, axis), dtype) + dot(low, b, (1, axis), dtype)
    return dot(_joined(x, low, 1), _joined(w, b, axis), (1, axis), dtype)


def _joined(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Two bfloat16 arrays behind each other. As integers: XLA's CPU backend would join them by way of float32."""
    bits = jnp.concatenate([jax.lax.bitcast_convert_type(part, jnp.uint16) for part in (x, y)], axis)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def _low_rank_matmul_fwd(x, w, a, b, scale, merged, dtype):
    saved = (x.astype(dtype), w, a, b, jnp.zeros((), x.dtype))
    return _low_rank_matmul(x, w, a, b, scale, merged, dtype), saved


def _low_rank_matmul_bwd(scale, merged, dtype, saved, g):
    x, w, a, b, example = saved
    w, a, b, g = w.astype(dtype), a.astype(dtype), b.astype(dtype), g.astype(dtype)
    low, g_low = ((scale * y).astype(dtype) for y in (dot(x, a, (1, 0)), dot(g, b, (1, 1))))  # [M, R] both
    dx = dot(g, w, (1, 1), example.dtype) if merged else _sum_of_products(g, w, g_low, a, 1, example.dtype)
    return dx, jnp.zeros_like(saved[1]), outer(x, g_low), outer(low, g)


_low_rank_matmul.defvjp(_low_rank_matmul_fwd, _low_rank_matmul_bwd)


class Dense(nn.Module):
    """[M, *inputs] -> [M, *features] in `activation_dtype(dtype)`; kernel [*inputs, *features], bias [*features]."""

    features: Sequence[int]
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, features = x.shape[1:], tuple(self.features)
        flat = (math.prod(inputs), math.prod(features))

        def init(key: jax.Array, shape: Sequence[int]) -> jax.Array:
            return nn.initializers.lecun_normal()(key, flat).reshape(shape)  # as nn.DenseGeneral

        kernel = self.param("kernel", init, (*inputs, *features)).reshape(flat)
        out = matmul(x.reshape(-1, flat[0]), kernel, self.dtype).reshape(-1, *features)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, features)
            out = out + bias.astype(out.dtype)[None]
        return out
