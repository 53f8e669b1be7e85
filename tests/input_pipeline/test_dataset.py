"""Loading into memory and from disk, batches, sharding, resuming, skipping corrupt files."""

import dataclasses
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import BRAIN, data_config, equal_batches, make_tree, picture, write

from input_pipeline import reader
from input_pipeline.batches import eval_batches, train_batches
from input_pipeline.cache import save_npz
from input_pipeline.dataset import INDEX_FNS, build_index, load_dataset, load_images
from input_pipeline.decode import read_image, read_mask
from input_pipeline.index import DataError
from input_pipeline.split import ArrayPixels, Split


def array_split(n, num_abnormal=0, size=4):
    rng = np.random.default_rng(n)
    image = rng.integers(0, 256, (n, size, size, 1), dtype=np.uint8)
    label = (np.arange(n) >= n - num_abnormal).astype(np.int32)
    mask = (rng.random((n, size, size, 1)) > 0.5).astype(np.uint8) * label[:, None, None, None].astype(np.uint8)
    names = [f"{i:03d}" for i in range(n)]
    pixels = ArrayPixels(image, mask if num_abnormal else None, size)
    return Split(names, names, label, bool(num_abnormal), pixels)


@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_splits_hold_what_the_files_hold(tmp_path, limit):
    make_tree(tmp_path, BRAIN)
    dataset = load_dataset(data_config(tmp_path, memory_limit_gb=limit, mask_size=6))
    assert {key: len(split) for key, split in dataset.splits.items()} == {
        "train": 8,
        "calibration": 2,
        "valid": 2,
        "test": 4,
    }
    assert {key: split.has_masks for key, split in dataset.splits.items()} == {
        "train": False,
        "calibration": False,
        "valid": True,
        "test": True,
    }
    for split in dataset.splits.values():
        assert split.in_memory == bool(limit)
        rows = np.arange(len(split))
        images = np.stack([read_image(tmp_path / name, 8, 1) for name in split.names])
        np.testing.assert_array_equal(split.images(rows), images)
        np.testing.assert_array_equal(split.images(rows[::-1]), images[::-1])
        masks = np.stack(
            [
                read_mask(tmp_path / name.replace("/img/", "/anomaly_mask/"), 6) if label else np.zeros((6, 6, 1))
                for name, label in zip(split.names, split.labels, strict=True)
            ]
        )
        np.testing.assert_array_equal(split.masks(rows), masks)
        assert split.masks(rows).any() == bool(split.labels.any())
    assert dataset.splits["test"].labels.tolist() == [1, 1, 0, 0]
    assert dataset.splits["test"].groups == ["00002", "00200", "00000", "00100"]


def test_memory_and_files_give_the_same_batches(tmp_path):
    make_tree(tmp_path, BRAIN)
    memory = load_dataset(data_config(tmp_path)).splits
    files = load_dataset(data_config(tmp_path, memory_limit_gb=0.0)).splits
    args = {"batch_size": 6, "seed": 3, "start_step": 2, "num_steps": 9}
    equal_batches(train_batches(memory["train"], **args), train_batches(files["train"], **args))
    equal_batches(eval_batches(memory["test"], 3), eval_batches(files["test"], 3))
    assert files["test"].images([]).shape == memory["test"].images([]).shape == (0, 8, 8, 1)


def test_what_fills_up_a_batch_and_what_is_not_asked_for_is_not_decoded(tmp_path, monkeypatch):
    make_tree(tmp_path, BRAIN)
    split = load_dataset(data_config(tmp_path, memory_limit_gb=0.0)).splits["test"]
    expected, read = split.masks([0, 2]), []

    def counted(path, *args):
        read.append(path)
        return read_image(path, *args)

    monkeypatch.setattr("input_pipeline.decode.read_image", counted)
    (batch,) = eval_batches(split, 16)
    assert len(batch["image"]) == len(batch["mask"]) == 16
    assert len(read) == len(split)
    read.clear()
    np.testing.assert_array_equal(split.masks([0, 2]), expected)
    assert read == []


def test_tf_data_and_threads_give_the_same_bytes(tmp_path):
    make_tree(tmp_path, BRAIN)
    for limit in (1.0, 0.0):
        by_tf, by_threads = (
            load_dataset(data_config(tmp_path, memory_limit_gb=limit), reader=reader).splits
            for reader in ("tf", "threads")
        )
        for key in by_tf:
            equal_batches(eval_batches(by_tf[key], 4), eval_batches(by_threads[key], 4))
        args = {"batch_size": 4, "seed": 0, "start_step": 1, "num_steps": 6}
        equal_batches(train_batches(by_tf["train"], **args), train_batches(by_threads["train"], **args))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux tells which CPUs a process may use")
