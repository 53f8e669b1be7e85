"""What a teacher expects of its images: the size before the crop."""

import math

import pytest

from vit_distill.preprocessing import Preprocessing


def resize_size(crop: int, fraction: float) -> int:
    return Preprocessing(crop, (0.5,), (0.5,), crop_fraction=fraction).resize_size


def test_a_size_survives_its_own_share():
    pairs = [(crop, size) for size in range(1, 701) for crop in range(1, size + 1)]
    assert [(crop, size) for crop, size in pairs if resize_size(crop, crop / size) != size] == []


@pytest.mark.parametrize("fraction", [0.875, 0.9, 0.95, 0.96, 1.0])
def test_ordinary_shares_give_what_timm_gives(fraction):
    crops = range(1, 1025)
    assert [resize_size(crop, fraction) for crop in crops] == [math.floor(crop / fraction) for crop in crops]
