"""Original files of MAE, DINO, DINOv2 and DeiT III in timm's format, torch files, and the hub."""

import argparse
import builtins
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from peers import peer, to_torch
from safetensors.numpy import save_file

from core import tree
from core.files import write_json
from core.vit import VisionTransformer
from vit_distill.formats import canonical
from vit_distill.formats.architectures import architecture_config
from vit_distill.formats.canonical import entries, expected_shapes
from vit_distill.formats.hub import download
from vit_distill.formats.timm import timm_model, to_timm, write_timm_folder
from vit_distill.teacher import Teacher, load_teacher

OVERRIDES = {"num_heads": 2, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SMALL = {"depth": 2, "width": 32, "num_heads": 2, "mlp_dim": 48, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def plain() -> Teacher:
    return load_teacher("random:vit_tiny_patch16_224", overrides=SMALL)


@pytest.fixture(scope="module")
def dinov2() -> Teacher:
    return load_teacher("random:vit_giant_patch14_dinov2", overrides=SMALL)


def load(folder: Path, state: dict[str, Any], **options: Any) -> Teacher:
    save_file(state, folder / "model.safetensors")
    return load_teacher(str(folder), overrides={**OVERRIDES, **options.pop("overrides", {})}, **options)


def same(found: Teacher, expected: Teacher) -> bool:
    return found.config == expected.config and tree.fingerprint(found.params) == tree.fingerprint(expected.params)


def test_mae_decoder_is_known_to_be_left_out(plain: Teacher, tmp_path: Path) -> None:
    extra = {"mask_token": np.ones((1, 1, 8), np.float32), "decoder_blocks.0.norm1.weight": np.ones(8, np.float32)}
    found = load(tmp_path, to_timm(plain.config, plain.params) | extra)
    assert same(found, plain)
    assert set(found.report.unused) == {
        "mask_token (used in masked pre-training only)",
        "decoder_blocks.0.norm1.weight (MAE's decoder)",
    }


def test_prefixes_come_off_and_dino_heads_are_left_out(plain: Teacher, tmp_path: Path) -> None:
    state = {f"module.backbone.{name}": array for name, array in to_timm(plain.config, plain.params).items()}
    found = load(tmp_path, state | {"head.last_layer.weight_g": np.ones((8, 1), np.float32)})
    assert same(found, plain)
    assert "module.backbone.blocks.1.attn.qkv.weight" in found.report.matched
    with pytest.raises(ValueError, match=r"1 tensors have no place.*'queue'"):
        load(tmp_path, state | {"queue": np.ones(3, np.float32)})


def test_original_dinov2_and_deit3_names(dinov2: Teacher, tmp_path: Path) -> None:
    state = to_timm(dinov2.config, dinov2.params)
    renamed = {n.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): a for n, a in state.items()}
    renamed = {n.replace("blocks.1.", "blocks.3.1.").replace("blocks.0.", "blocks.2.0."): a for n, a in renamed.items()}
    found = load(tmp_path, renamed)
    assert same(found, dinov2)
    assert "blocks.3.1.mlp.w12.weight" in found.report.matched
    smaller = load(tmp_path, renamed, overrides={"image_size": 16})
    assert smaller.report.reshaped == ("pos_embed [1, 17, 32] -> [1, 5, 32] (dinov2)",)
    deit3 = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): a for n, a in state.items()}
    deit3["pos_embed"] = deit3["pos_embed"][:, 1:]  # of the patches alone, and resized as timm does
    found = load(tmp_path, deit3)
    assert found.config.layer_scale
    assert not found.config.position_on_prefix
    smaller = load(tmp_path, deit3, overrides={"image_size": 16})
    assert smaller.report.reshaped == ("pos_embed [1, 16, 32] -> [1, 4, 32] (timm)",)


@pytest.mark.parametrize(
    "extra",
    ["mask_token", "decoder_pos_embed", "register_tokens", "dino_head.mlp.0.weight"],
)
def test_names_that_tell_an_original_give_imagenets_statistics(plain: Teacher, tmp_path: Path, extra: str) -> None:
    """Whatever the file's suffix; without such a sign mean and std are asked for."""
    state = to_timm(plain.config, plain.params)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="mean and std: no config beside the file"):
        load_teacher(str(tmp_path), overrides={"num_heads": 2})
    shape = (1, 4, 32) if extra == "register_tokens" else (1, 32)
    found = load(tmp_path, state | {extra: np.ones(shape, np.float32)}, overrides={"mean": None, "std": None})
    assert found.preprocessing.mean == (0.485, 0.456, 0.406)
    assert any("ImageNet's mean and std assumed" in note for note in found.report.notes)


