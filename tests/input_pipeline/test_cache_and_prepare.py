"""The .npz cache gives what the files give; prepare finds what is wrong with them."""

import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from labelled import files
from trees import BRAIN, TRAIN, data_config, equal_batches, make_tree, picture, write

from input_pipeline import cache, reader
from input_pipeline.batches import eval_batches
from input_pipeline.cache import load_npz, save_npz
from input_pipeline.dataset import load_dataset
from input_pipeline.index import DataError
from input_pipeline.prepare import format_report, prepare
from input_pipeline.split import ArrayPixels, Dataset, Split


def test_cache_gives_the_splits_of_the_files_under_every_seed(tmp_path):
    make_tree(tmp_path / "set", BRAIN)
    path = tmp_path / "out" / "set.npz"
    save_npz(load_dataset(data_config(tmp_path / "set")), path)
    for changes in ({}, {"seed": 3}, {"calibration_fraction": 0.4}, {"calibration_fraction": 0.0}):
        files = load_dataset(data_config(tmp_path / "set", **changes))
        for config in (data_config("absent", cache=str(path), **changes), data_config(path, kind="npz", **changes)):
            cached = load_dataset(config)
            assert (cached.name, cached.layout) == (files.name, files.layout)
            assert cached.manifest_hash == files.manifest_hash
            assert cached.splits.keys() == files.splits.keys()
            for key, split in files.splits.items():
                found = cached.splits[key]
                assert (found.names, found.groups, found.has_masks) == (split.names, split.groups, split.has_masks)
                equal_batches(eval_batches(found, 3), eval_batches(split, 3))


def test_a_test_split_alone_is_prepared_and_read_for_evaluation_only(tmp_path):
    root = make_tree(tmp_path / "set", {key: names for key, names in BRAIN.items() if key.startswith("test")})
    report = prepare(data_config(root), tmp_path / "set.npz")
    assert (report["warnings"], report["calibration_groups"]) == ([], [])
    text = format_report(report)
    assert "no training normals: none can be trained; a trained detector is measured on test/" in text
    assert "smallest p-value" not in text
    files = load_dataset(data_config(root), require_train=False)
    for changes in ({}, {"groups": "image"}):
        config = data_config(cache=str(tmp_path / "set.npz"), **changes)
        cached = load_dataset(config, require_train=False)
        assert list(cached.splits) == ["test"]
        assert cached.splits["test"].groups == (files.splits["test"].names if changes else files.splits["test"].groups)
        equal_batches(eval_batches(cached.splits["test"], 3), eval_batches(files.splits["test"], 3))
        with pytest.raises(DataError, match="data set 'set' has no training normals: found test"):
            load_dataset(config)


