"""The walk over learning rates finds the valley with as few trials as it takes."""

import math

import pytest

from vit_distill.tune import walk


@pytest.mark.parametrize(
    ("losses", "best", "tried"),
    [
        ([5, 3, 1, 2, 4], 2, {1, 2, 3}),
        ([1, 2, 3, 4, 5], 0, {0, 1, 2, 3}),
        ([5, 4, 3, 2, math.inf], 3, {1, 2, 3, 4}),
        ([1], 0, {0}),
        ([1, 1, 1], 0, {0, 1, 2}),
    ],
)
def test_the_walk_finds_the_valley(losses: list, best: int, tried: set):
    asked = set()
    grid = [10.0**i for i in range(len(losses))]

    def loss_of(rate: float) -> float:
        asked.add(grid.index(rate))
        return losses[grid.index(rate)]

    assert walk(grid, loss_of) == grid[best]
    assert asked == tried