@pytest.mark.parametrize(
    ("name", "pretrained", "warned"),
    [
        ("vit_base_patch16_clip_224", {"tag": "openai"}, True),
        ("vit_huge_patch14_clip_224", {"tag": "dfn5b", "notes": ["natively QuickGELU, use quickgelu variant"]}, True),
        ("vit_base_patch16_clip_224", {"tag": "laion2b"}, False),
        ("vit_base_patch16_clip_224", {"tag": "openai_ft_in1k"}, False),
        ("vit_base_patch16_clip_quickgelu_224", {"tag": "openai"}, False),
    ],
)
def test_clips_whose_weights_want_another_gelu_than_timm_computes_are_named(
    name: str, pretrained: dict[str, Any], warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """timm's function is kept; the note names the override, and what is exported then is quick GELU there too."""
    clip = load_teacher("random:vit_tiny_patch16_clip_224", overrides=SMALL)
    save_file(to_timm(clip.config, clip.params), tmp_path / "model.safetensors")
    content = {"architecture": name, "model_args": {"num_heads": 2}, "pretrained_cfg": pretrained}
    write_json(tmp_path / "config.json", content)
    found = load_teacher(str(tmp_path), overrides=OVERRIDES)
    assert found.config.activation == ("quick_gelu" if "quickgelu" in name else "gelu")
    message = "the weights were trained with quick_gelu, timm computes gelu"
    assert any(message in note for note in found.report.notes) == (message in caplog.text) == warned
    caplog.clear()
    quick = load_teacher(str(tmp_path), overrides=OVERRIDES | {"activation": "quick_gelu"})
    assert message not in caplog.text + str(quick.report)
    assert timm_model(quick.config)[1]["act_layer"] == "quick_gelu"


def test_siglip_without_its_attention_pooling(tmp_path: Path) -> None:
    """Its tokens are a plain ViT's; their mean is what timm computes with global_pool="avg" and no norm after it."""
    timm, torch = peer("timm"), peer("torch")
    args = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_base_patch16_siglip_224", **args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    pretrained = {"mean": [0.5] * 3, "std": [0.5] * 3}
    content = {"architecture": "vit_base_patch16_siglip_224", "global_pool": "map", "model_args": args}
    write_json(tmp_path / "config.json", content | {"pretrained_cfg": pretrained})
    save_file(state, tmp_path / "model.safetensors")
    mean_pool: dict[str, Any] = {"overrides": {"pool": "mean"}}
    with pytest.raises(ValueError, match=r"no place .*'attn_pool\..* name them in allow_unused"):
        load_teacher(str(tmp_path), **mean_pool)
    with pytest.raises(ValueError, match=r"tensors are missing: 'attn_pool\.latent'"):
        load_teacher(str(tmp_path), allow_unused=["attn_pool.*"])
    found = load_teacher(str(tmp_path), allow_unused=["attn_pool.*"], **mean_pool)
    assert found.name == "vit_base_patch16_siglip_224"
    images = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)
    out = jax.jit(VisionTransformer(found.config).apply)({"params": found.params}, images)
    mean = timm.create_model("vit_base_patch16_siglip_224", **args, global_pool="avg", fc_norm=False).eval()
    mean.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "attn_pool" not in name})
    with torch.no_grad():
        tokens = model.forward_features(to_torch(images)).numpy()
        pooled = mean(to_torch(images)).numpy()
    np.testing.assert_allclose(out.tokens, tokens, rtol=0, atol=1e-5 * np.abs(tokens).max())
    np.testing.assert_allclose(out.pooled, pooled, rtol=0, atol=1e-5 * np.abs(pooled).max())


