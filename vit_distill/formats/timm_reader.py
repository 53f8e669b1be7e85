"""Reader of timm's format, which is also that of the original files of DeiT, MAE and DINO, 1 to 3."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_distill.formats import architectures, canonical
from vit_distill.formats.checkpoint import Beside, Checkpoint, Reader
from vit_distill.formats.inference import square_side
from vit_distill.formats.timm import OWN_SECTION, POOLS, joined_name

# Old and original dialects -> timm's names of today.
_DIALECTS = (
    (re.compile(r"^blocks\.\d+\.(\d+)\."), r"blocks.\1."),  # DINOv2 trained in chunks; the second index counts on
    (re.compile(r"^(register_tokens|storage_tokens)$"), "reg_token"),
    (re.compile(r"\.mlp\.w12\."), ".mlp.fc1."),
    (re.compile(r"\.mlp\.w1\."), ".mlp.fc1_g."),  # DINOv3, as the next
    (re.compile(r"\.mlp\.w2\."), ".mlp.fc1_x."),
    (re.compile(r"\.mlp\.w3\."), ".mlp.fc2."),
    (re.compile(r"\.gamma_([12])$"), r".ls\1.gamma"),  # DeiT III, timm's DINOv3
    (re.compile(r"\.attn\.([qv])_bias$"), r".attn.\1.bias"),  # timm's DINOv3
)
# Of original files of DeiT, MAE and DINO and of none that timm writes: what the weights are under, and names.
_WRAPPERS = ("model", "teacher")
_ORIGINAL = (
    "register_tokens", "*mask_token", "*decoder_*", "*dino_head.*", "*ibot_head.*", "head.mlp.*", "head.last_layer*",
    "*.mlp.w12.*", "*.gamma_1", "storage_tokens",
)  # fmt: skip
# Of CLIPs that were trained with quick GELU; most say so in their notes too.
_QUICK_GELU_TAGS = ("openai", "metaclip_400m", "metaclip_2pt5b")
# What a config tells and tensors do not.
_TOLD = (
    "num_heads", "norm_eps", "activation", "pool", "position", "position_on_prefix", "rotary_base", "image_size"
)  # fmt: skip
# Beside a ViT, whether or not it has a prefix.
_OTHER_PARTS = {
    "head.mlp.*": "DINO's projection head",
    "head.last_layer*": "DINO's projection head",
    "*dino_head.*": "DINO's projection head",
    "*ibot_head.*": "iBOT's projection head",
    "text.*": "CLIP's text tower",
    "logit_*": "CLIP's temperature",
}
# Of model_args: how DINOv3 turns queries and keys, which other values change and no tensor tells.
_ROTARY_ARGS = {
    "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True, "rope_grid_offset": 0,
    "rope_grid_indexing": "ij",
}  # fmt: skip
_JOINED = re.compile(r"(blocks\.\d+\.attn|attn_pool)\.(q?kv)\.(weight|bias)")
_OUR_POOLS = {theirs: ours for ours, theirs in POOLS.items()}


def read(tensors: Mapping[str, np.ndarray], beside: Beside) -> Checkpoint:
    """Translates timm, DeiT, MAE or DINO tensors, names already without prefix.

    Args:
      beside: its config is timm's or ours. Without one, an original of DeiT, MAE or DINO is known by its wrapper or
        names; these all expect ImageNet's mean and std.

    Raises:
      ValueError: for a variant that is not a plain ViT.
    """
    apart = next((name for name in tensors if name.endswith(".attn.q_bias")), "")
    if apart and "pos_embed" in tensors:
        raise ValueError(
            f"tensor {apart!r}: a bias of the query by itself and a position embedding are EVA's and EVA-02's, which "
            "are not plain ViTs (EVA-02 has rotary positions too): take another model"
        )
    state: dict[str, np.ndarray] = {}
    sources: dict[str, str] = {}
    for source, array in tensors.items():
        name = source
        for pattern, replacement in _DIALECTS:
            name = pattern.sub(replacement, name)
        sources[name] = source
        if match := _JOINED.fullmatch(name):
            parts = match[2]
            if len(array) % len(parts):
                expected = "query, key, value" if parts == "qkv" else "key, value"
                raise ValueError(f"tensor {source!r}: expected rows of {expected}, found {len(array)}")
            for short, part in zip(parts, np.split(array, len(parts)), strict=True):
                state[f"{match[1]}.{short}.{match[3]}"] = part
        else:
            state[name] = array
    state = canonical.join_gates(state)
    dinov3 = "storage_tokens" in tensors  # the original; timm's has a config, or asks for overrides
    if dinov3:  # a mask of zeros lies on the key's bias
        state = {name: array for name, array in state.items() if not name.endswith(".attn.k.bias")}
    dinov2 = not beside.config and "blocks.0.ls1.gamma" in state and _position_on_class_token(state)
    notes = _fold_dinov2(state, "register_tokens" in tensors)

    def source_name(name: str) -> str:
        joined = joined_name(name)
        candidates = (name, joined, name.replace(".mlp.fc1.", ".mlp.fc1_g."))
        return next((sources[known] for known in candidates if known in sources), joined)

    settings, preprocessing, facts = _from_config(beside.config) if beside.config else ({}, {}, {})
    crop = _pretrained(beside.config or {}).get("crop_mode", "center")
    if crop != "center":
        notes += (f"the centre of images is cut out here; timm has crop_mode {crop!r} for this model",)
    if not beside.config:
        # A norm before the blocks is CLIP's, which torch's default epsilon came with.
        clip = "norm_pre.weight" in state
        settings = {"norm_eps": 1e-5 if clip else 1e-6, "activation": "gelu"}
        notes += (f"norm_eps {settings['norm_eps']} and exact GELU assumed: no config.json beside the file",)
        original = any(canonical.matches(name, _ORIGINAL) for name in (*tensors, *beside.left_out))
        if dinov3:
            settings |= architectures.dinov3_settings(state["reg_token"].shape[-1])
            notes = (
                "original DINOv3: norm_eps 1e-5, images of 224 pixels; those trained on satellite images (SAT-493M) "
                "expect overrides mean=(0.430, 0.411, 0.296) and std=(0.213, 0.156, 0.143)",
            )
        if not clip and (original or beside.wrapper in _WRAPPERS):
            preprocessing = dict(architectures.IMAGENET)
            notes += ("ImageNet's mean and std assumed, as DeiT, MAE and DINO expect",)
    return Checkpoint(
        "timm",
        state,
        source_name,
        settings=settings,
        preprocessing=preprocessing,
        facts=facts,
        # DINOv2 without registers was trained with the odd scale; timm's files are used as timm does.
        position_resize="dinov2" if dinov2 and "reg_token" not in state else "timm",
        notes=notes,
        trained_activation=_trained_activation(beside.config or {}),
    )


def _position_on_class_token(state: canonical.State) -> bool:
    """Whether positions are those of a square grid and more: DINOv2's are, DeiT III's (layer scale too) are not."""
    count = math.prod(state["pos_embed"].shape[:-1]) if "pos_embed" in state else 0
    return math.isqrt(count) ** 2 != count


def _fold_dinov2(state: dict[str, np.ndarray], original_registers: bool) -> tuple[str, ...]:
    """The original adds positions to cls and patches, then inserts registers: cls takes its position, as in timm."""
    if not original_registers or "pos_embed" not in state or "cls_token" not in state:
        return ()
    canonical.fold_prefix_positions(state, 1)
    return ("position of the class token folded into it (registers have none)",)


def _from_config(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(settings, preprocessing, facts) of a config.json of timm's or ours."""
    own = content.get(OWN_SECTION, {})
    if own:
        facts = {"architecture": content.get("architecture"), **own.get("facts", {})}
        told = {key: own["config"][key] for key in _TOLD if key in own["config"]}
        return told, dict(own["preprocessing"]), facts
    pretrained = _pretrained(content)
    name, args = str(content.get("architecture", "")), dict(content.get("model_args") or {})
    settings = architectures.named_settings(name)
    heads = args.get("num_heads") or _named_heads(name)
    if heads:
        settings["num_heads"] = heads
    if isinstance(args.get("act_layer"), str):
        settings["activation"] = args["act_layer"]
    if "no_embed_class" in args:
        settings["position_on_prefix"] = not args["no_embed_class"]
    side = square_side(args.get("img_size") or pretrained.get("input_size"), "img_size")
    if settings.get("position") == "rotary":
        for key, expected in _ROTARY_ARGS.items():
            if args.get(key, expected) != expected:
                raise ValueError(f"config.json: {key}: expected {expected!r}, as DINOv3 has it, found {args[key]!r}")
        settings |= {"rotary_base": float(args.get("rope_temperature", 100.0))}
        settings |= {"image_size": side} if side else {}
    pool = args.get("global_pool", content.get("global_pool"))
    if pool:  # one that we do not have is refused by VitConfig, unless overrides name another
        settings["pool"] = _OUR_POOLS.get(pool, pool)
    if args.get("pool_include_prefix"):
        raise ValueError("config.json: pool_include_prefix: expected a pooling of patches alone: take another model")
    preprocessing = {key: tuple(pretrained[key]) for key in ("mean", "std") if pretrained.get(key)}
    if pretrained.get("interpolation"):
        preprocessing["interpolation"] = pretrained["interpolation"]
    if pretrained.get("crop_pct"):
        preprocessing["crop_fraction"] = pretrained["crop_pct"]
    tag = pretrained.get("tag")
    facts = {
        "architecture": name or None,
        "name": f"{name}.{tag}" if name and tag else name or None,
        "licence": pretrained.get("license"),
        "class_names": content.get("label_names"),
    }
    return settings, preprocessing, facts


