"""Scores of patients: definition by loops, in files and pages of evaluation and prediction."""

import csv
import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from core.metrics import auroc
from core.workdir import save_config
from mtl_moe.calibration import load_calibration
from mtl_moe.evaluate import evaluate
from mtl_moe.infer import Scorer, calibrate, restore
from mtl_moe.patients import comparable, patients_of, write_patients
from mtl_moe.predict import predict
from mtl_moe.report_patients import patients_section


@pytest.fixture(scope="module")
def calibration(tiny_run):
    scorer = Scorer(tiny_run.system, restore(tiny_run.system, tiny_run.workdir))
    normals = tiny_run.dataset.splits["calibration"]
    groups = [str(i // 2) for i in range(len(normals))]
    return calibrate(tiny_run.system, scorer, dataclasses.replace(normals, groups=groups))


def test_a_patient_is_as_odd_as_the_oddest_tenth_of_its_images(calibration):
    count = 24
    groups, labels = ["a"] * 21 + ["b", "b", "c"], np.array([0] * 20 + [1] + [0, 0] + [-1])
    fused = np.random.default_rng(0).permutation(count).astype(float)
    found = patients_of(groups, labels, fused, calibration)
    assert found.names == ("a", "b", "c")
    assert found.counts.tolist() == [21, 2, 1]
    assert found.labels.tolist() == [1, 0, -1]
    expected = [np.mean(sorted(fused[:21])[-3:]), max(fused[21:23]), fused[23]]  # 2.1 of 21 images are three
    np.testing.assert_allclose(found.scores, expected)
    assert found.oddest.tolist() == [fused[:21].argmax(), 21 + fused[21:23].argmax(), 23]
    pairs = calibration.fused.reshape(-1, 2).max(1)
    ranks = [(1 + (pairs >= score).sum()) / (1 + len(pairs)) for score in expected]
    np.testing.assert_allclose(found.p_values, ranks)
    assert found.calibration_counts.tolist() == [2] * len(pairs)


def test_images_that_are_patients_by_themselves_have_none(calibration, tmp_path):
    assert patients_of(["b", "a"], np.array([0, 1]), np.array([0.5, 1.0]), calibration) is None
    (tmp_path / "patients.csv").write_text("somebody's own")
    write_patients(tmp_path / "patients.csv", None, ())
    assert (tmp_path / "patients.csv").exists()
    (tmp_path / "report.json").write_text("{}")  # it is of earlier images
    write_patients(tmp_path / "patients.csv", None, ())
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("count", "calibration_count", "expected"),
    [(1, 1, True), (3, 2, True), (2, 1, False), (8, 20, True), (100, 4, False)],
)
def test_patients_have_p_values_among_patients_of_about_as_many_images(count, calibration_count, expected):
    assert comparable(np.array([count, count, 50]), np.array([calibration_count])) == expected


def test_where_calibration_patients_bring_few_images_the_page_says_why_there_are_no_p_values(calibration):
    found = patients_of(["a"] * 9 + ["b"] * 4, np.zeros(13, int), np.arange(13.0), calibration)
    assert found.p_values is None
    page = patients_section(found, [f"{i}.png" for i in range(13)], "")
    assert "There are no p-values of patients" in page
    assert "these 4 to 9 (median 6.5), the calibration patients 2 to 2 (median 2)" in page
    assert "earlier version" not in page


def test_a_calibration_keeps_its_patients_and_one_of_before_has_no_p_values(calibration, tmp_path):
    calibration.save(tmp_path / "c.npz", 4)
    read = load_calibration(tmp_path / "c.npz", calibration.names, 4)
    np.testing.assert_array_equal(read.groups, calibration.groups)
    with np.load(tmp_path / "c.npz") as stored:
        np.savez(tmp_path / "old.npz", **{name: stored[name] for name in stored.files if name != "groups"})
    old = load_calibration(tmp_path / "old.npz", calibration.names, 4)
    found = patients_of(["a", "a", "b"], np.zeros(3, int), np.arange(3.0), old)
    assert found.p_values is None
    assert "does not know its patients" in patients_section(found, ["1.png", "2.png", "3.png"], "")
    write_patients(tmp_path / "patients.csv", found, ["1.png", "2.png", "3.png"])
    with (tmp_path / "patients.csv").open(newline="") as file:
        assert {row["p_value"] for row in csv.DictReader(file)} == {""}


def test_evaluation_measures_patients(tiny_run, tmp_path):
    test = tiny_run.dataset.splits["test"]
    test = dataclasses.replace(test, groups=[f"p{i // 2}" for i in range(len(test))])
    dataset = dataclasses.replace(tiny_run.dataset, splits=tiny_run.dataset.splits | {"test": test})
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "w")
    save_config(tiny_run.system.config, workdir)
    report = evaluate(tiny_run.system, dataset, workdir)
    with (workdir / "patients.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["patient"] for row in rows] == list(dict.fromkeys(test.groups))
    assert {row["images"] for row in rows} == {"2"}
    labels, scores = (np.array([float(row[key]) for row in rows]) for key in ("label", "score"))
    assert report["metrics"][f"test/{dataset.name}/patient_auroc"] == pytest.approx(auroc(scores, labels))
    page = (workdir / "report.html").read_text()
    assert "these 2 to 2 (median 2)" in page
    assert "AUROC of patients" in page


def test_prediction_scores_patients_whose_images_are_named_so(tiny_run, tmp_path):
    (tmp_path / "new").mkdir()
    for i, image in enumerate(tiny_run.dataset.splits["test"].images(np.arange(4))):
        Image.fromarray(image[..., 0]).save(tmp_path / "new" / f"scan-{i // 2}_slice{i:03d}.png")
    normals = tmp_path / "normals"
    normals.mkdir()
    for i, image in enumerate(tiny_run.dataset.splits["train"].images(np.arange(12))):
        Image.fromarray(image[..., 0]).save(normals / f"normal-{i // 3}_slice{i:03d}.png")
    predict(tiny_run.system, tiny_run.workdir, tmp_path / "new", tmp_path / "out", normals)
    with (tmp_path / "out" / "patients.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["patient"] for row in rows] == ["scan-0", "scan-1"]
    assert all(float(row["p_value"]) in (0.2, 0.4, 0.6, 0.8, 1.0) for row in rows)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "these 2 to 2 (median 2), the calibration patients 3 to 3 (median 3)" in page
