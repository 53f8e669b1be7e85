"""Checkpoints of every family against what timm and transformers compute: outputs stored by references/make.py."""

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from peers import peer
from safetensors.numpy import save_file

from core.vit import VisionTransformer
from vit_distill.teacher import Teacher, load_teacher

FOLDER = Path(__file__).parents[1] / "references"
CASES: dict[str, Any] = json.loads((FOLDER / "references.json").read_text())
OVERRIDES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
# Where nothing beside the file tells the heads; vit_jax's arrays do.
NUM_HEADS = {"openai_clip": 2, "facebook_dinov2": 2, "facebook_dinov3": 2, "facebook_dinov3_swiglu": 2}
TOWER = "visual."  # of CLIP's images; a tower saved by itself has no prefix


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("references_make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_case(name: str, folder: Path, alone: bool = False) -> Teacher:
    """The case's checkpoint written to disk and loaded."""
    case, tensors = CASES[name], script().fill(CASES[name]["shapes"])
    if alone:
        tensors = {key.removeprefix(TOWER): value for key, value in tensors.items() if key.startswith(TOWER)}
    if name in ("vit_jax", "big_vision"):
        np.savez(folder / "model.npz", **tensors)
    else:
        save_file(tensors, folder / "model.safetensors")
    for file, key in (("config.json", "config"), ("preprocessor_config.json", "preprocessor")):
        if case[key]:
            (folder / file).write_text(json.dumps(case[key]))
    overrides: dict[str, Any] = {"num_heads": NUM_HEADS.get(name)}
    if name == "facebook_dinov2":
        overrides |= OVERRIDES
    if name.startswith("facebook_dinov3"):
        overrides |= {"image_size": 24}
    return load_teacher(str(folder), overrides=overrides)


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_the_other_tools(name: str, tmp_path: Path) -> None:
    teacher = load_case(name, tmp_path)
    check_outputs(name, teacher)
    # A value that stands apart from its gate is one tensor with it here.
    parts = (".mlp.fc1_x.", ".mlp.w2.") + (".mlp.up_proj.",) * (teacher.config.mlp == "swiglu")
    values = sum(any(part in tensor for part in parts) for tensor in CASES[name]["shapes"])
    assert len(teacher.report.matched) + values + len(teacher.report.unused) == len(CASES[name]["shapes"])


def test_an_image_tower_of_clip_saved_by_itself(tmp_path: Path) -> None:
    teacher = load_case("openai_clip", tmp_path, alone=True)
    check_outputs("openai_clip", teacher)
    assert teacher.report.unused == ()


def test_rotary_positions_are_asked_for_and_serve_every_size(tmp_path: Path) -> None:
    """A file of timm's alone does not say which positions its model has, nor how large its images are."""
    save_file(script().fill(CASES["timm_dinov3"]["shapes"]), tmp_path / "alone.safetensors")
    overrides: dict[str, Any] = OVERRIDES | {"num_heads": 2, "norm_eps": 1e-5}
    with pytest.raises(ValueError, match=r"'pos_embed' is missing.*DINOv3's: overrides position=rotary and im"):
        load_teacher(str(tmp_path), overrides=overrides)
    with pytest.raises(ValueError, match="image_size: neither rotary positions nor a config"):
        load_teacher(str(tmp_path), overrides=overrides | {"position": "rotary"})
    rotary = {"position": "rotary", "image_size": 24, "pool": "mean"}
    check_outputs("timm_dinov3", load_teacher(str(tmp_path), overrides=overrides | rotary))
    larger = load_teacher(str(tmp_path), overrides=overrides | rotary | {"image_size": 48})
    assert (larger.config.num_patches, larger.report.reshaped) == (36, ())


@pytest.mark.parametrize("left_out", [False, True])
def test_a_gated_mlp_of_another_activation_is_refused(
    left_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GELU is also what transformers takes where the config does not say."""
    case = CASES["hf_dinov3_swiglu"]
    config = {key: value for key, value in case["config"].items() if key != "hidden_act"}
    config |= {} if left_out else {"hidden_act": "gelu"}
    monkeypatch.setitem(CASES, "hf_dinov3_swiglu", case | {"config": config})
    with pytest.raises(ValueError, match="hidden_act: expected silu of a gated MLP, found 'gelu'"):
        load_case("hf_dinov3_swiglu", tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("rope_rotate_half", False), ("rope_grid_offset", 1.0), ("use_rot_pos_emb", False)]
)
def test_other_rotary_positions_of_timm_are_refused(
    key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["timm_dinov3"]
    args = case["config"]["model_args"] | {"rope_type": "dinov3", key: value}
    monkeypatch.setitem(CASES, "timm_dinov3", case | {"config": case["config"] | {"model_args": args}})
    with pytest.raises(ValueError, match=f"config.json: {key}: expected .*, as DINOv3 has it, found {value}"):
        load_case("timm_dinov3", tmp_path)


def test_an_eva_without_its_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EVA-02 has a plain ViT's tensors but for its biases; its rotary positions are not stored."""
    case = CASES["timm_vit"]
    shapes = {name: shape for name, shape in case["shapes"].items() if not name.endswith("qkv.bias")}
    shapes |= {f"blocks.{i}.attn.{short}_bias": [32] for i in range(2) for short in "qv"}
    monkeypatch.setitem(CASES, "timm_vit", case | {"shapes": shapes, "config": None})
    with pytest.raises(ValueError, match=r"attn.q_bias'.*EVA-02's, which are not plain ViTs"):
        load_case("timm_vit", tmp_path)


@pytest.mark.parametrize("name", ["timm_vit", "timm_dinov3", "hf_vit", "hf_siglip_whole", "hf_dinov3"])
def test_images_that_are_not_square_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 x 16 positions are as many as 8 x 8."""
    config = copy.deepcopy(CASES[name]["config"])
    section, field = config.get("vision_config", config), "image_size"
    if "timm" in name:
        section, field = config["model_args"], "img_size"
    section[field] = [32, 128]
    monkeypatch.setitem(CASES, name, CASES[name] | {"config": config})
    with pytest.raises(ValueError, match=rf"{field}: expected square images, found \[32, 128\]: take another"):
        load_case(name, tmp_path)
    section[field] = [24, 24]
    assert load_case(name, tmp_path).config.image_size == 24


@pytest.mark.parametrize("name", ["hf_dinov3", "hf_dinov2_registers"])
def test_registers_that_a_config_names_and_a_file_lacks_are_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {key: shape for key, shape in CASES[name]["shapes"].items() if key != "embeddings.register_tokens"}
    monkeypatch.setitem(CASES, name, CASES[name] | {"shapes": shapes})
    with pytest.raises(ValueError, match=r"embeddings.register_tokens': expected \d+ as config.json says, found 0"):
        load_case(name, tmp_path)


def test_a_preprocessor_of_nulls_leaves_the_mean_to_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers writes one that does not normalise."""
    case = CASES["hf_vit"]
    nulls = case["preprocessor"] | {"image_mean": None, "image_std": None}
    monkeypatch.setitem(CASES, "hf_vit", case | {"preprocessor": nulls})
    with pytest.raises(ValueError, match="mean and std: no config beside the file tells them"):
        load_case("hf_vit", tmp_path)
    monkeypatch.setitem(CASES, "hf_vit", case | {"preprocessor": nulls | {"do_normalize": False}})
    assert load_case("hf_vit", tmp_path).preprocessing.std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "shapes", "config"),
    [
        ("timm_vit", {"blocks.0.attn.qkv.bias": []}, {}),
        ("timm_dinov3", {"reg_token": [32]}, {}),
        ("timm_vit", {}, {"pretrained_cfg": None}),
        ("hf_vit", {}, {"layer_norm_eps": None}),
    ],
)
def test_what_no_tool_writes_is_the_files_error(
    name: str, shapes: dict, config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    changed = {"shapes": case["shapes"] | shapes, "config": case["config"] | config}
    monkeypatch.setitem(CASES, name, case | changed)
    with pytest.raises(ValueError, match=r"model.safetensors: a tensor, or a field of the JSON beside it"):
        load_case(name, tmp_path)


def test_an_image_tower_of_siglip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 4 names it, of images that its patches do not cover; then what is no tower of fixed size."""
    case, report = CASES["hf_siglip"], load_case("hf_siglip_whole", tmp_path).report
    assert {line.partition(" (")[2] for line in report.unused} == {"text tower)", "temperature and bias)"}
    shapes = {f"vision_model.{name}": shape for name, shape in case["shapes"].items()}
    preprocessor = {"size": {"height": 30, "width": 30}, "resample": 3}  # 3 patches of 8 pixels and 6 pixels
    monkeypatch.setitem(CASES, "hf_siglip", case | {"shapes": shapes, "preprocessor": preprocessor})
    teacher = load_case("hf_siglip", tmp_path)
    assert (teacher.config.image_size, teacher.preprocessing.mean) == (24, (0.5, 0.5, 0.5))
    assert any("24 pixels: patches do not cover the 30" in note for note in teacher.report.notes)
    for name, shape, message in (
        ("vision_model.embeddings.patch_embedding.weight", [32, 192], "NaFlex.*such as google/siglip2-base-patch16"),
        ("classifier.weight", [3, 32], "takes the mean of the patches: leave it out"),
        ("vision_model.head.attention.in_proj_weight", [95, 32], "in_proj_weight': expected rows of query, key, value"),
    ):
        monkeypatch.setitem(CASES, "hf_siglip", case | {"shapes": shapes | {name: shape}})
        with pytest.raises(ValueError, match=message):
            load_case("hf_siglip", tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("attn_pool.pos_embed", {}, "positions of its own .* overrides pool=mean"),
        ("attn_pool.kv.bias", {}, "'attn_pool.kv.bias': expected rows of key, value, found 63"),
        ("attn_pool.q_norm.weight", {}, "no place in this architecture: 'attn_pool.q_norm.weight'"),
        ("", {"pool_include_prefix": True}, "pool_include_prefix: expected a pooling of patches alone"),
        ("", {"global_pool": "prr"}, "pool: expected one of .* found 'prr'"),
    ],
)
def test_another_attention_pooling_of_timm_is_refused(
    name: str, change: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["timm_siglip"]
    shapes = case["shapes"] | ({name: [63]} if name else {})
    config = case["config"] | {"model_args": case["config"]["model_args"] | change}
    monkeypatch.setitem(CASES, "timm_siglip", case | {"shapes": shapes, "config": config})
    with pytest.raises(ValueError, match=message):
        load_case("timm_siglip", tmp_path)


def check_outputs(name: str, teacher: Teacher) -> None:
    """Against the stored ones."""
    with np.load(FOLDER / "references.npz") as stored:
        expected = {key.partition("/")[2]: stored[key] for key in stored.files if key.startswith(f"{name}/")}
    out = jax.jit(VisionTransformer(teacher.config).apply)({"params": teacher.params}, script().images())
    found = {f"block_{i}": block for i, block in enumerate(out.blocks)}
    found |= {"tokens": out.tokens, "pooled": out.pooled, "logits": out.logits}
    assert len(expected) >= 4
    for key, value in expected.items():
        if teacher.config.num_classes == 0 and key == "logits":
            continue
        error = np.abs(np.asarray(found[key]) - value).max() / np.abs(value).max()
        assert error < 1e-5, (key, error)
    assert teacher.report.missing == ()


def test_preprocessing_is_read(tmp_path: Path) -> None:
    for name, interpolation, fraction in (("timm_vit", "bilinear", 0.9), ("hf_vit", "bicubic", 0.75)):
        folder = tmp_path / name
        folder.mkdir()
        preprocessing = load_case(name, folder).preprocessing
        assert (preprocessing.mean, preprocessing.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
        assert (preprocessing.interpolation, preprocessing.crop_fraction) == (interpolation, fraction)
        assert preprocessing.image_size == 24


def test_what_is_no_part_of_a_vit_is_named(tmp_path: Path) -> None:
    report = load_case("openai_clip", tmp_path).report
    assert {line.partition(" (")[0] for line in report.unused} == {
        "positional_embedding",
        "transformer.resblocks.0.ln_1.weight",
        "logit_scale",
        "token_embedding.weight",
    }
    assert any("quick GELU" in note for note in report.notes)


# What transformers takes where a config.json leaves a field out: class, norm_eps and activation by case.
DEFAULTS = {
    "hf_vit": ("ViTConfig", 1e-12, "gelu"),
    "hf_dinov2_swiglu": ("Dinov2Config", 1e-6, "gelu"),
    "hf_dinov2_registers": ("Dinov2WithRegistersConfig", 1e-6, "gelu"),
    "hf_clip": ("CLIPVisionConfig", 1e-5, "quick_gelu"),
    "hf_siglip": ("SiglipVisionConfig", 1e-6, "gelu_pytorch_tanh"),
}
LEFT_OUT = ("layer_norm_eps", "hidden_act", "num_attention_heads")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", DEFAULTS)
def test_fields_left_out_of_a_config_are_those_of_transformers(
    name: str, nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 4 wrote differences from the defaults alone for nested configs (openai/clip-vit-large-patch14-336)."""
    config = {key: value for key, value in CASES[name]["config"].items() if key not in LEFT_OUT}
    assert len(config) == len(CASES[name]["config"]) - 3
    monkeypatch.setitem(CASES, name, CASES[name] | {"config": {"vision_config": config} if nested else config})
    monkeypatch.setitem(NUM_HEADS, name, 2)
    _, eps, activation = DEFAULTS[name]
    found = load_case(name, tmp_path).config
    assert (found.norm_eps, found.activation) == (eps, activation.replace("pytorch_", ""))
    monkeypatch.delitem(NUM_HEADS, name)
    with pytest.raises(ValueError, match="width 32 is not a multiple of num_heads 12"):
        load_case(name, tmp_path)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_transformers(name: str) -> None:
    config_class, eps, activation = DEFAULTS[name]
    config = getattr(peer("transformers"), config_class)()
    assert (config.layer_norm_eps, config.hidden_act, config.num_attention_heads) == (eps, activation, 12)


def test_a_vit_of_msn_has_another_epsilon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are called as ViT's; the config alone says which it is."""
    monkeypatch.setitem(CASES, "hf_vit", CASES["hf_vit"] | {"config": {"model_type": "vit_msn"}})
    monkeypatch.setitem(NUM_HEADS, "hf_vit", 2)
    assert load_case("hf_vit", tmp_path).config.norm_eps == 1e-6
    assert peer("transformers").ViTMSNConfig().layer_norm_eps == 1e-6


@pytest.mark.parametrize(("kind", "mean"), [("vit", 0.5), ("vit_mae", 0.485), ("vit_msn", 0.485)])
def test_statistics_without_a_preprocessor_are_those_of_the_model(
    kind: str, mean: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["hf_vit"]
    monkeypatch.setitem(CASES, "hf_vit", case | {"config": case["config"] | {"model_type": kind}, "preprocessor": None})
    teacher = load_case("hf_vit", tmp_path)
    assert teacher.preprocessing.mean[0] == mean
    assert any("no preprocessor_config.json" in note for note in teacher.report.notes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(do_rescale=False, image_mean=[79.0] * 3), "pixels scaled by 1/255, found 1 "),
        (dict(rescale_factor=1 / 127.5), "pixels scaled by 1/255, found 0.00784314 "),
        (dict(resample=1), r"resample: expected one of 0 \(nearest\), 2 \(bilinear\), 3 \(bicubic\), found 1"),
    ],
)
def test_images_prepared_in_a_way_that_is_not_ours_are_refused(
    fields: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["hf_vit"]
    known = {"do_rescale": True, "rescale_factor": 0.00392156862745098, "resample": 2}
    monkeypatch.setitem(CASES, "hf_vit", case | {"preprocessor": (case["preprocessor"] or {}) | known})
    assert load_case("hf_vit", tmp_path).preprocessing.interpolation == "bilinear"
    CASES["hf_vit"]["preprocessor"].update(fields)
    with pytest.raises(ValueError, match=message):
        load_case("hf_vit", tmp_path)


@pytest.mark.parametrize(("fields", "side"), [({}, 24), (dict(do_center_crop=True, crop_size=16), 16)])
def test_a_size_that_no_image_is_resized_to_is_not_the_input_s(
    fields: dict, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"do_resize": False, "size": {"height": 32, "width": 32}} | fields
    case = CASES["hf_vit"]
    monkeypatch.setitem(CASES, "hf_vit", case | {"preprocessor": case["preprocessor"] | {"do_rescale": None} | own})
    teacher = load_case("hf_vit", tmp_path)
    assert (teacher.config.image_size, teacher.preprocessing.resize_size) == (side, side)
    assert any("do_resize is false" in note for note in teacher.report.notes)


@pytest.mark.parametrize(
    "name",
    [
        "timm_vit",
        "timm_siglip_gap",
        "timm_siglip",
        "timm_dinov3",
        "hf_dinov2_registers",
        "hf_dinov3_swiglu",
        "hf_siglip_whole",
        "big_vision",
    ],
)
def test_the_stored_outputs_are_those_of_the_script(name: str) -> None:
    peer("timm" if "timm" in name or "big" in name else "transformers")
    case = script().CASES[name]()
    with np.load(FOLDER / "references.npz") as stored:
        for key, value in case["arrays"].items():
            np.testing.assert_allclose(value, stored[f"{name}/{key}"], rtol=1e-4, atol=1e-5)
    assert case["shapes"] == CASES[name]["shapes"]
