"""Exports reload elsewhere with the same features; one that does not leaves nothing behind."""

import dataclasses
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from peers import peer
from PIL import Image

from core.tree import num_params
from vit_distill.export import command, other_tools
from vit_distill.export import export as export_module
from vit_distill.export.compare import model_outputs
from vit_distill.export.export import KINDS, export
from vit_distill.lora import attach
from vit_distill.teacher import load_teacher

# What our own reader and, where it can be installed, the tool of the format find.
PACKAGES = {"timm": "timm", "huggingface": "transformers", "onnx": "onnxruntime"}
DINOV2 = dict(mlp_dim=48, layer_scale=True, num_registers=3, position_on_prefix=False)
# Warnings of other packages about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def _expected(student, images):
    """Tokens, pooled and logits of base and adapters, as training saw them."""
    params = attach(student.base, student.adapters, student.lora) if student.lora else student.params
    return model_outputs(student.config, params, np.asarray(student.preprocessing.evaluate(images)))


def _folder_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _snippet(folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize("kind", KINDS)
def test_export_of_every_kind_is_checked_described_and_loadable(kind, make_student, images, tmp_path, monkeypatch):
    if kind in PACKAGES:
        peer(PACKAGES[kind])
    student = make_student()
    result = export(student, kind, tmp_path / "out", images)
    assert _folder_names(tmp_path) == ["out"]
    assert result["max_difference"] <= 1e-5 < result["tolerance"]
    assert result["files"] == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "export.json"} < set(result["files"])
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["kind"] == kind
    assert record["reloaded_by"] == result["reloaded_by"]
    assert (kind in ("timm", "huggingface")) == (len(result["reloaded_by"]) == 2), result["reloaded_by"]
    if kind == "adapters":  # needs its teacher: test_adapters.py
        return
    # The card's code, as a reader would run it; the stored size needs no resizing.
    Image.fromarray(images[0]).save(tmp_path / "out" / "image.jpg", format="png")
    monkeypatch.chdir(tmp_path / "out")
    namespace = {}
    exec(_snippet(tmp_path / "out"), namespace)
    features = namespace["features"]
    features = np.asarray(features.detach() if hasattr(features, "detach") else features)
    pooled = _expected(student, images[:1])["pooled"]
    np.testing.assert_allclose(features, pooled, rtol=0, atol=1e-5 * np.abs(pooled).max())


@pytest.mark.parametrize("kind", ["timm", "huggingface"])
def test_a_grey_student_is_loaded_by_the_code_of_its_card(
    kind, make_student, make_teacher, images, tmp_path, monkeypatch
):
    peer(PACKAGES[kind])
    teacher = make_teacher(in_channels=1)
    teacher.preprocessing = dataclasses.replace(teacher.preprocessing, mean=(0.5,), std=(0.2,))
    student = make_student(teacher)
    grey = images[..., :1]
    export(student, kind, tmp_path / "out", grey)
    Image.fromarray(grey[0, ..., 0]).save(tmp_path / "out" / "image.jpg", format="png")
    monkeypatch.chdir(tmp_path / "out")
    namespace = {}
    exec(_snippet(tmp_path / "out"), namespace)
    pooled = _expected(student, grey[:1])["pooled"]
    np.testing.assert_allclose(namespace["features"].detach(), pooled, rtol=0, atol=1e-5 * np.abs(pooled).max())


def test_timm_loads_the_folder_strictly_with_the_same_outputs(make_student, architecture, images, tmp_path):
    timm, torch = peer("timm"), peer("torch")
    student = make_student(**architecture)
    export(student, "timm", tmp_path / "out", images)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) >= num_params(student.params)
    data = timm.data.resolve_model_data_config(model)
    cropped = images[:, 2:18, 2:18].transpose(0, 3, 1, 2) / 255
    mean, std = (np.reshape(data[name], (1, 3, 1, 1)) for name in ("mean", "std"))
    with torch.inference_mode():
        tokens = model.forward_features(torch.tensor((cropped - mean) / std, dtype=torch.float32))
        found = {"tokens": tokens, "pooled": model.forward_head(tokens, pre_logits=True)}
        if student.config.num_classes:
            found["logits"] = model.forward_head(tokens)
    expected = _expected(student, images)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5 * np.abs(values).max())


@pytest.mark.parametrize("name", ["ViTForImageClassification", "ViTModel", "Dinov2WithRegistersModel"])
def test_transformers_loads_the_folder_strictly_with_the_same_outputs(name, make_student, images, tmp_path):
    transformers, torch = peer("transformers"), peer("torch")
    options = DINOV2 if "Dinov2" in name else {}
    student = make_student(**options, num_classes=5 if "Class" in name else 0)
    export(student, "huggingface", tmp_path / "out", images)
    pooler = {"add_pooling_layer": False} if name == "ViTModel" else {}
    make = getattr(transformers, name)
    model, loading = make.from_pretrained(tmp_path / "out", output_loading_info=True, **pooler)
    assert not any(loading.values()), loading
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(list(images), return_tensors="pt")
    expected = _expected(student, images)
    with torch.inference_mode():
        found = {"tokens": model.eval().base_model(**inputs).last_hidden_state}
        if student.config.num_classes:
            found["logits"] = model(**inputs).logits
    assert len(found) == 1 + (name == "ViTForImageClassification")
    for output, values in found.items():
        np.testing.assert_allclose(values, expected[output], rtol=0, atol=1e-5 * np.abs(expected[output]).max())