def test_as_many_threads_as_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert reader._num_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_few_images_of_a_large_split_are_read_by_threads(tmp_path, monkeypatch):
    """TensorFlow is for long streams: each use of it builds a pipeline of its own."""
    make_tree(tmp_path, BRAIN)
    split = load_dataset(data_config(tmp_path, memory_limit_gb=0.0)).splits["test"]
    expected, used = list(eval_batches(split, 4)), []

    def by_tf_data(decode, rows):
        used.append("tf")
        return reader._by_threads(decode, rows)

    monkeypatch.setattr(reader, "TF_MIN_IMAGES", 4)
    monkeypatch.setattr(reader, "_by_tf_data", by_tf_data)
    np.testing.assert_array_equal(split.images([0, 2]), expected[0]["image"][[0, 2]])
    np.testing.assert_array_equal(split.masks([1]), expected[0]["mask"][[1]])
    assert used == []
    equal_batches(eval_batches(split, 4), expected)
    assert used == ["tf"]


def test_colour(tmp_path):
    make_tree(tmp_path, {".": [f"{i}.png" for i in range(10)]})
    image = load_dataset(data_config(tmp_path, channels=3)).splits["train"].images([0])
    assert image.shape == (1, 8, 8, 3)


def test_train_order_is_epochs_without_repeats_and_resumes_anywhere():
    split = array_split(10)
    whole = list(train_batches(split, 4, seed=1, start_step=0, num_steps=15))
    stream = np.concatenate([b["index"] for b in whole])
    for epoch in range(6):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert (stream[:10] != stream[10:20]).any()
    assert all((split.images(b["index"]) == b["image"]).all() for b in whole)
    for start in (1, 4, 14, 15):
        equal_batches(train_batches(split, 4, seed=1, start_step=start, num_steps=15), whole[start:])
    other = np.concatenate([b["index"] for b in train_batches(split, 4, 2, 0, 15)])
    assert (other != stream).any()


def test_by_group_every_group_is_drawn_equally_often():
    split = dataclasses.replace(array_split(10), groups=["a"] * 6 + ["b"] * 3 + ["c"])
    whole = list(train_batches(split, 4, seed=1, start_step=0, num_steps=90, by_group=True))
    rows = np.concatenate([b["index"] for b in whole])
    groups = np.array(split.groups)[rows].reshape(-1, 3)
    assert all(set(epoch) == {"a", "b", "c"} for epoch in groups)
    assert all(60 < (groups[:, 0] == name).sum() * 2 < 100 for name in "abc")  # no group comes first
    counts = np.bincount(rows, minlength=10)
    assert counts[9] == 120
    assert (abs(counts[:6] - 20) < 16).all()
    assert (abs(counts[6:9] - 40) < 20).all()
    equal_batches(train_batches(split, 4, 1, 7, 90, by_group=True), whole[7:])


def test_batch_larger_than_the_set_wraps():
    (batch,) = train_batches(array_split(3), 8, seed=0, start_step=5, num_steps=6)
    counts = np.bincount(batch["index"], minlength=3)
    assert counts.sum() == 8
    assert counts.min() >= 2  # positions 40..47 hold two whole epochs and parts of two more


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_each_batch(hosts):
    split = array_split(11, num_abnormal=5)
    whole = list(train_batches(split, 8, 0, 0, 4))
    parts = [list(train_batches(split, 8, 0, 0, 4, host, hosts)) for host in range(hosts)]
    joined = [{k: np.concatenate([b[k] for b in same]) for k in same[0]} for same in zip(*parts, strict=True)]
    equal_batches(joined, whole)
    with pytest.raises(ValueError, match="batch size 9 cannot be shared by"):
        next(train_batches(split, 9, 0, 0, 4, 0, hosts))


@pytest.mark.parametrize("n", [1, 5, 6, 7])
def test_eval_counts_every_image_once(n):
    split = array_split(n, num_abnormal=1)
    batches = list(eval_batches(split, 3))
    assert {len(v) for b in batches for v in b.values()} == {3}
    valid = np.concatenate([b["valid"] for b in batches])
    assert np.concatenate([b["index"] for b in batches])[valid].tolist() == list(range(n))
    image, label, mask = (np.concatenate([b[k] for b in batches])[valid] for k in ("image", "label", "mask"))
    np.testing.assert_array_equal(image, split.images(np.arange(n)))
    np.testing.assert_array_equal(mask, split.masks(np.arange(n)))
    np.testing.assert_array_equal(label, split.labels)


