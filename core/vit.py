"""The vision transformer: architecture as data (VitConfig) and the module, from `core.transformer`'s parts.

Axes: B batch, H W C image, N tokens, D width, K heads, L layers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from core.dense import Dense, activation_dtype
from core.rotary import Rotary
from core.transformer import ACTIVATIONS, AttentionPool, Dtype, EncoderBlock, Mlp, PatchEmbed, SwiGlu, block_name


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
      key_bias: whether the key has one too (DINOv3: no), where query and value have.
      class_token: whether a cls token comes first.
      num_registers: register tokens after the cls token (Darcet et al., arXiv 2309.16588).
      position: "learned": an embedding added to the tokens; "rotary": queries and keys of patches turned (DINOv3).
      position_on_prefix: the position embedding covers cls and registers too; else patches only.
      rotary_base: as in core.rotary; unused with position="learned".
      pre_norm: a layer norm before the first block (CLIP).
      layer_scale: as in EncoderBlock.
      final_norm: "tokens": norm of every token before pooling; "pooled": norm after pooling (timm's fc_norm).
      pool: "token": the cls token; "mean": mean of the patch tokens; "attention": AttentionPool of them (SigLIP).
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
    key_bias: bool = True
    patch_bias: bool = True
    head_bias: bool = True
    class_token: bool = True
    num_registers: int = 0
    position: str = "learned"
    position_on_prefix: bool = True
    rotary_base: float = 100.0
    pre_norm: bool = False
    layer_scale: bool = False
    final_norm: str = "tokens"
    pool: str = "token"

    def __post_init__(self):
        choices = {
            "activation": tuple(ACTIVATIONS),
            "mlp": ("mlp", "swiglu"),
            "position": ("learned", "rotary"),
            "final_norm": ("tokens", "pooled"),
            "pool": ("token", "mean", "attention"),
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
        if self.position == "rotary" and (self.width // self.num_heads % 4 or self.rotary_base <= 1):
            raise ValueError(
                "rotary positions: expected heads of a multiple of 4 and rotary_base above 1, found width "
                f"{self.width}, num_heads {self.num_heads} and rotary_base {self.rotary_base}"
            )
        if self.pool == "token" and not self.class_token:
            raise ValueError('pool="token" needs class_token=True; use pool="mean"')
        if self.pool == "attention" and (self.mlp, self.position) != ("mlp", "learned"):
            raise ValueError(
                'pool="attention": expected mlp="mlp" and position="learned", found '
                f"mlp={self.mlp!r} and position={self.position!r}"
            )

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: cls and registers."""
        return int(self.class_token) + self.num_registers

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def rotary(self) -> Rotary | None:
        """What turns queries and keys, None with a learned position embedding."""
        if self.position != "rotary":
            return None
        return Rotary(self.image_size // self.patch_size, self.num_prefix, self.rotary_base)

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

    Parameters: embed/proj, cls_token [1, 1, D], reg_tokens [1, num_registers, D], pos_embedding [1, N or patches, D]
    (none with rotary positions), norm_pre, block_00..., norm, pool (with pool="attention"), head. Same order of tokens
    and operations as timm's VisionTransformer (Eva with rotary positions).
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
        if cfg.pool == "attention":
            pool = AttentionPool(cfg.num_heads, cfg.mlp_dim, cfg.activation, cfg.norm_eps, self.dtype, name="pool")
            pooled = pool(tokens[:, cfg.num_prefix :])
        else:
            pooled = tokens[:, 0] if cfg.pool == "token" else tokens[:, cfg.num_prefix :].mean(1)
        if cfg.final_norm == "pooled":
            pooled = final(pooled)
        logits = None
        if cfg.num_classes:
            logits = Dense((cfg.num_classes,), use_bias=cfg.head_bias, dtype=self.dtype, name="head")(pooled)
        return VitOutput(tuple(blocks), tokens, pooled, logits, embedded)

    def _embed(self, images: jax.Array) -> jax.Array:
        """Patch tokens behind cls and register tokens, learned positions added; [B, N, D]."""
        cfg = self.config
        x = PatchEmbed(cfg.width, cfg.patch_size, use_bias=cfg.patch_bias, dtype=self.dtype, name="embed")(images)
        position = None
        if cfg.position == "learned":
            count = cfg.num_tokens if cfg.position_on_prefix else cfg.num_patches
            position = self.param("pos_embedding", nn.initializers.normal(0.02), (1, count, cfg.width)).astype(x.dtype)
        prefix = []
        if cfg.class_token:
            prefix.append(self.param("cls_token", nn.initializers.normal(0.02), (1, 1, cfg.width)))
        if cfg.num_registers:
            prefix.append(self.param("reg_tokens", nn.initializers.normal(0.02), (1, cfg.num_registers, cfg.width)))
        prefix = [jnp.broadcast_to(t.astype(x.dtype), (x.shape[0], *t.shape[1:])) for t in prefix]
        if position is None:
            return jnp.concatenate([*prefix, x], axis=1)
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


def build_block(config: VitConfig, dtype: Dtype = jnp.float32, name: str | None = None) -> EncoderBlock:
    """One block of a VisionTransformer; on its own, it applies to one block's parameters and tokens [B, N, D]."""
    return EncoderBlock(
        config.num_heads,
        functools.partial(_build_mlp, config, dtype),
        norm_eps=config.norm_eps,
        qkv_bias=config.qkv_bias,
        key_bias=config.key_bias,
        layer_scale=config.layer_scale,
        rotary=config.rotary,
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
