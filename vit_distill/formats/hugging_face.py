"""Writer of Hugging Face folders: a ViT or DINO that transformers loads (it is not imported); inverse of the readers.

What transformers always has and a model lacks is written so that the function stays the same: zero biases and
positions, layer scales of one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core.files import write_json
from core.vit import VitConfig
from vit_distill.formats import canonical, hugging_face_dinov3, hugging_face_siglip
from vit_distill.formats.hugging_face_reader import DINOV2, DINOV2_SWIGLU, RESAMPLE, VIT
from vit_distill.formats.tensors import write_tensors
from vit_distill.preprocessing import Preprocessing


def to_hugging_face(config: VitConfig, params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config.json, tensors by their names on disk) of a ViT, of a DINOv2 for layer scale, registers, SwiGLU, of a
    DINOv3 for rotary positions, or of a SigLIP for attention pooling.

    Raises:
      ValueError: for what none of these models of transformers can express.
    """
    if config.position == "rotary":
        return hugging_face_dinov3.to_dinov3(config, params)
    if config.pool == "attention":
        return hugging_face_siglip.to_siglip(config, params)
    is_dinov2 = config.layer_scale or config.num_registers > 0 or config.mlp == "swiglu"
    content = _model_config(config, is_dinov2)
    state = canonical.with_key_bias(config, canonical.from_params(config, params))
    _express_all(config, state, is_dinov2)
    names = VIT if not is_dinov2 else DINOV2_SWIGLU if config.mlp == "swiglu" else DINOV2
    # A classifier holds the model under its name; the bare model has no prefix.
    prefix = f"{content['model_type']}." if config.num_classes else ""
    tensors = {}
    for name, array in state.items():
        source = names.source(name)
        tensors[source if source.startswith("classifier") else prefix + source] = array
    if config.num_registers:
        # Only masked pre-training uses it, but transformers' class with registers always holds it.
        tensors[f"{prefix}embeddings.mask_token"] = np.zeros((1, config.width), np.float32)
    return content, tensors


def _model_config(config: VitConfig, is_dinov2: bool) -> dict[str, Any]:
    """config.json of transformers."""
    refused = {
        "a norm before the blocks": config.pre_norm,
        "a norm after pooling": config.final_norm == "pooled",
        "mean pooling": config.pool == "mean",
    }
    if any(refused.values()):
        what = ", ".join(key for key, value in refused.items() if value)
        raise ValueError(f"Hugging Face's ViT and DINOv2 have no {what}: write a timm folder")
    ratio = config.mlp_dim // config.width
    if config.mlp == "swiglu":
        # transformers derives the hidden width: the smallest whole ratio that gives ours.
        ratio = next((r for r in range(1, 17) if (int(config.width * r * 2 / 3) + 7) // 8 * 8 == config.mlp_dim), 0)
    if is_dinov2 and config.mlp == "mlp" and ratio * config.width != config.mlp_dim:
        ratio = 0
    if is_dinov2 and not ratio:
        raise ValueError(
            f"Hugging Face's DINOv2 takes MLP widths from whole multiples of width {config.width}, found "
            f"{config.mlp_dim}: write a timm folder"
        )
    kind = ("dinov2_with_registers" if config.num_registers else "dinov2") if is_dinov2 else "vit"
    stem = {"vit": "ViT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}[kind]
    content: dict[str, Any] = {
        "architectures": [f"{stem}{'ForImageClassification' if config.num_classes else 'Model'}"],
        "model_type": kind,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "hidden_act": {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation],
        "layer_norm_eps": config.norm_eps,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "qkv_bias": config.qkv_bias,
        "dtype": "float32",
    }
    if is_dinov2:
        content |= {"mlp_ratio": ratio, "use_swiglu_ffn": config.mlp == "swiglu", "use_mask_token": False}
        content |= {"num_register_tokens": config.num_registers} if config.num_registers else {}
    else:
        content["intermediate_size"] = config.mlp_dim
    if config.num_classes:
        content["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_classes)}
        content["label2id"] = {f"LABEL_{i}": i for i in range(config.num_classes)}
    return content


def _express_all(config: VitConfig, state: dict[str, np.ndarray], is_dinov2: bool) -> None:
    """Adds tensors that transformers always has, with the values that leave the function as it is; changes `state`."""
    width = config.width
    if config.position_on_prefix and config.num_registers:
        canonical.fold_prefix_positions(state, config.num_prefix)
    if config.num_registers or not config.position_on_prefix:
        # A position for the class token alone: zero, since its own is in the token.
        state["pos_embed"] = np.concatenate([np.zeros((1, 1, width), np.float32), state["pos_embed"]], axis=1)
    if not config.patch_bias:
        state["patch_embed.proj.bias"] = np.zeros(width, np.float32)
    if config.num_classes and not config.head_bias:
        state["head.bias"] = np.zeros(config.num_classes, np.float32)
    if not is_dinov2:
        return
    if not config.layer_scale:
        state |= {f"blocks.{i}.ls{n}.gamma": np.ones(width, np.float32) for i in range(config.depth) for n in (1, 2)}
    if config.num_classes:
        # DINOv2's classifier sees [class token, mean of patches]: nothing of the second.
        state["head.weight"] = np.concatenate([state["head.weight"], np.zeros_like(state["head.weight"])], axis=1)


def write_hugging_face_folder(
    folder: Path, config: VitConfig, params: Any, preprocessing: Preprocessing, facts: Mapping[str, Any] | None = None
) -> None:
    """Writes model.safetensors, config.json and preprocessor_config.json, for transformers and for `load_teacher`.

    Args:
      facts: plain JSON; "name" and "class_names" are written.

    Raises:
      ValueError: as `to_hugging_face`.
    """
    content, tensors = to_hugging_face(config, params)
    if facts and facts.get("name"):
        content["_name_or_path"] = facts["name"]
    names = (facts or {}).get("class_names")
    if names and len(names) == config.num_classes:
        content["id2label"] = {str(i): name for i, name in enumerate(names)}
        content["label2id"] = {name: i for i, name in enumerate(names)}
    numbers = {name: number for number, name in RESAMPLE.items()}
    size = preprocessing.image_size
    preprocessor = {
        "image_processor_type": "BitImageProcessor",  # short side, then a centre crop; ViT's own squeezes
        "do_resize": True,
        "size": {"shortest_edge": preprocessing.resize_size},
        "resample": numbers[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "do_convert_rgb": config.in_channels == 3,
    }
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", content)
    write_json(folder / "preprocessor_config.json", preprocessor)