def test_no_mask_key_without_masks():
    assert set(next(eval_batches(array_split(4), 2))) == {"image", "label", "index", "valid"}


@pytest.mark.parametrize(("limit", "reader"), [(1.0, "threads"), (0.0, "threads"), (1.0, "tf")])
def test_corrupt_file_stops_or_is_skipped(tmp_path, limit, reader, caplog):
    make_tree(tmp_path, BRAIN)
    bad = tmp_path / "train/good/img/00003_70.png"
    bad.write_bytes(bad.read_bytes()[:40])
    config = data_config(tmp_path, memory_limit_gb=limit)

    def read_all():  # on disk, it is found when it is read
        return [list(eval_batches(split, 2)) for split in load_dataset(config, reader=reader).splits.values()]

    with pytest.raises(DataError, match=r"00003_70\.png: cannot be decoded"):
        read_all()
    with caplog.at_level(logging.WARNING):
        config.skip_corrupt = True
        splits = load_dataset(config, reader=reader).splits
    assert sum(len(splits[key]) for key in ("train", "calibration")) == 9
    assert not any("00003_70" in name for split in splits.values() for name in split.names)
    assert "00003_70.png" in caplog.text
    assert "1 of 8 images skipped" in caplog.text or "1 of 2 images skipped" in caplog.text
    for split in splits.values():
        images = np.stack([read_image(tmp_path / name, 8, 1) for name in split.names])
        np.testing.assert_array_equal(split.images(np.arange(len(split))), images)


def test_all_corrupt_is_an_error_even_when_skipping(tmp_path):
    make_tree(tmp_path, {".": ["a.png", "b.png"]})
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of its 1 images can be decoded"):
        load_dataset(data_config(tmp_path, skip_corrupt=True))


@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_images_to_score_that_are_corrupt_stop_or_are_left_out(tmp_path, limit, caplog):
    make_tree(tmp_path, {"new": ["a.png", "b.png"], "old": ["c.png", "d.png"]})
    (tmp_path / "new/b.png").write_bytes(b"")
    config = data_config(memory_limit_gb=limit)
    with pytest.raises(DataError, match=r"b\.png: empty file.* data\.skip_corrupt$"):  # before anything is scored
        load_images(tmp_path, config)
    (tmp_path / "old/e.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=rf"b\.png: empty file.*; 1 more files of {tmp_path.name} .*: old/e\.png$"):
        load_images(tmp_path, config)
    (tmp_path / "old/e.png").unlink()
    config.skip_corrupt = True
    split, skipped = load_images(tmp_path, config, need_groups=True)
    assert split.names == ["new/a.png", "old/c.png", "old/d.png"]
    assert split.groups == ["new/a", "old/c", "old/d"]
    assert split.labels.tolist() == [-1] * 3
    assert split.in_memory == bool(limit)
    assert skipped.keys() == {"new/b.png"}
    assert "b.png: empty file" in skipped["new/b.png"]
    assert "skipped: " in caplog.text
    expected = np.stack([read_image(tmp_path / name, 8, 1) for name in split.names])
    np.testing.assert_array_equal(split.images(np.arange(3)), expected)
    for name in split.names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="none of its 4 images can be decoded"):
        load_images(tmp_path, config)


def test_masks_among_images_to_score_are_left_out_or_refused(tmp_path, caplog):
    folders = {"good": ["label.png"], "Ungood/img": ["a.png"], "masked": ["m.png"], "label 2": ["b.png"]}
    masks = {"Ungood/anomaly_mask": ["a.png"], "ground_truth/hole": ["a_mask.png", "b.png"], "Val_Label": ["v.png"]}
    make_tree(tmp_path, folders | masks)
    expected = ["Ungood/img/a.png", "good/label.png", "label 2/b.png", "masked/m.png"]
    for needed in (False, True):
        caplog.clear()
        assert load_images(tmp_path, data_config(), need_groups=needed)[0].names == expected
        assert "4 files in folders of masks were left out: " in caplog.text
        assert "Ungood/anomaly_mask" in caplog.text
    with pytest.raises(DataError, match=r"all of its 2 images lie in folders of masks .*\(hole/gt\); give the folder"):
        load_images(make_tree(tmp_path / "only", {"hole/gt": ["a.png", "b.png"]}), data_config())
    assert load_images(tmp_path / "only/hole/gt", data_config())[0].names == ["a.png", "b.png"]
    make_tree(tmp_path, {"good": ["label_mask.png"]})
    for needed in (False, True):
        with pytest.raises(DataError, match=r"label_mask\.png: a mask by its name"):
            load_images(tmp_path, data_config(), need_groups=needed)


