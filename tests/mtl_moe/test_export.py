"""The exported program alone gives the detector's scores and maps."""

import csv
import json
import re
import shutil
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
from PIL import Image

from core.workdir import save_config
from mtl_moe import export as exporting
from mtl_moe import run
from mtl_moe.evaluate import evaluate
from mtl_moe.floors import log_mean_gradient
from mtl_moe.infer import Scorer, restore


@pytest.fixture(scope="module")
def small_run(make_run, tiny_config):
    config = tiny_config()
    config.tasks.names = ("masked", "transform")
    found = make_run(config)
    save_config(config, found.workdir)
    return found


def test_the_file_scores_as_the_detector_does(small_run):
    config = small_run.system.config
    run.export(config, small_run.workdir, "stablehlo", "")
    folder = small_run.workdir / "export" / "stablehlo"
    facts = json.loads((folder / "export.json").read_text())
    assert facts["evidences"] == ["masked", "transform"]
    assert facts["input"] == {"dtype": "uint8", "shape": [8, 32, 32, 1]}
    assert facts["outputs"] == {"raw": [8, 2], "maps": [8, 2, 32, 32], "body": [8, 32, 32], "texture": [8]}
    assert (facts["calibration"], facts["thresholds"]) == (None, [])  # the work directory has none
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


@pytest.fixture(scope="module")
def site(small_run, tmp_path_factory):
    """A folder with what a user has: the work directory `runs/scans`, exported, and images in `new_scans`."""
    root = tmp_path_factory.mktemp("site")
    workdir = shutil.copytree(small_run.workdir, root / "runs" / "scans")
    evaluate(small_run.system, small_run.dataset, workdir)
    run.export(small_run.system.config, workdir, "stablehlo", "")
    (root / "new_scans").mkdir()
    for row, grey in enumerate(small_run.dataset.splits["test"].images(np.arange(8))[..., 0]):
        image = Image.fromarray(grey).resize((70 + row, 50), Image.Resampling.BICUBIC)
        deep = Image.fromarray(np.asarray(image).astype(np.uint16) * 200)
        (deep if row % 2 else image.convert("RGB")).save(root / "new_scans" / f"{row:04d}.png")
    return root


@pytest.fixture(scope="module")
def predicted(small_run, site):
    """predictions.csv and the maps of --mode=predict on the images of `site`."""
    config = small_run.system.config.copy_and_resolve_references()
    config.score.save_maps = True
    run.predict(config, site / "runs" / "scans", str(site / "new_scans"), str(site / "out"))
    with (site / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {name: np.array([float(row[name]) for row in rows]) for name in ("score", "p_value")}
    return found | {"map": np.stack([np.load(site / "out" / "maps" / f"{row['name']}.npy") for row in rows])}


def test_the_folder_alone_gives_what_prediction_does(site, predicted):
    """Files become images by the words of export.json. It calibrates in float32, hence 1e-4."""
    folder = site / "runs" / "scans" / "export" / "stablehlo"
    facts = json.loads((folder / "export.json").read_text())
    assert {name: facts["outputs"][name] for name in predicted} == {
        "score": [8], "p_value": [8], "map": [8, 32, 32]
    }  # fmt: skip
    assert (facts["calibration"]["normals"], facts["calibration"]["source"]) == (6, "phantom")
    stated = facts["preprocessing"]
    assert (stated["size"], stated["channels"], stated["window"]) == (32, 1, "the file's own")
    images = []
    for path in sorted((site / "new_scans").iterdir()):
        image = Image.open(path)
        deep = image.mode == "I;16"
        image = Image.fromarray(np.asarray(image).astype(np.float32) / 257) if deep else image.convert("L")
        image = image.resize((stated["size"], stated["size"]), Image.Resampling.BILINEAR)
        images.append(np.clip(np.rint(np.asarray(image)), 0, 255).astype(np.uint8)[..., None])
    program = jax.export.deserialize(bytearray((folder / exporting.FILE).read_bytes()))
    found = jax.device_get(program.call(np.stack(images)))
    for name, values in predicted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4 * np.abs(values).max())
    assert len(np.unique(predicted["p_value"])) > 1
    report = json.loads((site / "out" / "report.json").read_text())
    assert facts["thresholds"] == report["thresholds"]


def test_the_documents_example_gives_what_prediction_does(site, predicted, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    code = re.search(r"```python\n(.*?)```", text.partition("## An exported detector")[2], re.DOTALL)[1]
    imported = set(re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE))
    assert imported <= {"json", "pathlib", "jax", "numpy", "PIL"}, "without this code"
    monkeypatch.chdir(site)
    names: dict = {}
    exec(code, names)
    for name, value in (("score", names["score"]), ("p_value", names["p_value"]), ("map", names["anomaly_map"])):
        np.testing.assert_allclose(value, predicted[name][0], rtol=1e-4, atol=1e-4 * np.abs(predicted[name]).max())


@pytest.mark.parametrize("differences", [(1e-3, 0.0, 0.0, 0.0), (0.0, 0.0, np.nan, 0.0)])
def test_a_program_that_differs_is_not_written(small_run, tmp_path, monkeypatch, differences):
    found = iter(differences)
    monkeypatch.setattr(exporting, "_distance", lambda *_: next(found))
    trained = restore(small_run.system, small_run.workdir)
    images = small_run.dataset.splits["test"].images(np.arange(3))
    with pytest.raises(ValueError, match="differs from the detector"):
        exporting.export(small_run.system, trained, None, images, {}, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_other_formats_are_refused(small_run):
    with pytest.raises(ValueError, match=r"expected --export=stablehlo.*found 'timm'"):
        run.export(small_run.system.config, small_run.workdir, "timm", "")
