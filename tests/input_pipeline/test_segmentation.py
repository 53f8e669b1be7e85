"""Class masks: formats, sizes, ignored pixels, binary masks, and wrong folders."""

import shutil

import numpy as np
import pytest
from labelled import SIZES, data, files
from PIL import Image
from trees import make_tree, picture, write

from input_pipeline.classification import load_labelled
from input_pipeline.index import DataError
from input_pipeline.segmentation import read_segmentation

IDS = np.random.default_rng(0).integers(0, 3, (8, 8)).astype(np.uint8)
IDS[0, 0] = 255


@pytest.fixture
def sea(tmp_path):
    """Three train images (grey png, RGB npy, float npy) and one test image, of 8x8 and 8x12 pixels."""
    make_tree(tmp_path, {"train/images": ["a.png"], "test/images": ["x.png"]})
    write(tmp_path / "train/images/a.png", picture(1, 8))
    np.save(tmp_path / "train/images/b.npy", np.stack([picture(2, 8)] * 3, -1))
    np.save(tmp_path / "train/images/c.npy", picture(3, 8) / 255)
    write(tmp_path / "test/images/x.png", np.hstack([picture(4, 8), picture(5, 8)[:, :4]]))
    palette = Image.fromarray(IDS)
    palette.putpalette([(3 * i) % 256 for i in range(768)])
    (tmp_path / "train/masks").mkdir()
    palette.save(tmp_path / "train/masks/a.png")
    np.save(tmp_path / "train/masks/b.npy", IDS[..., None].astype(np.int64))
    write(tmp_path / "train/masks/c.png", IDS)
    write(tmp_path / "test/masks/x.png", np.hstack([IDS, IDS[:, :4]]))
    return tmp_path


def test_masks_and_images(sea):
    sets = read_segmentation(str(sea), "", SIZES)
    train, test = sets["train"], sets["test"]
    assert train.classes == ("0", "1", "2")
    assert train.has_masks
    assert train.labels.tolist() == [-1] * 3
    np.testing.assert_array_equal(train.masks([0, 1, 2]), [IDS] * 3)
    assert train.masks([0]).dtype == np.uint8
    expected = [np.repeat(picture(seed, 8)[..., None], 3, -1) for seed in (1, 2, 3)]
    np.testing.assert_array_equal(train.images([0, 1, 2]), expected)
    # 8x12 to 8x8: the middle, from column 2 on, of mask and image alike.
    np.testing.assert_array_equal(test.masks([0])[0], np.hstack([IDS, IDS[:, :4]])[:, 2:10])
    np.testing.assert_array_equal(test.images([0])[0, ..., 0], np.hstack([picture(4, 8), picture(5, 8)])[:, 2:10])
    np.testing.assert_array_equal(train.take([2, 1]).take([1]).masks([0])[0], IDS)


def test_splits_batches_and_names(sea):
    (sea / "classes.txt").write_text("sea\nland\ncloud\n\n")
    found = [load_labelled(data("segmentation", sea, valid_fraction=0.4), s, 4) for s in ("train", "valid", "test")]
    assert [len(x) for x in found] == [2, 1, 1]
    assert found[0].classes == ("sea", "land", "cloud")
    ((images, masks),) = found[0].pixels.batches(lambda: [[0, 1]], True)
    assert images.shape == (2, 4, 4, 3)
    assert masks.shape == (2, 4, 4, 1)
    (sea / "classes.txt").write_text("sea\nland\n")
    with pytest.raises(DataError, match=r"classes\.txt: 2 names, but masks hold the id 2"):
        read_segmentation(str(sea), "", SIZES)


def test_train_alone_gives_its_test_split_too(sea, monkeypatch):
    shutil.rmtree(sea / "test")
    config = data("segmentation", sea, valid_fraction=0.4, test_fraction=0.4)
    found = {split: load_labelled(config, split, 8) for split in ("train", "valid", "test")}
    assert {split: len(one) for split, one in found.items()} == dict(train=1, valid=1, test=1)
    monkeypatch.setattr("input_pipeline.segmentation.read_class_mask", lambda path: pytest.fail("decoded again"))
    assert load_labelled(config, "test", 8).names == found["test"].names
    config.test_fraction = 0.0
    with pytest.raises(DataError, match=r"no test split .*data\.test_fraction above 0.*needs labels or masks"):
        load_labelled(config, "test", 8)


