"""Volumes become slices: the right way up, on one grey scale a volume, in the folders that the reader knows."""

import gzip
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from trees import data_config

from input_pipeline.dataset import load_dataset
from input_pipeline.groups import group_of
from input_pipeline.index import DataError
from input_pipeline.nifti import AXES, display, write_slices

SHAPE = (10, 12, 14)  # X Y Z


def body(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A volume with a body of 100 to 200 in its middle, fullest in the middle slice of every axis, and air of 0."""
    places = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    inside = np.square(places).sum(0) < 0.9
    return np.where(inside, np.random.default_rng(seed).uniform(100, 200, shape), 0).astype(np.float32)


def save(path: Path, volume: np.ndarray, axes: str = "RAS") -> Path:
    """Writes a volume given as [right, front, head], stored in another order and direction of its axes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(volume, np.eye(4))
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    nibabel.save(image.as_reoriented(turn), path)
    return path


def cut(root: Path, output: Path, axis: str = "axial", every: int = 1, min_body: float = 0.0, window=()) -> dict:
    return dict(write_slices(str(root), output, axis, every, min_body, window))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SRA"])
@pytest.mark.parametrize("axis", AXES)
def test_slices_are_the_right_way_up_whatever_the_files_order(tmp_path, axes: str, axis: str):
    volume = np.full(SHAPE, 50, np.float32)
    volume[8:, 9:, 10:] = 200  # right, front, head
    volume[0, 0, 0] = 0
    save(tmp_path / "in" / "v.nii.gz", volume, axes)
    save(tmp_path / "in" / "w.nii.gz", volume, axes)
    cut(tmp_path / "in", tmp_path / "out", axis)
    position = {"axial": 12, "coronal": 10, "sagittal": 9}[axis]
    bright = np.asarray(Image.open(tmp_path / "out" / "train" / "good" / f"v_slice{position:03d}.png")) == 255
    height, width = bright.shape
    rows, columns = {
        "axial": (slice(0, 3), slice(0, 2)),  # front is up, the patient's right is on the left
        "coronal": (slice(0, 4), slice(0, 2)),  # head is up
        "sagittal": (slice(0, 4), slice(0, 3)),  # head is up, front is on the left
    }[axis]
    expected = np.zeros((height, width), bool)
    expected[rows, columns] = True
    np.testing.assert_array_equal(bright, expected)
    assert (height, width) == {"axial": (12, 10), "coronal": (14, 10), "sagittal": (14, 12)}[axis]


def test_one_grey_scale_a_volume(tmp_path):
    volume = body(0)
    volume[:, :, 7] *= 0.5
    save(tmp_path / "in" / "v.nii", volume)
    save(tmp_path / "in" / "w.nii", body(1))
    cut(tmp_path / "in", tmp_path / "out")
    white = np.percentile(volume[volume > 0], 99.5)
    for k in range(2, 12):
        found = np.asarray(Image.open(tmp_path / "out" / "train" / "good" / f"v_slice{k:03d}.png"))
        np.testing.assert_array_equal(found, np.rint(255 * np.clip(display(volume, 2, k) / white, 0, 1)))


def test_a_tree_with_masks_is_read_as_any_other(tmp_path):
    for k in range(4):
        save(tmp_path / "in" / "train" / "good" / f"case-{k}.nii.gz", body(k))
    save(tmp_path / "in" / "test" / "good" / "case-7.nii.gz", body(7))
    save(tmp_path / "in" / "test" / "Ungood" / "img" / "case-8.nii.gz", body(8))
    lesion = np.zeros(SHAPE, np.uint8)
    lesion[3:6, 4:8, 6:8] = 1
    mask = tmp_path / "in" / "test" / "Ungood" / "label" / "case-8.nii.gz"
    save(mask, lesion)
    for shape, shift in ((SHAPE, 2.0), ((10, 12, 13), 0.0)):
        affine = np.eye(4)
        affine[0, 3] = shift
        nibabel.save(nibabel.Nifti1Image(lesion[:, :, : shape[2]], affine), mask)
        with pytest.raises(DataError, match=r"case-8\.nii\.gz: mask of shape .*expected the same grid"):
            cut(tmp_path / "in", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    save(mask, lesion, "LPS")  # the same grid in another order
    counts = cut(tmp_path / "in", tmp_path / "out", min_body=0.5)
    kept = counts["train/good"] // 4
    assert 0 < kept < SHAPE[2]
    assert counts == {
        "train/good": 4 * kept,
        "test/good": kept + kept - 2,  # slices of case-8 without a lesion
        "test/Ungood/img": 2,
        "test/Ungood/anomaly_mask": 2,
        "left out": 6 * (SHAPE[2] - kept),
    }
    dataset = load_dataset(data_config(tmp_path / "out", image_size=12, mask_size=12, calibration_fraction=0.3))
    assert set(dataset.splits["train"].groups) | set(dataset.splits["calibration"].groups) == {
        f"case-{k}" for k in range(4)
    }
    assert not set(dataset.splits["train"].groups) & set(dataset.splits["calibration"].groups)
    test = dataset.splits["test"]
    assert test.labels.sum() == 2
    assert test.has_masks
    rows = np.flatnonzero(test.labels)
    assert [test.names[row] for row in rows] == [f"test/Ungood/img/case-8_slice{k:03d}.png" for k in (6, 7)]
    marked = np.asarray(Image.open(tmp_path / "out" / "test" / "Ungood" / "anomaly_mask" / "case-8_slice006.png"))
    np.testing.assert_array_equal(marked, display(lesion, 2, 6) * 255)


def test_volumes_called_alike_in_patients_folders_do_not_collide(tmp_path, caplog):
    for number, folder in enumerate(("PAT0/ST0/SE0", "PAT0/ST0/SE1", "PAT1/ST0/SE0")):
        save(tmp_path / "in" / folder / "IM0001.nii", body(number))
    save(tmp_path / "in" / "site" / "sub-01" / "sub-01_T1w.nii.gz", body(3))
    kept = cut(tmp_path / "in", tmp_path / "out", every=7)["train/good"] // 4
    assert "all 4 images are taken as normal training images" in caplog.text
    names = [path.name for path in sorted((tmp_path / "out" / "train" / "good").iterdir())]
    stems = ["PAT0+ST0-SE0-IM0001", "PAT0+ST0-SE1-IM0001", "PAT1+ST0-SE0-IM0001", "sub-01+site-sub-01-sub-01_T1w"]
    assert names == [f"{stem}_slice{7 * k:03d}.png" for stem in stems for k in range(kept)]
    splits = load_dataset(data_config(tmp_path / "out", calibration_fraction=0.4)).splits
    assert set(splits["train"].groups) | set(splits["calibration"].groups) == {"PAT0", "PAT1", "sub-01"}


def test_volumes_of_one_name_in_a_split_are_refused_whatever_their_label(tmp_path):
    save(tmp_path / "in" / "good" / "case-1.nii", body(0))
    save(tmp_path / "in" / "Ungood" / "case-1.nii", body(1))
    (tmp_path / "in").rename(tmp_path / "test")
    (tmp_path / "in").mkdir()
    (tmp_path / "test").rename(tmp_path / "in" / "test")
    with pytest.raises(DataError, match=r"good/case-1\.nii and .*case-1\.nii: two volumes of one name in test"):
        cut(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "test" / "good" / "case-1.nii").rename(tmp_path / "in" / "test" / "good" / "case-2.nii")
    assert set(cut(tmp_path / "in", tmp_path / "out")) == {"test/good", "test/Ungood/img", "left out"}  # without train


def test_abnormal_volumes_that_count_as_normal_are_said(tmp_path, caplog):
    save(tmp_path / "in" / "test" / "good" / "a.nii", body(0))
    lesion = np.zeros(SHAPE, np.uint8)
    lesion[4, 5, 7] = 1
    for name in "bc":
        save(tmp_path / "in" / "test" / "Ungood" / "img" / f"{name}.nii", body(1))
        save(tmp_path / "in" / "test" / "Ungood" / "label" / f"{name}.nii", np.roll(lesion, "bc".index(name), 2))
    counts = cut(tmp_path / "in", tmp_path / "out", every=2)  # slices 0, 2, ..., of lesions in 7 and 8
    assert counts["test/Ungood/img"] == 1
    assert "1 abnormal volumes have no marked slice among those that were cut, test/Ungood/img/b.nii" in caplog.text


def test_a_plus_in_a_name_says_no_patient(tmp_path):
    for k in range(2):
        save(tmp_path / "in" / f"T1+C_{k}.nii", body(k))
        save(tmp_path / "tree" / f"A+B{k}" / "T1+C.nii", body(k))
    for root, groups in (("in", {"T1-C_0", "T1-C_1"}), ("tree", {"A-B0", "A-B1"})):
        cut(tmp_path / root, tmp_path / f"{root}_out")
        splits = load_dataset(data_config(tmp_path / f"{root}_out", calibration_fraction=0.5)).splits
        assert set(splits["train"].groups) | set(splits["calibration"].groups) == groups


def test_ct_needs_a_window(tmp_path):
    volume = np.linspace(-1000, 1000, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    for name in ("v", "w"):
        save(tmp_path / "in" / f"{name}.nii", volume)
    with pytest.raises(DataError, match=r"values down to -1000, as in CT; .*--config\.data\.window="):
        cut(tmp_path / "in", tmp_path / "out")
    cut(tmp_path / "in", tmp_path / "out", window=(40.0, 400.0))
    found = np.asarray(Image.open(tmp_path / "out" / "train" / "good" / "v_slice005.png"))
    expected = np.rint(255 * np.clip((display(volume, 2, 5) + 160) / 400, 0, 1))
    np.testing.assert_allclose(found, expected, atol=1)  # float32 halves


def test_every_and_body(tmp_path):
    for name in ("v", "w"):
        save(tmp_path / "in" / f"{name}.nii", body(0))
    counts = cut(tmp_path / "in", tmp_path / "out", every=3)
    assert counts["train/good"] == 2 * 5
    assert counts["left out"] == 0
    assert cut(tmp_path / "in", tmp_path / "full", min_body=1.0)["train/good"] < 2 * SHAPE[2] // 2


def test_bad_volumes_are_named_and_nothing_is_left(tmp_path):
    good = save(tmp_path / "in" / "a.nii.gz", body(0))
    (tmp_path / "in" / "b.nii.gz").write_bytes(good.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"b\.nii\.gz: cannot be read as NIfTI"):
        cut(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "b.nii.gz").write_bytes(gzip.compress(b"no volume" * 100))
    with pytest.raises(DataError, match=r"b\.nii\.gz: cannot be read as NIfTI"):
        cut(tmp_path / "in", tmp_path / "out")
    nibabel.save(nibabel.Nifti1Image(np.zeros((*SHAPE, 2), np.float32), np.eye(4)), tmp_path / "in" / "b.nii.gz")
    with pytest.raises(DataError, match="expected one volume of three axes"):
        cut(tmp_path / "in", tmp_path / "out")
    turned, flat = np.diag([-1.0, -1, 1, 1]), np.diag([1.0, 1, 0, 1])
    colours = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    for voxels, affine, message in (
        (np.zeros(SHAPE[:2], np.float32), turned, r"shape \(10, 12\); expected one volume of three axes"),
        (colours, turned, "expected one grey value each"),
        (np.zeros(SHAPE, np.float32), flat, "its affine does not say how the axes lie"),
    ):
        image = nibabel.Nifti1Image(voxels, turned)
        image.header["srow_z"] = affine[2]
        nibabel.save(nibabel.Nifti1Image(voxels, None, image.header), tmp_path / "in" / "b.nii.gz")
        with pytest.raises(DataError, match=message):
            cut(tmp_path / "in", tmp_path / "out")
    save(tmp_path / "in" / "b.nii.gz", np.zeros(SHAPE, np.float32))
    with pytest.raises(DataError, match="nothing but the value 0"):
        cut(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"no image \(\.nii, \.nii\.gz\) in it"):
        cut(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="exists: expected a new folder"):
        cut(tmp_path / "in", tmp_path / "none")
    for changes in ({"axis": "z"}, {"every": 0}, {"min_body": 2.0}):
        with pytest.raises(ValueError, match="expected axis among sagittal, coronal, axial"):
            cut(tmp_path / "in", tmp_path / "out", **changes)


def test_without_nibabel_the_way_out_is_said(tmp_path, monkeypatch):
    save(tmp_path / "in" / "a.nii", body(0))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(DataError, match=r"pip install -e '\.\[medical\]'"):
        cut(tmp_path / "in", tmp_path / "out")


def test_slices_of_a_patient_are_one_group():
    assert group_of("BraTS-GLI-00005-000_slice045") == "BraTS-GLI-00005-000"
    assert group_of("sub-01_ses-2_T1w_slice045") == group_of("sub-01_ses-1_T1w_slice001") == "sub-01"
