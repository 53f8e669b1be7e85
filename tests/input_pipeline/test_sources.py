"""Every source of labelled images on tiny copies of its layout, and what it says of a wrong one."""

import errno
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from labelled import SIZES, data, files
from PIL import Image
from trees import BRAIN, make_tree

from input_pipeline.classification import SOURCES, load_labelled
from input_pipeline.decode import resize_array
from input_pipeline.index import DataError
from input_pipeline.sources import ArraySource
from input_pipeline.sources_arrays import read_digits, read_npz
from input_pipeline.sources_folder import read_bmad, read_folder
from input_pipeline.sources_lists import FINDINGS, read_chestxray14, read_inat19
from input_pipeline.sources_tfds import _labels, read_tfds


@pytest.mark.parametrize("kind", sorted(set(SOURCES) - {"digits", "tfds"}))
@pytest.mark.parametrize("root", ["", "absent"])
def test_absent_data_says_what_is_expected(kind, root):
    with pytest.raises(DataError, match=r"(?s)(data\.root is empty|absent).*Expected"):
        load_labelled(data(kind, root), "train", 8)


# --- folders


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            {"train/a": files(2), "train/b/deeper/still": files(2), "test/c": files(2)},
            "classes c have no folder in train",
        ),
        ({"train/a": files(2), "odd": files(2)}, "odd stand beside train"),
        ({"test/a": files(2)}, "no train/"),
        ({"a": files(2), ".": files(1)}, "1 images stand beside class folders"),
    ],
)
def test_wrong_folders(tmp_path, folders, message):
    with pytest.raises(DataError, match=message):
        read_folder(str(make_tree(tmp_path, folders)), "", SIZES)


def test_an_empty_class(tmp_path):
    make_tree(tmp_path, {"train/a": files(2)})
    (tmp_path / "train/b").mkdir()
    with pytest.raises(DataError, match=r"train/b: class without an image"):
        read_folder(str(tmp_path), "", SIZES)
    (tmp_path / "flat").mkdir()
    with pytest.raises(DataError, match=r"flat: no image \(\.png.*other files: none\. Expected"):
        read_folder(str(tmp_path / "flat"), "", SIZES)


@pytest.mark.parametrize("folders", [{".": files(2)}, {"a": files(2), "b": files(1)}])
def test_other_files_are_counted_and_webp_is_read(tmp_path, folders, caplog):
    make_tree(tmp_path, folders)
    folder = tmp_path / next(iter(folders))
    Image.new("RGB", (9, 9), (250, 0, 0)).save(folder / "x.webp", lossless=True)
    for name in ("a.heic", "b.heic", "notes.txt"):
        (folder / name).write_bytes(b"x")
    train = read_folder(str(tmp_path), "", SIZES)["train"]
    assert len(train) == sum(map(len, folders.values())) + 1
    row = next(row for row, name in enumerate(train.names) if name.endswith("x.webp"))
    assert (train.images([row])[0] == (250, 0, 0)).all()
    assert "3 files are no images and were left out: .heic, .txt" in caplog.text


def test_names_make_no_groups_in_class_folders(tmp_path):
    """Else ImageNet's names, synset_number, would make one group of every class, and nothing could be carved."""
    names = {word: [f"{word}_{k:05d}.JPEG" for k in range(5)] for word in ("n01440764", "n01443537")}
    for groups in ("auto", "image"):
        train = read_folder(str(make_tree(tmp_path, names)), "", SIZES, groups)["train"]
        assert train.groups == train.names


@pytest.mark.parametrize("folder", ["train/benign", "benign", "."])
def test_masks_beside_images_are_no_images(tmp_path, folder):
    make_tree(tmp_path, {folder: ["benign (1).png", "benign (1)_mask.png"]})
    with pytest.raises(DataError, match=r"benign \(1\)_mask\.png: a mask by its name \(1 such\)"):
        load_labelled(data("folder", tmp_path), "train", 8, "bicubic")


def test_images_below_a_class_folder_belong_to_it(tmp_path):
    make_tree(tmp_path, {"train/a": files(2), "train/b/deeper": files(3), "test/b": files(1)})
    sets = read_folder(str(tmp_path), "", SIZES)
    assert sets["train"].labels.tolist() == [0, 0, 1, 1, 1]
    assert sets["test"].labels.tolist() == [1]
    assert sets["test"].classes == ("a", "b")


# --- BMAD as two classes


