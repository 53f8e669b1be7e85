"""The walk over learning rates finds the valley with as few trials as it takes."""

import itertools
import math

import pytest

from vit_distill.tune import most_tried, walk


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


@pytest.mark.parametrize("number", range(1, 7))
def test_most_that_is_tried(number: int):
    def tried(losses: tuple) -> int:
        asked = set()
        walk(range(number), lambda i: asked.add(i) or losses[i])
        return len(asked)

    assert most_tried(number) == max(map(tried, itertools.permutations(range(number))))
