"""Adapters alone: they give the student back on their own base and refuse every other."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from core import tree
from vit_distill.export import adapters
from vit_distill.lora import LoraConfig


@pytest.fixture(
    params=[
        LoraConfig((("query", 2), ("out", 3), ("fc2", 4)), scaling="alpha", alpha=3.0),
        LoraConfig((("value", 2),), dora=True, train_norms=True, train_biases=True),
    ],
    ids=["lora", "dora"],
)
def student(request, make_student, make_teacher):
    return make_student(make_teacher(), lora=request.param)


def test_adapters_and_their_config_come_back_exactly(student, tmp_path):
    adapters.write(student, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapters.safetensors", "adapters.json"}
    found, lora = adapters.read(tmp_path, student.base)
    assert lora == student.lora
    assert tree.fingerprint(found) == tree.fingerprint(student.adapters)


def test_the_teacher_and_the_files_give_the_student(student, make_teacher, tmp_path):
    adapters.write(student, tmp_path)
    loaded = adapters.load_adapters(tmp_path, make_teacher())
    assert loaded.config == student.config
    assert loaded.blocks == (0, 2)
    assert loaded.preprocessing == student.preprocessing
    assert loaded.facts["teacher"]["name"] == "tiny"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, student.params)


def test_another_base_is_refused_and_the_right_one_named(student, make_teacher, tmp_path):
    adapters.write(student, tmp_path)
    teacher = make_teacher()
    teacher.params["norm"]["scale"] = teacher.params["norm"]["scale"] + np.float32(1e-7)
    with pytest.raises(
        ValueError, match=r"blocks \[0, 2\] of teacher tiny \(file sha256 abababababab.*load that teacher"
    ):
        adapters.load_adapters(tmp_path, teacher)
    with pytest.raises(ValueError, match="a model of only 2 blocks"):
        adapters.load_adapters(tmp_path, make_teacher(depth=2))


@pytest.mark.parametrize("change", [{"activation": "quick_gelu"}, {"mean": (0.5, 0.4, 0.31)}])
def test_a_teacher_that_computes_something_else_is_refused(change, student, make_teacher, tmp_path):
    adapters.write(student, tmp_path)
    teacher, ((name, value),) = make_teacher(), change.items()
    part = "config" if hasattr(teacher.config, name) else "preprocessing"
    right = json.loads(json.dumps({name: getattr(getattr(teacher, part), name)}))
    setattr(teacher, part, dataclasses.replace(getattr(teacher, part), **change))
    with pytest.raises(ValueError, match=r"of teacher tiny .* with the same overrides: load_teacher") as error:
        adapters.load_adapters(tmp_path, teacher)
    assert f"found {name} {json.loads(json.dumps(value))!r}: load" in str(error.value)
    assert str(error.value).endswith(f"overrides={right!r})")
    path = tmp_path / adapters.DESCRIPTION
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in content if key not in ("config", "preprocessing")}))
    assert adapters.load_adapters(tmp_path, teacher).blocks == (0, 2)  # written before these were recorded


def test_a_student_without_adapters_is_refused(make_student, tmp_path):
    with pytest.raises(ValueError, match=r'no adapters .*method="copy"'):
        adapters.write(make_student(lora=None), tmp_path)


def test_damaged_files_are_named(student, tmp_path):
    adapters.write(student, tmp_path)
    weights, description = tmp_path / adapters.WEIGHTS, tmp_path / adapters.DESCRIPTION
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"adapters\.safetensors: not a complete safetensors file"):
        adapters.read(tmp_path, student.base)
    content = json.loads(description.read_text())
    description.write_text(json.dumps(content | {"format": "other"}))
    with pytest.raises(ValueError, match=r"adapters\.json: expected format .*, found 'other'"):
        adapters.read(tmp_path, student.base)
    description.write_text("{")
    with pytest.raises(ValueError, match=r"adapters\.json: expected the description of exported adapters"):
        adapters.read(tmp_path, student.base)
    description.unlink()
    with pytest.raises(ValueError, match=r"adapters\.json: expected the description of exported adapters"):
        adapters.read(tmp_path, student.base)