def test_another_way_to_a_square_is_noted(plain: Teacher, tmp_path: Path) -> None:
    write_timm_folder(tmp_path, plain.config, plain.params, plain.preprocessing)
    assert not load_teacher(str(tmp_path)).report.notes
    content = json.loads((tmp_path / "config.json").read_text())
    content["pretrained_cfg"]["crop_mode"] = "squash"
    write_json(tmp_path / "config.json", content)
    (note,) = load_teacher(str(tmp_path)).report.notes
    assert note == "the centre of images is cut out here; timm has crop_mode 'squash' for this model"


def test_torch_files(plain: Teacher, tmp_path: Path) -> None:
    torch = peer("torch")
    state = {name: torch.tensor(array) for name, array in to_timm(plain.config, plain.params).items()}
    path = tmp_path / "mae_pretrain_vit.pth"
    torch.save({"model": state, "epoch": 3}, path)
    found = load_teacher(str(path), overrides={"num_heads": 2})
    assert same(found, plain)
    assert found.preprocessing.mean == (0.485, 0.456, 0.406)
    assert found.name == "mae_pretrain_vit"
    assert found.report.notes[0] == "weights taken from 'model' of the torch file, not ['epoch']"
    for content in (state, {"state_dict": state}):  # as timm and others save: nothing tells the origin
        torch.save(content, path)
        with pytest.raises(ValueError, match="mean and std: no config beside the file"):
            load_teacher(str(path), overrides={"num_heads": 2})
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(ValueError, match=r"mae_pretrain_vit\.pth: torch cannot read it with weights_only=True"):
        load_teacher(str(path))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged"):
        load_teacher(str(path))
    path.write_text("hello")  # torch's reason is a bare number
    with pytest.raises(ValueError, match=r"torch says: [A-Z][A-Za-z]+Error: "):
        load_teacher(str(path))


def test_torch_file_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.pth").write_bytes(b"x")
    refuse_import(monkeypatch, "torch")
    with pytest.raises(ValueError, match=r"weights\.pth is a torch pickle and torch is not installed"):
        load_teacher(str(tmp_path / "weights.pth"))


def test_hub(plain: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = peer("huggingface_hub")
    from huggingface_hub import errors

    write_timm_folder(tmp_path, plain.config, plain.params, plain.preprocessing)
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda **options: asked.update(options) or str(tmp_path))
    found = load_teacher("hf-hub:timm/vit_tiny@v1")
    assert same(found, plain)
    assert (asked["repo_id"], asked["revision"]) == ("timm/vit_tiny", "v1")
    assert (found.name, found.source["licence"]) == ("timm/vit_tiny@v1", "cc-by-nc-4.0")
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        assert canonical.matches(name, asked["allow_patterns"])

    (tmp_path / "model.safetensors").unlink()  # the repository has pytorch_model.bin alone
    with pytest.raises(ValueError, match=r"timm/vit_tiny: holds neither .*pickled weights .* are not fetched"):
        load_teacher("hf-hub:timm/vit_tiny")

    def offline(**options: Any) -> None:
        raise errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="not in the cache, and the hub cannot be reached"):
        download("timm/vit_tiny")
    refuse_import(monkeypatch, "huggingface_hub")
    with pytest.raises(ValueError, match="needs the package huggingface_hub"):
        download("timm/vit_tiny")


def refuse_import(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = builtins.__import__

    def fake(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_huge_patch14_224",
        "vit_gigantic_patch14_224",
        "deit3_base_patch16_384",
        "vit_large_patch14_clip_quickgelu_336",
        "vit_small_patch14_reg4_dinov2",
        "vit_giant_patch14_dinov2",
    ],
)
def test_architectures_have_timms_shapes(name: str) -> None:
    timm, torch = peer("timm"), peer("torch")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    config = architecture_config(name)
    shapes = expected_shapes(config)
    found = {entry.name: shapes[entry.path] for entry in entries(config)}
    joined = {key.replace(".attn.q.", ".attn.qkv."): value for key, value in found.items()}
    assert set(expected) == {key for key in joined if ".attn.k." not in key and ".attn.v." not in key}
    assert found["blocks.0.mlp.fc1.weight"] == expected["blocks.0.mlp.fc1.weight"][::-1]
    assert found["pos_embed"] == expected["pos_embed"]
    assert config.num_heads == model.blocks[0].attn.num_heads
    assert config.norm_eps == model.blocks[0].norm1.eps
