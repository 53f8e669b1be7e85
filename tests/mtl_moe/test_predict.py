"""Prediction calibrated on a folder of normals, and by the work directory. Axes: n normals."""

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.workdir import save_config
from input_pipeline.split import Split
from mtl_moe import run
from mtl_moe.evaluate import evaluate
from mtl_moe.infer import Scorer, calibrate, restore
from mtl_moe.predict import check_output, predict, unlike_calibration
from mtl_moe.training_data import bind_training_data

ROOT = Path(__file__).parents[2]


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


def calibration_of(tiny_run):
    scorer = Scorer(tiny_run.system, restore(tiny_run.system, tiny_run.workdir))
    return calibrate(tiny_run.system, scorer, tiny_run.dataset.splits["calibration"])


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
    # The work directory is of before what it was trained on was written down.
    assert "12 calibration normals of normals, of which it is not" in (tmp_path / "out" / "report.html").read_text()


def test_the_documents_example_gives_what_prediction_does(tiny_run, folders, tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "runs" / "scans")
    save_config(tiny_run.system.config, workdir)
    shutil.copytree(folders[1], tmp_path / "new_scans")
    evaluate(*tiny_run._replace(workdir=workdir))
    names: dict = {}
    exec(code, names)
    np.testing.assert_allclose(
        names["scores"], predict(tiny_run.system, workdir, folders[1], tmp_path / "out"), rtol=1e-5
    )
    assert names["maps"].shape == (6, 32, 32)
    assert names["p_values"].min() > 0


def test_a_folder_unlike_the_calibration_normals_is_said_to_be(tiny_run, folders, tmp_path, caplog):
    normals, new = folders
    other = tmp_path / "noise"
    other.mkdir()
    for path in sorted(normals.iterdir()):
        noise = np.random.default_rng(0).integers(0, 256, np.asarray(Image.open(path)).shape)
        for i in range(4):
            Image.fromarray(np.roll(noise, i).astype(np.uint8)).save(other / f"{path.stem}_{i}.png")
    predict(tiny_run.system, tiny_run.workdir, other, tmp_path / "out", normals)
    sentence = "48 of 48 images are flagged where 10 % of normal ones are"
    assert sentence in caplog.text
    page = (tmp_path / "out" / "report.html").read_text()
    assert sentence in page
    assert "by their amount of texture alone" in page
    caplog.clear()
    predict(tiny_run.system, tiny_run.workdir, new, tmp_path / "same", normals)
    assert "images are flagged where" not in caplog.text + (tmp_path / "same" / "report.html").read_text()


@pytest.mark.parametrize(
    ("flagged", "num", "num_groups", "said"),
    [(3, 3, 100, False), (60, 100, 100, False), (80, 100, 100, True), (0, 50, 100, False), (100, 100, 3, True),
     (80, 100, 3, False)],
)  # fmt: skip
def test_a_few_flagged_images_are_no_reason_for_a_caution(tiny_run, flagged, num, num_groups, said):
    p = np.where(np.arange(num) < flagged, 0.01, 0.5)
    calibration = dataclasses.replace(calibration_of(tiny_run), num_groups=num_groups)
    text = unlike_calibration(p, np.zeros(num), [str(i) for i in range(num)], calibration)
    assert bool(text) == said
    assert "texture" not in text


def test_folders_that_cannot_calibrate_are_named(tiny_run, folders, tmp_path):
    _, source = folders
    for pair in ((source, source), (source.parent, source), (source, source.parent)):
        with pytest.raises(ValueError, match="neither inside the other"):
            predict(tiny_run.system, tiny_run.workdir, pair[1], tmp_path, pair[0])
    few = write(tiny_run.dataset.splits["train"], np.arange(4), tmp_path / "few")
    with pytest.raises(ValueError, match="only 4 calibration normals: at least 5"):
        predict(tiny_run.system, tiny_run.workdir, source, tmp_path, few)
    assert not (tmp_path / "predictions.csv").exists()


def test_normals_that_were_trained_on_do_not_calibrate(tiny_run, folders, tmp_path):
    trained_on, source = folders
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "w")
    bind_training_data(tiny_run.dataset, workdir)
    with pytest.raises(ValueError, match=r"was trained on these normals: only 0 are new"):
        predict(tiny_run.system, workdir, source, tmp_path / "out", trained_on)
    normals = write(tiny_run.dataset.splits["calibration"], np.arange(6), tmp_path / "normals")
    expected = predict(tiny_run.system, workdir, source, tmp_path / "out", normals)
    shutil.copy(trained_on / "00.png", normals / "one more.png")
    scores = predict(tiny_run.system, workdir, source, tmp_path / "out", normals)
    np.testing.assert_array_equal(scores, expected)
    assert "6 calibration normals of normals." in (tmp_path / "out" / "report.html").read_text()


