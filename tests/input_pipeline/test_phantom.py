"""Phantoms: contract, determinism, exact masks, and that no trivial statistic finds the lesions.

Axes: N images, H W image, M mask.
"""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from input_pipeline import phantom

COUNTS = {"train": 10, "valid": 8, "test": 48}


@pytest.fixture(scope="module")
def data():
    return phantom.make_dataset(64, 48, COUNTS["train"], COUNTS["valid"], COUNTS["test"], seed=3)


def _split_equal(a, b, count):
    for key in ("image", "mask", "label"):
        np.testing.assert_array_equal(a[key][:count], b[key][:count])
    assert a["name"][:count] == b["name"][:count]
    assert a["group"][:count] == b["group"][:count]


def test_shapes_dtypes_and_ranges(data):
    assert list(data) == list(COUNTS)
    for split, count in COUNTS.items():
        part = data[split]
        assert sorted(part) == ["group", "image", "label", "mask", "name"]
        assert part["image"].shape == (count, 64, 64, 1)
        assert part["image"].dtype == np.uint8
        assert part["mask"].shape == (count, 48, 48, 1)
        assert part["mask"].dtype == np.uint8
        assert part["mask"].max() <= 1
        assert part["label"].shape == (count,)
        assert part["label"].dtype == np.int32
        assert len(part["name"]) == len(part["group"]) == len(set(part["name"])) == count
        # An image uses its range: neither empty nor saturated.
        assert (part["image"].max((1, 2, 3)) > 120).all()
        assert (np.mean(part["image"] == 255, axis=(1, 2, 3)) < 0.1).all()


def test_training_is_normal_and_half_of_the_rest_is_not(data):
    assert data["train"]["label"].sum() == 0
    assert data["valid"]["label"].sum() == COUNTS["valid"] // 2
    assert data["test"]["label"].sum() == COUNTS["test"] // 2


def test_masks_are_empty_exactly_for_normals(data):
    for part in data.values():
        area = part["mask"].sum((1, 2, 3))
        np.testing.assert_array_equal(area > 0, part["label"] == 1)
        # Lesions are local: larger than a speck of noise, smaller than the organ.
        assert (area[part["label"] == 1] >= 15).all()
        assert (area < 0.25 * 48 * 48).all()


def test_names_follow_the_bmad_layout_and_say_group_slice_and_kind(data):
    assert data["train"]["name"][:3] == [
        "train/good/head000000_0.png",
        "train/good/head000000_1.png",
        "train/good/chest000001_0.png",
    ]
    assert data["valid"]["name"][2:4] == ["valid/Ungood/head100001_0_mass.png", "valid/Ungood/head100001_1_mass.png"]
    for split, part in data.items():
        for name, label, group in zip(part["name"], part["label"], part["group"], strict=True):
            folder, file = name.removeprefix(f"{split}/").split("/")
            assert folder == ("Ungood" if label else "good")
            assert file.split("_")[0] == group
            assert file.endswith(tuple(f"_{kind}.png" for kind in phantom.LESIONS)) == bool(label)


def test_every_anatomy_and_kind_of_lesion_occurs(data):
    kinds = {name.rsplit("_", 1)[1][:-4] for name in data["test"]["name"] if "Ungood" in name}
    assert len(kinds) == 4  # 12 abnormal subjects, 3 anatomies to a kind
    for label in (0, 1):
        groups = [g for g, y in zip(data["test"]["group"], data["test"]["label"], strict=True) if y == label]
        assert {g[:-6]: groups.count(g) for g in groups} == {"head": 2, "chest": 2, "abdomen": 2}
        assert all(sum(g.startswith(a) for g in groups) == 8 for a in phantom.ANATOMIES)


def test_subjects_never_cross_splits(data):
    groups = [set(part["group"]) for part in data.values()]
    assert len(set.union(*groups)) == sum(map(len, groups))


def test_deterministic_and_independent_of_counts(data):
    other = phantom.make_dataset(64, 48, num_train=5, num_valid=4, num_test=8, seed=3)
    for split, part in other.items():
        _split_equal(part, data[split], len(part["label"]))


def test_subjects_slices_and_seeds_differ(data):
    images = data["train"]["image"].astype(int)
    change = np.abs(images[:, None] - images[None]).mean((2, 3, 4))
    # Above the mean difference of two noise draws (sigma at most 0.03 of 255: 8.6), for the same anatomy: 0, 6 | 1, 7.
    assert min(change[0, 6], change[1, 7]) > 9
    assert (change[~np.eye(len(images), dtype=bool)] > 1).all()
    assert change[0, 1] < change[0, 6]  # the slices of one subject are alike
    reseeded = phantom.make_dataset(64, 48, 1, 0, 0, seed=4)["train"]["image"].astype(int)
    assert np.abs(reseeded[0] - images[0]).mean() > 5


