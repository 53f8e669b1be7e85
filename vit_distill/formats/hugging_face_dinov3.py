"""Hugging Face's DINOv3 with a ViT (transformers is not imported): names, reader and writer.

On disk its blocks are called "layer.0", in a saved state_dict "model.layer.0"; both are read, the first is written.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from core.vit import VitConfig
from vit_distill.formats import architectures, canonical, inference
from vit_distill.formats.checkpoint import Beside, Checkpoint, Reader
from vit_distill.formats.hugging_face_reader import check_registers, read_preprocessor, read_settings
from vit_distill.formats.names import Names

ANCHOR = "embeddings.patch_embeddings.weight"
_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "norm": "norm",
}
_BLOCK = {
    **{f"attn.{short}": f"attention.{short}_proj" for short in "qkv"},
    "attn.proj": "attention.o_proj",
    **{f"norm{n}": f"norm{n}" for n in (1, 2)},
    **{f"ls{n}.gamma": f"layer_scale{n}.lambda1" for n in (1, 2)},
    "mlp.fc2": "mlp.down_proj",
}
_MLP = {"mlp.fc1": "mlp.up_proj"}
_GATED_MLP = {"mlp.fc1_g": "mlp.gate_proj", "mlp.fc1_x": "mlp.up_proj"}


def _names(mlp: Mapping[str, str], layers: str = "layer") -> Names:
    block = {f"blocks.{{i}}.{ours}": f"{layers}.{{i}}.{theirs}" for ours, theirs in {**_BLOCK, **mlp}.items()}
    return Names({**_EMBEDDINGS, **block})


def read(tensors: Mapping[str, np.ndarray], beside: Beside) -> Checkpoint:
    """Translates DINOv3's tensors.

    Raises:
      ValueError: for an activation that is not ours, or registers that are not there.
    """
    content = beside.config or {}
    gated = any(".mlp.gate_proj." in name for name in tensors)
    layers = "model.layer" if any(name.startswith("model.layer.") for name in tensors) else "layer"
    names = _names(_GATED_MLP if gated else _MLP, layers)
    state, unused = names.translate(tensors)
    if "reg_token" in state and not state["reg_token"].size:  # transformers' class holds them always, even none
        del state["reg_token"]
    check_registers(state, content)
    gate = content.get("hidden_act", "gelu") if content else "silu"
    if gated and gate != "silu":
        raise ValueError(f"config.json: hidden_act: expected silu of a gated MLP, found {gate!r}")
    told = read_settings({key: value for key, value in content.items() if not (gated and key == "hidden_act")})
    settings = architectures.dinov3_settings(inference.require(state, "cls_token", names.source, 3).shape[-1])
    # What a config.json leaves out is the default of transformers' class.
    for ours, theirs, default in (("num_heads", "num_attention_heads", 6), ("image_size", "image_size", 224)):
        settings |= {ours: int(np.ravel(content.get(theirs, default))[-1])} if content else {}
    settings |= told | {"rotary_base": float(content.get("rope_theta", 100.0))}
    notes = () if content else (f"{settings['num_heads']} heads and images of 224 pixels assumed: no config.json",)
    preprocessing, more_notes = read_preprocessor(beside.preprocessor, imagenet=True)
    settings |= {key: preprocessing.pop(key) for key in ("image_size",) if key in preprocessing}

    def source_name(name: str) -> str:
        return names.source(name.replace(".mlp.fc1.", ".mlp.fc1_g.") if gated else name)

    return Checkpoint(
        "huggingface",
        canonical.join_gates(state),
        source_name,
        unused=unused,
        settings=settings,
        preprocessing=preprocessing,
        facts={"name": content.get("_name_or_path")},
        notes=notes + more_notes,
    )


READER = Reader(
    anchors=(ANCHOR,),
    read=read,
    ignored={"embeddings.mask_token": "used in masked pre-training only"},
)


def to_dinov3(config: VitConfig, params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config.json, tensors by their names on disk) of a model with rotary positions.

    Raises:
      ValueError: for what DINOv3 of transformers has not.
    """
    refused = {
        "classifier": bool(config.num_classes),
        "norm before the blocks": config.pre_norm,
        "norm after pooling": config.final_norm == "pooled",
        "mean pooling": config.pool == "mean",
    }
    if any(refused.values()):
        what = " and ".join(name for name, found in refused.items() if found)
        raise ValueError(f"Hugging Face's DINOv3, which has rotary positions, has no {what}: write a timm folder")
    gated, width = config.mlp == "swiglu", config.width
    state = canonical.from_params(config, params)
    if gated:
        state = canonical.split_gates(state)
    if not config.patch_bias:
        state["patch_embed.proj.bias"] = np.zeros(width, np.float32)
    if not config.layer_scale:
        state |= {f"blocks.{i}.ls{n}.gamma": np.ones(width, np.float32) for i in range(config.depth) for n in (1, 2)}
    names = _names(_GATED_MLP if gated else _MLP)
    tensors = {names.source(name): array for name, array in state.items()}
    # Masked pre-training alone uses the one; transformers' class always holds both.
    tensors["embeddings.mask_token"] = np.zeros((1, 1, width), np.float32)
    tensors.setdefault("embeddings.register_tokens", np.zeros((1, 0, width), np.float32))
    activations = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    content = {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "hidden_act": "silu" if gated else activations[config.activation],
        "use_gated_mlp": gated,
        "layer_norm_eps": config.norm_eps,
        "rope_theta": config.rotary_base,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "num_register_tokens": config.num_registers,
        "query_bias": config.qkv_bias,
        "key_bias": config.qkv_bias and config.key_bias,
        "value_bias": config.qkv_bias,
        "dtype": "float32",
    }
    return content, tensors
