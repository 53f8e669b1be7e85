"""Groups, the calibration split and the manifest hash."""

import shutil

import numpy as np
import pytest
from trees import BRAIN, make_tree

from input_pipeline.folder import index_folder
from input_pipeline.index import DataError, Example, calibration_rows, group_of, split_calibration


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


def test_calibration_of_few_images():
    assert calibration_rows(["a", "b"], 0.1, 0).sum() == 1
    assert calibration_rows(["a", "a", "a", "b", "b"], 0.1, 3).tolist() == [False, False, False, True, True]
    assert not calibration_rows(["a", "a"], 0.0, 0).any()
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
    reference = index_folder(root, seed=0).manifest_hash()
    assert reference == index_folder(root, seed=5).manifest_hash()
    moved = shutil.copytree(root, tmp_path / "b")
    assert reference == index_folder(moved).manifest_hash()
    (moved / "test/good/img/00000_96.png").rename(moved / "test/good/img/00001_96.png")
    assert reference != index_folder(moved).manifest_hash()