def test_bmad_without_valid_normals(tmp_path):
    normal, abnormal = ([f"{patient:05d}_{z}.png" for patient in p for z in (1, 2)] for p in (range(8), range(8, 16)))
    make_tree(tmp_path, {"train/good": files(3), "test/good": normal, "test/Ungood": abnormal})
    found = {s: load_labelled(data("bmad", tmp_path), s, 8) for s in ("train", "valid", "test")}
    assert {s: np.bincount(x.labels).tolist() for s, x in found.items()} == {
        "train": [6, 6],
        "valid": [2, 2],
        "test": [8, 8],
    }
    patients = [{name.split("/")[-1][:5] for name in x.names} for x in found.values()]
    assert not patients[0] & patients[1] | patients[0] & patients[2] | patients[1] & patients[2]
    assert found["train"].classes == ("normal", "abnormal")
    assert all("/Ungood/" in n for n, label in zip(found["test"].names, found["test"].labels, strict=True) if label)


def test_bmad_with_valid_and_masks(tmp_path):
    sets = read_bmad(str(make_tree(tmp_path, BRAIN)), "", SIZES)
    assert {split: found.labels.tolist() for split, found in sets.items()} == {"valid": [1, 0], "test": [1, 1, 0, 0]}
    masks = sets["test"].masks([0, 3])
    assert masks.shape == (2, 8, 8)
    assert masks[0].any()
    assert not masks[1].any()
    make_tree(tmp_path / "b", {"train/good": files(3), "test/good": files(3)})
    with pytest.raises(DataError, match="no test split with normal and abnormal"):
        read_bmad(str(tmp_path / "b"), "", SIZES)


# --- arrays


def test_digits():
    sets = read_digits(SIZES)
    assert {split: len(found) for split, found in sets.items()} == {"train": 1437, "test": 360}
    assert np.bincount(sets["train"].labels).min() > 130
    with pytest.raises(DataError, match="digits has no masks"):
        sets["train"].masks([0])
    image = sets["train"].images([0])[0]  # the first digit of the file is a zero: ink around a hole
    assert sets["train"].labels[0] == 0
    assert image.shape == (8, 8, 3)
    assert image[4, 3, 0] < 60 < 150 < image[1, 3, 0]


def medmnist(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (12, 10, 10, 3), dtype=np.uint8),
        "train_labels": (np.arange(12)[:, None] % 3).astype(np.uint8),  # as theirs are
        "val_images": rng.integers(0, 256, (4, 10, 10), dtype=np.uint8),
        "val_labels": np.zeros((4, 1), np.uint8),
    }
    arrays = {key: value for key, value in (arrays | changes).items() if value is not None}
    np.savez(path, **arrays)
    return arrays


def test_npz(tmp_path):
    arrays = medmnist(tmp_path / "x.npz")
    sets = read_npz(str(tmp_path / "x.npz"), "", SIZES)
    assert sets["train"].labels.tolist() == [0, 1, 2] * 4
    assert sets["valid"].classes == ("0", "1", "2")
    np.testing.assert_array_equal(
        sets["train"].images([7])[0], resize_array(arrays["train_images"][7], 8, 3, SIZES.resize)
    )
    grey = sets["valid"].pixels.source.arrays
    assert (grey.shape, grey.strides[-1]) == ((4, 10, 10, 3), 0)  # not three copies of it
    for row in range(4):
        expected = resize_array(np.repeat(arrays["val_images"][row][..., None], 3, -1), 8, 3, SIZES.resize)
        np.testing.assert_array_equal(sets["valid"].images([row])[0], expected)
    test = load_labelled(data("npz", tmp_path / "x.npz"), "test", 8)
    assert test.names[0] == "val/0000000"
    taken = test.take([2, 0]).take([0])
    np.testing.assert_array_equal(taken.images([0]), sets["valid"].images([2]))


def test_arrays_are_decoded_side_by_side(monkeypatch):
    """As those of TFDS, each of which is an encoded image until it is asked for."""

    class Waiting:
        both = threading.Barrier(2, timeout=10)

        def __len__(self):
            return 4

        def __getitem__(self, row):
            self.both.wait()
            return np.full((8, 8, 3), row, np.uint8)

    monkeypatch.setattr("input_pipeline.reader._num_cpus", lambda: 2)
    source = ArraySource(Waiting(), SIZES)
    assert source.images([3, 1])[:, 0, 0, 0].tolist() == [3, 1]
    found = [images[:, 0, 0, 0].tolist() for images, _ in source.batches(lambda: [[0, 1, 2], [3]], False)]
    assert found == [[0, 1, 2], [3]]
    assert source.images([]).shape == (0, 8, 8, 3)