@pytest.mark.parametrize("anatomy", phantom.ANATOMIES)
@pytest.mark.parametrize("kind", phantom.LESIONS)
def test_outside_its_mask_a_lesion_changes_nothing_noticeable(kind, anatomy):
    for subject in range(3):
        normal, _ = phantom.make_slice(64, 64, 0, subject, anatomy, 0, None)
        abnormal, mask = phantom.make_slice(64, 64, 0, subject, anatomy, 0, kind)
        change = np.abs(normal.astype(int) - abnormal)[..., 0]
        mask = mask[..., 0] == 1
        # One grey level more than the threshold: two roundings to uint8.
        assert change[~mask].max() <= phantom.NOTICEABLE * 255 + 1
        # Inside, the change is several times the noise somewhere, and the mask is no wide frame around it.
        assert np.quantile(change[mask], 0.9) > 3 * phantom.NOTICEABLE * 255 * (0.6 if kind == "haze" else 1)
        assert np.mean(change[mask] > phantom.NOTICEABLE * 255 - 1) > 0.4
        far = ~ndimage.binary_dilation(mask, iterations=16)
        assert far.any()
        assert (change[far] == 0).all()  # a lesion has compact support


@pytest.mark.parametrize("kind", [None, "mass", "distortion"])
def test_same_content_at_every_size(kind):
    for subject, anatomy in enumerate(phantom.ANATOMIES):
        small, small_mask = phantom.make_slice(64, 64, 0, subject, anatomy, 1, kind)
        large, large_mask = phantom.make_slice(128, 64, 0, subject, anatomy, 1, kind)
        # The mask is drawn at its own size, whatever the size of the image.
        np.testing.assert_array_equal(small_mask, large_mask)
        halved = large[..., 0].reshape(64, 2, 64, 2).mean((1, 3))
        correlation = np.corrcoef(ndimage.gaussian_filter(halved, 1).ravel(), _blur(small).ravel())[0, 1]
        stranger = _blur(phantom.make_slice(64, 64, 0, subject + 3, anatomy, 1, kind)[0])
        assert correlation > 0.99
        assert correlation > np.corrcoef(_blur(small).ravel(), stranger.ravel())[0, 1] + 0.01


def _blur(image):
    return ndimage.gaussian_filter(image[..., 0].astype(float), 1)


def test_no_trivial_statistic_separates_lesions():
    """The floors of any results table, both directions: below 0.75, so that a figure above it means something."""
    test = phantom.make_dataset(64, 64, 0, 0, 288, seed=0)["test"]
    images = test["image"][..., 0] / 255
    down, right = np.gradient(images, axis=(1, 2))
    floors = {
        "mean": images.mean((1, 2)),
        "gradient": np.hypot(down, right).mean((1, 2)),
        "std": images.std((1, 2)),
        "maximum": ndimage.gaussian_filter(images, (0, 1, 1)).max((1, 2)),
        "minimum of the inner part": ndimage.gaussian_filter(images, (0, 1, 1))[:, 20:44, 20:44].min((1, 2)),
    }
    for name, score in floors.items():
        area = roc_auc_score(test["label"], score)
        assert 0.25 < area < 0.75, f"{name} separates lesions with AUROC {area:.3f}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 16}, "at least 32, got 16 and 64"),
        ({"num_test": 6}, "num_test must be a multiple of 4"),
        ({"num_train": -1}, "num_train must be in"),
        ({"num_train": 200_001}, "num_train must be in"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    good = {"image_size": 64, "mask_size": 64, "num_train": 2, "num_valid": 4, "num_test": 4, "seed": 0}
    with pytest.raises(ValueError, match=message):
        phantom.make_dataset(**(good | arguments))


def test_anatomies_can_be_chosen():
    sizes = {"image_size": 32, "mask_size": 32, "num_train": 4, "num_valid": 0, "num_test": 4, "seed": 0}
    splits = phantom.make_dataset(**sizes, anatomies=("chest",))
    assert all(group.startswith("chest") for split in splits.values() for group in split["group"])
    with pytest.raises(ValueError, match=r"expected some of .*found \('lung',\)"):
        phantom.make_dataset(**sizes, anatomies=("lung",))
