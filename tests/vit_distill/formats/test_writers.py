"""Written folders against timm and transformers, and against our own readers."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from peers import peer, to_torch
from safetensors.numpy import load_file

from core import tree
from core.vit import VisionTransformer, VitConfig
from vit_distill.formats.hugging_face import write_hugging_face_folder
from vit_distill.formats.timm import timm_model, write_timm_folder
from vit_distill.preprocessing import Preprocessing
from vit_distill.teacher import Teacher, load_teacher

PLAIN = VitConfig(
    depth=2, width=32, num_heads=2, mlp_dim=64, patch_size=8, image_size=24, num_classes=3, norm_eps=1e-6
)  # fmt: skip
DINOV2 = dataclasses.replace(PLAIN, layer_scale=True, num_registers=2, position_on_prefix=False)
DINOV3 = dataclasses.replace(
    PLAIN, layer_scale=True, num_registers=2, norm_eps=1e-5, position="rotary", key_bias=False, rotary_base=50.0
)  # fmt: skip
SIGLIP = dataclasses.replace(
    PLAIN, pool="attention", class_token=False, position_on_prefix=False, activation="gelu_tanh", num_classes=0
)
PREPROCESSING = Preprocessing(24, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "bicubic", 0.75)
IMAGES = np.random.RandomState(0).standard_normal((2, 24, 24, 3)).astype(np.float32)
TIMM = {
    "plain": PLAIN,
    "odd_mlp": dataclasses.replace(PLAIN, mlp_dim=59, activation="gelu_tanh", head_bias=False, num_classes=0),
    "fc_norm": dataclasses.replace(PLAIN, final_norm="pooled", pool="mean", class_token=False, head_bias=False),
    "mean": dataclasses.replace(PLAIN, pool="mean", patch_bias=False, qkv_bias=False),
    "no_key_bias": dataclasses.replace(PLAIN, key_bias=False),
    "registers": DINOV2,
    "swiglu": dataclasses.replace(PLAIN, mlp="swiglu", mlp_dim=37, num_registers=3),
    "clip": dataclasses.replace(PLAIN, pre_norm=True, patch_bias=False, norm_eps=1e-5, activation="quick_gelu"),
    "siglip": SIGLIP,
    "siglip_head": dataclasses.replace(SIGLIP, num_classes=3, num_registers=2, norm_eps=1e-5, mlp_dim=59),
    "dinov3": DINOV3,
    "dinov3_swiglu": dataclasses.replace(DINOV3, mlp="swiglu", mlp_dim=37, pool="mean", num_classes=0),
    "dinov3_bare": dataclasses.replace(
        DINOV3,
        layer_scale=False,
        num_registers=0,
        qkv_bias=False,
        key_bias=True,
        final_norm="pooled",
        pool="mean",
        patch_bias=False,
        head_bias=False,
    ),
}
HUGGING_FACE = {
    "plain": dataclasses.replace(PLAIN, mlp_dim=59, norm_eps=1e-5, activation="gelu_tanh"),
    "headless": dataclasses.replace(PLAIN, num_classes=0, patch_bias=False, position_on_prefix=False),
    "no_key_bias": dataclasses.replace(PLAIN, key_bias=False),
    "registers": dataclasses.replace(PLAIN, num_registers=2),
    "dinov2": dataclasses.replace(DINOV2, head_bias=False),
    "swiglu": dataclasses.replace(PLAIN, mlp="swiglu", mlp_dim=24, num_classes=0),
    "siglip": SIGLIP,
    "siglip_bare": dataclasses.replace(
        SIGLIP, qkv_bias=False, patch_bias=False, mlp_dim=59, activation="gelu", norm_eps=1e-5
    ),
    "dinov3": dataclasses.replace(DINOV3, num_classes=0, mlp_dim=59, activation="gelu_tanh"),
    "dinov3_swiglu": dataclasses.replace(DINOV3, num_classes=0, mlp="swiglu", key_bias=True),
    "dinov3_bare": dataclasses.replace(
        DINOV3, num_classes=0, num_registers=0, layer_scale=False, patch_bias=False, qkv_bias=False, key_bias=True
    ),
}


def random_params(config: VitConfig) -> Any:
    """Every leaf random, so that no layer is the identity."""
    random = np.random.RandomState(1)
    abstract = jax.eval_shape(VisionTransformer(config).init, jax.random.key(0), IMAGES)["params"]

    def leaf(path: str, shape: Any) -> np.ndarray:
        return (path.endswith("scale") + 0.2 * random.standard_normal(shape.shape)).astype(np.float32)

    return tree.map_with_path(leaf, abstract)


def outputs(config: VitConfig, params: Any) -> Any:
    return jax.jit(VisionTransformer(config).apply)({"params": params}, IMAGES)


def close(found: Any, expected: Any) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-5


def same_model(again: Teacher, config: VitConfig, params: Any, expected: Any) -> None:
    """The very parameters, or the same function where zero biases and the like were added."""
    if again.config == config:
        assert tree.fingerprint(again.params) == tree.fingerprint(params)
    else:
        close(outputs(again.config, again.params).pooled, expected.pooled)


@pytest.mark.parametrize("name", TIMM)
def test_timm_folder(name: str, tmp_path: Path) -> None:
    config, params = TIMM[name], random_params(TIMM[name])
    write_timm_folder(tmp_path, config, params, PREPROCESSING, {"licence": "mit"})
    expected = outputs(config, params)
    again = load_teacher(str(tmp_path))
    assert again.preprocessing == PREPROCESSING
    assert again.source["licence"] == "mit"
    same_model(again, config, params, expected)
    timm, torch = peer("timm"), peer("torch")
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert set(model.state_dict()) == set(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        features = model.forward_features(to_torch(IMAGES))
        close(model.forward_head(features, pre_logits=True), expected.pooled)
        close(features, expected.tokens)
        if config.num_classes:
            close(model(to_torch(IMAGES)), expected.logits)
    data = timm.data.resolve_model_data_config(model)
    assert (tuple(data["mean"]), data["crop_pct"], data["input_size"]) == (PREPROCESSING.mean, 0.75, (3, 24, 24))


def test_timm_resizes_to_the_same_size_where_its_own_division_would_lose_a_pixel(tmp_path: Path) -> None:
    preprocessing = dataclasses.replace(PREPROCESSING, crop_fraction=24 / 59)
    write_timm_folder(tmp_path, PLAIN, random_params(PLAIN), preprocessing)
    written = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["crop_pct"]
    assert math.floor(24 / preprocessing.crop_fraction) == 58
    assert math.floor(24 / written) == preprocessing.resize_size == 59
    assert load_teacher(str(tmp_path)).preprocessing == preprocessing


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_folder(name: str, tmp_path: Path) -> None:
    config, params = HUGGING_FACE[name], random_params(HUGGING_FACE[name])
    write_hugging_face_folder(tmp_path, config, params, PREPROCESSING, {"name": "student"})
    expected = outputs(config, params)
    again = load_teacher(str(tmp_path))
    assert (again.preprocessing, again.name) == (PREPROCESSING, "student")
    same_model(again, config, params, expected)
    transformers, torch = peer("transformers"), peer("torch")
    kind = "ImageClassification" if config.num_classes else ""
    loader = getattr(transformers, f"AutoModel{'For' if kind else ''}{kind}")
    model, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    absent = {key for key in info["missing_keys"] if "pooler" not in key and "mask_token" not in key}
    assert not absent
    assert not info["unexpected_keys"]
    with torch.no_grad():
        out = model.eval()(to_torch(IMAGES), output_hidden_states=True)
        if config.num_classes:
            close(out.logits, expected.logits)
        else:
            close(out.last_hidden_state, expected.tokens)
        if config.pool == "attention":
            close(out.pooler_output, expected.pooled)


def test_what_a_tool_cannot_express_is_refused(tmp_path: Path) -> None:
    clip = TIMM["clip"]
    with pytest.raises(ValueError, match="norm before the blocks"):
        write_hugging_face_folder(tmp_path, clip, random_params(clip), PREPROCESSING)
    odd = dataclasses.replace(DINOV2, mlp_dim=59)
    with pytest.raises(ValueError, match="whole multiples of width 32, found 59"):
        write_hugging_face_folder(tmp_path, odd, random_params(odd), PREPROCESSING)
    with pytest.raises(ValueError, match=r"norm_eps 0\.001"):
        timm_model(dataclasses.replace(PLAIN, norm_eps=1e-3))
    with pytest.raises(ValueError, match=r"not those of the architecture:\nmissing: block_02"):
        write_timm_folder(tmp_path, dataclasses.replace(PLAIN, depth=3), random_params(PLAIN), PREPROCESSING)
    for changed, message in (
        (dict(num_classes=3), "DINOv3, which has rotary positions, has no classifier: write a timm folder"),
        (dict(num_classes=0, pool="mean", pre_norm=True), "has no norm before the blocks and mean pooling"),
    ):
        rotary = dataclasses.replace(DINOV3, **changed)
        with pytest.raises(ValueError, match=message):
            write_hugging_face_folder(tmp_path, rotary, random_params(rotary), PREPROCESSING)
    pooling = dataclasses.replace(PLAIN, pool="attention", layer_scale=True)
    with pytest.raises(ValueError, match=r"SigLIP.* has no classifier, class token or registers, layer scale: write a"):
        write_hugging_face_folder(tmp_path, pooling, random_params(pooling), PREPROCESSING)
    rotary = dataclasses.replace(DINOV3, key_bias=True, norm_eps=1e-6)
    with pytest.raises(ValueError, match=r"Eva.* has no bias of the key, norm_eps 1e-06 \(expected 1e-5\)"):
        write_timm_folder(tmp_path, rotary, random_params(rotary), PREPROCESSING)
    assert not list(tmp_path.iterdir())
