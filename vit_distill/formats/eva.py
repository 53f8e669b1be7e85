"""A model with rotary positions as timm's class Eva has it, which is how timm builds DINOv3 (timm is not imported)."""

import re
from typing import Any

import numpy as np

from core.vit import VitConfig
from vit_distill.formats import canonical


def to_eva(config: VitConfig, params: Any) -> dict[str, np.ndarray]:
    """Parameters -> timm's state_dict, float32; of query, key and value the kernels are one, the biases are not.

    Raises:
      ValueError: as `eva_model`.
    """
    eva_model(config)
    state = canonical.from_params(config, params)
    if config.mlp == "swiglu":
        state = canonical.split_gates(state)
    found: dict[str, np.ndarray] = {}
    for name, array in state.items():
        name = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)
        name = re.sub(r"\.attn\.([qv])\.bias$", r".attn.\1_bias", name)
        kernel = re.sub(r"\.attn\.[qkv]\.weight$", ".attn.qkv.weight", name)
        found[kernel] = np.concatenate([found[kernel], array]) if kernel in found else array
    if not config.layer_scale:  # timm always has them; scales of one are the same function
        scales = (f"blocks.{i}.gamma_{n}" for i in range(config.depth) for n in (1, 2))
        found |= {name: np.ones(config.width, np.float32) for name in scales}
    return found | zero_biases(config)


def zero_biases(config: VitConfig) -> dict[str, np.ndarray]:
    """Biases that all of timm's classes have and this model has not: zeros, the same function."""
    found: dict[str, np.ndarray] = {}
    if not config.patch_bias and not config.pre_norm:
        found["patch_embed.proj.bias"] = np.zeros(config.width, np.float32)
    if config.num_classes and not config.head_bias:
        found["head.bias"] = np.zeros(config.num_classes, np.float32)
    return found


def eva_model(config: VitConfig) -> tuple[str, dict[str, Any]]:
    """(architecture, model_args) with which timm builds this VitConfig.

    Raises:
      ValueError: for what Eva has not.
    """
    refused = {
        "bias of the key": config.qkv_bias and config.key_bias,
        f"activation {config.activation}": config.mlp == "mlp" and config.activation != "gelu",
        f"norm_eps {config.norm_eps:g} (expected 1e-5)": abs(config.norm_eps / 1e-5 - 1) > 0.1,
        "patch embedding with a bias and a norm after it": config.pre_norm and config.patch_bias,
    }
    if any(refused.values()):
        what = ", ".join(name for name, found in refused.items() if found)
        raise ValueError(f"timm's Eva, which has rotary positions, has no {what}: write a Hugging Face folder")
    ratio = config.mlp_dim / config.width
    args = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "num_classes": config.num_classes,
        "global_pool": "token" if config.pool == "token" else "avg",
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        # timm takes int(width * ratio): half a unit more where the division rounds down.
        "mlp_ratio": ratio if int(config.width * ratio) == config.mlp_dim else (config.mlp_dim + 0.5) / config.width,
        "swiglu_align_to": 1 if config.mlp == "swiglu" else None,
        "qkv_bias": config.qkv_bias,
        "class_token": config.class_token,
        "num_reg_tokens": config.num_registers,
        "rope_temperature": config.rotary_base,
        "use_pre_transformer_norm": config.pre_norm,
        "use_fc_norm": config.final_norm == "pooled",
    }
    return "vit_small_plus_patch16_dinov3" if config.mlp == "swiglu" else "vit_small_patch16_dinov3", args
