"""Writer of timm's format, for the timm of today (it is not imported); inverse of the reader.

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads a folder strictly.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core.files import write_json
from core.vit import VitConfig
from vit_distill.formats import canonical, eva
from vit_distill.formats.tensors import write_tensors
from vit_distill.preprocessing import Preprocessing

OWN_SECTION = "vit_distill"  # of config.json: what timm's own fields cannot say exactly
POOLS = {"token": "token", "mean": "avg", "attention": "map"}  # ours -> timm's
_SPLIT = (  # canonical; in timm they are one
    (re.compile(r"^(blocks\.\d+\.attn)\.[qkv]\.(weight|bias)$"), r"\1.qkv.\2"),
    (re.compile(r"^(attn_pool)\.[kv]\.(weight|bias)$"), r"\1.kv.\2"),
)


def joined_name(name: str) -> str:
    """timm's name of the tensor that a canonical one is or is a part of."""
    for pattern, replacement in _SPLIT:
        name = pattern.sub(replacement, name)
    return name


def to_timm(config: VitConfig, params: Any) -> dict[str, np.ndarray]:
    """Parameters -> timm's state_dict, float32; of its class Eva with rotary positions.

    Raises:
      ValueError: if timm's VisionTransformer has no such layer.
    """
    if config.position == "rotary":
        return eva.to_eva(config, params)
    if config.pre_norm and config.patch_bias:
        raise ValueError("timm has no bias in the patch embedding of a model with a norm before the blocks")
    state = canonical.with_key_bias(config, canonical.from_params(config, params))
    joined: dict[str, np.ndarray] = {}
    for name, array in state.items():
        whole = joined_name(name)
        joined[whole] = np.concatenate([joined[whole], array]) if whole in joined else array
    # timm always has these; scales of one are the same function.
    if config.mlp == "swiglu" and not config.layer_scale:
        scales = (f"blocks.{i}.ls{n}.gamma" for i in range(config.depth) for n in (1, 2))
        joined |= {name: np.ones(config.width, np.float32) for name in scales}
    return joined | eva.zero_biases(config)


def timm_model(config: VitConfig) -> tuple[str, dict[str, Any]]:
    """(architecture, model_args) with which timm builds this VitConfig.

    The architecture only gives what JSON cannot say: the norms' epsilon and SwiGLU; the arguments say the rest.

    Raises:
      ValueError: for an epsilon that no architecture of timm has.
    """
    if config.position == "rotary":
        return eva.eva_model(config)
    if config.mlp == "swiglu":
        if config.norm_eps > 3e-6:
            raise ValueError(f"timm has no SwiGLU model with norm_eps {config.norm_eps}: expected 1e-6")
        name = "vit_giant_patch14_dinov2"
    else:
        name = "vit_base_patch16_clip_224" if config.norm_eps > 3e-6 else "vit_base_patch16_224"
    if config.norm_eps > 3e-5:
        raise ValueError(f"timm has no ViT with norm_eps {config.norm_eps}: expected 1e-6 or 1e-5")
    hidden = config.mlp_dim * (2 if config.mlp == "swiglu" else 1)
    ratio = hidden / config.width
    args = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "num_classes": config.num_classes,
        "global_pool": POOLS[config.pool],
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        # timm takes int(width * ratio): half a unit more where the division rounds down.
        "mlp_ratio": ratio if int(config.width * ratio) == hidden else (hidden + 0.5) / config.width,
        "qkv_bias": config.qkv_bias,
        "init_values": 1e-5 if config.layer_scale else None,
        "class_token": config.class_token,
        "no_embed_class": not config.position_on_prefix,
        "reg_tokens": config.num_registers,
        "pre_norm": config.pre_norm,
        "fc_norm": config.final_norm == "pooled",
    }
    if config.mlp == "mlp":
        args["act_layer"] = config.activation
    return name, args


def write_timm_folder(
    folder: Path, config: VitConfig, params: Any, preprocessing: Preprocessing, facts: Mapping[str, Any] | None = None
) -> None:
    """Writes model.safetensors and config.json, for timm's local-dir loading and for `load_teacher`.

    Args:
      facts: plain JSON for our own reader: name, licence and so on; "class_names" for timm too.

    Raises:
      ValueError: as `to_timm` and `timm_model`.
    """
    facts = dict(facts or {})
    tensors, (name, args) = to_timm(config, params), timm_model(config)
    channels, size = config.in_channels, config.image_size
    crop_fraction = preprocessing.crop_fraction
    if math.floor(preprocessing.image_size / crop_fraction) < preprocessing.resize_size:
        crop_fraction = math.nextafter(crop_fraction, 0.0)  # timm's own division would lose a pixel
    content = {
        "architecture": name,
        "num_classes": config.num_classes,
        "num_features": config.width,
        "global_pool": args["global_pool"],
        "model_args": {key: value for key, value in args.items() if value is not None},
        "pretrained_cfg": {
            "tag": "vit_distill",
            "custom_load": False,
            "input_size": [channels, size, size],
            "fixed_input_size": True,
            "interpolation": preprocessing.interpolation,
            "crop_pct": crop_fraction,
            "crop_mode": "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": config.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": facts.get("licence", "unknown"),
        },
        OWN_SECTION: {
            "config": dataclasses.asdict(config),
            "preprocessing": dataclasses.asdict(preprocessing),
            "facts": facts,
        },
    }
    names = facts.get("class_names")
    if names and len(names) == config.num_classes:
        content["label_names"] = names
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", content)
