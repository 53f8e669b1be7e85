"""Vision transformer in parts: patches, attention, MLP, pre-norm block, and the whole classifier.

Axes: B batch, H W C image, P patch side, N tokens, D width, K heads, L layers. The MLP of a block is injected, so that
a system can put its own kind (Mixture-of-Experts) into the same block. Tokens are flattened to [B*N, D] before every
dense layer: XLA's CPU backend multiplies 2-D matrices up to twice as fast as 3-D ones. What out and fc2 read is sown as
"intermediates": "heads" [B, N, K, Dh] and "hidden" [B, N, mlp_dim]. After Dosovitskiy et al., arXiv 2010.11929.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from core.attention import attend
from core.dense import Dense, activation_dtype

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
    """Multi-head self-attention, [B, N, D] -> [B, N, D]; kernels q, k, v are [D, K, Dh] and out is [K, Dh, D]."""

    num_heads: int
    qkv_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        if width % self.num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {self.num_heads}")
        shape = (self.num_heads, width // self.num_heads)
        flat = x.reshape(-1, width)

        def heads(name: str) -> jax.Array:
            out = Dense(shape, use_bias=self.qkv_bias, dtype=self.dtype, name=name)(flat)
            return out.reshape(batch, tokens, *shape)

        out = attend(heads("query"), heads("key"), heads("value"), self.dtype)
        self.sow("intermediates", "heads", out)
        out = Dense((width,), dtype=self.dtype, name="out")(out.reshape(-1, *shape))
        return out.reshape(batch, tokens, width)


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
    """

    num_heads: int
    make_mlp: Callable[[str], nn.Module]
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    layer_scale: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *mlp_args: Any) -> tuple[jax.Array, Aux]:
        y = nn.LayerNorm(epsilon=self.norm_eps, dtype=activation_dtype(self.dtype), name="norm1")(x)
        y = SelfAttention(self.num_heads, qkv_bias=self.qkv_bias, dtype=self.dtype, name="attn")(y)
        x = x + self._scaled("ls1", y)
        y = nn.LayerNorm(epsilon=self.norm_eps, dtype=activation_dtype(self.dtype), name="norm2")(x)
        y, aux = self.make_mlp("mlp")(y, *mlp_args)
        return x + self._scaled("ls2", y), aux

    def _scaled(self, name: str, y: jax.Array) -> jax.Array:
        if not self.layer_scale:
            return y
        return y * self.param(name, nn.initializers.ones, (1, 1, y.shape[-1])).astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Architecture of a VisionTransformer.

    Attributes:
      depth, width, num_heads, mlp_dim: L, D, K and the MLP's hidden width.
      patch_size, image_size: sides in pixels; images are square.
      in_channels: C.
      num_classes: outputs of the head; 0 for none.
      norm_eps: epsilon of every layer norm.
      activation: a key of ACTIVATIONS; unused with mlp="swiglu".
      mlp: "mlp" | "swiglu".
      qkv_bias, patch_bias, head_bias: whether these layers have biases.
      class_token: whether a cls token comes first.
      num_registers: register tokens after the cls token (Darcet et al., arXiv 2309.16588).
      position_on_prefix: the position embedding covers cls and registers too; else patches only.
      pre_norm: a layer norm before the first block (CLIP).
      layer_scale: as in EncoderBlock.
      final_norm: "tokens": norm of every token before pooling; "pooled": norm after pooling (timm's fc_norm).
      pool: "token": the cls token; "mean": mean of the patch tokens.
    """

    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    patch_size: int
    image_size: int
    in_channels: int = 3
    num_classes: int = 0
    norm_eps: float = 1e-6
    activation: str = "gelu"
    mlp: str = "mlp"
    qkv_bias: bool = True
    patch_bias: bool = True
    head_bias: bool = True
    class_token: bool = True
    num_registers: int = 0
    position_on_prefix: bool = True
    pre_norm: bool = False
    layer_scale: bool = False
    final_norm: str = "tokens"
    pool: str = "token"

    def __post_init__(self):
        choices = {
            "activation": tuple(ACTIVATIONS),
            "mlp": ("mlp", "swiglu"),
            "final_norm": ("tokens", "pooled"),
            "pool": ("token", "mean"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: expected one of {allowed}, found {getattr(self, field)!r}")
        for field in ("depth", "width", "num_heads", "mlp_dim", "patch_size", "image_size", "in_channels"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, found {getattr(self, field)}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.pool == "token" and not self.class_token:
            raise ValueError('pool="token" needs class_token=True; use pool="mean"')

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: cls and registers."""
        return int(self.class_token) + self.num_registers

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.num_patches


class VitOutput(NamedTuple):
    """What a VisionTransformer returns.

    Attributes:
      blocks: L arrays [B, N, D]: the tokens after every block, before the final norm.
      tokens: [B, N, D]: the last of them after the final norm (the same with final_norm="pooled").
      pooled: [B, D]: the image's feature after pooling and norm, what a head or a probe sees.
      logits: [B, num_classes], None without a head.
      embedded: [B, N, D]: what the first block takes.
    """

    blocks: tuple[jax.Array, ...]
    tokens: jax.Array
    pooled: jax.Array
    logits: jax.Array | None
    embedded: jax.Array


class VisionTransformer(nn.Module):
    """Images [B, H, W, C], already normalised as the model expects them -> VitOutput.

    Parameters: embed/proj, cls_token [1, 1, D], reg_tokens [1, num_registers, D], pos_embedding [1, N or patches, D],
    norm_pre, block_00..., norm, head. Same order of tokens and operations as timm's VisionTransformer.
    """

    config: VitConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> VitOutput:
        cfg = self.config
        if images.shape[1:] != (cfg.image_size, cfg.image_size, cfg.in_channels):
            expected = f"[B, {cfg.image_size}, {cfg.image_size}, {cfg.in_channels}]"
            raise ValueError(f"images: expected {expected}, found {list(images.shape)}")
        norm = functools.partial(nn.LayerNorm, epsilon=cfg.norm_eps, dtype=activation_dtype(self.dtype))
        x = self._embed(images)
        if cfg.pre_norm:
            x = norm(name="norm_pre")(x)
        embedded, blocks = x, []
        for i in range(cfg.depth):
            x, _ = build_block(cfg, self.dtype, name=block_name(i))(x)
            blocks.append(x)
        final = norm(name="norm")
        tokens = final(x) if cfg.final_norm == "tokens" else x
        pooled = tokens[:, 0] if cfg.pool == "token" else tokens[:, cfg.num_prefix :].mean(1)
        if cfg.final_norm == "pooled":
            pooled = final(pooled)
        logits = None
        if cfg.num_classes:
            logits = Dense((cfg.num_classes,), use_bias=cfg.head_bias, dtype=self.dtype, name="head")(pooled)
        return VitOutput(tuple(blocks), tokens, pooled, logits, embedded)

    def _embed(self, images: jax.Array) -> jax.Array:
        """Patch tokens behind cls and register tokens, positions added; [B, N, D]."""
        cfg = self.config
        x = PatchEmbed(cfg.width, cfg.patch_size, use_bias=cfg.patch_bias, dtype=self.dtype, name="embed")(images)
        count = cfg.num_tokens if cfg.position_on_prefix else cfg.num_patches
        position = self.param("pos_embedding", nn.initializers.normal(0.02), (1, count, cfg.width)).astype(x.dtype)
        prefix = []
        if cfg.class_token:
            prefix.append(self.param("cls_token", nn.initializers.normal(0.02), (1, 1, cfg.width)))
        if cfg.num_registers:
            prefix.append(self.param("reg_tokens", nn.initializers.normal(0.02), (1, cfg.num_registers, cfg.width)))
        prefix = [jnp.broadcast_to(t.astype(x.dtype), (x.shape[0], *t.shape[1:])) for t in prefix]
        if cfg.position_on_prefix:
            return jnp.concatenate([*prefix, x], axis=1) + position
        return jnp.concatenate([*prefix, x + position], axis=1)


def init_params(config: VitConfig, key: jax.Array) -> Any:
    """Seeded float32 parameters of a VisionTransformer."""
    images = jnp.zeros((1, config.image_size, config.image_size, config.in_channels))
    return VisionTransformer(config).init(key, images)["params"]


@functools.lru_cache(maxsize=64)
def abstract_params(config: VitConfig) -> Any:
    """Shapes of these parameters, a tree of jax.ShapeDtypeStruct; nothing is computed."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def block_name(index: int) -> str:
    """Where block `index` keeps its parameters: "block_00", ..."""
    return f"block_{index:02d}"


def build_block(config: VitConfig, dtype: Dtype = jnp.float32, name: str | None = None) -> EncoderBlock:
    """One block of a VisionTransformer; on its own, it applies to one block's parameters and tokens [B, N, D]."""
    return EncoderBlock(
        config.num_heads,
        functools.partial(_build_mlp, config, dtype),
        norm_eps=config.norm_eps,
        qkv_bias=config.qkv_bias,
        layer_scale=config.layer_scale,
        dtype=dtype,
        name=name,
    )


def _build_mlp(cfg: VitConfig, dtype: Dtype, name: str) -> nn.Module:
    if cfg.mlp == "swiglu":
        return SwiGlu(cfg.mlp_dim, dtype=dtype, name=name)
    return Mlp(cfg.mlp_dim, activation=cfg.activation, dtype=dtype, name=name)


def apply_final_norm(config: VitConfig, params: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
    """The final norm on any block's tokens [B, N, D].

    Raises:
      ValueError: for a model that pools before it normalises: its tokens have no norm.
    """
    if config.final_norm != "tokens":
        raise ValueError("this model normalises after pooling: its tokens have no final norm (use the pre-norm target)")
    return nn.LayerNorm(epsilon=config.norm_eps).apply({"params": params["norm"]}, tokens)
