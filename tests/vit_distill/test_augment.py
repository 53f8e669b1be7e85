"""Crops against Pillow's resampling of the same boxes, and what boxes and views promise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vit_distill.augment import crop_and_resize, fixed_view, random_box, random_resized_crop, view_keys

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)
BOXES = np.array([[0, 0, 24, 24], [3, 5, 20, 12], [10, 1, 7, 9], [2, 20, 22, 4]])  # reduced, mixed, enlarged


def pillow(image: np.ndarray, box: np.ndarray, size: int, how: Image.Resampling) -> np.ndarray:
    """Resampling in floating point by Pillow, channel by channel, clipped once: float [size, size, 3] in [0, 1]."""
    top, left, height, width = box
    planes = [
        np.asarray(
            Image.fromarray(image[top : top + height, left : left + width, channel].astype(np.float32)).resize(
                (size, size), how
            )
        )
        for channel in range(3)
    ]
    return np.clip(np.stack(planes, -1) / 255.0, 0, 1)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [8, 16])
def test_boxes_are_resampled_as_by_pillow(interpolation, size):
    flips = np.array([False, True, False, True])
    found = crop_and_resize(IMAGES, BOXES, flips, size, interpolation)
    assert found.shape == (4, size, size, 3)
    assert found.dtype == jnp.float32
    for image, box, flip, one in zip(IMAGES, BOXES, flips, found, strict=True):
        expected = pillow(image, box, size, Image.Resampling[interpolation.upper()])
        np.testing.assert_allclose(one, expected[:, ::-1] if flip else expected, atol=2e-6)


def test_the_whole_image_at_its_own_size_is_unchanged():
    boxes = np.tile([0, 0, 24, 24], (4, 1))
    found = crop_and_resize(IMAGES, boxes, np.zeros(4, bool), 24)
    np.testing.assert_allclose(found, IMAGES / 255.0, atol=1e-6)


def boxes_of(count: int, side: int, scale: tuple[float, float]) -> np.ndarray:
    draw = jax.jit(jax.vmap(partial(random_box, side=side, scale=scale)))
    return np.asarray(draw(jax.random.split(jax.random.key(0), count)))


def test_boxes_have_the_areas_and_ratios_asked_for():
    side, scale = 200, (0.3, 0.6)
    top, left, height, width = boxes_of(2000, side, scale).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= side).all()
    assert (left + width <= side).all()
    area, ratio = height * width / side**2, width / height
    assert 0.29 < area.min() < 0.31
    assert 0.59 < area.max() < 0.61
    assert abs(area.mean() - 0.45) < 0.01
    assert 0.74 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.35
    assert abs(np.log(ratio).mean()) < 0.01
    free = np.stack([top / np.maximum(side - height, 1), left / np.maximum(side - width, 1)])
    np.testing.assert_allclose(free.mean(axis=1), 0.5, atol=0.03)


def test_a_box_that_never_fits_is_the_whole_image():
    boxes = boxes_of(300, 64, (1.0, 1.0))
    assert (boxes[:, 2:] <= 64).all()
    assert (boxes == [0, 0, 64, 64]).all(axis=1).mean() > 0.9  # ratio 1 exactly is rare


def test_flips_and_crops_differ_by_image_and_key():
    ramp = np.tile(np.arange(32, dtype=np.uint8)[None, None, :, None] * 8, (64, 32, 1, 1))
    found = np.asarray(random_resized_crop(jax.random.key(1), ramp, 8, scale=(0.9, 1.0)))
    mirrored = found[:, 0, 0, 0] > found[:, 0, -1, 0]
    assert 15 < mirrored.sum() < 49
    assert len(np.unique(found.reshape(64, -1), axis=0)) > 20  # few boxes differ on a ramp of 32 columns
    assert not np.array_equal(found, random_resized_crop(jax.random.key(2), ramp, 8, scale=(0.9, 1.0)))
    plain = np.asarray(random_resized_crop(jax.random.key(1), ramp, 8, scale=(0.9, 1.0), flip=False))
    assert (plain[:, 0, 0, 0] < plain[:, 0, -1, 0]).all()


def test_a_fixed_view_does_not_depend_on_the_batch():
    rows = np.array([7, 3, 100, 4])
    make = jax.jit(fixed_view, static_argnums=(0, 4))
    whole = make(5, rows, 2, IMAGES, 8)
    part = make(5, rows[[2, 0]], 2, IMAGES[[2, 0]], 8)
    np.testing.assert_allclose(part, whole[np.array([2, 0])], atol=1e-6)
    mixed = make(5, rows[[2, 0]], np.array([2, 3]), IMAGES[[2, 0]], 8)
    np.testing.assert_allclose(mixed[0], whole[2], atol=1e-6)
    assert np.abs(np.asarray(mixed[1] - whole[0])).max() > 0.01
    for other in (make(5, rows, 3, IMAGES, 8), make(6, rows, 2, IMAGES, 8), make(5, rows + 1, 2, IMAGES, 8)):
        assert (np.abs(np.asarray(other - whole)).max(axis=(1, 2, 3)) > 0.01).all()
    keys = np.concatenate([jax.random.key_data(view_keys(0, np.arange(3), view)) for view in range(3)])
    assert len(np.unique(keys, axis=0)) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpolation": "lanczos"}, "bicubic.*lanczos"),
        ({"scale": (0.0, 1.0)}, "0 < smallest"),
        ({"scale": (0.5, 0.2)}, "0 < smallest"),
        ({"images": IMAGES[:, :20]}, "square.*20x24"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        random_resized_crop(**{"key": jax.random.key(0), "images": IMAGES, "size": 8, **change})
