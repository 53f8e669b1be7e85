"""Every folder layout that exists, and every one that must be refused."""

import cProfile
from pathlib import Path

import pytest
from trees import BRAIN, TRAIN, make_tree, picture, write

from input_pipeline.bmad import BMAD, find_root, index_bmad
from input_pipeline.index import DataError
from input_pipeline.tree import read_tree

G, U = ["00000_96.png", "00100_97.png"], ["00002_60.png", "00200_68.png"]


def renamed(*pairs):
    folders = dict(BRAIN)
    for old, new in pairs:
        folders = {key.replace(old, new): names for key, names in folders.items()}
    return folders


LAYOUTS = {
    "BMAD with masks": BRAIN,
    "label for anomaly_mask": renamed(("anomaly_mask", "label")),
    "mask, val, lower case": renamed(("anomaly_mask", "mask"), ("valid", "val"), ("Ungood", "ungood")),
    "img absent in train only": renamed(("train/good/img", "train/good")),
    "img absent": renamed(("/img", "")),
    "masks of normals too": BRAIN | {"test/good/label": G, "valid/good/label": ["00025_99.png"]},
    "Liver": {
        "train/good": TRAIN,
        "valid/img/good": ["00025_99.png"],
        "valid/img/Ungood": ["00124_60.png"],
        "valid/label/good": ["00025_99.png"],
        "valid/label/Ungood": ["00124_60.png"],
        "test/img/good": G,
        "test/img/Ungood": U,
        "test/label/good": G,
        "test/label/Ungood": U,
    },
    "RESC": {
        "Train/train/good": TRAIN,
        "Val/val/good": ["00025_99.png"],
        "Val/val/Ungood": ["00124_60.png"],
        "Val/val_label/Ungood": ["00124_60.png"],
        "Test/test/good": G,
        "Test/test/Ungood": U,
        "Test/test_label/Ungood": U,
    },
    "Liver, in its archive": {f"Liver/Train/hist_DIY/{key}": names for key, names in BRAIN.items()},
    "re-packed and wrapped": {f"BraTS2021_slice/{key}": names for key, names in BRAIN.items()},
}


def check_brain(index, root: Path):
    """The images, labels, masks and groups that every layout of BRAIN must give, named from the folder `root` on."""
    train = index.splits["train"] + index.splits["calibration"]
    assert sorted(e.image.name for e in train) == TRAIN
    assert {e.label for e in train} == {0}
    assert {e.group for e in index.splits["train"]}.isdisjoint(e.group for e in index.splits["calibration"])
    for split, normal, abnormal in (("valid", ["00025_99.png"], ["00124_60.png"]), ("test", G, U)):
        found = index.splits[split]
        assert [e.image.name for e in found if e.label == 0] == normal
        assert [e.image.name for e in found if e.label == 1] == abnormal
        assert [e.mask.name for e in found if e.label == 1] == abnormal
        assert [e.mask for e in found if e.label == 0] == [None] * len(normal)
        assert all(e.mask != e.image and e.mask.is_file() and e.image.is_file() for e in found if e.label)
        assert [e.name for e in found] == sorted(e.name for e in found)
        assert all(root / e.name == e.image and e.group == e.image.name.split("_")[0] for e in found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_one_set_are_read_alike(tmp_path, layout):
    root = make_tree(tmp_path / "Brain_AD", LAYOUTS[layout])
    check_brain(read_tree(root, calibration_fraction=0.2), find_root("brain", root))
    for given in (root, tmp_path):  # the set's folder or its parent
        check_brain(index_bmad("brain", given, calibration_fraction=0.2), find_root("brain", root))


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("brain", "Brain"),
        ("liver", "Liver_AD"),
        ("resc", "Retina_RESC_AD"),
        ("resc", "RESC"),
        ("oct2017", "RetinaOCT2017_AD"),
        ("rsna", "Chest-RSNA"),
        ("rsna", "Chest-AD"),
        ("camelyon16", "camelyon16_256"),
        ("camelyon16", "Histopathology_AD"),
    ],
)
def test_set_is_found_in_its_parent(tmp_path, name, folder):
    make_tree(tmp_path / "other", {"train/good": TRAIN})
    root = make_tree(tmp_path / folder, {"train/good": TRAIN, "test/good": G, "test/Ungood": U})
    assert find_root(name, tmp_path) == root


