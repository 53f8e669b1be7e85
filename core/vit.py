"""Vision transformer in parts: patches, attention, MLP, pre-norm block, encoder.

Axes: B batch, H W C image, P patch side, N tokens, D width, K heads. The MLP of a block is injected, so that a system
can put its own kind (Mixture-of-Experts) into the same encoder. Tokens are flattened to [B*N, D] before every dense
layer: XLA's CPU backend multiplies 2-D matrices up to twice as fast as 3-D ones. Dosovitskiy et al., arXiv 2010.11929.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

Dtype = Any
Aux = Mapping[str, jax.Array]


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Cuts images [B, H, W, C] into non-overlapping patches [B, N, P*P*C], row by row.

    Raises:
      ValueError: if H or W is not a multiple of `patch_size`.
    """
    height, width = images.shape[1:3]
    if height % patch_size or width % patch_size:
        raise ValueError(f"image size {height}x{width} is not a multiple of patch_size {patch_size}")
    return rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: jax.Array, patch_size: int, height: int) -> jax.Array:
    """Inverse of `patchify`: [B, N, P*P*C] -> [B, H, W, C] for images `height` pixels high."""
    rows = height // patch_size
    return rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", h=rows, p=patch_size, q=patch_size)


class PatchEmbed(nn.Module):
    """Linear patch embedding, [B, H, W, C] -> [B, N, D]; a convolution of stride P written as one matmul."""

    width: int
    patch_size: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        patches = patchify(images, self.patch_size)
        flat = patches.reshape(-1, patches.shape[-1])
        out = nn.Dense(self.width, dtype=self.dtype, name="proj")(flat)
        return out.reshape(*patches.shape[:2], self.width)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(Dh)) v for [B, N, K, Dh] each, softmax in float32; [B, N, K, Dh].

    `jax.nn.dot_product_attention` off the CPU. There its einsums take twice as long as batched matmuls over heads laid
    out contiguously (benchmarks/NOTES.md).
    """
    if jax.default_backend() != "cpu":
        return jax.nn.dot_product_attention(query, key, value)
    batch, _, num_heads, head_dim = query.shape
    q, k, v = (rearrange(x, "b n k d -> (b k) n d") for x in (query, key, value))
    logits = jax.lax.dot_general(q, k, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * head_dim**-0.5).astype(v.dtype)
    out = jax.lax.dot_general(weights, v, (((2,), (1,)), ((0,), (0,))))
    return rearrange(out, "(b k) n d -> b n k d", b=batch, k=num_heads)


class SelfAttention(nn.Module):
    """Multi-head self-attention, [B, N, D] -> [B, N, D]; kernels q, k, v are [D, K, Dh] and out is [K, Dh, D]."""

    num_heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        if width % self.num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {self.num_heads}")
        head_dim = width // self.num_heads
        flat = x.reshape(-1, width)

        def heads(name: str) -> jax.Array:
            out = nn.DenseGeneral((self.num_heads, head_dim), dtype=self.dtype, name=name)(flat)
            return out.reshape(batch, tokens, self.num_heads, head_dim)

        out = attend(heads("query"), heads("key"), heads("value"))
        out = nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(
            out.reshape(-1, self.num_heads, head_dim)
        )
        return out.reshape(batch, tokens, width)


class Mlp(nn.Module):
    """Two dense layers with GELU, [B, N, D] -> ([B, N, D], {}); the empty dict is where an injected MLP puts losses."""

    hidden_dim: int
    approximate_gelu: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Aux]:
        flat = x.reshape(-1, x.shape[-1])
        hidden = nn.Dense(self.hidden_dim, dtype=self.dtype, name="fc1")(flat)
        hidden = jax.nn.gelu(hidden, approximate=self.approximate_gelu)
        out = nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)
        return out.reshape(x.shape), {}


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
      num_heads: attention heads.
      make_mlp: called with the submodule's name, gives a module that maps tokens (and `mlp_args`) to (tokens, aux).
    """

    num_heads: int
    make_mlp: Callable[[str], nn.Module]
    norm_eps: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *mlp_args: Any) -> tuple[jax.Array, Aux]:
        y = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm1")(x)
        x = x + SelfAttention(self.num_heads, dtype=self.dtype, name="attn")(y)
        y = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm2")(x)
        y, aux = self.make_mlp("mlp")(y, *mlp_args)
        return x + y, aux
