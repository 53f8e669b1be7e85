"""Splits that a source has or that are carved, decoding, corrupt files."""

import numpy as np
import pytest
from labelled import data, files
from PIL import Image
from trees import make_tree, picture, write

from input_pipeline.classification import carve, load_labelled
from input_pipeline.decode import Resize
from input_pipeline.index import DataError
from input_pipeline.sources import ArraySource, LabelledSet, SelectedPixels, Sizes


@pytest.fixture
def splits(tmp_path):
    return make_tree(tmp_path, {f"{s}/{c}": files(n) for s, n in (("train", 10), ("test", 4)) for c in ("b", "a")})


def test_class_folders(splits):
    train, valid, test = (load_labelled(data("folder", splits), s, 8) for s in ("train", "valid", "test"))
    assert [len(found) for found in (train, valid, test)] == [16, 4, 8]
    assert train.classes == valid.classes == test.classes == ("a", "b")
    assert np.bincount(train.labels).tolist() == [8, 8]
    assert np.bincount(valid.labels).tolist() == [2, 2]
    assert list(train.names) == sorted(train.names)
    assert not set(train.names) & set(valid.names)
    assert all(
        name.split("/")[1] == train.classes[label] for name, label in zip(train.names, train.labels, strict=True)
    )
    assert train.labelled
    assert not train.multi_label
    images = train.images(np.array([3, 0, 3]))
    assert images.shape == (3, 8, 8, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images[0], images[2])
    expected = Image.open(splits / train.names[3]).resize((8, 8), Image.Resampling.BICUBIC).convert("RGB")
    np.testing.assert_array_equal(images[0], expected)


def test_luminance(splits):
    grey, colour = (load_labelled(data("folder", splits, channels=c), "test", 8).images([1]) for c in (1, 3))
    assert grey.shape == (1, 8, 8, 1)
    np.testing.assert_array_equal(np.repeat(grey, 3, -1), colour)
    digits = [load_labelled(data("digits", channels=c), "test", 8).images([1]) for c in (1, 3)]
    np.testing.assert_array_equal(np.repeat(digits[0], 3, -1), digits[1])


def test_validation_serves_as_test_where_there_is_none(tmp_path):
    make_tree(tmp_path, {"train/a": files(10), "train/b": files(10), "val/a": files(3), "val/b": files(3)})
    assert load_labelled(data("folder", tmp_path), "test", 8).names[0] == "val/a/000.png"
    assert load_labelled(data("folder", tmp_path), "valid", 8).names[0].startswith("train/")


def test_one_folder_of_classes_gives_three_disjoint_splits(tmp_path):
    make_tree(tmp_path, {"a": files(20), "b": files(20)})
    found = {s: load_labelled(data("folder", tmp_path), s, 8) for s in ("train", "valid", "test")}
    assert {s: np.bincount(x.labels).tolist() for s, x in found.items()} == {
        "train": [12, 12],
        "valid": [3, 3],
        "test": [5, 5],
    }
    assert len({name for x in found.values() for name in x.names}) == 40
    other = load_labelled(data("folder", tmp_path, seed=1), "test", 8)
    assert other.names != found["test"].names


def test_flat_folder_without_labels(tmp_path):
    make_tree(tmp_path, {".": files(10)})
    config = data("folder", tmp_path, valid_fraction=0.0)
    train = load_labelled(config, "train", 8)
    assert len(train) == 10
    assert (train.labels == -1).all()
    assert not train.labelled
    assert len(load_labelled(data("folder", tmp_path), "valid", 8)) == 2
    for split in ("valid", "test"):
        with pytest.raises(DataError, match=f"no {split} split"):
            load_labelled(config, split, 8)


def test_short_side_is_resized_and_the_middle_cut_out(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (20, 31), dtype=np.uint8)
    write(tmp_path / "x.png", grey)
    found = load_labelled(data("folder", tmp_path, valid_fraction=0.0), "train", 10, "bilinear").images([0])[0]
    whole = np.asarray(Image.fromarray(grey).resize((15, 10), Image.Resampling.BILINEAR))  # 31 * 10 / 20 = 15.5
    np.testing.assert_array_equal(found, np.repeat(whole[:, 2:12, None], 3, -1))  # (15 - 10) / 2 = 2.5, to even