def test_bmad_compares_with_the_table(tmp_path):
    index = index_bmad("brain", make_tree(tmp_path, BRAIN))
    assert "differ" in index.layout
    assert "train: 10 normal + 0 abnormal, the BMAD table says 7500 + 0" in index.warnings
    assert any(w.startswith("test: 2 normal + 2 abnormal") for w in index.warnings)
    assert index_bmad("rsna", tmp_path).warnings[-1].startswith("masks found")
    # the table itself, against the totals of mtl_mad.md: images of each set
    totals = {name: sum(row.train + row.valid + row.test) for name, row in BMAD.items()}
    assert totals == {
        "brain": 11298,
        "liver": 3201,
        "resc": 6217,
        "oct2017": 27315,
        "rsna": 26684,
        "camelyon16": 7321,
    }


def test_bmad_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown BMAD set 'heart': expected one of brain, liver"):
        index_bmad("heart", tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        index_bmad("brain", tmp_path / "absent")
    make_tree(tmp_path, {"Lung/train/good": TRAIN, "Heart/train/good": TRAIN})
    with pytest.raises(DataError, match=r"one folder of set 'brain'.*found Heart, Lung"):
        index_bmad("brain", tmp_path)


def test_repacked_copy_without_train_is_for_evaluation_only(tmp_path):
    root = make_tree(tmp_path / "Brain_AD", {k: v for k, v in BRAIN.items() if "train" not in k})
    with pytest.raises(DataError, match="no normal training images"):
        index_bmad("brain", root)
    assert sorted(index_bmad("brain", root, require_train=False).splits) == ["test", "valid"]


@pytest.mark.parametrize("folder", [".", "img", "good"])
def test_flat_folder_is_all_normal_training(tmp_path, folder):
    root = make_tree(tmp_path, {folder: [f"{i}.png" for i in range(10)]})
    (root / "notes.txt").write_text("left out")
    index = read_tree(root)
    assert {split: len(found) for split, found in index.splits.items()} == {"train": 9, "calibration": 1}
    assert index.warnings == ("1 files are no images and were left out: .txt",)


def test_train_and_test_without_good_below_train(tmp_path):
    index = read_tree(make_tree(tmp_path, {"train": TRAIN, "test/normal": G, "test/abnormal": U}), "mine")
    assert index.dataset == "mine"
    assert [e.label for e in index.splits["test"]] == [1, 1, 0, 0]  # by name: test/abnormal before test/normal
    assert "valid" not in index.splits


def test_mvtec_layout(tmp_path):
    folders = {"train/good": TRAIN, "test/good": ["000.png"], "test/Hole": ["000.png"], "test/crack": ["000.png"]}
    folders |= {"ground_truth/Hole": ["000_mask.png"], "ground_truth/crack": ["000_mask.png"]}
    index = read_tree(make_tree(tmp_path, folders))
    test = {e.name: e for e in index.splits["test"]}
    assert {name: e.label for name, e in test.items()} == {
        "test/good/000.png": 0,
        "test/Hole/000.png": 1,
        "test/crack/000.png": 1,
    }
    assert test["test/Hole/000.png"].mask == tmp_path / "ground_truth/Hole/000_mask.png"
    assert test["test/crack/000.png"].mask == tmp_path / "ground_truth/crack/000_mask.png"
    assert len({e.group for e in index.splits["test"]}) == 3  # 000 says nothing about a patient


def test_mask_of_another_format_has_the_same_stem(tmp_path):
    folders = {"train": TRAIN, "test/good": ["a.jpg"], "test/Ungood/img": ["b.jpg"], "test/Ungood/mask": ["b.png"]}
    (example,) = (e for e in read_tree(make_tree(tmp_path, folders)).splits["test"] if e.label)
    assert example.mask.name == "b.png"


BAD = {
    "no training images": ({"test/good": G, "test/Ungood": U}, "no normal training images"),
    "abnormal under train": ({"train/good": TRAIN, "train/Ungood": U}, r"Ungood: 2 abnormal images under train"),
    "unknown label": ({"train/good": TRAIN, "test/PNEUMONIA": U}, r"'PNEUMONIA' is not a known label \(good, .*Ungood"),
    "unknown folder below a label": (BRAIN | {"test/Ungood/bodymask": U}, "'bodymask' is not a known label"),
    "classes of another kind of set": ({"train/cat": TRAIN, "train/dog": U}, "'cat' is not a known label"),
    "no label": ({"train/good": TRAIN, "test": U}, "test image in neither good/ nor Ungood/"),
    "stray image": ({"train/good": TRAIN, ".": ["stray.png"]}, "stray.png: image outside train/"),
    "two splits": ({"train/good": TRAIN, "train/test/good": G}, "says two things"),
    "only abnormal": ({"Ungood": U}, "image outside train/"),
    "mask without image": (
        BRAIN | {"test/Ungood/anomaly_mask": [*U, "00300_1.png"]},
        r"00300_1\.png: mask without an image",
    ),
    "mask without image, flat": ({".": TRAIN, "mask": ["x.png"]}, "image outside|mask without an image"),
    "image without mask": (
        BRAIN | {"test/Ungood/anomaly_mask": U[:1]},
        r"00200_68\.png: abnormal image without a mask \(1 such in test\)",
    ),
    "test without masks in a set with masks": (
        {key: names for key, names in BRAIN.items() if key != "test/Ungood/anomaly_mask"},
        r"00002_60\.png: abnormal image without a mask \(2 such in test\)",
    ),
    "two images, one mask": (BRAIN | {"test/Ungood": ["00002_60.png"]}, "share one mask"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_trees(tmp_path, case):
    folders, message = BAD[case]
    with pytest.raises(DataError, match=message):
        read_tree(make_tree(tmp_path, folders))


TREES = {  # images by folder, and their groups in the order of their names
    "names say nothing": (
        {"PAT0/ST0/SE0": ["IM0001.png", "IM0002.png"], "PAT0/ST0/SE1": ["IM0001.png"], "PAT1/ST0/SE0": ["IM0001.png"]},
        ["PAT0", "PAT0", "PAT0", "PAT1"],
    ),
    "BIDS below sites": (
        {"site1/sub-01/anat": ["sub-01_T1w.png"], "site1/sub-02/anat": ["sub-02_T1w.png", "sub-02_T2w.png"]},
        ["sub-01", "sub-02", "sub-02"],
    ),
    "series and image in the name": (
        {"a/x": ["IM-0001-0001.png", "IM-0002-0001.png"], "b/x": ["IM-0001-0001.png"]},
        ["a", "a", "b"],
    ),
    "images beside the folders": ({"a": ["1.png"], ".": ["1.png", "7_1.png"]}, ["1", "7", "a"]),
    "names that number anew in every patient's folder": (
        {"patA": ["s1_001.png", "s2_001.png"], "patB": ["s1_001.png", "s3_001.png"], ".": ["s1_002.png"]},
        ["patA", "patA", "patB", "patB", "s1"],
    ),
    "folders numbered from 0": ({"0": ["1.png"], "1": ["1.png"], "2/0": ["1.png"], "2/1": ["1.png"]}, list("0122")),
    "words within words": ({"ses-post": ["1.png"], "patient_no_2": ["1.png"]}, ["patient_no_2", "ses-post"]),
}


@pytest.mark.parametrize("case", TREES)
def test_trees_without_known_words_hold_normals(tmp_path, case):
    folders, groups = TREES[case]
    root = make_tree(tmp_path, folders)
    (root / "readme.txt").write_text("keeps the only folder from being gone through")
    index = read_tree(root, calibration_fraction=0)
    assert list(index.splits) == ["train"]
    assert [e.group for e in index.splits["train"]] == groups
    assert {(e.label, e.mask) for e in index.splits["train"]} == {(0, None)}
    assert len({e.name for e in index.splits["train"]}) == len(groups)
    assert f"all {len(groups)} images are taken as normal training images; first-level folders" in index.warnings[-1]
    assert index.layout == f"{len(groups)} images in {len(folders)} folders, none called train, good, ..."


def test_folders_that_stand_for_the_patient_are_said(tmp_path, caplog):
    read_tree(make_tree(tmp_path, {f"pat{k}": ["s1_001.png", "s2_001.png"] for k in "AB"}))
    assert "begin alike in several first-level folders (s1 in patA, patB), so that the folder is taken" in caplog.text


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (["yes", "No"], "No"),
        (["benign", "malignant"], "benign"),
        (["covid", "non-COVID"], "covid"),
        (["8863/0", "8863/1", "8864/0", "IDC/8863/1"], "8863/1"),
        (["train_images", "test_images"], "test_images"),
        (["site1/PAT0", "site2/brain_tumour"], "site2/brain_tumour"),
        (["notumor", "glioma"], "glioma"),
    ],
)
def test_trees_that_are_divided_are_no_normals(tmp_path, folders, named):
    root = make_tree(tmp_path, {folder: ["1.png"] for folder in folders})
    (root / "labels.csv").write_text("")
    with pytest.raises(DataError, match=rf"{named}: no folder is called train.*reads like .* set data\.root to the"):
        read_tree(root)


@pytest.mark.parametrize("name", ["sub-01_T1w_seg.png", "mask.png", "x-label.png", "y_mask_1.png"])
def test_masks_in_such_a_tree_are_no_normals(tmp_path, name):
    make_tree(tmp_path, {"a": ["x.png"], "b": [name, "y_masked_out.png"]})
    with pytest.raises(DataError, match=rf"{name}: a mask by its name \(1 such\).*move the masks out"):
        read_tree(tmp_path)


@pytest.mark.parametrize(
    "folders",
    [
        {".": ["normal (1).png", "normal (1)_mask.png", "normal (2).png"]},
        {"train/good": TRAIN, "test/good": G, "test/Ungood": ["normal (1).png", "normal (1)_mask.png"]},
        {"train": TRAIN, "test/good/img": ["normal (1).jpg", "normal (1)_mask_1.png"], "test/Ungood/img": U},
    ],
)
def test_masks_beside_their_images_are_no_images(tmp_path, folders):
    make_tree(tmp_path, folders)
    with pytest.raises(DataError, match=r"normal \(1\)_mask(_1)?\.png: a mask by its name \(1 such\).*move the masks"):
        read_tree(tmp_path)
    for path in tmp_path.rglob("*_mask*"):
        path.rename(path.with_name("b_mask.png"))  # of no image there: a name like others
    assert read_tree(tmp_path).splits


def test_one_known_word_makes_all_others_errors(tmp_path):
    root = make_tree(tmp_path, {"PAT0/ST0": ["1.png"], "PAT1/good": ["1.png"]})
    with pytest.raises(DataError, match="'PAT0' is not a known label"):
        read_tree(root)


def test_empty_and_foreign_folders(tmp_path):
    with pytest.raises(DataError, match=r"no image .* other files: none; expected images"):
        read_tree(tmp_path)
    (tmp_path / "scan.nii").write_bytes(b"x")
    with pytest.raises(DataError, match=r"other files: \.nii; volumes are cut into images by --mode=slices"):
        read_tree(tmp_path)


def test_hidden_files_and_mac_leftovers_are_no_images(tmp_path):
    make_tree(tmp_path, {"train": TRAIN})
    write(tmp_path / "__MACOSX" / "x.png", picture(0))
    write(tmp_path / "train" / "._00000_60.png", picture(0))
    index = read_tree(tmp_path)
    assert len(index.splits["train"] + index.splits["calibration"]) == len(TRAIN)


def test_a_folder_that_links_lead_to_again_is_read_once(tmp_path, caplog):
    root = make_tree(tmp_path / "scans", {"b": ["1.png"], "c": ["2.png"]})
    make_tree(tmp_path / "elsewhere", {".": ["3.png"]})
    (root / "a").mkdir()
    for link, target in (("a/loop", ".."), ("a/latest", "../b"), ("linked", "../elsewhere"), ("z", "../elsewhere")):
        (root / link).symlink_to(target, target_is_directory=True)
    index = read_tree(root, calibration_fraction=0)
    assert [e.name for e in index.splits["train"]] == ["b/1.png", "c/2.png", "linked/3.png"]
    for link, first in (("a/loop", root), ("a/latest", root / "b"), ("z", root / "linked")):
        assert f"{root / link}: left out, it is the same folder as {first}" in caplog.messages


def test_masks_of_normals_are_not_compared_with_every_image(tmp_path):
    def num_calls(num):
        folders = {"test/good/img": [f"{k}.png" for k in range(num)]}
        folders["test/good/label"] = [f"{k}_mask.png" for k in range(num)]
        root, profile = make_tree(tmp_path / str(num), BRAIN | folders), cProfile.Profile()
        profile.runcall(read_tree, root)
        return sum(entry.callcount for entry in profile.getstats())

    assert num_calls(200) < 10 * num_calls(20)  # as the files, not as their pairs
