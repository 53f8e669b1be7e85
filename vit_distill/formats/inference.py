"""The architecture that names and shapes of a canonical state tell."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from vit_distill.formats.canonical import State


def infer_config(
    state: State,
    source_name: Callable[[str], str],
    position_on_prefix: bool | None = None,
    position: str = "learned",
) -> dict[str, Any]:
    """Every field of VitConfig that names and shapes tell: all but num_heads, norm_eps, activation.

    Args:
      position_on_prefix: None: whichever gives a square grid, the prefix left out if both do.
      position: as in VitConfig; "rotary" has no tensor, so that nothing tells image_size.

    Raises:
      ValueError: for states that no plain ViT has.
    """
    patch = require(state, "patch_embed.proj.weight", source_name, 4)
    width, channels, patch_size, other_side = patch.shape
    if patch_size != other_side:
        raise ValueError(f"patches: expected square ones, found {patch_size}x{other_side}")
    fc1 = require(state, "blocks.0.mlp.fc1.weight", source_name, 2).shape[0]
    fc2 = require(state, "blocks.0.mlp.fc2.weight", source_name, 2).shape[1]
    if fc1 not in (fc2, 2 * fc2):
        raise ValueError(
            f"{source_name('blocks.0.mlp.fc1.weight')!r} gives {fc1} values: expected {fc2} (MLP) or {2 * fc2} (SwiGLU)"
        )
    class_token = "cls_token" in state
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    image = {}
    if position == "learned":
        on_prefix, grid = _position_grid(state, source_name, class_token + registers, position_on_prefix)
        image = {"position_on_prefix": on_prefix, "image_size": grid * patch_size}
    head = state.get("head.weight")
    pool = "token" if class_token and "fc_norm.weight" not in state else "mean"
    return {
        "depth": _depth(state, source_name),
        "width": width,
        "mlp_dim": fc2,
        "patch_size": patch_size,
        **image,
        "in_channels": channels,
        "num_classes": 0 if head is None else head.shape[0],
        "mlp": "mlp" if fc1 == fc2 else "swiglu",
        "qkv_bias": "blocks.0.attn.q.bias" in state,
        "key_bias": "blocks.0.attn.k.bias" in state or "blocks.0.attn.q.bias" not in state,
        "patch_bias": "patch_embed.proj.bias" in state,
        "head_bias": head is None or "head.bias" in state,
        "class_token": class_token,
        "num_registers": registers,
        "pre_norm": "norm_pre.weight" in state,
        "layer_scale": "blocks.0.ls1.gamma" in state,
        "final_norm": "pooled" if "fc_norm.weight" in state else "tokens",
        "pool": pool if "attn_pool.latent" not in state else "attention",
    }


def square_side(size: Any, field: str) -> int:
    """Side in pixels of a config.json's image size, a number or [..., height, width]; 0 where it names none.

    Raises:
      ValueError: for images that are not square: their positions may be as many as a square's.
    """
    sides = np.ravel(size)[-2:] if size else [0]
    if sides[0] != sides[-1]:
        raise ValueError(
            f"config.json: {field}: expected square images, found {size}: take another model (with rotary positions, "
            "which serve every size, write one number there)"
        )
    return int(sides[0])


def _position_grid(
    state: State, source_name: Callable[[str], str], prefix: int, on_prefix: bool | None
) -> tuple[bool, int]:
    """(whether the position embedding covers the `prefix` tokens too, side of its grid of patches)."""
    count = require(state, "pos_embed", source_name, 3).shape[1]
    if on_prefix is None:  # a grid of patches alone first: timm's register models leave the prefix out
        on_prefix = prefix > 0 and math.isqrt(count) ** 2 != count
    grid = math.isqrt(max(count - prefix * on_prefix, 0))
    if grid * grid + prefix * on_prefix != count:
        raise ValueError(
            f"{source_name('pos_embed')!r}: expected a square grid of patches, alone or with {prefix} tokens before "
            f"it, found {count} positions"
        )
    return on_prefix, grid


def _depth(state: State, source_name: Callable[[str], str]) -> int:
    indices = sorted({int(m.group(1)) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))})
    if indices != list(range(len(indices))):
        raise ValueError(
            f"blocks (like {source_name('blocks.0.norm1.weight')!r}): expected indices 0..{len(indices) - 1} without a "
            f"gap, found {indices}"
        )
    return len(indices)


def require(state: State, name: str, source_name: Callable[[str], str], rank: int) -> np.ndarray:
    """The tensor called `name`, of `rank` axes.

    Raises:
      ValueError: if it is missing or has another number of axes.
    """
    if name not in state:
        _depth(state, source_name)  # a gap at block 0 has a clearer message
        hint = "; rotary positions as DINOv3's: overrides position=rotary and image_size" if name == "pos_embed" else ""
        raise ValueError(f"tensor {source_name(name)!r} is missing: expected in every ViT of this format{hint}")
    if state[name].ndim != rank:
        raise ValueError(f"tensor {source_name(name)!r}: expected {rank} axes, found shape {list(state[name].shape)}")
    return state[name]
