"""Helpers of the tests of labelled sets."""

from ml_collections import ConfigDict

from input_pipeline.decode import Resize
from input_pipeline.sources import Sizes

SIZES = Sizes(8, 8, 3, Resize(True, "bicubic"))


def data(kind: str, root: object = "", **changes: object) -> ConfigDict:
    """A `config.data` of labelled sets."""
    values = dict(
        kind=kind, name="", root=str(root), channels=3, skip_corrupt=False, memory_limit_gb=1.0, valid_fraction=0.2,
        test_fraction=0.25, seed=0, groups="auto",
    )  # fmt: skip
    return ConfigDict(values | changes)


def files(count: int) -> list[str]:
    return [f"{row:03d}.png" for row in range(count)]