def test_patients_of_images_to_score_are_found_where_names_tell_them(tmp_path, caplog):
    make_tree(tmp_path, {"new": ["00001_60.png", "00001_61.png", "x.png"]})
    assert load_images(tmp_path, data_config())[0].groups == ["00001", "00001", "new/x"]
    other = data_config(groups="patient-([a-z]+)")
    with pytest.raises(DataError, match="finds no patient in 3 of 3 names"):
        load_images(tmp_path, other, need_groups=True)
    split, _ = load_images(tmp_path, other)
    assert split.groups == split.names
    assert "finds no patient in 3 of 3 names" in caplog.text
    assert "; each image is taken for a patient of its own" in caplog.text


def test_images_called_alike_in_patients_folders_are_not_of_one_patient(tmp_path, caplog):
    names = ["IM-0001-0001.png", "IM-0001-0002.png"]
    make_tree(tmp_path / "new", {"export/patA/se0": names, "export/patB": [*names, "x.png"]})
    assert load_images(tmp_path / "new", data_config())[0].groups == ["patA"] * 2 + ["patB"] * 3
    assert "the folder is taken for the patient" in caplog.text
    make_tree(tmp_path / "classes", {"benign": ["00001_60.png"], "malignant": ["00001_61.png"]})
    assert load_images(tmp_path / "classes", data_config())[0].groups == ["00001"] * 2


