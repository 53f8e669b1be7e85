"""Evenly spaced rows: the ends, the spacing, sets that are smaller."""

import numpy as np
import pytest

from core.sampling import even_rows


@pytest.mark.parametrize(
    ("total", "most", "expected"),
    [(10, 4, [0, 3, 6, 9]), (6, 4, [0, 2, 3, 5]), (3, 8, [0, 1, 2]), (5, 1, [0]), (0, 4, []), (4, 0, [])],
)
def test_rows_by_hand(total: int, most: int, expected: list[int]):
    assert even_rows(total, most).tolist() == expected


@pytest.mark.parametrize("total", [129, 1000, 12811, 50000])
def test_rows_differ_and_reach_the_ends(total: int):
    rows = even_rows(total, 128)
    assert (np.diff(rows) >= total // 128).all()
    assert (len(rows), rows[0], rows[-1]) == (128, 0, total - 1)
