"""Google's .npz: vit_jax and augreg, big_vision with and without stacked layers.

Both normalise images to [-1, 1], resize them bilinearly without a crop, and use Flax's tanh GELU and epsilon 1e-6.

Axes: D width, K heads, Dh = D / K, P patch side, L layers.
"""

import re
from collections.abc import Mapping

import einops
import numpy as np

from vit_distill.formats import architectures
from vit_distill.formats.checkpoint import Beside, Checkpoint, Reader
from vit_distill.formats.names import Names

_SHARED = {
    "cls_token": "cls",
    "patch_embed.proj": "embedding",
    "norm": "Transformer.encoder_norm",
    "head": "head",
}
_BLOCK = "Transformer.encoderblock_{i}"


def _names(position: str, norm2: str, attention: str, mlp: str) -> Names:
    attention = f"{_BLOCK}.MultiHeadDotProductAttention_{attention}"
    return Names(
        {
            **_SHARED,
            "pos_embed": position,
            "blocks.{i}.norm1": f"{_BLOCK}.LayerNorm_0",
            "blocks.{i}.norm2": f"{_BLOCK}.LayerNorm_{norm2}",
            "blocks.{i}.attn.q": f"{attention}.query",
            "blocks.{i}.attn.k": f"{attention}.key",
            "blocks.{i}.attn.v": f"{attention}.value",
            "blocks.{i}.attn.proj": f"{attention}.out",
            "blocks.{i}.mlp.fc1": f"{_BLOCK}.MlpBlock_{mlp}.Dense_0",
            "blocks.{i}.mlp.fc2": f"{_BLOCK}.MlpBlock_{mlp}.Dense_1",
        }
    )


VIT_JAX = _names("Transformer.posembed_input.pos_embedding", norm2="2", attention="1", mlp="3")
BIG_VISION = _names("pos_embedding", norm2="1", attention="0", mlp="0")


def read(tensors: Mapping[str, np.ndarray], beside: Beside) -> Checkpoint:
    """Translates vit_jax or big_vision arrays, names already without "params/" or the like.

    Raises:
      ValueError: for arrays of other ranks than a ViT's.
    """
    del beside  # these files have nothing beside them
    names = VIT_JAX if any(name.startswith("Transformer/posembed_input") for name in tensors) else BIG_VISION
    state: dict[str, np.ndarray] = {}
    sources: dict[str, str] = {}
    unused: dict[str, None] = {}
    for source, short, array in _unstacked(tensors):
        name = names.canonical(_dotted(short))
        if name is None:
            unused[source] = None
        else:
            state[name], sources[name] = _torch_layout(name, array, source), source

    def source_name(name: str) -> str:
        return sources.get(name) or _slashed(names.source(name), name)

    settings = {"norm_eps": 1e-6, "activation": "gelu_tanh"}
    query = next((a for _, short, a in _unstacked(tensors) if short.endswith("/query/kernel") and a.ndim == 3), None)
    if query is not None:
        settings["num_heads"] = query.shape[1]
    return Checkpoint(
        "google_npz",
        state,
        source_name,
        unused=tuple(unused),
        settings=settings,
        preprocessing={**architectures.HALF, "interpolation": "bilinear"},
        notes=("tanh GELU, norm_eps 1e-6, mean and std 0.5, bilinear: as vit_jax and big_vision",),
    )


# Beside a ViT, whether or not it has a prefix.
_OTHER_PARTS = {
    "opt/state/*": "optimiser state",
    "params/txt/*": "text tower",
    "params/t": "temperature",
    "params/b": "temperature",
    "extra/*": "training state",
}
READER = Reader(
    anchors=("embedding/kernel",),
    read=read,
    ignored=_OTHER_PARTS,
    ignored_outside=_OTHER_PARTS,
    unsupported={
        "MAPHead_*": "attention pooling (SigLIP) is read from timm's and Hugging Face's files alone: take one of them",
        "pre_logits/*": "the head sees a representation layer that a ViT here does not have: leave both out with "
        "allow_unused=['*pre_logits/*', '*head/*']",
    },
)


def _unstacked(tensors: Mapping[str, np.ndarray]):
    """(name in the file, name with the layer's index, array): big_vision's scan keeps all layers in one array."""
    for source, array in tensors.items():
        if "/encoderblock/" in f"/{source}":
            for i, layer in enumerate(array):
                yield source, source.replace("encoderblock/", f"encoderblock_{i}/", 1), layer
        else:
            yield source, source, array


def _dotted(name: str) -> str:
    return re.sub(r"\.(kernel|scale)$", ".weight", name.replace("/", "."))


def _slashed(name: str, ours: str) -> str:
    kind = "scale" if "norm" in ours else "kernel"
    return re.sub(r"/weight$", f"/{kind}", name.replace(".", "/"))


def _torch_layout(name: str, array: np.ndarray, source: str) -> np.ndarray:
    """Flax's layouts -> canonical ones."""
    patterns = {
        "patch_embed.proj.weight": "p q c d -> d c p q",
        "attn.proj.weight": "k h d -> d (k h)",
        "weight": "i o -> o i",
    }
    if re.search(r"attn\.[qkv]\.weight$", name):
        pattern = "d k h -> (k h) d"
    elif re.search(r"attn\.[qkv]\.bias$", name):
        pattern = "k h -> (k h)"
    elif name.endswith("weight") and "norm" not in name:
        pattern = next(value for key, value in patterns.items() if name.endswith(key))
    else:
        return array
    try:
        return einops.rearrange(array, pattern)
    except einops.EinopsError as error:
        axes = pattern.partition(" ->")[0]
        raise ValueError(f"array {source!r}: expected axes [{axes}], found shape {list(array.shape)}") from error