def test_multi_label_npz(tmp_path):
    medmnist(
        tmp_path / "x.npz", train_labels=np.eye(12)[:, :5], val_labels=np.eye(4, 5), classes=np.array(list("abcde"))
    )
    found = read_npz(str(tmp_path / "x.npz"), "", SIZES)["train"]
    assert found.multi_label
    assert found.labels.dtype == np.float32
    assert found.classes == tuple("abcde")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((12, 9, 9), np.float32)}, "train_images are float32"),
        ({"train_labels": np.zeros(5, int)}, r"train_labels are \(5,\) for 12 images"),
        ({"train_images": None}, "no train_images, found"),
        ({"val_images": np.zeros((0, 9, 9), np.uint8), "val_labels": np.zeros(0, int)}, "val_images holds no image"),
        ({"train_labels": np.arange(12) + 0.7}, "train_labels are float64, not whole numbers"),
        ({"val_labels": np.array(list("abcd"))}, "val_labels are <U1, not whole numbers"),
    ],
)
def test_wrong_npz(tmp_path, changes, message):
    medmnist(tmp_path / "x.npz", **changes)
    with pytest.raises(DataError, match=message):
        read_npz(str(tmp_path / "x.npz"), "", SIZES)
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match="cannot be read"):
        read_npz(str(tmp_path / "x.npz"), "", SIZES)
    (tmp_path / "x.npz").write_text("not even binary")
    with pytest.raises(DataError, match=r"cannot be read \(no \.npz file"):
        read_npz(str(tmp_path / "x.npz"), "", SIZES)


# --- ChestX-ray14

CHEST = [  # patient, findings
    ("1", "Cardiomegaly|Emphysema"), ("1", "No Finding"), ("2", "Hernia"), ("3", "No Finding"), ("3", "Mass"),
    ("4", "Mass|Nodule"),
]  # fmt: skip


@pytest.fixture
def chest(tmp_path):
    names = [f"0000000{row}_000.png" for row in range(len(CHEST))]
    make_tree(tmp_path, {"images_001/images": names[:3], "images_002/images": names[3:]})
    rows = [f"{name},{found},0,{patient}" for name, (patient, found) in zip(names, CHEST, strict=True)]
    (tmp_path / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels,Follow-up #,Patient ID\n" + "\n".join(rows)
    )
    (tmp_path / "train_val_list.txt").write_text("\n".join(names[4::-1]))
    (tmp_path / "test_list.txt").write_text(names[5] + "\n")
    return tmp_path


