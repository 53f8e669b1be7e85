"""Small painted defects: where they are said to be, and images shrunk by means."""

import numpy as np

from benchmarks.small_defects import paint, shrink


def test_defects_are_small_and_where_they_are_said_to_be():
    images = np.random.default_rng(0).integers(100, 140, (4, 256, 256, 1)).astype(np.uint8)
    painted = paint(images)
    assert (painted["clean"][0] == images).all()
    for name in ("spot", "speckle"):
        changed, where = painted[name]
        difference = np.abs(changed.astype(int) - images)[..., 0]
        assert changed.dtype == np.uint8
        assert ((where.sum((1, 2)) > 5) & (where.mean((1, 2)) < 0.005)).all()
        inside, outside = difference[where].mean(), difference[~where].mean()
        assert inside > 10
        assert outside < 0.2


def test_shrunk_images_are_means_of_squares():
    images = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8, 1)
    small = shrink(images, 4)
    assert small.shape == (2, 4, 4, 1)
    assert small[1, 0, 2, 0] == round(images[1, :2, 4:6].mean())
    assert (shrink(images, 8) == images).all()