def _pretrained(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """timm's pretrained_cfg; old files have its fields at the top."""
    return content.get("pretrained_cfg", content)


def _trained_activation(content: Mapping[str, Any]) -> str:
    """What the weights were trained with, where timm's architecture need not compute it; "" where nothing says."""
    pretrained = _pretrained(content)
    said = "quickgelu" in str(pretrained.get("notes", "")).lower() or pretrained.get("tag") in _QUICK_GELU_TAGS
    return "quick_gelu" if said and "_clip_" in str(content.get("architecture")) else ""


def _named_heads(name: str) -> int | None:
    try:
        return architectures.architecture_config(name).num_heads
    except ValueError:
        return None


READER = Reader(
    anchors=("patch_embed.proj.weight",),
    read=read,
    ignored={
        "mask_token": "used in masked pre-training only",
        "decoder_*": "MAE's decoder",
        "rope_embed.periods": "DINOv3's periods, computed here",
        "*.attn.qkv.bias_mask": "which of DINOv3's biases are none",
        "local_cls_norm.*": "of DINOv3's small crops in training",
        **_OTHER_PARTS,
    },
    ignored_outside=_OTHER_PARTS,
    unsupported={
        "dist_token": "a distilled DeiT has a second class token and head: take the plain one (deit_*_patch16_224)",
        "head_dist.*": "a distilled DeiT has a second head: take the plain one (deit_*_patch16_224)",
        "attn_pool.pos_embed": "attention pooling with positions of its own is not SigLIP's; to use the tokens without "
        "it, give allow_unused=['attn_pool.*'] and overrides pool=mean",
        "rope.*": "rotary positions with tensors (EVA-02, mixed) are not a plain ViT's nor DINOv3's",
        "*.attn.q_norm.*": "normalised queries are not a plain ViT's",
        "*relative_position*": "relative positions (BEiT) are not a plain ViT's",
    },
)
