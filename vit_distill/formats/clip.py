"""The image tower of CLIP: OpenAI's names (OpenCLIP's too) and Hugging Face's.

The projection into the joint space becomes the head, without a bias: the logits are CLIP's image embedding, the pooled
feature is what is before it. Leave it out with allow_unused (["*proj"] or ["visual_projection.weight"]).
"""

import re
from collections.abc import Mapping

import numpy as np

from vit_distill.formats import architectures
from vit_distill.formats.checkpoint import Beside, Checkpoint, Reader
from vit_distill.formats.hugging_face_reader import DEFAULT_HEADS, read_preprocessor, read_settings
from vit_distill.formats.names import Names

OPENAI = Names(
    {
        "cls_token": "class_embedding",
        "pos_embed": "positional_embedding",
        "patch_embed.proj": "conv1",
        "norm_pre": "ln_pre",
        "blocks.{i}.norm1": "transformer.resblocks.{i}.ln_1",
        "blocks.{i}.norm2": "transformer.resblocks.{i}.ln_2",
        "blocks.{i}.attn.proj": "transformer.resblocks.{i}.attn.out_proj",
        "blocks.{i}.mlp.fc1": "transformer.resblocks.{i}.mlp.c_fc",
        "blocks.{i}.mlp.fc2": "transformer.resblocks.{i}.mlp.c_proj",
        "norm": "ln_post",
        "head.weight": "proj",
    }
)
HUGGING_FACE_BLOCK = {  # SigLIP's too
    **{f"blocks.{{i}}.norm{n}": f"encoder.layers.{{i}}.layer_norm{n}" for n in (1, 2)},
    **{f"blocks.{{i}}.attn.{short}": f"encoder.layers.{{i}}.self_attn.{short}_proj" for short in "qkv"},
    "blocks.{i}.attn.proj": "encoder.layers.{i}.self_attn.out_proj",
    **{f"blocks.{{i}}.mlp.fc{n}": f"encoder.layers.{{i}}.mlp.fc{n}" for n in (1, 2)},
}
HUGGING_FACE = Names(
    {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm_pre": "pre_layrnorm",
        **HUGGING_FACE_BLOCK,
        "norm": "post_layernorm",
        "head": "visual_projection",
    }
)
_IN_PROJ = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_SPLIT = re.compile(r"blocks\.(\d+)\.attn\.[qkv]\.(weight|bias)")


def read(tensors: Mapping[str, np.ndarray], beside: Beside) -> Checkpoint:
    """Translates an image tower, names already without "visual." or "vision_model."."""
    is_openai = "class_embedding" in tensors
    names = OPENAI if is_openai else HUGGING_FACE
    state, unused = names.translate(tensors)
    if is_openai:
        unused = tuple(name for name in unused if not _IN_PROJ.fullmatch(name))
        for name, array in tensors.items():
            if match := _IN_PROJ.fullmatch(name):
                if len(array) % 3:
                    raise ValueError(f"tensor {name!r}: expected rows of query, key, value, found {len(array)}")
                for short, part in zip("qkv", np.split(array, 3), strict=True):
                    state[f"blocks.{match[1]}.attn.{short}.{match[2]}"] = part
        if "head.weight" in state:
            state["head.weight"] = state["head.weight"].T
    state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"][None]

    def source_name(name: str) -> str:
        if is_openai and (match := _SPLIT.fullmatch(name)):
            return f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"
        return names.source(name)

    settings, preprocessing = {"norm_eps": 1e-5, "activation": "quick_gelu"}, dict(architectures.OPENAI)
    notes: tuple[str, ...] = ("norm_eps 1e-5, quick GELU, mean and std as OpenAI's models (OpenCLIP's own have GELU)",)
    if beside.config and not is_openai:
        settings, notes = settings | {"num_heads": DEFAULT_HEADS} | read_settings(beside.config), ()
    if beside.preprocessor:
        fields, more = read_preprocessor(beside.preprocessor, imagenet=False)
        fields.pop("image_size", None)
        preprocessing, notes = preprocessing | fields, notes + more
    return Checkpoint(
        "clip",
        state,
        source_name,
        unused=unused,
        settings=settings,
        preprocessing=preprocessing,
        position_resize="timm" if is_openai else "bicubic",
        notes=notes,
    )


READER = Reader(
    anchors=("class_embedding", "embeddings.class_embedding"),
    read=read,
    outside=("visual_projection.weight",),
    ignored={"embeddings.position_ids": "a count from 0"},
    ignored_outside={
        "text_model.*": "text tower",
        "text_projection*": "text tower",
        "transformer.resblocks.*": "text tower",
        "positional_embedding": "text tower",
        "token_embedding.*": "text tower",
        "ln_final.*": "text tower",
        "attn_mask": "text tower",
        "logit_*": "temperature",
        "input_resolution": "a number that the text tower's code needs",
        "context_length": "a number that the text tower's code needs",
        "vocab_size": "a number that the text tower's code needs",
    },
    unsupported={
        "layer1.*": "a CLIP of ResNet type is not a ViT",
        "attnpool.*": "a CLIP of ResNet type is not a ViT",
    },
)
