"""Hugging Face's image tower of SigLIP, and of SigLIP 2 with images of one size (transformers is not imported): names,
reader and writer.

On disk transformers 4 puts "vision_model." before all names, version 5 does in a whole model only; both load both.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from core.vit import VitConfig
from vit_distill.formats import architectures, canonical
from vit_distill.formats.checkpoint import Beside, Checkpoint, Reader
from vit_distill.formats.clip import HUGGING_FACE_BLOCK
from vit_distill.formats.hugging_face_reader import DEFAULT_HEADS, read_preprocessor, read_settings
from vit_distill.formats.names import Names

PATCHES = "embeddings.patch_embedding.weight"
NAMES = Names(
    {
        "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed.proj": "embeddings.patch_embedding",
        **HUGGING_FACE_BLOCK,
        "norm": "post_layernorm",
        "attn_pool.latent": "head.probe",
        "attn_pool.proj": "head.attention.out_proj",
        "attn_pool.norm": "head.layernorm",
        **{f"attn_pool.mlp.fc{n}": f"head.mlp.fc{n}" for n in (1, 2)},
    }
)
_IN_PROJ = "head.attention.in_proj"
_SPLIT = re.compile(r"attn_pool\.[qkv]\.(weight|bias)")


def read(tensors: Mapping[str, np.ndarray], beside: Beside) -> Checkpoint:
    """Translates an image tower, names already without "vision_model.".

    Raises:
      ValueError: for a NaFlex model.
    """
    patches = tensors[PATCHES]
    if patches.ndim == 2:
        raise ValueError(
            f"tensor {PATCHES!r}: found shape {list(patches.shape)}, a NaFlex model for images of every shape: take a "
            "SigLIP 2 with images of one size, such as google/siglip2-base-patch16-224"
        )
    state, unused = NAMES.translate(tensors)
    for leaf in ("weight", "bias"):
        name = f"{_IN_PROJ}_{leaf}"
        if name not in tensors:
            continue
        if len(tensors[name]) % 3:
            raise ValueError(f"tensor {name!r}: expected rows of query, key, value, found {len(tensors[name])}")
        for short, part in zip("qkv", np.split(tensors[name], 3), strict=True):
            state[f"attn_pool.{short}.{leaf}"] = part
    if "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"][None]
    settings: dict[str, Any] = {"norm_eps": 1e-6, "activation": "gelu_tanh"}
    notes: tuple[str, ...] = ()
    if beside.config:  # what it leaves out is the default of transformers' class
        settings |= {"num_heads": DEFAULT_HEADS} | read_settings(beside.config)
    else:
        settings |= {"num_heads": 16} if len(patches) == 1536 else {}  # DINOv2's giant of this width has 24
        notes = ("norm_eps 1e-6 and tanh GELU assumed, as SigLIP: no config.json",)
    preprocessing, more_notes = read_preprocessor(beside.preprocessor, imagenet=False)
    notes += more_notes
    if size := preprocessing.pop("image_size", 0):
        settings["image_size"] = size - size % patches.shape[-1]
        if size != settings["image_size"]:
            notes += (f"images of {settings['image_size']} pixels: patches do not cover the {size} of the file",)
    return Checkpoint(
        "huggingface",
        state,
        source_name,
        unused=tuple(name for name in unused if not name.startswith(_IN_PROJ)),
        settings=settings,
        preprocessing=architectures.HALF | preprocessing,
        facts={"name": (beside.config or {}).get("_name_or_path")},
        position_resize="bicubic",
        notes=notes,
    )


def source_name(name: str) -> str:
    """The tower's name of a canonical tensor, or of the tensor that it is a part of."""
    if match := _SPLIT.fullmatch(name):
        return f"{_IN_PROJ}_{match[1]}"
    return NAMES.source(name)


READER = Reader(
    anchors=(PATCHES,),
    read=read,
    ignored={"embeddings.position_ids": "a count from 0"},
    ignored_outside={"text_model.*": "text tower", "logit_*": "temperature and bias"},
    unsupported={
        "classifier.*": "transformers' classifier of SigLIP takes the mean of the patches: leave it out with "
        "allow_unused=['classifier.*']",
    },
)


def to_siglip(config: VitConfig, params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config.json, tensors by their names on disk) of a model with attention pooling.

    Raises:
      ValueError: for what SigLIP of transformers has not.
    """
    refused = {
        "classifier": bool(config.num_classes),
        "class token or registers": bool(config.num_prefix),
        "norm before the blocks": config.pre_norm,
        "norm after pooling": config.final_norm == "pooled",
        "layer scale": config.layer_scale,
    }
    if any(refused.values()):
        what = ", ".join(name for name, found in refused.items() if found)
        raise ValueError(f"Hugging Face's SigLIP, which has attention pooling, has no {what}: write a timm folder")
    state, zeros = canonical.from_params(config, params), np.zeros(config.width, np.float32)
    # Biases of zero are the same function as none.
    for i in range(config.depth):
        for short in "qkv":
            state.setdefault(f"blocks.{i}.attn.{short}.bias", zeros)
    state.setdefault("patch_embed.proj.bias", zeros)
    state["pos_embed"] = state["pos_embed"][0]
    tensors: dict[str, np.ndarray] = {}
    for name, array in state.items():
        source = f"vision_model.{source_name(name)}"
        tensors[source] = np.concatenate([tensors[source], array]) if source in tensors else array
    activations = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    content = {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "hidden_act": activations[config.activation],
        "layer_norm_eps": config.norm_eps,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "vision_use_head": True,
        "dtype": "float32",
    }
    return content, tensors