def test_folders_without_images_to_score_are_told_apart(tmp_path, caplog):
    with pytest.raises(DataError, match="absent: no such folder; expected a folder"):
        load_images(tmp_path / "absent", data_config())
    image = write(tmp_path / "set" / "x.png", picture(0))
    with pytest.raises(DataError, match=r"x\.png: is a file; expected a folder"):
        load_images(image, data_config())
    (tmp_path / "volumes").mkdir()
    (tmp_path / "volumes" / "a.nii.gz").write_bytes(b"x")
    (tmp_path / "volumes" / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no image .* other files: \.gz, \.heic; volumes are cut .*--mode=slices"):
        load_images(tmp_path / "volumes", data_config())
    (tmp_path / "set" / "y.heic").write_bytes(b"x")
    assert load_images(tmp_path / "set", data_config())[0].names == ["x.png"]
    assert "1 files are no images and were left out: .heic" in caplog.text


def test_every_image_by_itself_from_files_and_from_their_cache(tmp_path):
    make_tree(tmp_path / "set", BRAIN)
    save_npz(load_dataset(data_config(tmp_path / "set")), tmp_path / "set.npz")
    files = load_dataset(data_config(tmp_path / "set", groups="image")).splits
    cached = load_dataset(data_config(cache=str(tmp_path / "set.npz"), groups="image")).splits
    for key, split in files.items():
        assert split.groups == split.names
        assert (cached[key].names, cached[key].groups) == (split.names, split.groups)
    alone = load_images(tmp_path / "set/train", data_config(groups="image"))[0]
    assert alone.groups[0] == alone.names[0] == "good/img/00000_60.png"
    for config in (data_config(tmp_path / "set", groups="x"), data_config(cache=str(tmp_path / "set.npz"), groups="x")):
        with pytest.raises(ValueError, match=r"data\.groups: expected auto, image or .*found 'x'"):
            load_dataset(config)


def test_patients_on_both_sides_are_said_at_training_time(tmp_path, caplog):
    """Of files, and of their cache."""
    root, cache = make_tree(tmp_path / "set", BRAIN), str(tmp_path / "set.npz")
    save_npz(load_dataset(data_config(root)), cache)
    for config in (data_config(root), data_config(cache=cache), data_config(cache, kind="npz")):
        caplog.clear()
        load_dataset(config)
        assert caplog.text.count("2 patients or groups stand in train and in valid or test (00000, 00002)") == 1
        caplog.clear()
        config.groups = "image"
        load_dataset(config)
        assert "stand in train" not in caplog.text


def dot(value):
    """A mask of 12 x 12 pixels with one of them marked, which 8 x 8 nearest pixels pass over."""
    values = np.zeros((12, 12), np.uint8)
    values[4, 4] = value
    return values


@pytest.mark.parametrize(
    ("suffix", "values", "message"),
    [
        (".png", np.zeros((12, 12), np.uint8), r"\(largest value 0\).*test \(2 in all\); export the masks again"),
        (".jpg", np.ones((12, 12), np.uint8), r"\(largest value 1\).*cut at 127: store them as PNG"),
        (".png", dot(7), r"\(largest value 7\) at data\.mask_size=8.*lost when it is resized: raise data\.mask_size"),
    ],
)
def test_masks_without_a_mark_stop_at_once(tmp_path, suffix, values, message, caplog):
    folders = {key: names for key, names in BRAIN.items() if "valid" not in key and "mask" not in key}
    make_tree(tmp_path, folders)
    masks = [write(tmp_path / f"test/Ungood/anomaly_mask/{stem}{suffix}", values) for stem in ("00002_60", "00200_68")]
    with pytest.raises(DataError, match=rf"00002_60\{suffix}: nothing is marked in it {message}"):
        load_dataset(data_config(tmp_path))
    assert load_dataset(data_config(tmp_path, memory_limit_gb=0.0)).splits["test"].has_masks  # read when it is needed
    Image.fromarray(np.full((12, 12), 255, np.uint8)).save(masks[1])
    load_dataset(data_config(tmp_path))
    assert "nothing is marked in 1 of 2 masks at data.mask_size=8, the first " in caplog.text
    assert f"00002_60{suffix}" in caplog.text


def test_patch_size_and_config_errors(tmp_path):
    make_tree(tmp_path, BRAIN)
    with pytest.raises(DataError, match="smaller than a patch of 16"):
        load_dataset(data_config(tmp_path), min_size=16)
    with pytest.raises(ValueError, match=r"unknown data\.kind 'tarball'"):
        load_dataset(data_config(tmp_path, kind="tarball"))
    with pytest.raises(ValueError, match="channels=2"):
        load_dataset(data_config(tmp_path, channels=2))
    with pytest.raises(ValueError, match="unknown reader"):
        load_dataset(data_config(tmp_path), reader="fast")
    with pytest.raises(DataError, match=r"data\.root is empty"):
        load_dataset(data_config())
    with pytest.raises(DataError, match="training split is empty"):
        next(train_batches(array_split(0), 2, 0, 0, 1))


def test_phantoms(monkeypatch):
    def make_dataset(image_size, mask_size, num_train, num_valid, num_test, seed):
        splits = {}
        for key, n in (("train", num_train), ("valid", num_valid), ("test", num_test)):
            s = array_split(n, num_abnormal=0 if key == "train" else n // 2, size=image_size)
            masks = s.masks(np.arange(n))
            assert mask_size == image_size
            names = [f"{key}_{i // 2}_{i % 2}" for i in range(n)]
            groups = [f"{key}_{i // 2}" for i in range(n)]
            pixels = s.images(np.arange(n))
            splits[key] = {"image": pixels, "mask": masks, "label": s.labels, "name": names, "group": groups}
        return splits

    monkeypatch.setattr("input_pipeline.phantom.make_dataset", make_dataset, raising=False)
    dataset = load_dataset(data_config(kind="phantom", calibration_fraction=0.2))
    assert {key: len(split) for key, split in dataset.splits.items()} == {
        "train": 10,
        "valid": 4,
        "test": 6,
        "calibration": 2,
    }
    assert set(dataset.splits["train"].groups).isdisjoint(dataset.splits["calibration"].groups)
    assert dataset.splits["test"].has_masks
    other = data_config(kind="phantom", phantom={"num_train": 12, "num_valid": 4, "num_test": 8, "seed": 0})
    assert dataset.manifest_hash != load_dataset(other).manifest_hash
    assert dataset.manifest_hash == load_dataset(data_config(kind="phantom", seed=7)).manifest_hash


def test_the_documents_reader_is_a_kind_of_data(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text().partition("## A data set")[2]
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    monkeypatch.setitem(INDEX_FNS, "mine", names["read_mine"])
    rows = [f"{k}.png,p{k // 2},{'test' if k > 5 else 'train'},{int(k > 7)}" for k in (9, 1, 2, 3, 4, 5, 6, 7, 8, 0)]
    (tmp_path / "images.csv").write_text("\n".join(["file,patient,split,abnormal", *rows]))
    splits = build_index(data_config(tmp_path, kind="mine", calibration_fraction=0.3)).splits
    assert [example.label for example in splits["test"]] == [0, 0, 1, 1]
    assert [example.name for example in splits["test"]] == ["6.png", "7.png", "8.png", "9.png"]
    assert len(splits["train"]) == 4
    assert len({example.group for example in splits["calibration"]}) == 1
