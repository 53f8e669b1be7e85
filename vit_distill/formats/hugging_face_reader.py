"""Hugging Face's ViT and DINOv2 (transformers is not imported): names and reader.

On disk both transformers 4 and 5 write the old names; version 5 has new ones in memory, which a saved state_dict shows.
Both are read, the old ones written.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_distill.formats import architectures, canonical
from vit_distill.formats.checkpoint import Beside, Checkpoint, Reader
from vit_distill.formats.inference import square_side
from vit_distill.formats.names import Names

_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "head": "classifier",
}
_OLD_ATTENTION = {
    "blocks.{i}.attn.q": "encoder.layer.{i}.attention.attention.query",
    "blocks.{i}.attn.k": "encoder.layer.{i}.attention.attention.key",
    "blocks.{i}.attn.v": "encoder.layer.{i}.attention.attention.value",
    "blocks.{i}.attn.proj": "encoder.layer.{i}.attention.output.dense",
}
VIT = Names(
    {
        **_EMBEDDINGS,
        **_OLD_ATTENTION,
        "blocks.{i}.norm1": "encoder.layer.{i}.layernorm_before",
        "blocks.{i}.norm2": "encoder.layer.{i}.layernorm_after",
        "blocks.{i}.mlp.fc1": "encoder.layer.{i}.intermediate.dense",
        "blocks.{i}.mlp.fc2": "encoder.layer.{i}.output.dense",
    }
)
VIT_IN_MEMORY = Names(
    {
        **_EMBEDDINGS,
        **{f"blocks.{{i}}.attn.{short}": f"layers.{{i}}.attention.{short}_proj" for short in "qkv"},
        "blocks.{i}.attn.proj": "layers.{i}.attention.o_proj",
        "blocks.{i}.norm1": "layers.{i}.layernorm_before",
        "blocks.{i}.norm2": "layers.{i}.layernorm_after",
        "blocks.{i}.mlp.fc1": "layers.{i}.mlp.fc1",
        "blocks.{i}.mlp.fc2": "layers.{i}.mlp.fc2",
    }
)
_DINOV2_BLOCK = {
    **{f"blocks.{{i}}.norm{n}": f"encoder.layer.{{i}}.norm{n}" for n in (1, 2)},
    **{f"blocks.{{i}}.ls{n}.gamma": f"encoder.layer.{{i}}.layer_scale{n}.lambda1" for n in (1, 2)},
}
DINOV2 = Names(
    {
        **_EMBEDDINGS,
        **_OLD_ATTENTION,
        **_DINOV2_BLOCK,
        **{f"blocks.{{i}}.mlp.fc{n}": f"encoder.layer.{{i}}.mlp.fc{n}" for n in (1, 2)},
    }
)
DINOV2_SWIGLU = Names(
    {
        **_EMBEDDINGS,
        **_OLD_ATTENTION,
        **_DINOV2_BLOCK,
        "blocks.{i}.mlp.fc1": "encoder.layer.{i}.mlp.weights_in",
        "blocks.{i}.mlp.fc2": "encoder.layer.{i}.mlp.weights_out",
    }
)
TABLES = (VIT, VIT_IN_MEMORY, DINOV2, DINOV2_SWIGLU)

_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}
# Beside a ViT, whether or not it has a prefix.
_DECODER = {"decoder.*": "the decoder of masked pre-training"}
_IMAGENET_TYPES = ("vit_mae", "vit_msn", "deit")  # model_type of those that expect ImageNet's mean and std
DEFAULT_HEADS = 12  # of the config classes of ViT, DINOv2 and CLIP alike, whatever the width


def read(tensors: Mapping[str, np.ndarray], beside: Beside) -> Checkpoint:
    """Translates ViT or DINOv2 tensors, names already without "vit." or the like.

    Raises:
      ValueError: for a DINOv2 classifier, an unknown activation or registers that are not there.
    """
    names = max(TABLES, key=lambda table: sum(table.canonical(name) is not None for name in tensors))
    is_dinov2 = names in (DINOV2, DINOV2_SWIGLU)
    state, unused = names.translate(tensors)
    if is_dinov2 and "head.weight" in state:
        state["head.weight"] = _class_token_half(state["head.weight"])
    check_registers(state, beside.config or {})
    if "reg_token" in state and "pos_embed" in state and "cls_token" in state:
        canonical.fold_prefix_positions(state, 1)
    defaults, notes = _defaults(beside.config, is_dinov2)
    settings = defaults | read_settings(beside.config or {})
    kind = (beside.config or {}).get("model_type")
    preprocessing, more_notes = read_preprocessor(beside.preprocessor, is_dinov2 or kind in _IMAGENET_TYPES)
    if beside.preprocessor:
        settings |= {key: preprocessing.pop(key) for key in ("image_size",) if key in preprocessing}
    return Checkpoint(
        "huggingface",
        state,
        names.source,
        unused=unused,
        settings=settings,
        preprocessing=preprocessing,
        facts={"name": (beside.config or {}).get("_name_or_path"), "class_names": _class_names(beside.config or {})},
        notes=notes + more_notes,
        # As transformers does it: with antialias for the register models only.
        position_resize="timm" if "reg_token" in state else "bicubic",
    )


READER = Reader(
    anchors=("embeddings.patch_embeddings.projection.weight",),
    read=read,
    outside=("classifier.*",),
    ignored={
        "embeddings.mask_token": "used in masked pre-training only",
        "pooler.*": "a layer after the encoder that other tools do not have",
        **_DECODER,
    },
    ignored_outside=_DECODER,
    unsupported={
        "embeddings.distillation_token": "a distilled DeiT has a second class token: take a ViT",
        "*relative_position*": "relative positions (BEiT) are not a plain ViT's",
    },
)


def check_registers(state: canonical.State, config: Mapping[str, Any]) -> None:
    """Raises ValueError unless there are as many register tokens as a config.json says, if it does: without them a file
    looks like another model's."""
    found = state["reg_token"].shape[1] if "reg_token" in state else 0
    if config.get("num_register_tokens", found) != found:
        raise ValueError(
            f"tensor 'embeddings.register_tokens': expected {config['num_register_tokens']} as config.json says, "
            f"found {found}: download or write both again"
        )