def test_what_a_format_cannot_hold_is_said_and_nothing_left(make_student, images, tmp_path):
    with pytest.raises(ValueError, match=r"Hugging Face's ViT and DINOv2 have no .*mean pooling: write a timm folder"):
        export(make_student(pool="mean"), "huggingface", tmp_path / "out", images)
    assert not _folder_names(tmp_path)


@pytest.mark.parametrize("kind", ["timm", "huggingface"])
@pytest.mark.parametrize("named", [True, False])
def test_the_classes_of_the_head_keep_their_names(kind, named, make_student, images, tmp_path):
    student = make_student()
    names = [f"finding {i}" for i in range(student.config.num_classes)] if named else None
    facts = {"teacher": dict(student.facts.get("teacher", {}), class_names=names)}
    export(dataclasses.replace(student, facts=facts), kind, tmp_path / "out", images)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    if named and kind == "huggingface":
        assert (content["id2label"]["1"], content["label2id"]["finding 1"]) == ("finding 1", 1)
    content.pop("vit_distill", None)  # our own section: as any other tool's folder
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    assert load_teacher(str(tmp_path / "out")).source.get("class_names") == names


def test_a_model_that_reloads_differently_is_no_export(make_student, images, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    first = export(make_student(), "adapters", folder, images)
    entry = export_module._KINDS["adapters"]

    def read_wrongly(student, folder):
        call = entry.read(student, folder)
        return lambda images: {name: values * (1 + 3e-4) for name, values in call(images).items()}

    monkeypatch.setitem(export_module._KINDS, "adapters", entry._replace(read=read_wrongly))
    with pytest.raises(
        ValueError, match=r"differs from the adapted model by 3\.0e-04 .* at most 1e-04; nothing is left"
    ):
        export(make_student(), "adapters", tmp_path / "new", images)
    with pytest.raises(ValueError, match="nothing is left"):
        export(make_student(), "adapters", folder, images)
    assert _folder_names(tmp_path) == ["out"]
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == first["files"]


def test_a_model_that_does_not_reload_or_needs_a_fixed_batch_is_no_export(make_student, images, tmp_path, monkeypatch):
    entry = export_module._KINDS["adapters"]

    def read_three_only(student, folder):
        call = entry.read(student, folder)
        return lambda images: call(images) if len(images) == 3 else {"pooled": np.zeros((3, 16))}

    def read_nothing(student, folder):
        raise RuntimeError("unexpected key")

    for read, message in ((read_three_only, r"expected shape \(1, 16\)"), (read_nothing, "unexpected key")):
        monkeypatch.setitem(export_module._KINDS, "adapters", entry._replace(read=read))
        with pytest.raises(ValueError, match=f"could not be reloaded by vit_distill, nothing is left: .*{message}"):
            export(make_student(), "adapters", tmp_path / "out", images)
        assert not _folder_names(tmp_path)


def test_an_earlier_export_is_replaced_and_another_folder_is_not(make_student, images, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    export(make_student(), "adapters", folder, images)
    (folder / "adapters.json").write_text("old")
    export(make_student(), "adapters", folder, images)
    assert (folder / "adapters.json").read_text() != "old"
    os.remove(folder / "export.json")
    with pytest.raises(ValueError, match=r"out exists and is no earlier export: choose another --output"):
        export(make_student(), "adapters", folder, images)
    assert _folder_names(tmp_path) == ["out"]
    assert len(_folder_names(folder)) == 3


def test_unknown_kind_and_no_images(make_student, images, tmp_path):
    with pytest.raises(ValueError, match=r"export: expected one of \('timm', .*'onnx'\), found 'tflite'"):
        export(make_student(), "tflite", tmp_path / "out", images)
    with pytest.raises(ValueError, match="at least one image"):
        export(make_student(), "adapters", tmp_path / "out", images[:0])
    assert not _folder_names(tmp_path)


def test_without_timm_our_own_reader_checks(make_student, images, tmp_path, monkeypatch):
    monkeypatch.setitem(other_tools._PROBES, "timm", ("no_such_package",))
    result = export(make_student(lora=None), "timm", tmp_path / "out", images)
    assert list(result["reloaded_by"]) == ["vit_distill"]
    assert result["not_reloaded_by"] == {"timm": "cannot be imported: No module named 'no_such_package'"}


def test_command_exports_into_the_work_directory_and_prints(make_student, images, tmp_path, monkeypatch, capsys):
    pixels = SimpleNamespace(images=lambda rows: images[np.asarray(rows) % 3])
    rows = np.arange(40)
    monkeypatch.setattr(command, "load_student", lambda *_: make_student())
    monkeypatch.setattr(command, "few_shot_images", lambda *_: (SimpleNamespace(pixels=pixels), rows, rows[:0]))
    command.run_export(SimpleNamespace(), tmp_path, "adapters")
    assert json.loads((tmp_path / "export" / "adapters" / "export.json").read_text())["num_images"] == 16
    printed = capsys.readouterr().out
    assert f"exported to {tmp_path / 'export' / 'adapters'}" in printed
    assert "adapters.safetensors" in printed
    assert "reloaded by vit_distill: differs by " in printed
    command.run_export(SimpleNamespace(), tmp_path, "adapters", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "README.md").exists()
    with pytest.raises(ValueError, match="--export: expected one of"):
        command.run_export(SimpleNamespace(), tmp_path, "")
