"""Multi-head attention: jax.nn's off the CPU, by cuDNN where it serves; batched matmuls over heads on the CPU.

Axes: B batch, N tokens, K heads, Dh width of a head, G = B * K.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from core.dense import in_bfloat16_units, transposed


def attend(query: jax.Array, key: jax.Array, value: jax.Array, dtype: Any) -> jax.Array:
    """softmax(q k^T / sqrt(Dh)) v for [B, N, K, Dh] each, softmax in float32; [B, N, K, Dh] in the dtype of `query`.

    There may be fewer queries than keys and values; the result has as many tokens as `query`.

    `jax.nn.dot_product_attention` off the CPU, by cuDNN where that serves: it writes no [B, K, N, N].
    On the CPU its einsums take twice as long as batched matmuls over heads laid out contiguously (benchmarks/NOTES.md).
    Operands of products are rounded to `dtype`, in the gradient too.
    """
    if jax.default_backend() != "cpu":
        # Where fewer tokens ask than answer (a pooling), its gradient would mask by the wrong length.
        if query.shape == key.shape and _by_cudnn(query):
            return fused_attention(query, key, value)
        return jax.nn.dot_product_attention(query, key, value, implementation="xla")
    batch, _, num_heads, _ = query.shape
    out = _attention(*(rearrange(x, "b n k d -> (b k) n d") for x in (query, key, value)), dtype)
    return rearrange(out, "(b k) n d -> b n k d", b=batch, k=num_heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused_attention(query: jax.Array, key: jax.Array, value: jax.Array, implementation: str = "cudnn") -> jax.Array:
    """`jax.nn.dot_product_attention` by cuDNN, for any number of tokens.

    JAX refuses its gradient for odd numbers, which any ViT with a cls token has: there one more token is masked out.
    """
    return jax.nn.dot_product_attention(query, key, value, implementation=implementation)


def _fused_attention_fwd(query, key, value, implementation):
    return jax.vjp(functools.partial(_even_attention, implementation), query, key, value)


fused_attention.defvjp(_fused_attention_fwd, lambda implementation, vjp, g: vjp(g))


def _even_attention(implementation: str, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`fused_attention`, by one of an even number of tokens."""
    batch, num_tokens = query.shape[:2]
    if num_tokens % 2 == 0:
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation)
    padded = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value))
    length = jnp.full((batch,), num_tokens, jnp.int32)
    lengths = dict(query_seq_lengths=length, key_value_seq_lengths=length)
    return jax.nn.dot_product_attention(*padded, **lengths, implementation=implementation)[:, :num_tokens]


def _by_cudnn(query: jax.Array) -> bool:
    """Whether cuDNN's attention serves: half precision on an NVIDIA GPU. Not where the highest precision is asked for,
    as exported programs do, which may not hold calls of libraries."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if jax.default_backend() != "gpu" or not half or jax.config.jax_default_matmul_precision == "highest":
        return False
    return _cudnn_compiles(query.shape[1], query.shape[3], query.dtype.name)


@functools.cache
def _cudnn_compiles(num_tokens: int, head_width: int, dtype: str) -> bool:
    """Whether attention of one head with its gradient compiles: versions, GPUs and shapes that cuDNN does not serve are
    found only by asking it."""
    x = jax.ShapeDtypeStruct((1, num_tokens, 1, head_width), dtype)

    def summed(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return fused_attention(query, key, value).astype(jnp.float32).sum()

    try:
        for tried in (summed, jax.grad(summed, argnums=(0, 1, 2))):
            jax.jit(tried).lower(x, x, x).compile()
    except (RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        logging.warning("attention without cuDNN's kernel, which is slower: %s", reason)
        return False
    return True


def _dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Products of operands of one dtype, one for each of the G first indices, over the named axes; float32."""
    dimensions = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _transposed_dot(weights: jax.Array, x: jax.Array) -> jax.Array:
    """weights^T x, [G, N, N] and [G, N, Dh] -> [G, N, Dh] float32. What has to be written out is the narrower."""
    if not in_bfloat16_units(x):
        return _dot(weights, x, (1, 1))
    # Without the barrier XLA would make weights^T x of it again.
    return jax.lax.optimization_barrier(_dot(transposed(x), weights, (2, 1))).mT


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(query: jax.Array, key: jax.Array, value: jax.Array, dtype: Any) -> jax.Array:
    """`attend` for [G, N, Dh]; where no gradient is taken, as here.

    Divided by the weights' sum after the second product, where a row has Dh numbers and not N: twice as fast. With a
    gradient that keeps the undivided weights forward and backward together take half as long again in bfloat16
    (benchmarks/NOTES.md).
    """
    q, k, v = (x.astype(dtype) for x in (query, key, value))
    logits = _dot(q, k, (2, 2)) * query.shape[-1] ** -0.5
    weights = jnp.exp(logits - logits.max(-1, keepdims=True)).astype(dtype)
    total = weights.astype(jnp.float32).sum(-1, keepdims=True)
    return (_dot(weights, v, (2, 1)) / total).astype(query.dtype)


def _attention_fwd(query, key, value, dtype):
    q, k, v = (x.astype(dtype) for x in (query, key, value))
    weights = jax.nn.softmax(_dot(q, k, (2, 2)) * query.shape[-1] ** -0.5).astype(dtype)
    out = _dot(weights, v, (2, 1)).astype(query.dtype)
    return out, (q, k, v, weights, out)


def _attention_bwd(dtype, saved, g):
    q, k, v, weights, out = saved
    # The softmax's own term, sum_m w_nm (g v^T)_nm, is g . out: no second sum over [N, N] (as in FlashAttention).
    own = (g * out).astype(jnp.float32).sum(-1, keepdims=True)
    g = g.astype(dtype)
    logits = (weights * (_dot(g, v, (2, 2)) - own) * q.shape[-1] ** -0.5).astype(dtype)
    gradients = (
        _dot(logits, k, (2, 1)),
        _transposed_dot(logits, q),
        _transposed_dot(weights, g),
    )
    return tuple(x.astype(out.dtype) for x in gradients)


_attention.defvjp(_attention_fwd, _attention_bwd)
