"""Sizes of ViTs by their timm names, and what a name alone tells: heads, activation, epsilon of the norms."""

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

from core.vit import VitConfig

# depth, width, heads, MLP width. Dosovitskiy et al. 2010.11929; Touvron et al. 2012.12877; Zhai et al. 2106.04560.
_SIZES = {
    "tiny": (12, 192, 3, 768),
    "small": (12, 384, 6, 1536),
    "medium": (12, 512, 8, 2048),
    "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
    "huge": (32, 1280, 16, 5120),
    "giant": (40, 1408, 16, 6144),
    "gigantic": (48, 1664, 16, 8192),
}
_DINOV2_GIANT = (40, 1536, 24, 4096)
# DINOv3's own sizes, with SwiGLU (Siméoni et al., arXiv 2508.10104).
_DINOV3 = {
    "small_plus": (12, 384, 6, 1536),
    "huge_plus": (32, 1280, 20, 5120),
    "7b": (40, 4096, 32, 8192),
}
# SigLIP's own sizes (Alabdulmohsin et al., arXiv 2305.13035; Tschannen et al., arXiv 2502.14786).
_SIGLIP = {"so400m": (27, 1152, 16, 4304), "giantopt": (40, 1536, 16, 6144)}
# Widths whose heads are not 64 wide in the published models.
_HEADS_BY_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
_NAME = re.compile(
    r"(?P<family>vit|deit|deit3)_(?P<size>[a-z]+(?:_plus)?|7b|so400m)_patch(?P<patch>\d+)(?P<rest>(?:_[a-z0-9]+)*)"
)
_PART = re.compile(r"\d+|clip|quickgelu|dinov2|dinov3|qkvb|siglip|reg\d+")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
# Models of timm that have the tensors of a plain ViT, as far as names and shapes go, and compute something else.
_ROTARY = ("*_rope_*", "*_lingbot*", "*_sapiens2*", "vit_pe_*", "eva02_*")
_NOT_PLAIN = {
    **dict.fromkeys(_ROTARY, "rotary positions of another kind than DINOv3's"),
    "eva_giant_*": "attention of its own (EVA)",
    "beit*": "attention of its own (BEiT)",
    "*_rpn_*": "norms after attention and MLP, not before",
    "test_vit3": "attention pooling of registers too",
}
_TANH = {"activation": "gelu_tanh"}
# Where names of timm's tell more than a norm epsilon of 1e-6, the exact GELU, and the heads that the width tells.
_NAMED: Mapping[str, Mapping[str, Any]] = {
    "*_clip*": {"norm_eps": 1e-5},
    "*_dinov3*": {"norm_eps": 1e-5, "position": "rotary", "pool": "mean"},  # DINOv3's own pooling is the cls token
    "*_clip_quickgelu_*": {"activation": "quick_gelu"},
    # These SigLIPs alone: timm gives the others the exact GELU.
    "vit_base_patch32_siglip_*": _TANH,
    "vit_large_patch16_siglip_*512": _TANH,
    "vit_so400m_patch16_siglip_*": _TANH,
    "vit_giantopt_patch16_siglip_*": _TANH | {"num_heads": 16},
    "vit_base_patch16_gap_224": {"num_heads": 16},
    "test_vit": {"num_heads": 2},
    "test_vit2": {"num_heads": 2},
}


def architecture_config(name: str) -> VitConfig:
    """VitConfig of a timm architecture such as "vit_base_patch16_224" or "vit_small_patch14_reg4_dinov2".

    Raises:
      ValueError: for a name outside the families vit, deit, deit3 (plain, clip, siglip, dinov2, dinov3, reg).
    """
    match = _NAME.fullmatch(name.split(".")[0].replace("_siglip_gap", "_siglip"))
    parts = match["rest"].split("_")[1:] if match else []
    dinov2, dinov3, clip, siglip = (family in parts for family in ("dinov2", "dinov3", "clip", "siglip"))
    sizes = _SIZES | (_DINOV3 if dinov3 else {}) | (_SIGLIP if siglip else {})
    if match is None or match["size"] not in sizes or not all(_PART.fullmatch(part) for part in parts):
        raise ValueError(
            "architecture: expected a name like vit_base_patch16_224, deit3_small_patch16_224, "
            "vit_base_patch16_clip_224, vit_small_patch14_reg4_dinov2, vit_small_patch16_dinov3 or "
            "vit_base_patch16_siglip_224, of size "
            f"{', '.join(sizes)}; found {name!r}"
        )
    dinov2_giant = dinov2 and match["size"] == "giant"
    depth, width, heads, mlp_dim = _DINOV2_GIANT if dinov2_giant else sizes[match["size"]]
    registers = next((int(part[3:]) for part in parts if re.fullmatch(r"reg\d+", part)), 0)
    size = next((int(part) for part in parts if part.isdigit()), 518 if dinov2 else 256 if dinov3 else 224)
    deit3, patch = match["family"] == "deit3", int(match["patch"])
    size -= size % patch  # patches cover 378 of the 384 pixels of vit_so400m_patch14_siglip_384
    named = named_settings(name)
    if siglip:
        named |= {"class_token": False, "pool": "mean" if "_gap" in name else "attention"}
    return VitConfig(
        depth=depth, width=width, mlp_dim=mlp_dim, patch_size=patch, image_size=size,
        mlp="swiglu" if dinov2_giant or match["size"] in _DINOV3 else "mlp", num_registers=4 if dinov3 else registers,
        position_on_prefix=not (registers or deit3 or siglip), pre_norm=clip, patch_bias=not clip,
        layer_scale=dinov2 or deit3 or dinov3, qkv_bias=not dinov3 or "qkvb" in parts, key_bias="qkvb" not in parts,
        **{"num_heads": heads} | named,
    )  # fmt: skip


def dinov3_settings(width: int) -> dict[str, Any]:
    """What weights of a DINOv3 that are not timm's leave open: heads are 64 wide, in the 7B 128."""
    heads = next((size[2] for size in _DINOV3.values() if size[1] == width), width // 64)
    return named_settings("vit_dinov3") | {"num_heads": heads, "image_size": 224, "pool": "token"}


def named_settings(name: str) -> dict[str, Any]:
    """What shapes cannot tell and a timm name does: norm_eps, activation and, if need be, num_heads.

    Raises:
      ValueError: for a model that looks like a plain ViT and is none.
    """
    name = name.split(".")[0]
    if reason := next((reason for pattern, reason in _NOT_PLAIN.items() if fnmatch.fnmatchcase(name, pattern)), None):
        raise ValueError(
            f"architecture {name!r}: expected a plain ViT such as vit_base_patch16_224, found {reason}: take another"
        )
    settings: dict[str, Any] = {"norm_eps": 1e-6, "activation": "gelu"}
    for pattern, fields in _NAMED.items():
        if fnmatch.fnmatchcase(name, pattern):
            settings |= fields
    return settings


def standard_heads(width: int) -> int | None:
    """Heads that published ViTs of this width have (64 wide but for the huge ones); None where there is no custom."""
    if width in _HEADS_BY_WIDTH:
        return _HEADS_BY_WIDTH[width]
    return None if width % 64 else width // 64