# Worked out by hand for a side of 12: long side int(12 * long / short), offset round((long - 12) / 2), halves to even.
@pytest.mark.parametrize(
    ("shape", "resized", "corner"),
    [
        ((20, 31), (12, 18), (0, 3)),
        ((33, 17), (23, 12), (6, 0)),
        ((50, 49), (12, 12), (0, 0)),
        ((8, 9), (12, 13), (0, 0)),
    ],
)
@pytest.mark.parametrize("how", ["bicubic", "bilinear", "nearest"])
def test_squares(shape, resized, corner, how):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8))
    whole = np.asarray(image.resize(resized[::-1], Image.Resampling[how.upper()]))
    expected = whole[corner[0] : corner[0] + 12, corner[1] : corner[1] + 12]
    np.testing.assert_array_equal(Resize(True, how).square(image, 12), expected)


def test_images_are_decoded_once_below_the_memory_limit(splits):
    few, none = (load_labelled(data("folder", splits, memory_limit_gb=x), "test", 8) for x in (1.0, 0.0))
    before = few.images(np.arange(8))
    np.testing.assert_array_equal(before, none.images(np.arange(8)))
    Image.fromarray(255 - picture(99)).save(splits / few.names[0])
    np.testing.assert_array_equal(few.images([0]), before[:1])
    assert (none.images([0]) != before[:1]).any()
    for (image, mask), rows in zip(none.pixels.batches(lambda: [[5, 2], [7]], False), ([5, 2], [7]), strict=True):
        np.testing.assert_array_equal(image, before[rows])
        assert mask is None
    ((image, _),) = few.pixels.batches(lambda: [[5, 2]], False)
    np.testing.assert_array_equal(image, before[[5, 2]])
    taken = few.take([5, 2])
    np.testing.assert_array_equal(taken.images([0, 1]), before[[5, 2]])
    np.testing.assert_array_equal(taken.take([1]).images([0]), before[[2]])
    assert taken.names == (few.names[5], few.names[2])
    assert taken.manifest_hash() != few.manifest_hash()


