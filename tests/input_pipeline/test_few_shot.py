"""Few-shot subsets: counts, nesting, independence of listing order, manifests."""

import json

import numpy as np
import pytest
from labelled import data, files
from trees import make_tree

from input_pipeline import split
from input_pipeline.classification import load_labelled
from input_pipeline.decode import Resize
from input_pipeline.few_shot import read_manifest, select_few_shot, write_manifest
from input_pipeline.index import DataError
from input_pipeline.sources import ArraySource, LabelledSet, SelectedPixels, Sizes


def labelled(labels: object, names: list[str] | None = None, classes: tuple[str, ...] = ("a", "b", "c")) -> LabelledSet:
    """A set with these labels and black images."""
    labels = np.asarray(labels)
    names = tuple(names or (f"{row:04d}" for row in range(len(labels))))
    sizes = Sizes(2, 2, 3, Resize())
    source = ArraySource(np.zeros((len(labels), 2, 2, 3), np.uint8), sizes)
    pixels = SelectedPixels(source, np.arange(len(labels)), sizes)
    return LabelledSet("s", "", classes, names, names, labels, pixels)


LABELS = np.repeat([0, 1, 2], [100, 40, 3]).astype(np.int32)


@pytest.mark.parametrize(("ratio", "counts"), [(0.01, [1, 1, 1]), (0.1, [10, 4, 1]), (0.255, [25, 10, 1]), (1.0, None)])
def test_ratio_of_each_class_and_at_least_one(ratio, counts):
    rows = select_few_shot(labelled(LABELS), ratio)
    assert np.bincount(LABELS[rows]).tolist() == (counts or [100, 40, 3])
    assert (np.diff(rows) > 0).all()


def test_number_per_class():
    assert np.bincount(LABELS[select_few_shot(labelled(LABELS), per_class=5)]).tolist() == [5, 5, 3]


def test_subsets_nest_and_seeds_differ():
    found = labelled(LABELS)
    nested = [set(select_few_shot(found, ratio, seed=3)) for ratio in (0.01, 0.1, 0.5, 1.0)]
    assert nested[0] < nested[1] < nested[2] < nested[3]
    assert nested[1] != set(select_few_shot(found, 0.1, seed=4))
    assert set(select_few_shot(found, per_class=2, seed=3)) < set(select_few_shot(found, per_class=4, seed=3))


def test_the_choice_depends_on_names_and_not_on_rows():
    names = [f"{row:04d}" for row in range(len(LABELS))]
    chosen = {names[row] for row in select_few_shot(labelled(LABELS, names), 0.1)}
    order = np.random.default_rng(0).permutation(len(names))
    shuffled = [names[row] for row in order]
    assert {shuffled[row] for row in select_few_shot(labelled(LABELS[order], shuffled), 0.1)} == chosen
    # The order is sha256 of seed and name: a value that must not change with a version of anything.
    assert sorted(chosen)[:4] == ["0003", "0005", "0008", "0023"]


def test_images_without_labels_are_one_class():
    assert len(select_few_shot(labelled(np.full(50, -1, np.int32)), 0.1)) == 5


def test_every_finding_of_a_multi_label_set_is_there():
    labels = np.zeros((200, 3), np.float32)
    labels[:100, 0] = 1
    labels[90:110, 1] = 1
    labels[199, 2] = 1
    found = labelled(labels)
    small, large = (select_few_shot(found, ratio) for ratio in (0.05, 0.2))
    assert (labels[small].sum(axis=0) >= [5, 1, 1]).all()
    assert (labels[small].sum(axis=1) == 0).sum() == 4  # 89 images have no finding
    assert set(small) < set(large)
    assert len(small) < 14


@pytest.mark.parametrize("change", [{"ratio": 0.0}, {"ratio": 1.1}, {"per_class": -1}, {"ratio": 0.1, "per_class": 2}])
def test_impossible_sizes(change):
    with pytest.raises(ValueError, match=r"ratio in \(0, 1\]"):
        select_few_shot(labelled(LABELS), **change)


def test_corrupt_files_are_replaced_and_only_the_drawn_are_decoded(tmp_path, monkeypatch):
    make_tree(tmp_path, {f"train/{c}": files(12) for c in "ab"})
    found = load_labelled(data("folder", tmp_path, skip_corrupt=True, valid_fraction=0.0), "train", 8, check=False)
    first, more = (select_few_shot(found, per_class=count) for count in (3, 4))
    bad = first[0]  # of class a
    (tmp_path / found.names[bad]).write_bytes(b"")
    seen, read = [], split.read_image
    monkeypatch.setattr(split, "read_image", lambda path, *rest: seen.append(path) or read(path, *rest))
    rows = select_few_shot(found, per_class=3, skip_corrupt=True)
    assert len(seen) == 7
    assert set(rows) == (set(first) | set(more[found.labels[more] == 0])) - {bad}
    for name in found.names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"none of its 18 images can be decoded"):
        select_few_shot(found, per_class=3, skip_corrupt=True)


def test_manifest_round_trip(tmp_path):
    found = labelled(LABELS)
    rows = select_few_shot(found, 0.1, seed=2)
    written = write_manifest(tmp_path / "a" / "m.json", found, rows, ratio=0.1, seed=2)
    assert json.loads((tmp_path / "a" / "m.json").read_text()) == written
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["m.json"]
    assert (written["num_images"], written["selection"]) == (15, {"ratio": 0.1, "seed": 2})
    assert written["hash"] == found.take(rows).manifest_hash() != found.manifest_hash() == written["source_hash"]
    np.testing.assert_array_equal(read_manifest(tmp_path / "a" / "m.json", found), rows)
    more = labelled([0, *LABELS], ["-first", *found.names])  # a set that has grown: the same images, other rows
    np.testing.assert_array_equal(read_manifest(tmp_path / "a" / "m.json", more), rows + 1)


def test_manifest_of_another_set(tmp_path):
    found = labelled(LABELS)
    write_manifest(tmp_path / "m.json", found, [0, 1, 120])
    with pytest.raises(DataError, match=r"2 of its 3 images are not in the set s of 100 images: 0001, 0120"):
        read_manifest(tmp_path / "m.json", found.take([0, *range(2, 101)]).take(range(100)))
    with pytest.raises(DataError, match="labels or class names"):
        read_manifest(tmp_path / "m.json", labelled(np.roll(LABELS, 30)))
    with pytest.raises(DataError, match="labels or class names"):
        read_manifest(tmp_path / "m.json", labelled(LABELS, classes=("a", "b", "d")))


@pytest.mark.parametrize("text", ["", "[1]", '{"format": "x"}', '{"names": ["a"'])
def test_not_a_manifest(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(DataError, match=r"m\.json: not a manifest"):
        read_manifest(tmp_path / "m.json", labelled(LABELS))


def test_absent_manifest(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_manifest(tmp_path / "m.json", labelled(LABELS))
