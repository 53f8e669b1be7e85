"""Augmentation: its kinds, its limits, and that it is a function of the key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_moe.augment import KINDS, augment

SIZE = 33  # odd: there is a middle pixel, which zoom and rotation leave in place


def dot(batch):
    images = np.zeros((batch, SIZE, SIZE, 1), np.float32)
    images[:, SIZE // 2 - 1 : SIZE // 2 + 2, SIZE // 2 - 1 : SIZE // 2 + 2] = 0.5
    return jnp.asarray(images)


def centre_of_mass(images):
    images = np.asarray(images)[..., 0]
    total = images.sum((1, 2))
    line = np.arange(SIZE)
    return np.stack([(images.sum(2) * line).sum(1) / total, (images.sum(1) * line).sum(1) / total], 1)


def test_none_is_the_identity():
    images = dot(2)
    assert augment(jax.random.key(0), images, "none") is images


@pytest.mark.parametrize("kind", ["light", "strong"])
def test_kind_stays_within_its_limits(kind):
    images, size = dot(32), KINDS[kind]
    first, again, other = (augment(jax.random.key(k), images, kind) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == images.shape
    moved = np.abs(centre_of_mass(first) - SIZE // 2).max(axis=0)  # along rows, along columns
    # Zoom and rotation about the middle move the dot by less than a pixel.
    assert np.all(moved > 0.6 * size["shift"] * SIZE)
    assert np.all(moved < size["shift"] * SIZE * (1 + size["zoom"]) + 1)
    flat = np.asarray(augment(jax.random.key(2), jnp.full((32, SIZE, SIZE, 1), 0.5), kind))
    np.testing.assert_allclose(np.ptp(flat, axis=(1, 2, 3)), 0, atol=1e-6)
    gains = flat[:, 0, 0, 0] / 0.5
    assert 1 - size["gain"] <= gains.min() < 1 < gains.max() <= 1 + size["gain"]
    white = augment(jax.random.key(2), jnp.ones((8, SIZE, SIZE, 1)), kind)
    assert float(white.max()) == 1.0


def test_images_get_their_own_geometry():
    moved = centre_of_mass(augment(jax.random.key(0), dot(8), "strong"))
    assert len(np.unique(moved.round(3), axis=0)) == 8


def test_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match=r"augment: expected one of \['light', 'none', 'strong'\], found 'heavy'"):
        augment(jax.random.key(0), dot(1), "heavy")
