"""Groups, the calibration split and the manifest hash."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from trees import BRAIN, make_tree, picture, write

from input_pipeline.groups import check_groups, group_of
from input_pipeline.index import DataError, Example, calibration_rows, split_calibration
from input_pipeline.tree import read_tree


@pytest.mark.parametrize(
    ("stem", "group"),
    [
        ("00003_60", "00003"),
        ("n085_no0", "n085"),
        ("a012_y7", "a012"),
        ("IM-0115-0001", "IM-0115"),
        ("NORMAL2-IM-0451-0001", "NORMAL2-IM-0451"),
        ("NORMAL2-IM-0451-0001-0002", "NORMAL2-IM-0451"),
        ("person100_bacteria_475", "person100"),
        ("person1661_virus_2872", "person1661"),
        ("NORMAL-1001666-12", "NORMAL-1001666"),
        ("PAT0+ST0-SE0-IM0001_slice045", "PAT0"),
        ("sub-01+anat-sub-01_T1w_slice045", "sub-01"),
        ("1000", "1000"),
        ("IMG_0001", "IMG_0001"),
        ("scan_of_someone_3", "scan_of_someone_3"),
        ("0a1b2c3d-0001", "0a1b2c3d-0001"),
    ],
)
def test_group_of_hand_written_table(stem, group):
    assert group_of(stem) == group


def test_calibration_holds_out_whole_groups_of_about_the_fraction():
    rng = np.random.default_rng(0)
    groups = [f"p{g}" for g in rng.integers(0, 60, 400)]
    for seed in range(5):
        out = calibration_rows(groups, 0.1, seed)
        held = {g for g, o in zip(groups, out, strict=True) if o}
        assert not held & {g for g, o in zip(groups, out, strict=True) if not o}
        assert 33 <= out.sum() <= 40  # at most the target; short of it by less than the largest group (about 15)
        np.testing.assert_array_equal(out, calibration_rows(groups, 0.1, seed))
    assert any((calibration_rows(groups, 0.1, 0) != calibration_rows(groups, 0.1, s)).any() for s in (1, 2))


def test_more_held_out_than_asked_for_is_said(caplog):
    assert calibration_rows(["a"] * 40 + ["b"] * 60, 0.1, 0).sum() == 40
    assert "40 of 100 training normals are held out for calibration, not 10" in caplog.text
    caplog.clear()
    assert calibration_rows(["a"] * 15 + ["b"] * 85, 0.1, 0).sum() == 15
    assert not caplog.text


def test_calibration_of_few_images():
    assert calibration_rows(["a", "b"], 0.1, 0).sum() == 1
    assert calibration_rows(["a", "a", "a", "b", "b"], 0.1, 3).tolist() == [False, False, False, True, True]
    assert not calibration_rows(["a", "a"], 0.0, 0).any()
    with pytest.raises(ValueError, match=r"data\.seed: expected at least 0, found -1"):
        calibration_rows(["a", "b"], 0.1, -1)
    with pytest.raises(DataError, match="at least two patients"):
        calibration_rows(["a", "a"], 0.1, 0)
    with pytest.raises(ValueError, match="calibration_fraction"):
        calibration_rows(["a", "b"], 1.0, 0)


def test_split_calibration_keeps_every_example_once(tmp_path):
    examples = [Example(f"{g}_{i}.png", tmp_path, 0, None, g) for g in "abcdefgh" for i in range(3)]
    train, calibration = split_calibration(examples, 0.25, seed=1)
    assert len(calibration) == 6
    assert sorted(train + calibration, key=lambda e: e.name) == examples


def test_manifest_hash_follows_the_data_not_the_seed_or_the_place(tmp_path):
    root = make_tree(tmp_path / "a", BRAIN)
    reference = read_tree(root, seed=0).manifest_hash()
    assert reference == read_tree(root, seed=5).manifest_hash()
    moved = shutil.copytree(root, tmp_path / "b")
    assert reference == read_tree(moved).manifest_hash()
    (moved / "test/good/img/00000_96.png").rename(moved / "test/good/img/00001_96.png")
    assert reference != read_tree(moved).manifest_hash()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["cohort2"] * 4, r"found 4 images of one, 'cohort2' \(from the names of files .*--config\.data\.groups=image"),
        (["patient-0123456789ab"] * 4, r"one, 'patient-0123456789ab' \(from the DICOM headers: PatientID"),
        (["a"], "at least two training normals, found 1: add images$"),
    ],
)
def test_a_single_group_is_explained(groups, message):
    with pytest.raises(DataError, match=message) as error:
        calibration_rows(groups, 0.1, 0)
    assert "calibration_fraction" not in str(error.value)


def test_images_can_be_said_to_be_independent(tmp_path):
    root = make_tree(tmp_path, {".": [f"cohort2_{k:04d}.png" for k in range(10)]})
    with pytest.raises(DataError, match="of one, 'cohort2'"):
        read_tree(root)
    index = read_tree(root, groups="image")
    assert {split: len(found) for split, found in index.splits.items()} == {"train": 9, "calibration": 1}
    assert all(e.group == e.name for found in index.splits.values() for e in found)


def test_the_patient_may_be_said_by_a_regular_expression(tmp_path):
    names = [f"{patient}_{k:02d}.png" for patient in ("smith", "P-017", "a_b") for k in range(3)]
    root = make_tree(tmp_path, {"train/good": names, "test/good": ["smith_09.png"]})
    by_name = read_tree(root, groups="([^/]+)_[^/]*$", calibration_fraction=0.3)
    assert {e.group for found in by_name.splits.values() for e in found} == {"smith", "P-017", "a_b"}
    assert len(by_name.splits["calibration"]) == 3  # all of one patient
    if "smith" not in {e.group for e in by_name.splits["calibration"]}:
        assert by_name.crossing_groups() == {"smith": ["test", "train"]}
    with pytest.raises(DataError, match=r"finds no patient in 7 of 10 names, 'test/good/smith_09.png' the first"):
        read_tree(root, groups="(P-017|nobody)_")


@pytest.mark.parametrize("groups", ["patient", "(a)(b)", "(a"])
def test_groups_that_are_no_rule_are_refused(groups):
    with pytest.raises(ValueError, match=r"data\.groups: expected auto, image or a regular expression with one pair"):
        check_groups(groups)


def test_names_that_no_report_could_hold_are_refused_at_once(tmp_path):
    write(tmp_path / "a.png", picture(0))
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller.png"))
    write(tmp_path / "b.png", picture(1)).rename(odd)
    with pytest.raises(DataError, match=r"M\?ller\.png: the file's name is not UTF-8.*rename it"):
        read_tree(tmp_path)
    odd.rename(tmp_path / "M\u00fcller.png")
    assert len(read_tree(tmp_path, calibration_fraction=0).splits["train"]) == 2


def test_patients_on_both_sides_of_a_split(tmp_path):
    # by hand: train and calibration hold patients 00000 to 00004; valid 00025, 00124; test 00000, 00002, 00025, 00200
    index = read_tree(make_tree(tmp_path, BRAIN | {"test/good/img": ["00000_96.png", "00025_97.png"]}))
    assert index.crossing_groups() == {"00000": ["test", "train"], "00002": ["test", "train"]}
    assert read_tree(tmp_path, groups="image").crossing_groups() == {}