def test_images_that_were_trained_on_are_counted(tiny_run, folders, tmp_path, caplog):
    """By their pixels, in a prediction and in an evaluation on another folder; nothing is said of new ones."""
    trained_on, source = folders
    system, dataset, _ = tiny_run
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "w")
    bind_training_data(dataset, workdir)
    evaluate(system, dataset, workdir)
    predict(system, workdir, source, tmp_path / "new")
    assert "trained on: they look" not in caplog.text
    images = shutil.copytree(source, tmp_path / "images")
    for name in ("00.png", "11.png"):
        shutil.copy(trained_on / name, images / f"again_{name}")
    said = "2 of the 8 images scored were trained on: they look more normal"
    predict(system, workdir, images, tmp_path / "out")
    assert said in caplog.text
    assert said in (tmp_path / "out" / "report.html").read_text()
    caplog.clear()
    config = system.config.copy_and_resolve_references()
    config.data.update(kind="folder", name="other", root=str(tmp_path / "other"))
    shutil.copytree(images, tmp_path / "other" / "test" / "good")
    write(dataset.splits["test"], np.flatnonzero(dataset.splits["test"].labels), tmp_path / "other/test/Ungood")
    run.evaluate(config, workdir)
    assert "2 of the " in caplog.text
    assert "were trained on: they look more normal" in (workdir / "evaluate/other/report.html").read_text()


def test_predictions_stay_apart_and_say_what_they_are_of(tiny_run, folders, tmp_path, caplog):
    """Through the command: a damaged file left out, maps of the rest, and another folder of the same name refused."""
    normals, source = folders
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "w")
    images = shutil.copytree(source, tmp_path / "a" / "DICOM")
    (images / "zz.png").write_bytes(b"no picture")
    config = tiny_run.system.config.copy_and_resolve_references()
    config.data.skip_corrupt = True
    config.score.save_maps = True
    run.predict(config, workdir, str(images), "", str(normals))
    folder = workdir / "predict" / "DICOM_against_normals"
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [*(f"{i:02d}.png" for i in range(6)), "zz.png"]
    assert [row["error"] for row in rows[:-1]] == [""] * 6  # as many columns as the last one's
    assert "zz.png" in rows[-1]["error"]
    assert (rows[-1]["score"], rows[-1]["p_value"]) == ("", "")
    assert len(list((folder / "maps").glob("*.npy"))) == 6
    assert np.load(folder / "maps" / "05.png.npy").shape == (32, 32)
    facts = json.loads((folder / "report.json").read_text())["provenance"]
    assert facts["source"] == f"{images.resolve()} against {normals.resolve()}"
    assert facts["counts"] == {"images": 6, "skipped": 1, "calibration": 12}
    assert {"checkpoint_step", "git_revision", "devices", "versions", "seed"} <= set(facts)
    page = (folder / "report.html").read_text()
    assert str(images.resolve()) in page
    assert "training is unfinished: step 3 of 4" in page
    assert "newest checkpoint is of step 3 of 4" in caplog.text

    elsewhere = shutil.copytree(source, tmp_path / "b" / "DICOM")
    with pytest.raises(ValueError, match=r"holds the results of .*/a/DICOM against .*, not .*/b/DICOM.*--output"):
        run.predict(config, workdir, str(elsewhere), "", str(normals))
    (images / "05.png").unlink()
    run.predict(config, workdir, str(images), "", str(normals))  # again, and of its maps none is an image's of before
    assert sorted(path.name for path in (folder / "maps").glob("*.npy")) == [f"{i:02d}.png.npy" for i in range(5)]


def test_the_page_names_the_folder_that_it_was_started_in(tiny_run, folders, tmp_path, monkeypatch):
    normals, source = folders
    monkeypatch.chdir(source)
    predict(tiny_run.system, tiny_run.workdir, Path("."), tmp_path, normals)
    assert "6 images below new" in (tmp_path / "report.html").read_text()


def test_the_page_says_on_whose_normals_the_work_directory_was_calibrated(tiny_run, folders, tmp_path):
    _, source = folders
    system, dataset, _ = tiny_run
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "w")
    calibration = calibrate(system, Scorer(system, restore(system, workdir)), dataset.splits["calibration"])
    for origin, dtype, said in (("scans", "float32", "6 calibration normals of scans."), ("", "", "its last eval")):
        dataclasses.replace(calibration, source=origin, dtype=dtype).save(workdir / "calibration.npz", 3)
        predict(system, workdir, source, tmp_path / "out")
        assert said in (tmp_path / "out" / "report.html").read_text()
    dataclasses.replace(calibration, dtype="bfloat16").save(workdir / "calibration.npz", 3)
    with pytest.raises(ValueError, match=r"score.dtype='float32', but the calibration was made for 'bfloat16'"):
        predict(system, workdir, source, tmp_path / "out")


def test_what_is_in_the_way_of_the_output_is_kept(tiny_run, folders, tmp_path):
    """A folder "maps" of the user's own, beside results, is not one of ours."""
    normals, new = folders
    output = tmp_path / "out"
    (output / "maps").mkdir(parents=True)
    (output / "maps" / "mine.txt").write_text("mine")
    for _ in range(2):
        predict(tiny_run.system, tiny_run.workdir, new, output, normals)
    assert (output / "maps" / "mine.txt").read_text() == "mine"
    check_output(output, new, None)
    (output / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a work directory, whose results would be lost"):
        check_output(output, new, None)
    for folder in (new, new / "results"):
        with pytest.raises(ValueError, match="lies among the images of"):
            check_output(folder, normals, new)
    with pytest.raises(ValueError, match="lies among the images of"):
        check_output(tmp_path / "sets", tmp_path / "sets" / "maps" / "new", None)