def _class_token_half(weight: np.ndarray) -> np.ndarray:
    """DINOv2's classifier takes [class token, mean of patches]; ours the first, so the other half must be zero."""
    half = weight.shape[1] // 2
    if weight.shape[1] % 2 or weight[:, half:].any():
        raise ValueError(
            "tensor 'classifier.weight': DINOv2's classifier also sees the mean of the patches: leave it out with "
            "allow_unused=['classifier.*']"
        )
    return weight[:, :half]


def _defaults(config: Mapping[str, Any] | None, is_dinov2: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What transformers takes for fields that a config.json leaves out (as version 4 wrote nested ones), and notes."""
    is_msn = (config or {}).get("model_type") == "vit_msn"
    settings: dict[str, Any] = {"norm_eps": 1e-6 if is_dinov2 or is_msn else 1e-12, "activation": "gelu"}
    if not config:  # then the width is a better guess than the default of 12 heads
        return settings, (f"norm_eps {settings['norm_eps']} and exact GELU assumed: no config.json",)
    return settings | {"num_heads": DEFAULT_HEADS}, ()


def read_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of VitConfig that a config.json of transformers names, and no other.

    Raises:
      ValueError: for an unknown activation or images that are not square.
    """
    config = config.get("vision_config", config)
    square_side(config.get("image_size"), "image_size")
    settings: dict[str, Any] = {}
    if "layer_norm_eps" in config:
        settings["norm_eps"] = float(config["layer_norm_eps"])
    if "num_attention_heads" in config:
        settings["num_heads"] = int(config["num_attention_heads"])
    if "hidden_act" in config:
        activation = config["hidden_act"]
        if activation not in _ACTIVATIONS:
            expected = ", ".join(_ACTIVATIONS)
            raise ValueError(f"config.json: hidden_act: expected one of {expected}, found {activation!r}")
        settings["activation"] = _ACTIVATIONS[activation]
    return settings


def read_preprocessor(content: Mapping[str, Any] | None, imagenet: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fields of Preprocessing in a preprocessor_config.json, and notes.

    Args:
      imagenet: whether a model without one expects ImageNet's mean and std (DINOv2, MAE, MSN) rather than 0.5 (ViT).

    Raises:
      ValueError: where pixels are scaled or resized as they are not here.
    """
    if not content:
        label, values = ("ImageNet's", architectures.IMAGENET) if imagenet else ("0.5", architectures.HALF)
        return dict(values), (f"mean and std {label} assumed: no preprocessor_config.json",)
    scale = 1.0 if content.get("do_rescale") is False else content.get("rescale_factor") or 1 / 255
    if abs(255 * scale - 1) > 0.01:
        raise ValueError(
            f"preprocessor_config.json: expected pixels scaled by 1/255, found {scale:g} (do_rescale, rescale_factor): "
            "write image_mean and image_std for pixels of 0..1, and do_rescale true"
        )
    if content.get("resample") is not None and content["resample"] not in RESAMPLE:
        known = ", ".join(f"{number} ({name})" for number, name in RESAMPLE.items())
        raise ValueError(f"preprocessor_config.json: resample: expected one of {known}, found {content['resample']!r}")
    fields: dict[str, Any] = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if content.get(theirs):
            fields[ours] = tuple(content[theirs])
    if content.get("do_normalize") is False:
        fields |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    if content.get("resample") in RESAMPLE:
        fields["interpolation"] = RESAMPLE[content["resample"]]
    size, crop = _side(content.get("size")), _side(content.get("crop_size"))
    notes: tuple[str, ...] = ()
    if content.get("do_resize") is False:  # `size` says nothing then
        size = crop if content.get("do_center_crop") else None
        notes = ("do_resize is false: transformers takes images as large as they are, here they are resized to fit",)
    if content.get("do_center_crop") and crop and size:
        fields |= {"image_size": crop, "crop_fraction": min(crop / size, 1.0)}
    elif size:
        fields["image_size"] = size
        notes = ("images are centre-cropped to squares here; transformers squeezes them",)
    return fields, notes


def _side(size: Any) -> int | None:
    """Short side of the forms that transformers uses: 224, {"height": ..}, {"shortest_edge": ..}."""
    if isinstance(size, Mapping):
        return next((int(size[key]) for key in ("shortest_edge", "height") if key in size), None)
    return int(size) if size else None


def _class_names(content: Mapping[str, Any]) -> list[str] | None:
    """Names of the head's classes; None where there are none but those that transformers makes up."""
    found = content.get("id2label")
    if not isinstance(found, Mapping) or set(found) != {str(i) for i in range(len(found))}:
        return None
    names = [str(found[str(i)]) for i in range(len(found))]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names
