"""Painted defects: each family does what its name says, on the body only, and the criterion is the AUROC it claims."""

import numpy as np
import pytest

from input_pipeline.split import ArrayPixels, Split
from mtl_moe import painted
from mtl_moe.painted import CLEAN, KINDS, TRAINED, UNSEEN, by_kind, criteria, paint, painted_auroc, painted_normals
from mtl_moe.tasks import base

SIDE = 32


def textured(count: int, seed: int = 0) -> np.ndarray:
    """uint8 images [count, SIDE, SIDE, 1]: noise around mid grey, with a dark surround on the left."""
    images = np.random.default_rng(seed).normal(120, 25, (count, SIDE, SIDE, 1)).clip(60, 190)
    images[:, :, : SIDE // 4] = 0
    return images.astype(np.uint8)


IMAGES = textured(8)
PAINTED = {family: paint(IMAGES, family, seed=3) for family in KINDS[1:]}
CHANGE = {family: found.astype(int) - IMAGES for family, found in PAINTED.items()}
BODY = np.asarray(base.body_mask(IMAGES.astype(np.float32) / 255)) > 0


@pytest.mark.parametrize("family", KINDS[1:])
def test_every_image_gets_a_defect_on_the_body_only(family):
    assert PAINTED[family].dtype == np.uint8
    assert PAINTED[family].shape == IMAGES.shape
    assert not CHANGE[family][~BODY].any()
    assert np.all(np.abs(CHANGE[family]).max((1, 2, 3)) >= 3)


def test_defects_are_a_function_of_the_seed():
    np.testing.assert_array_equal(paint(IMAGES, "bump", seed=3), PAINTED["bump"])
    assert (paint(IMAGES, "bump", seed=4) != PAINTED["bump"]).any()
    with pytest.raises(ValueError, match=r"family: expected one of .*'bump'.*found 'lump'"):
        paint(IMAGES, "lump", seed=0)


def test_families_that_nothing_trains_on_do_what_they_are_called():
    area = {family: (np.abs(change) >= 5)[BODY].mean() for family, change in CHANGE.items()}
    assert area["bump"] < 0.2 < min(area["wide_brightening"], area["wide_darkening"], area["wide_texture"])
    assert CHANGE["wide_brightening"].min() >= 0
    assert CHANGE["wide_darkening"].max() <= 0
    for i in range(len(IMAGES)):
        signs = np.unique(np.sign(CHANGE["bump"][i]))
        assert signs.tolist() in ([-1, 0], [0, 1])
        inside = np.abs(CHANGE["inverted"][i]) >= 30
        before, after = IMAGES[i][inside].astype(float), PAINTED["inverted"][i][inside].astype(float)
        assert np.corrcoef(before, after)[0, 1] < -0.5
        rough = lambda image: np.abs(np.diff(image.astype(float), axis=0)).mean()  # noqa: E731
        assert rough(PAINTED["wide_blur"][i]) < 0.9 * rough(IMAGES[i])
        assert rough(PAINTED["wide_veil"][i]) < 0.97 * rough(IMAGES[i])
    assert set(TRAINED).isdisjoint(UNSEEN)


def test_normals_stand_once_for_each_kind(monkeypatch):
    monkeypatch.setattr(painted, "paint", lambda images, family, seed: images + np.uint8(KINDS.index(family)))
    images = textured(9)
    names, groups = [f"n{i}" for i in range(9)], [f"g{i // 2}" for i in range(9)]
    normals = Split(names, groups, np.zeros(9, np.int32), False, ArrayPixels(images, None, SIDE))
    found = painted_normals(normals, most=5)
    kinds = by_kind(found.images(np.arange(len(found))))
    for i, kind in enumerate(KINDS):
        np.testing.assert_array_equal(kinds[kind], images[::2] + np.uint8(i))
    assert found.groups[:5] == found.groups[5:10] == ["g0", "g1", "g2", "g3", "g4"]
    assert len(set(found.names)) == len(found) == 5 * len(KINDS)
    assert len(painted_normals(normals, most=50)) == 9 * len(KINDS)


def test_the_criterion_is_the_auroc_of_each_family_against_the_clean_images():
    scores = {kind: np.array([1.0, 2.0]) for kind in KINDS}
    scores["blend"] = np.array([3.0, 2.0])  # pairs: 1, 1, 1, 1/2
    scores["bump"] = np.array([0.0, 1.5])  # 0, 0, 1, 0
    found = painted_auroc(scores)
    assert CLEAN not in found
    assert found["blend"] == 0.875
    assert found["bump"] == 0.25
    assert found["mass"] == 0.5
    means = criteria(found)
    assert means["trained"] == pytest.approx((0.875 + 0.5 * (len(TRAINED) - 1)) / len(TRAINED))
    assert means["unseen"] == pytest.approx((0.25 + 0.5 * (len(UNSEEN) - 1)) / len(UNSEEN))
