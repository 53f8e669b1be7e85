"""StableHLO and ONNX files against the model they hold, read without any code of this project."""

import dataclasses

import jax
import jax.export
import numpy as np
import pytest

from vit_distill.export import compare, onnx_file, stablehlo


def _expected(student, images):
    normalised = np.asarray(student.preprocessing.evaluate(images))
    return normalised, compare.model_outputs(student.config, student.params, normalised)


def _assert_equal(found, expected, count):
    """Tolerance: float32 roundings of two blocks; every output is there, for `count` images."""
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], values[:count], rtol=0, atol=1e-5 * np.abs(values).max())


def test_stablehlo_for_any_number_of_images_and_every_platform(make_student, images, tmp_path):
    student = make_student()
    stablehlo.write(student, tmp_path)
    exported = jax.export.deserialize(bytearray((tmp_path / stablehlo.FILE).read_bytes()))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    normalised, expected = _expected(student, images)
    for count in (1, 3):
        _assert_equal(jax.device_get(exported.call(normalised[:count])), expected, count)


def test_onnx_for_any_number_of_images(make_student, architecture, images, tmp_path):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    student = make_student(**architecture)
    onnx_file.write(student, tmp_path)
    path = tmp_path / onnx_file.FILE
    assert [opset.version for opset in onnx.load(path).opset_import] == [17]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 16, 16]
    names = [output.name for output in session.get_outputs()]
    normalised, expected = _expected(student, images)
    for count in (1, 3):
        values = session.run(names, {"images": normalised[:count].transpose(0, 3, 1, 2)})
        _assert_equal(dict(zip(names, values, strict=True)), expected, count)


def test_onnx_without_its_packages_says_what_to_install(make_student, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx and onnxruntime: install .*\[onnx\]"):
        onnx_file.write(make_student(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [stablehlo, onnx_file])
def test_a_student_that_does_not_fit_into_one_file_is_refused(make_student, monkeypatch, tmp_path, module):
    if module is onnx_file:
        pytest.importorskip("onnxruntime")
    student = make_student()
    monkeypatch.setattr(stablehlo, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"at most 2 GiB, .*use --export=timm or huggingface"):
        module.write(student, tmp_path)


def test_difference_is_a_share_of_the_largest_value_and_sees_every_output():
    expected = {"pooled": np.array([[1.0, -4.0]]), "tokens": np.array([[[2.0, 0.0]]])}
    assert compare.largest_difference(expected, expected) == 0
    assert compare.largest_difference(expected, {"pooled": np.array([[1.5, -4.0]])}) == 0.125
    assert compare.largest_difference(expected, expected | {"tokens": np.array([[[2.0, 1.0]]])}) == 0.5
    zeros = {"logits": np.zeros((1, 2))}
    assert compare.largest_difference(zeros, zeros) == 0
    assert compare.largest_difference(zeros, {"logits": np.array([[0.0, 0.25]])}) == 0.25


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "expected some of"),
        ({"hidden": np.zeros((1, 2))}, r"expected some of \['pooled'\], found \['hidden'\]"),
        ({"pooled": np.zeros((2, 2))}, r"pooled: expected shape \(1, 2\), found \(2, 2\)"),
        ({"pooled": np.array([[np.nan, 0.0]])}, "pooled holds values that are not finite"),
    ],
)
def test_outputs_that_cannot_be_compared_are_errors(found, message):
    with pytest.raises(ValueError, match=message):
        compare.largest_difference({"pooled": np.ones((1, 2))}, found)


def test_weights_that_are_not_finite_are_an_error(make_student, images):
    student = make_student(lora=None)
    params = dict(student.params, norm={"scale": np.full(16, np.nan, np.float32), "bias": np.zeros(16, np.float32)})
    _, expected = _expected(dataclasses.replace(student, params=params), images)
    with pytest.raises(ValueError, match="not finite"):
        compare.largest_difference(expected, expected)