def test_corrupt_files(splits):
    bad = splits / "test/a/001.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(DataError, match=r"test/a/001\.png: cannot be decoded"):
        load_labelled(data("folder", splits), "test", 8).images(np.arange(8))
    found = load_labelled(data("folder", splits, skip_corrupt=True), "test", 8)
    assert len(found) == 7
    assert "test/a/001.png" not in found.names
    for path in (splits / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of its 8 images"):
        load_labelled(data("folder", splits, skip_corrupt=True), "test", 8)


def grouped(groups: list[str], labels: list[int]) -> LabelledSet:
    names = tuple(f"{row:03d}" for row in range(len(groups)))
    sizes = Sizes(2, 2, 3, Resize())
    pixels = SelectedPixels(
        ArraySource(np.zeros((len(groups), 2, 2, 3), np.uint8), sizes), np.arange(len(groups)), sizes
    )
    return LabelledSet("s", "", ("a", "b"), names, tuple(groups), np.asarray(labels, np.int32), pixels)


def test_groups_are_never_cut():
    groups = [f"{row // 3}" for row in range(60)]
    labels = [0] * 30 + [1] * 30
    rows = carve(grouped(groups, labels), 0.2, 0)
    assert np.bincount(np.asarray(labels)[rows]).tolist() == [6, 6]
    assert not {groups[r] for r in np.flatnonzero(rows)} & {groups[r] for r in np.flatnonzero(~rows)}


@pytest.mark.parametrize("seed", range(8))
def test_a_patient_of_most_images_is_not_set_apart(seed: int, caplog):
    counts = dict(zip("abcdefgh", (400, 30, 20, 60, 15, 25, 10, 40), strict=True))
    groups = [patient for patient, count in counts.items() for _ in range(count)]
    rows = carve(grouped(groups, [0] * 600), 0.1, seed)
    assert 30 < rows.sum() <= 60
    assert not caplog.messages


def test_a_smallest_patient_that_is_too_large_is_said(caplog):
    rows = carve(grouped(["a"] * 50 + ["b"] * 30 + ["c"] * 40, [0] * 120), 0.1, 0)
    assert np.flatnonzero(rows).tolist() == list(range(50, 80))
    assert "30 of 120 images are set apart, not 12: the smallest of 3 patients" in caplog.text


def test_two_folders_of_one_split_are_refused(tmp_path):
    make_tree(tmp_path, {"train/a": ["1.png"], "training/a": ["2.png"]})
    with pytest.raises(DataError, match=r"train/ and training/ both name the train split"):
        load_labelled(data("folder", tmp_path), "train", 8)


def test_what_is_set_apart_is_said(tmp_path):
    make_tree(tmp_path, {name: [f"{i}.png" for i in range(20)] for name in ("a", "b")})
    found = load_labelled(data("folder", tmp_path, test_fraction=0.2, valid_fraction=0.125), "train", 8)
    assert ", of these 8 for test and 4 for valid set apart (data.test_fraction, " in found.layout
    assert len(found) == 28
    kept = load_labelled(data("folder", tmp_path, test_fraction=0.0, valid_fraction=0.0), "train", 8)
    assert (len(kept), "set apart" in kept.layout) == (40, False)
    own = {f"{split}/a": [f"{split}{i}.png" for i in range(10)] for split in ("train", "valid")}  # valid becomes test
    found = load_labelled(data("folder", make_tree(tmp_path / "own", own), valid_fraction=0.2), "train", 8)
    assert ", of these 2 for valid set apart" in found.layout


def test_slices_in_class_folders_stay_with_their_patient_unless_they_are_all_of_a_class(tmp_path):
    slices = {name: [f"{name}_slice{k:03d}.png" for k in range(4)] for name in ("smith", "jones", "bread")}
    folders = {"good": [*slices["smith"][:2], *slices["jones"]], "ill": slices["smith"][2:], "bread": slices["bread"]}
    make_tree(tmp_path, folders)
    found = load_labelled(data("folder", tmp_path, valid_fraction=0.0, test_fraction=0.0), "train", 8)
    assert found.groups == tuple([f"bread/{file}" for file in slices["bread"]] + ["jones"] * 4 + ["smith"] * 4)


def test_patients_on_both_sides_of_one_s_own_splits_are_said(tmp_path, caplog):
    images = {"train/a": ["p1_0.png", "p2_0.png"], "valid/a": ["p3_0.png"], "test/a": ["p1_1.png", "p2_1.png"]}
    make_tree(tmp_path, images)
    config = data("folder", tmp_path, groups="([^/]+)_[^/]*$")
    for split in ("train", "valid"):
        load_labelled(config, split, 8)
    assert "stand in train" not in caplog.text
    load_labelled(config, "test", 8)
    assert "2 patients or groups stand in train and in valid or test (p1, p2)" in caplog.text
    caplog.clear()
    load_labelled(data("folder", tmp_path), "test", 8)
    assert "stand in train" not in caplog.text


@pytest.mark.parametrize("kind", ["digits", "npz", "tfds"])
def test_no_expression_finds_patients_among_numbers(kind):
    with pytest.raises(ValueError, match=rf"data\.groups: expected auto or image for data\.kind '{kind}'"):
        load_labelled(data(kind, groups=r"(\d+)$"), "train", 8)


def test_a_class_of_one_group_stays_in_train():
    rows = carve(grouped(["x"] * 4 + ["y", "z"], [0] * 4 + [1, 1]), 0.5, 0)
    assert rows[:4].sum() == 0
    assert rows[4:].sum() == 1
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        carve(grouped(["x"], [0]), 1.0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("photos", "train", 8), "unknown data.kind 'photos': expected one of .*digits"),
        (("digits", "dev", 8), "train, valid or test, found 'dev'"),
        (("digits", "train", 0), "image_size"),
        (("digits", "train", 8, "lanczos"), "bicubic.*lanczos"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_labelled(data(arguments[0]), *arguments[1:])