def test_chestxray14(chest):
    sets = read_chestxray14(str(chest), "", SIZES)
    train = sets["train"]
    assert len(train.classes) == train.labels.shape[1] == 15
    found = [{FINDINGS[column] for column in np.flatnonzero(label)} for label in train.labels]
    assert found == [set(findings.split("|")) for _, findings in CHEST[:5]]
    assert train.groups == ("1", "1", "2", "3", "3")
    np.testing.assert_array_equal(sets["test"].labels[0].nonzero()[0], [4, 5])
    path = chest / "images_002/images/00000003_000.png"
    expected = Image.open(path).resize((8, 8), Image.Resampling.BICUBIC).convert("RGB")
    np.testing.assert_array_equal(train.images([3])[0], expected)
    parts = [load_labelled(data("chestxray14", chest, valid_fraction=0.4), s, 8) for s in ("train", "valid")]
    assert len(parts[1]) >= 1
    assert not set(parts[0].groups) & set(parts[1].groups)
    config = data("chestxray14", chest, valid_fraction=0.0, groups="image")
    train = load_labelled(config, "train", 8)
    assert train.groups == train.names
    config.groups = r"(\d)_000"
    assert load_labelled(config, "train", 8).groups == tuple("01234")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("test_list.txt", "5_000", "9_000", r"test_list\.txt: 1 of its images have no row in .*00000009_000\.png"),
        ("Data_Entry_2017.csv", "Hernia", "Hernias", r"00000002_000\.png has the finding 'Hernias'"),
        ("Data_Entry_2017.csv", "Patient ID", "Patient", "no column Patient ID"),
    ],
)
def test_wrong_chest_lists(chest, file, old, new, message):
    (chest / file).write_text((chest / file).read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        read_chestxray14(str(chest), "", SIZES)


def test_absent_chest_files(chest):
    (chest / "images_001/images/00000001_000.png").rename(chest / "x.png")
    with pytest.raises(DataError, match=r"train_val_list\.txt: 1 of its images have no image file: 00000001_000\.png"):
        read_chestxray14(str(chest), "", SIZES)
    (chest / "x.png").rename(chest / "images_001/images/00000001_000.png")
    (chest / "test_list.txt").unlink()
    with pytest.raises(DataError, match=r"no test_list\.txt"):
        read_chestxray14(str(chest), "", SIZES)


# --- iNaturalist 2019


def inat_json(path, names, labels):
    content = {
        "images": [{"id": row + 10, "file_name": name} for row, name in enumerate(names)],
        "annotations": [{"image_id": row + 10, "category_id": label} for row, label in enumerate(labels)],
        "categories": [{"id": key, "name": f"species {key}"} for key in (7, 3)],
    }
    path.write_text(json.dumps(content))


def test_inat19(tmp_path):
    make_tree(tmp_path, {"train_val2019/Plants/3": files(3), "train_val2019/Birds/7": files(3)})
    names = [f"train_val2019/{folder}/{file}" for folder in ("Plants/3", "Birds/7") for file in files(3)]
    inat_json(tmp_path / "train2019.json", names[:5], [3, 3, 3, 7, 7])
    inat_json(tmp_path / "val2019.json", names[5:], [7])
    sets = read_inat19(str(tmp_path), "", SIZES)
    assert sets["train"].classes == ("species 3", "species 7")
    assert sets["train"].names[0] == "train_val2019/Birds/7/000.png"
    assert sets["train"].labels.tolist() == [1, 1, 0, 0, 0]
    assert sets["valid"].labels.tolist() == [1]
    assert sets["train"].groups == sets["train"].names
    assert read_inat19(str(tmp_path), "", SIZES, r"/(\w+)/\d/")["train"].groups == ("Birds",) * 2 + ("Plants",) * 3
    (tmp_path / names[5]).unlink()
    with pytest.raises(DataError, match=r"val2019\.json: 1 of its images have no image file"):
        read_inat19(str(tmp_path), "", SIZES)
    (tmp_path / "val2019.json").write_text('{"images": []}')
    with pytest.raises(DataError, match=r"val2019\.json: not a list of images"):
        read_inat19(str(tmp_path), "", SIZES)


def test_inat19_folders(tmp_path):
    make_tree(tmp_path, {"train/x": files(2), "val/x": files(1)})
    assert {split: len(found) for split, found in read_inat19(str(tmp_path), "", SIZES).items()} == {
        "train": 2,
        "valid": 1,
    }


# --- TFDS


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    tf = pytest.importorskip("tensorflow")
    tfds = pytest.importorskip("tensorflow_datasets")
    root = tmp_path_factory.mktemp("tfds")
    images = np.random.default_rng(0).integers(0, 256, (6, 10, 12, 3), dtype=np.uint8)
    image, label = tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(names=["a", "b"])
    for name, kind, extra in (
        ("tiny", "array_record", {}),
        ("old", "tfrecord", {}),
        ("odd", "array_record", {"box": 1}),
    ):
        rows = {"picture" if extra else "image": images, "label": np.arange(6) % 2}
        splits = {
            split: tf.data.Dataset.from_tensor_slices({key: values[:count] for key, values in rows.items()})
            for split, count in (("train", 6), ("validation", 2))
        }
        features = tfds.features.FeaturesDict({"picture" if extra else "image": image, "label": label})
        tfds.dataset_builders.store_as_tfds_dataset(
            name, "1.0.0", data_dir=str(root), split_datasets=splits,
            features=features, file_format=kind, disable_shuffling=True,
        )  # fmt: skip
    return root, images


def test_tfds(tfds_folder):
    root, images = tfds_folder
    sets = read_tfds(str(root), "tiny", SIZES)
    assert sets["train"].classes == ("a", "b")
    assert sets["train"].labels.tolist() == [0, 1, 0, 1, 0, 1]
    np.testing.assert_array_equal(sets["train"].images([4])[0], resize_array(images[4], 8, 3, SIZES.resize))
    assert load_labelled(data("tfds", root, name="tiny"), "test", 8).names == (
        "validation/0000000",
        "validation/0000001",
    )


def test_labels_of_a_read_only_folder_are_used_and_not_kept(tmp_path, monkeypatch, caplog):
    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert _labels([{"label": 1}, {"label": 0}], tmp_path / "labels.npy").tolist() == [1, 0]
    assert "cannot be kept" in caplog.text


def test_labels_of_tfds_are_read_once(tfds_folder):
    root, _ = tfds_folder
    expected = read_tfds(str(root), "tiny", SIZES)["train"].labels
    (path,) = root.glob("tiny/1.0.0/labels_train.npy")
    np.save(path, 1 - expected)
    np.testing.assert_array_equal(read_tfds(str(root), "tiny", SIZES)["train"].labels, 1 - expected)
    np.save(path, expected[:2])  # of a set prepared anew
    np.testing.assert_array_equal(read_tfds(str(root), "tiny", SIZES)["train"].labels, expected)
    np.testing.assert_array_equal(np.load(path), expected)
    path.write_bytes(b"cut")
    with pytest.raises(DataError, match=r"labels_train\.npy: cannot be read .*delete it"):
        read_tfds(str(root), "tiny", SIZES)
    path.unlink()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("old", "prepared as tfrecord.*tfds build old --file_format=array_record"),
        ("odd", "has features .*picture"),
        ("no_such_set", "no set 'no_such_set'.*Expected"),
        ("imagenet2012", "(?s)ILSVRC2012_img_train.tar.*Expected"),
    ],
)
def test_tfds_that_cannot_be_read(tfds_folder, name, message):
    with pytest.raises(DataError, match=message):
        read_tfds(str(tfds_folder[0]), name, SIZES)
