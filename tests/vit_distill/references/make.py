"""Makes the stored reference outputs with timm and transformers: python tests/vit_distill/references/make.py [CASE...]

A case is a checkpoint as another tool writes it (names, shapes, the JSON beside it) and what that tool's model gives
for it. Weights are not stored: `fill` makes them from the names. `references.json` and `references.npz` lie beside.
"""

import json
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
IMAGE_SIZE, WIDTH, HEADS, DEPTH, PATCH, CLASSES = 24, 32, 2, 2, 8, 3


def images() -> np.ndarray:
    """[2, H, W, 3], as a model takes them."""
    return np.random.RandomState(0).standard_normal((2, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)


def fill(shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors of these shapes, each seeded by its name; scales of norms around 1."""
    tensors = {}
    for name, shape in shapes.items():
        values = 0.2 * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
        is_scale = any(word in name.lower() for word in ("norm", "ln_", "layrnorm")) and not name.endswith("bias")
        tensors[name] = np.asarray(values + is_scale, np.float32)
    return tensors


def timm_case(name: str, convert: Callable | None = None, shapes: Any = None, **arguments: Any) -> dict[str, Any]:
    """A timm model; with `convert` its weights come from another format's tensors through timm's own converter."""
    import timm
    import torch

    arguments = {
        "img_size": IMAGE_SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS,
        "num_classes": CLASSES, **arguments,
    }  # fmt: skip
    model = timm.create_model(name, **arguments).eval()
    shapes = shapes or {key: list(value.shape) for key, value in model.state_dict().items()}
    tensors = fill(shapes)
    if convert is None:
        model.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
    else:
        convert(model, tensors)
    x = torch.from_numpy(np.moveaxis(images(), -1, 1).copy())
    with torch.no_grad():
        _, blocks = model.forward_intermediates(
            x, return_prefix_tokens=True, norm=False, output_fmt="NLC", intermediates_only=False
        )
        tokens = model.forward_features(x)
        pooled, logits = model.forward_head(tokens, pre_logits=True), model(x)
    # forward_intermediates gives (patches, prefix) where there is a prefix.
    blocks = [torch.cat([b[1], b[0]], 1) if isinstance(b, tuple | list) else b for b in blocks]
    config = None
    if convert is None:
        config = {
            "architecture": name,
            "model_args": arguments,
            "pretrained_cfg": {
                "mean": [0.1, 0.2, 0.3],
                "std": [0.5, 0.6, 0.7],
                "crop_pct": 0.9,
                "interpolation": "bilinear",
            },
        }
    return _case(shapes, config, None, blocks, tokens, pooled, logits)


def hugging_face_case(
    model_class: str, config_class: str, on_disk: bool = True, text: Mapping[str, Any] | None = None, **arguments: Any
) -> dict[str, Any]:
    """A model of transformers, with its names on disk or in memory; pooled is the class token after the norm (SigLIP:
    its own). With `text`, that tower's arguments, a whole model of images and text."""
    import tempfile

    import torch
    import transformers
    from safetensors.numpy import load_file, save_file

    arguments = {
        "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "image_size": IMAGE_SIZE,
        "patch_size": PATCH, **arguments,
    }  # fmt: skip
    if text:
        arguments = {"vision_config": arguments, "text_config": text}
    config = getattr(transformers, config_class)(**arguments)
    model = getattr(transformers, model_class)(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config_json = json.loads((Path(folder) / "config.json").read_text())
        if on_disk:
            file = f"{folder}/model.safetensors"
            shapes = {key: list(value.shape) for key, value in load_file(file).items()}
            save_file(fill(shapes), file, metadata={"format": "pt"})
            model = getattr(transformers, model_class).from_pretrained(folder).eval()
        else:
            shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
            model.load_state_dict({key: torch.from_numpy(value) for key, value in fill(shapes).items()})
    x = torch.from_numpy(np.moveaxis(images(), -1, 1).copy())
    model = model.vision_model if text else model
    with torch.no_grad():
        out = model(x, output_hidden_states=True)
    has_logits = hasattr(out, "logits")
    base = getattr(model, model.base_model_prefix, model)
    norm = getattr(base, "layernorm", None) or getattr(base, "post_layernorm", None) or model.norm
    blocks = list(out.hidden_states[1:])
    with torch.no_grad():
        tokens = norm(blocks[-1])
    preprocessor = {
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 3, "do_center_crop": True,
        "size": {"shortest_edge": 32}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }  # fmt: skip
    pooled = out.pooler_output if "Siglip" in model_class else tokens[:, 0]
    return _case(shapes, config_json, preprocessor, blocks, tokens, pooled, out.logits if has_logits else None)


def _case(shapes, config, preprocessor, blocks, tokens, pooled, logits) -> dict[str, Any]:
    arrays = {f"block_{i}": block.numpy() for i, block in enumerate(blocks)}
    arrays |= {"tokens": tokens.numpy(), "pooled": pooled.numpy()}
    arrays |= {"logits": logits.detach().numpy()} if logits is not None else {}
    return {"shapes": shapes, "config": config, "preprocessor": preprocessor, "arrays": arrays}


def google_shapes(big_vision: bool) -> dict[str, list[int]]:
    """vit_jax's names, or big_vision's with all layers stacked and positions on the patches alone."""
    head, hidden, patches = WIDTH // HEADS, 4 * WIDTH, (IMAGE_SIZE // PATCH) ** 2
    norm2, attention, mlp = ("1", "0", "0") if big_vision else ("2", "1", "3")
    heads = {"kernel": [WIDTH, HEADS, head], "bias": [HEADS, head]}
    block = {
        "LayerNorm_0": {"scale": [WIDTH], "bias": [WIDTH]},
        f"LayerNorm_{norm2}": {"scale": [WIDTH], "bias": [WIDTH]},
        **{f"MultiHeadDotProductAttention_{attention}/{name}": heads for name in ("query", "key", "value")},
        f"MultiHeadDotProductAttention_{attention}/out": {"kernel": [HEADS, head, WIDTH], "bias": [WIDTH]},
        f"MlpBlock_{mlp}/Dense_0": {"kernel": [WIDTH, hidden], "bias": [hidden]},
        f"MlpBlock_{mlp}/Dense_1": {"kernel": [hidden, WIDTH], "bias": [WIDTH]},
    }
    leaves = {f"{layer}/{leaf}": shape for layer, parts in block.items() for leaf, shape in parts.items()}
    shapes = {
        "cls": [1, 1, WIDTH],
        "embedding/kernel": [PATCH, PATCH, 3, WIDTH],
        "embedding/bias": [WIDTH],
        "Transformer/encoder_norm/scale": [WIDTH],
        "Transformer/encoder_norm/bias": [WIDTH],
        "head/kernel": [WIDTH, CLASSES],
        "head/bias": [CLASSES],
    }
    if big_vision:
        shapes["pos_embedding"] = [1, patches, WIDTH]
        shapes |= {f"Transformer/encoderblock/{leaf}": [DEPTH, *shape] for leaf, shape in leaves.items()}
        return {f"params/{name}": shape for name, shape in shapes.items()}
    shapes["Transformer/posembed_input/pos_embedding"] = [1, patches + 1, WIDTH]
    return shapes | {f"Transformer/encoderblock_{i}/{k}": shape for i in range(DEPTH) for k, shape in leaves.items()}


def openai_shapes() -> dict[str, list[int]]:
    """OpenAI CLIP's file: image tower under "visual.", and some of the text tower."""
    shapes = {
        "class_embedding": [WIDTH], "positional_embedding": [(IMAGE_SIZE // PATCH) ** 2 + 1, WIDTH],
        "conv1.weight": [WIDTH, 3, PATCH, PATCH], "proj": [WIDTH, CLASSES],
    }  # fmt: skip
    norms = [
        name for i in range(DEPTH) for name in (f"transformer.resblocks.{i}.ln_1", f"transformer.resblocks.{i}.ln_2")
    ]
    for name in ("ln_pre", "ln_post", *norms):
        shapes |= {f"{name}.weight": [WIDTH], f"{name}.bias": [WIDTH]}
    for i in range(DEPTH):
        block = f"transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": [3 * WIDTH, WIDTH], f"{block}.attn.in_proj_bias": [3 * WIDTH]}
        sizes = {"attn.out_proj": (WIDTH, WIDTH), "mlp.c_fc": (4 * WIDTH, WIDTH), "mlp.c_proj": (WIDTH, 4 * WIDTH)}
        for name, (out, inputs) in sizes.items():
            shapes |= {f"{block}.{name}.weight": [out, inputs], f"{block}.{name}.bias": [out]}
    text = {"positional_embedding": [4, 8], "transformer.resblocks.0.ln_1.weight": [8], "logit_scale": []}
    return {**{f"visual.{name}": shape for name, shape in shapes.items()}, **text, "token_embedding.weight": [9, 8]}


def facebook_shapes() -> dict[str, list[int]]:
    """The original DINOv2 with registers and SwiGLU: positions on cls and patches, w12 and w3, a mask token."""
    shapes: dict[str, list[int]] = {
        "cls_token": [1, 1, WIDTH], "register_tokens": [1, 4, WIDTH], "mask_token": [1, WIDTH],
        "pos_embed": [1, (IMAGE_SIZE // PATCH) ** 2 + 1, WIDTH], "patch_embed.proj.weight": [WIDTH, 3, PATCH, PATCH],
        "patch_embed.proj.bias": [WIDTH], "norm.weight": [WIDTH], "norm.bias": [WIDTH],
    }  # fmt: skip
    for i in range(DEPTH):
        sizes = {
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "mlp.w12": (128, WIDTH),
            "mlp.w3": (WIDTH, 64),
        }
        for name, (out, inputs) in sizes.items():
            shapes |= {f"blocks.{i}.{name}.weight": [out, inputs], f"blocks.{i}.{name}.bias": [out]}
        for n in (1, 2):
            shapes |= {f"blocks.{i}.norm{n}.{leaf}": [WIDTH] for leaf in ("weight", "bias")}
            shapes[f"blocks.{i}.ls{n}.gamma"] = [WIDTH]
    return shapes


def facebook_dinov3_shapes(gated: bool) -> dict[str, list[int]]:
    """The original DINOv3: storage tokens, periods, a key bias that is masked, with `gated` w1, w2 and w3."""
    shapes: dict[str, list[int]] = {
        "cls_token": [1, 1, WIDTH], "storage_tokens": [1, 4, WIDTH], "mask_token": [1, WIDTH],
        "rope_embed.periods": [WIDTH // HEADS // 4], "patch_embed.proj.weight": [WIDTH, 3, PATCH, PATCH],
        "patch_embed.proj.bias": [WIDTH], "norm.weight": [WIDTH], "norm.bias": [WIDTH],
    }  # fmt: skip
    mlp = (
        {"w1": (64, WIDTH), "w2": (64, WIDTH), "w3": (WIDTH, 64)} if gated else {"fc1": (64, WIDTH), "fc2": (WIDTH, 64)}
    )
    sizes = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), **{f"mlp.{k}": v for k, v in mlp.items()}}
    for i in range(DEPTH):
        for name, (out, inputs) in sizes.items():
            shapes |= {f"blocks.{i}.{name}.weight": [out, inputs], f"blocks.{i}.{name}.bias": [out]}
        shapes[f"blocks.{i}.attn.qkv.bias_mask"] = [3 * WIDTH]
        for n in (1, 2):
            shapes |= {f"blocks.{i}.norm{n}.{leaf}": [WIDTH] for leaf in ("weight", "bias")}
            shapes[f"blocks.{i}.ls{n}.gamma"] = [WIDTH]
    return shapes


def through_eva_filter(model: Any, tensors: Mapping[str, np.ndarray]) -> None:
    """timm's own conversion of the original DINOv3's files."""
    import torch
    from timm.models.eva import checkpoint_filter_fn

    state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}
    model.load_state_dict(checkpoint_filter_fn(state, model))


def through_filter(model: Any, tensors: Mapping[str, np.ndarray]) -> None:
    """timm's own conversion of OpenAI's and Facebook's files."""
    import torch
    from timm.models.vision_transformer import checkpoint_filter_fn

    state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}
    model.load_state_dict(checkpoint_filter_fn(state, model))


def through_npz(model: Any, tensors: Mapping[str, np.ndarray]) -> None:
    """timm's own conversion of Google's files."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/weights.npz", **tensors)
        model.load_pretrained(f"{folder}/weights.npz")


VIT = ("ViTForImageClassification", "ViTConfig")
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "timm_vit": lambda: timm_case("vit_base_patch16_224"),
    "timm_vit_no_qkv_bias": lambda: timm_case("vit_base_patch16_224", qkv_bias=False, act_layer="gelu_tanh"),
    "timm_fc_norm": lambda: timm_case("vit_base_patch16_224", global_pool="avg"),
    "timm_mean_no_class_token": lambda: timm_case(
        "vit_base_patch16_224", global_pool="avg", fc_norm=False, class_token=False
    ),
    "timm_siglip_gap": lambda: timm_case("vit_so400m_patch16_siglip_gap_256"),
    "timm_siglip": lambda: timm_case("vit_base_patch16_siglip_224"),
    "timm_deit3": lambda: timm_case("deit3_small_patch16_224"),
    "timm_dinov2_registers": lambda: timm_case("vit_small_patch14_reg4_dinov2"),
    "timm_dinov2_giant": lambda: timm_case("vit_giant_patch14_dinov2"),
    "timm_clip": lambda: timm_case("vit_base_patch16_clip_224"),
    "timm_clip_quick_gelu": lambda: timm_case("vit_base_patch16_clip_quickgelu_224"),
    "facebook_dinov2": lambda: timm_case(
        "vit_giant_patch14_reg4_dinov2", through_filter, facebook_shapes(), num_classes=0, mlp_ratio=4.0
    ),
    "timm_dinov3": lambda: timm_case("vit_small_patch16_dinov3_qkvb"),
    "timm_dinov3_swiglu": lambda: timm_case("vit_small_plus_patch16_dinov3", num_classes=0, global_pool="token"),
    "facebook_dinov3": lambda: timm_case(
        "vit_small_patch16_dinov3_qkvb",
        through_eva_filter,
        facebook_dinov3_shapes(False),
        mlp_ratio=2.0,
        num_classes=0,
        global_pool="token",
    ),
    "facebook_dinov3_swiglu": lambda: timm_case(
        "vit_small_plus_patch16_dinov3_qkvb",
        through_eva_filter,
        facebook_dinov3_shapes(True),
        mlp_ratio=2.0,
        num_classes=0,
        global_pool="token",
    ),
    "openai_clip": lambda: timm_case("vit_base_patch16_clip_quickgelu_224", through_filter, openai_shapes()),
    "vit_jax": lambda: timm_case("vit_base_patch16_224", through_npz, google_shapes(False), act_layer="gelu_tanh"),
    "big_vision": lambda: timm_case(
        "vit_base_patch16_224", through_npz, google_shapes(True), act_layer="gelu_tanh", no_embed_class=True
    ),
    "hf_vit": lambda: hugging_face_case(*VIT, intermediate_size=48, num_labels=CLASSES),
    "hf_vit_in_memory": lambda: hugging_face_case(*VIT, False, intermediate_size=48, hidden_act="gelu_new"),
    "hf_dinov2_swiglu": lambda: hugging_face_case("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True),
    "hf_dinov2_registers": lambda: hugging_face_case("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
    "hf_dinov3": lambda: hugging_face_case(
        "DINOv3ViTModel", "DINOv3ViTConfig", intermediate_size=48, num_register_tokens=4, rope_theta=50.0
    ),
    "hf_dinov3_swiglu": lambda: hugging_face_case(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        intermediate_size=48,
        num_register_tokens=2,
        use_gated_mlp=True,
        hidden_act="silu",
        query_bias=False,
        value_bias=False,
    ),
    "hf_dinov3_in_memory": lambda: hugging_face_case(
        "DINOv3ViTModel", "DINOv3ViTConfig", False, intermediate_size=48, key_bias=True, num_register_tokens=1
    ),
    "hf_clip": lambda: hugging_face_case("CLIPVisionModel", "CLIPVisionConfig", intermediate_size=48),
    "hf_siglip": lambda: hugging_face_case("SiglipVisionModel", "SiglipVisionConfig", intermediate_size=48),
    "hf_siglip_whole": lambda: hugging_face_case(
        "SiglipModel",
        "SiglipConfig",
        intermediate_size=48,
        text={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "vocab_size": 9,
            "max_position_embeddings": 4,
        },
    ),
}


def main() -> None:
    """Makes all cases, or those named on the command line, beside which the stored others stay."""
    sys.path.insert(0, str(FOLDER.parent))
    from peers import peer

    peer("timm"), peer("transformers")
    described, arrays = {}, {}
    if wanted := sys.argv[1:]:
        described = json.loads((FOLDER / "references.json").read_text())
        with np.load(FOLDER / "references.npz") as stored:
            arrays = {key: stored[key] for key in stored.files if key.partition("/")[0] not in wanted}
    for name in wanted or CASES:
        case = CASES[name]()
        arrays |= {f"{name}/{key}": value for key, value in case.pop("arrays").items()}
        described[name] = case
    (FOLDER / "references.json").write_text(json.dumps(described, indent=None, sort_keys=True) + "\n")
    np.savez_compressed(FOLDER / "references.npz", **arrays)


if __name__ == "__main__":
    main()