def test_a_cache_is_never_three_times_in_memory(tmp_path):
    rng, names = np.random.default_rng(0), [f"{k:03d}_0" for k in range(512)]
    image = rng.integers(0, 256, (512, 64, 64, 1), dtype=np.uint8)
    parts = {"train": slice(0, 400), "calibration": slice(400, 512)}
    splits = {
        key: Split(
            names[rows], names[rows], np.zeros(len(names[rows]), np.int32), False, ArrayPixels(image[rows], None, 8)
        )
        for key, rows in parts.items()
    }
    save_npz(Dataset("noise", "", "", 1, 64, 8, splits), tmp_path / "noise.npz")
    config = data_config(cache=str(tmp_path / "noise.npz"), image_size=64)
    tracemalloc.start()
    found = load_dataset(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.3 * image.nbytes
    for split in found.splits.values():
        np.testing.assert_array_equal(split.images(np.arange(len(split))), image[[int(n[:3]) for n in split.names]])


def test_a_link_to_nothing_is_a_corrupt_file(tmp_path):
    root = make_tree(tmp_path / "set", BRAIN)
    (root / "train/good/img/00009_1.png").symlink_to(tmp_path / "gone.png")
    report = prepare(data_config(root))
    assert list(report["corrupt"]) == ["train/good/img/00009_1.png"]
    splits = load_dataset(data_config(root, skip_corrupt=True)).splits
    assert len(splits["train"]) + len(splits["calibration"]) == len(TRAIN)


def test_training_from_a_cache_needs_no_tensorflow(tmp_path):
    make_tree(tmp_path / "set", BRAIN)
    save_npz(load_dataset(data_config(tmp_path / "set")), tmp_path / "set.npz")
    code = (
        "import sys; sys.path.insert(0, 'tests/input_pipeline'); sys.modules['tensorflow'] = None\n"
        "from trees import data_config\n"
        "from input_pipeline.batches import train_batches\n"
        "from input_pipeline.dataset import load_dataset\n"
        f"split = load_dataset(data_config({str(tmp_path / 'set.npz')!r}, kind='npz')).splits['train']\n"
        "print(sum(len(b['index']) for b in train_batches(split, 4, 0, 0, 3)))"
    )
    repository = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "12"


def test_bad_caches(tmp_path):
    make_tree(tmp_path / "set", BRAIN)
    path = tmp_path / "set.npz"
    save_npz(load_dataset(data_config(tmp_path / "set")), path)
    whole = path.read_bytes()
    for kept in (len(whole) // 2, len(whole) - 10, 100, 0):
        (tmp_path / "cut.npz").write_bytes(whole[:kept])
        with pytest.raises(DataError, match=r"cut\.npz: damaged or truncated"):
            load_npz(tmp_path / "cut.npz")
    (tmp_path / "text.npz").write_text("not even binary")
    with pytest.raises(DataError, match=r"text\.npz: not a data cache of this program"):
        load_npz(tmp_path / "text.npz")
    flipped = bytearray(whole)
    at = whole.index(np.load(path)["test/image"].tobytes()[:16])
    flipped[at] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with pytest.raises(DataError, match="damaged or truncated"):
        load_npz(tmp_path / "flipped.npz")
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "names.txt").write_text("train/a.png\n")
    for name in ("foreign.npz", "array.npy", "names.txt"):
        with pytest.raises(DataError, match=f"{name}: not a data cache of this program"):
            load_npz(tmp_path / name)
    np.savez(tmp_path / "newer.npz", header=np.asarray(json.dumps({"format": cache.FORMAT, "version": 99})))
    with pytest.raises(DataError, match="version 99, expected"):
        load_npz(tmp_path / "newer.npz")
    with pytest.raises(DataError, match="no such file"):
        load_npz(tmp_path / "absent.npz")
    with pytest.raises(DataError, match=r"image_size=8, the config says data\.image_size=16"):
        load_dataset(data_config(cache=str(path), image_size=16))
    with pytest.raises(DataError, match="cache of data set 'set'"):
        load_dataset(data_config(cache=str(path), name="other"))


def test_failed_write_leaves_the_old_cache_whole(tmp_path, monkeypatch):
    make_tree(tmp_path / "set", BRAIN)
    dataset = load_dataset(data_config(tmp_path / "set"))
    path = tmp_path / "set.npz"
    save_npz(dataset, path)
    before = path.read_bytes()

    def full_disk(file, header):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np.lib.format, "write_array_header_1_0", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_npz(dataset, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["set.npz"]

    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    with pytest.raises(DataError, match=r"set\.npz: the images need 0.0 GiB, 0.0 GiB are free"):
        save_npz(dataset, path)
    assert path.read_bytes() == before


def test_prepare_of_a_clean_set(tmp_path):
    make_tree(tmp_path / "set", BRAIN)
    report = prepare(data_config(tmp_path / "set", kind="bmad", name="brain"), tmp_path / "set.npz")
    assert report["counts"]["test"] == {"normal": 2, "abnormal": 2, "masks": 2}
    assert (report["corrupt"], report["duplicates"], report["leaks"]) == ({}, [], [])
    # by hand: train holds patients 00000 to 00004, test 00000, 00002, 00100, 00200
    assert report["crossing_groups"] == {"00000": ["test", "train"], "00002": ["test", "train"]}
    assert report["native_sizes"] == {"12x12": 16}
    assert report["cache"] == str(tmp_path / "set.npz")
    assert load_npz(tmp_path / "set.npz").name == "brain"
    text = format_report(report)
    assert "the BMAD table says 7500 + 0" in text
    assert "written:" in text
    json.dumps(report)


@pytest.mark.parametrize("out", ["", "set.npz"])
def test_prepare_holds_no_set_in_memory_that_is_larger_than_allowed(tmp_path, monkeypatch, out):
    root = make_tree(tmp_path / "set", {"train": files(240), "test/good": files(4), "test/bad": files(8)})
    make_tree(root, {"ground_truth/bad": files(8)})
    monkeypatch.setattr(reader, "_num_cpus", lambda: 1)  # 16 images are decoded ahead for each
    config = data_config(root, image_size=256, memory_limit_gb=0.0)
    tracemalloc.start()
    report = prepare(config, out and tmp_path / out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.6 * 252 * 256**2
    assert report["counts"]["test"] == {"normal": 4, "abnormal": 8, "masks": 8}
    if out:
        expected = load_dataset(data_config(root, image_size=256))
        for key, split in load_npz(tmp_path / out).splits.items():
            equal_batches(eval_batches(split, 8), eval_batches(expected.splits[key], 8))


def test_prepare_lists_every_corrupt_file_and_writes_nothing(tmp_path):
    root = make_tree(tmp_path / "set", BRAIN)
    for name in ("train/good/img/00001_60.png", "test/good/img/00100_97.png"):
        (root / name).write_bytes(b"")
    write(root / "test/Ungood/anomaly_mask/00200_68.png", picture(0, 5))
    bad = {"train/good/img/00001_60.png", "test/good/img/00100_97.png", "test/Ungood/img/00200_68.png"}
    out = tmp_path / "set.npz"
    report = prepare(data_config(root), out)
    assert report["corrupt"].keys() == bad
    assert "mask of 5x5" in report["corrupt"]["test/Ungood/img/00200_68.png"]
    assert report["cache"] == ""
    assert not out.exists()
    text = format_report(report)
    assert "corrupt files: 3" in text
    assert "no cache written" in text
    prepare(data_config(root, skip_corrupt=True), out)
    kept = {name for split in load_npz(out).splits.values() for name in split.names}
    assert len(kept) == 13
    assert not kept & bad


def test_prepare_finds_duplicates_whatever_the_format(tmp_path):
    root = make_tree(tmp_path / "set", BRAIN)
    shutil.copy(root / "train/good/img/00001_60.png", root / "train/good/img/00004_99.png")
    values = picture(77)
    write(root / "train/good/img/00009_1.bmp", values)
    write(root / "test/good/img/00300_1.png", values)
    report = prepare(data_config(root))
    leak = ["test/good/img/00300_1.png", "train/good/img/00009_1.bmp"]
    assert sorted(report["duplicates"]) == [leak, ["train/good/img/00001_60.png", "train/good/img/00004_99.png"]]
    assert report["leaks"] == [leak]
    assert "in train and in valid or test: 1" in format_report(report)


def test_prepare_warns_of_unwindowed_images(tmp_path):
    for i in range(6):
        write(tmp_path / f"{i}.png", picture(i).astype(np.uint16) * 16)  # 12 bits in 16
    assert any("very dark" in warning for warning in prepare(data_config(tmp_path))["warnings"])
    for i in range(6):
        write(tmp_path / f"{i}.png", 120 + picture(i) // 16)  # a few values around the middle of a wide range
    (warning,) = prepare(data_config(tmp_path))["warnings"]
    assert "few grey levels (median of brightest minus darkest pixel" in warning


def test_prepare_warns_of_colour_that_is_dropped(tmp_path):
    rng = np.random.default_rng(0)
    grey = np.repeat(picture(0, 16)[..., None], 3, -1)
    bone = np.clip(np.stack([0.875 * grey[..., 0] + offset for offset in (0, 0, 31.875)], -1), 0, 255).astype(np.uint8)
    write(tmp_path / "grey.png", grey)
    write(tmp_path / "bone.png", bone)
    write(tmp_path / "grey.jpg", grey)
    assert not prepare(data_config(tmp_path))["warnings"]
    for k in range(2):
        write(tmp_path / f"stained{k}.png", rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    (warning,) = prepare(data_config(tmp_path))["warnings"]
    assert warning == "2 of 5 images are coloured; they become grey: --config.data.channels=3 keeps colour"
    assert not prepare(data_config(tmp_path, channels=3))["warnings"]


def test_prepare_looks_at_some_images_of_a_large_set(tmp_path):
    for k in range(130):
        write(tmp_path / f"{k:03d}.png", np.dstack([picture(k, 8), np.zeros((8, 8), np.uint8), picture(k, 8)]))
    assert "64 of 64 images looked at are coloured" in "".join(prepare(data_config(tmp_path))["warnings"])


def test_prepare_warns_of_images_that_shrink_much(tmp_path):
    for k, size in enumerate((20, 33, 34, 70)):  # median 33.5, more than four times 8
        write(tmp_path / f"{k}.png", np.pad(picture(k, size), ((0, 0), (0, 9))))
    (warning,) = prepare(data_config(tmp_path))["warnings"]
    assert warning.startswith("median short side 33.5 px, used at 8: --config.data.image_size=16 and a larger preset")
    assert not prepare(data_config(tmp_path, image_size=9))["warnings"]


def test_prepare_is_for_folders(tmp_path):
    with pytest.raises(ValueError, match=r"prepare checks files .*: one of bmad, folder.*found 'phantom'"):
        prepare(data_config(kind="phantom"), tmp_path / "x.npz")
