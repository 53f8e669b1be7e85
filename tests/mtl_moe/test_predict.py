"""Prediction calibrated on a folder of normals. Axes: n normals."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from input_pipeline.split import Split
from mtl_moe.infer import Scorer, calibrate, restore
from mtl_moe.predict import predict


def write(split: Split, rows: np.ndarray, folder: Path) -> Path:
    folder.mkdir()
    for row, image in zip(rows, split.images(rows), strict=True):
        Image.fromarray(image[..., 0]).save(folder / f"{row:02d}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tiny_run, tmp_path_factory):
    """Twelve normals and six images to score."""
    root = tmp_path_factory.mktemp("site")
    train, test = (tiny_run.dataset.splits[name] for name in ("train", "test"))
    return write(train, np.arange(12), root / "normals"), write(test, np.arange(6), root / "new")


def test_the_normals_of_a_site_calibrate_its_scores(tiny_run, folders, tmp_path):
    normals, source = folders
    scores = predict(tiny_run.system, tiny_run.workdir, source, tmp_path / "out", normals)
    scorer = Scorer(tiny_run.system, restore(tiny_run.system, tiny_run.workdir))
    own = calibrate(tiny_run.system, scorer, tiny_run.dataset.splits["train"].take(np.arange(12)))
    scored = scorer.split(tiny_run.dataset.splits["test"].take(np.arange(6)), "test")
    np.testing.assert_allclose(scores, own.fuse(own.corrected(scored.raw, scored.texture)), rtol=1e-5)
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        p = [float(row["p_value"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(np.array(p) * 13, np.round(np.array(p) * 13), atol=1e-3)
    assert "12 calibration normals of normals." in (tmp_path / "out" / "report.html").read_text()


def test_folders_that_cannot_calibrate_are_named(tiny_run, folders, tmp_path):
    _, source = folders
    for pair in ((source, source), (source.parent, source), (source, source.parent)):
        with pytest.raises(ValueError, match="neither inside the other"):
            predict(tiny_run.system, tiny_run.workdir, pair[1], tmp_path, pair[0])
    few = write(tiny_run.dataset.splits["train"], np.arange(4), tmp_path / "few")
    with pytest.raises(ValueError, match="only 4 calibration normals: at least 5"):
        predict(tiny_run.system, tiny_run.workdir, source, tmp_path, few)
    assert not (tmp_path / "predictions.csv").exists()
