"""The exported program alone gives the detector's raw scores and maps."""

import json
import re

import jax
import jax.export
import numpy as np
import pytest

from core.workdir import save_config
from mtl_moe import export as exporting
from mtl_moe import run
from mtl_moe.floors import log_mean_gradient
from mtl_moe.infer import Scorer, restore


@pytest.fixture(scope="module")
def small_run(make_run, tiny_config):
    config = tiny_config()
    config.tasks.names = ("transform",)
    found = make_run(config)
    save_config(config, found.workdir)
    return found


def test_the_file_scores_as_the_detector_does(small_run):
    config = small_run.system.config
    run.export(config, small_run.workdir, "stablehlo", "")
    folder = small_run.workdir / "export" / "stablehlo"
    facts = json.loads((folder / "export.json").read_text())
    assert facts["evidences"] == ["transform"]
    assert facts["input"] == {"dtype": "uint8", "shape": [8, 32, 32, 1]}
    assert facts["outputs"] == {"raw": [8, 1], "maps": [8, 1, 32, 32], "body": [8, 32, 32], "texture": [8]}
    assert facts["platforms"] == ["cpu", "cuda", "tpu"]
    images = small_run.dataset.splits["test"].images(np.arange(8))
    program = jax.export.deserialize(bytearray((folder / exporting.FILE).read_bytes()))
    found = jax.device_get(program.call(images))
    expected = Scorer(small_run.system, restore(small_run.system, small_run.workdir)).images(images)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["texture"], log_mean_gradient(images), rtol=1e-5)
    products = re.findall(r"stablehlo\.dot_general.*", program.mlir_module())
    assert any("f32>" in line for line in products)
    assert all("[HIGHEST, HIGHEST]" in line for line in products), "other machines may round the operands"


def test_a_program_that_differs_is_not_written(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    trained = restore(small_run.system, small_run.workdir)
    images = small_run.dataset.splits["test"].images(np.arange(3))
    with pytest.raises(ValueError, match="differs from the detector"):
        exporting.export(small_run.system, trained, images, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_other_formats_are_refused(small_run):
    with pytest.raises(ValueError, match=r"expected --export=stablehlo.*found 'timm'"):
        run.export(small_run.system.config, small_run.workdir, "timm", "")
