"""Transformer parts: patches, attention, MLP, pre-norm block, attention pooling.

Axes: B batch, H W C image, P patch side, N tokens, D width, K heads. The MLP of a block is injected, so that a system
can put its own kind (Mixture-of-Experts) into the same block. Tokens are flattened to [B*N, D] before every dense
layer: XLA's CPU backend multiplies 2-D matrices up to twice as fast as 3-D ones. What out and fc2 read is sown as
"intermediates": "heads" [B, N, K, Dh] and "hidden" [B, N, mlp_dim]. After Dosovitskiy et al., arXiv 2010.11929.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from core.attention import attend
from core.dense import Dense, activation_dtype
from core.rotary import Rotary, rotate

Dtype = Any
Aux = Mapping[str, jax.Array]

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    # timm, DeiT, MAE, DINO. jax.nn.gelu's erfc is more exact where x < -4 and costs more than twice as much on a CPU.
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5)),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),  # vit_jax's; the cheapest
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's CLIP
}


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
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        patches = patchify(images, self.patch_size)
        flat = patches.reshape(-1, patches.shape[-1])
        out = Dense((self.width,), use_bias=self.use_bias, dtype=self.dtype, name="proj")(flat)
        return out.reshape(*patches.shape[:2], self.width)


class SelfAttention(nn.Module):
    """Multi-head self-attention, [B, N, D] -> [B, N, D]; kernels q, k, v are [D, K, Dh] and out is [K, Dh, D].

    Attributes:
      key_bias: whether the key has a bias too, where `qkv_bias` gives them.
      rotary: queries and keys are turned by it.
    """

    num_heads: int
    qkv_bias: bool = True
    key_bias: bool = True
    rotary: Rotary | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, asking: jax.Array | None = None) -> jax.Array:
        """Tokens `asking` [B, M, D] attend to x, to [B, M, D]; by default x itself."""
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {self.num_heads}")
        shape = (self.num_heads, width // self.num_heads)
        asking = x if asking is None else asking

        def heads(name: str) -> jax.Array:
            use_bias = self.qkv_bias and (self.key_bias or name != "key")
            tokens = asking if name == "query" else x
            out = Dense(shape, use_bias=use_bias, dtype=self.dtype, name=name)(tokens.reshape(-1, width))
            out = out.reshape(*tokens.shape[:2], *shape)
            return out if self.rotary is None or name == "value" else rotate(out, self.rotary)

        out = attend(heads("query"), heads("key"), heads("value"), self.dtype)
        self.sow("intermediates", "heads", out)
        out = Dense((width,), dtype=self.dtype, name="out")(out.reshape(-1, *shape))
        return out.reshape(asking.shape)


class Mlp(nn.Module):
    """Two dense layers, [B, N, D] -> ([B, N, D], {}); the empty dict is where an injected MLP puts losses.

    Attributes:
      activation: a key of ACTIVATIONS.
    """

    hidden_dim: int
    activation: str = "gelu_tanh"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Aux]:
        flat = x.reshape(-1, x.shape[-1])
        hidden = ACTIVATIONS[self.activation](Dense((self.hidden_dim,), dtype=self.dtype, name="fc1")(flat))
        self.sow("intermediates", "hidden", hidden.reshape(*x.shape[:-1], -1))
        out = Dense((x.shape[-1],), dtype=self.dtype, name="fc2")(hidden)
        return out.reshape(x.shape), {}


class SwiGlu(nn.Module):
    """fc2(silu(gate) * value) with [gate, value] = fc1(x), [B, N, D] -> ([B, N, D], {}); DINOv2's giant.

    Attributes:
      hidden_dim: width of gate and of value, so fc1 is [D, 2 * hidden_dim]. Shazeer, arXiv 2002.05202.
    """

    hidden_dim: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Aux]:
        flat = x.reshape(-1, x.shape[-1])
        gate, value = jnp.split(Dense((2 * self.hidden_dim,), dtype=self.dtype, name="fc1")(flat), 2, axis=-1)
        hidden = jax.nn.silu(gate) * value
        self.sow("intermediates", "hidden", hidden.reshape(*x.shape[:-1], -1))
        out = Dense((x.shape[-1],), dtype=self.dtype, name="fc2")(hidden)
        return out.reshape(x.shape), {}


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
      num_heads: attention heads.
      make_mlp: called with the submodule's name, gives a module that maps tokens (and `mlp_args`) to (tokens, aux).
      layer_scale: each branch times a learned vector "ls1", "ls2" [D] (Touvron et al., arXiv 2103.17239).
      qkv_bias, key_bias, rotary: as in SelfAttention.
    """

    num_heads: int
    make_mlp: Callable[[str], nn.Module]
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    key_bias: bool = True
    layer_scale: bool = False
    rotary: Rotary | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *mlp_args: Any) -> tuple[jax.Array, Aux]:
        y = nn.LayerNorm(epsilon=self.norm_eps, dtype=activation_dtype(self.dtype), name="norm1")(x)
        attention = SelfAttention(self.num_heads, self.qkv_bias, self.key_bias, self.rotary, self.dtype, name="attn")
        y = attention(y)
        x = x + self._scaled("ls1", y)
        y = nn.LayerNorm(epsilon=self.norm_eps, dtype=activation_dtype(self.dtype), name="norm2")(x)
        y, aux = self.make_mlp("mlp")(y, *mlp_args)
        return x + self._scaled("ls2", y), aux

    def _scaled(self, name: str, y: jax.Array) -> jax.Array:
        if not self.layer_scale:
            return y
        return y * self.param(name, nn.initializers.ones, (1, 1, y.shape[-1])).astype(y.dtype)


class AttentionPool(nn.Module):
    """One learned query "query_token" [1, 1, D] attends to the tokens, then x + mlp(norm(x)); [B, N, D] -> [B, D].

    SigLIP's (Zhai et al., arXiv 2303.15343), after Lee et al., arXiv 1810.00825. All layers have biases.
    """

    num_heads: int
    mlp_dim: int
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, _, width = x.shape
        query = self.param("query_token", nn.initializers.normal(0.02), (1, 1, width)).astype(x.dtype)
        query = jnp.broadcast_to(query, (batch, 1, width))
        x = SelfAttention(self.num_heads, dtype=self.dtype, name="attn")(x, query)
        y = nn.LayerNorm(epsilon=self.norm_eps, dtype=activation_dtype(self.dtype), name="norm")(x)
        y, _ = Mlp(self.mlp_dim, self.activation, self.dtype, name="mlp")(y)
        return (x + y)[:, 0]


def block_name(index: int) -> str:
    """Where block `index` keeps its parameters: "block_00", ..."""
    return f"block_{index:02d}"