def test_slices_of_a_patient_stay_in_one_split(tmp_path):
    slices = [f"{patient}_{k}.png" for patient in ("smith", "jones", "brown", "green", "black") for k in range(4)]
    make_tree(tmp_path, {"train/images": slices, "train/masks": slices})
    config = data("segmentation", tmp_path, groups="([^/]+)_[^/]*$")
    train, valid, test = (set(load_labelled(config, split, 8).groups) for split in ("train", "valid", "test"))
    assert train | valid | test == {"smith", "jones", "brown", "green", "black"}
    assert not train & valid | train & test | valid & test
    config.groups = "(nobody)"
    with pytest.raises(DataError, match=r"data\.groups: '\(nobody\)' finds no patient in 20 of 20 names"):
        load_labelled(config, "train", 8)


@pytest.mark.parametrize(("name", "patient"), [("{}", "{}"), ("sub-{}_ses-2_T1w", "sub-{}"), ("{}+ST0-IM0001", "{}")])
def test_slices_that_were_cut_from_volumes_stay_with_their_patient(tmp_path, name, patient):
    people = ("smith", "jones", "brown", "green", "black")
    slices = [f"{name.format(person)}_slice{k:03d}.png" for person in people for k in range(4)]
    make_tree(tmp_path, {"train/images": slices, "train/masks": slices})
    config = data("segmentation", tmp_path)
    train, valid, test = (set(load_labelled(config, split, 8).groups) for split in ("train", "valid", "test"))
    assert train | valid | test == {patient.format(person) for person in people}
    assert not train & valid | train & test | valid & test


def test_masks_of_0_and_255_are_binary(tmp_path):
    make_tree(tmp_path, {"train/images": files(2), "train/masks": files(2)})
    train = read_segmentation(str(tmp_path), "", SIZES)["train"]
    assert train.classes == ("0", "1")
    assert set(np.unique(train.masks([0, 1]))) == {0, 1}


def test_masks_whose_values_compression_changes_are_refused(sea):
    (sea / "train/masks/a.png").unlink()
    write(sea / "train/masks/a.jpg", IDS)
    with pytest.raises(DataError, match=r"a\.jpg: class ids stored as JPEG, .* export the masks again"):
        read_segmentation(str(sea), "", SIZES)


def test_named_classes_need_not_all_occur(sea):
    write(sea / "train/masks/a.png", np.where(IDS == 2, 7, IDS))
    (sea / "classes.txt").write_text("\n".join("abcdefgh"))
    assert read_segmentation(str(sea), "", SIZES)["train"].classes == tuple("abcdefgh")


def test_corrupt_images_are_skipped(sea):
    (sea / "train/images/b.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"b\.npy: cannot be read"):
        read_segmentation(str(sea), "", SIZES)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train/masks/d.png", IDS, r"without partner \['d'\]"),
        ("train/masks/a.png", IDS[:4], r"masks/a\.png: mask of 4x8 pixels, its image .*a\.png has 8x8"),
        ("train/masks/a.png", np.dstack([IDS] * 3), r"a\.png: uint8 \(8, 8, 3\); expected class ids"),
        ("train/masks/a.png", np.where(IDS == 2, 7, IDS), r"masks/a\.png: value 7, but the masks hold 4 values in all"),
        ("train/masks/b.npy", np.arange(64).reshape(8, 8) + 1, r"masks/b\.npy: value 64, .* at most 64 of them"),
        ("train/masks/b.npy", IDS.astype(np.int64) + 300, r"b\.npy: int64 \(8, 8\); expected class ids"),
        ("train/images/b.npy", np.zeros((8, 8, 120), np.uint8), r"b\.npy: uint8 \(8, 8, 120\).*three bands"),
        ("train/images/b.npy", np.full((8, 8), 2.0), r"b\.npy: float64 \(8, 8\).*scale it"),
    ],
)
def test_wrong_files(sea, file, content, message):
    if file.endswith(".npy"):
        np.save(sea / file, content)
    else:
        write(sea / file, content)
    with pytest.raises(DataError, match=message):
        read_segmentation(str(sea), "", SIZES)


def test_wrong_folders(tmp_path):
    make_tree(tmp_path, {"test/images": files(1)})
    with pytest.raises(DataError, match="no train/"):
        read_segmentation(str(tmp_path), "", SIZES)
    make_tree(tmp_path, {"train/images": files(1)})
    with pytest.raises(DataError, match="no masks/"):
        read_segmentation(str(tmp_path), "", SIZES)
