"""A labelled (or unlabelled) set of images, in memory or on disk, and how one is made of files or of arrays.

Axis alphabet: B batch, N images, H W C image, S image side, M mask side, F findings.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from input_pipeline.decode import Resize, resize_array
from input_pipeline.index import DataError, Example
from input_pipeline.split import FilePixels, Rows


class ImageReader(Protocol):
    """Where a labelled set's pixels come from: `FilePixels`, `ResizedArrays`."""

    image_size: int

    def __len__(self) -> int: ...

    def images(self, rows: Rows) -> np.ndarray:
        """uint8 [n, S, S, 3] of the given rows."""

    def masks(self, rows: Rows) -> np.ndarray:
        """uint8 [n, M, M, 1] of the given rows."""


@dataclass
class ResizedArrays:
    """Images given as arrays, each uint8 [H, W, 3] of any size, resized whenever they are asked for."""

    arrays: Sequence[np.ndarray]
    image_size: int
    resize: Resize

    def __len__(self) -> int:
        return len(self.arrays)

    def images(self, rows: Rows) -> np.ndarray:
        squares = [resize_array(self.arrays[int(row)], self.image_size, self.resize) for row in rows]
        return np.stack(squares) if squares else np.zeros((0, self.image_size, self.image_size, 3), np.uint8)

    def masks(self, rows: Rows) -> np.ndarray:
        raise DataError("this data has no masks: use data.kind=segmentation or a BMAD set with masks")


@dataclass
class _Memory:
    """Pixels already decoded, by row. The array is allocated as a whole, but its pages are taken as rows are filled."""

    image: np.ndarray
    known: np.ndarray


@dataclass(frozen=True)
class LabelledSet:
    """N images of one split with their labels.

    Attributes:
      name: of the data set.
      layout: what was recognised, one line.
      classes: names of the classes, or of the F findings; for segmentation the names of the pixel classes; () unknown.
      names: unique name of each image, sorted.
      groups: patient or near-duplicate group of each image; splits never cut a group.
      labels: int32 [N] (-1: unknown), or float32 [N, F] of 0 and 1 (multi-label).
      pixels: where images come from.
      has_masks: `masks` can be read.
      memory_limit: bytes; below it every image is decoded once only, at its first use.
    """

    name: str
    layout: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    groups: tuple[str, ...]
    labels: np.ndarray
    pixels: ImageReader
    has_masks: bool = False
    memory_limit: float = 0.0
    _memory: list[_Memory] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self):
        sizes = {len(self.names), len(self.groups), len(self.labels), len(self.pixels)}
        if len(sizes) != 1:
            raise DataError(f"names, groups, labels and pixels of {self.name} differ in length: {sorted(sizes)}")
        if len(set(self.names)) != len(self.names):
            raise DataError(f"{self.name}: names of images must be unique, found {_repeated(self.names)} twice")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def image_size(self) -> int:
        return self.pixels.image_size

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim == 2

    @property
    def labelled(self) -> bool:
        return self.multi_label or bool((self.labels >= 0).all())

    def images(self, rows: Rows) -> np.ndarray:
        """uint8 [n, S, S, 3] of the given rows (int [n]); DataError for a file that cannot be decoded."""
        rows = np.asarray(rows, np.int64)
        num_bytes = len(self) * self.image_size**2 * 3
        if num_bytes > self.memory_limit:
            return self.pixels.images(rows)
        if not self._memory:
            shape = (len(self), self.image_size, self.image_size, 3)
            self._memory.append(_Memory(np.empty(shape, np.uint8), np.zeros(len(self), bool)))
        memory = self._memory[0]
        missing = np.unique(rows[~memory.known[rows]])
        for start in range(0, len(missing), 4096):  # bounds the copy beside the array
            part = missing[start : start + 4096]
            memory.image[part] = self.pixels.images(part)
            memory.known[part] = True
        return memory.image[rows]

    def masks(self, rows: Rows) -> np.ndarray:
        """uint8 [n, M, M]: class of each pixel (255: not labelled); of BMAD sets 0 and 1, zeros for normal images."""
        return self.pixels.masks(np.asarray(rows, np.int64))[..., 0]

    def take(self, rows: Rows) -> "LabelledSet":
        """The set of the given rows; its images are decoded anew."""
        rows = np.asarray(rows, np.int64)
        if isinstance(self.pixels, FilePixels):
            pixels = replace(self.pixels, examples=tuple(self.pixels.examples[row] for row in rows))
        else:
            pixels = replace(self.pixels, arrays=_Taken(self.pixels.arrays, rows))
        names, groups = (tuple(values[row] for row in rows) for values in (self.names, self.groups))
        return replace(self, names=names, groups=groups, labels=self.labels[rows], pixels=pixels, _memory=[])

    def manifest_hash(self) -> str:
        """sha256 over names, labels and class names: equal for equal sets on every machine and at every image size."""
        digest = hashlib.sha256(repr((self.classes, self.multi_label)).encode())
        for name, label in zip(self.names, self.labels, strict=True):
            digest.update(repr((name, np.asarray(label, np.int64).tolist())).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Taken:
    """Rows of a sequence, read when asked for."""

    arrays: Sequence[np.ndarray]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.arrays[int(self.rows[row])]


def _repeated(names: Sequence[str]) -> str:
    seen = set()
    return next(name for name in names if name in seen or seen.add(name))


@dataclass(frozen=True)
class Sizes:
    """Sides of images and masks in pixels, and how pictures become squares."""

    image_size: int
    mask_size: int
    resize: Resize


def set_of_files(
    name: str,
    layout: str,
    classes: Sequence[str],
    examples: Sequence[Example],
    sizes: Sizes,
    labels: np.ndarray | None = None,
) -> LabelledSet:
    """A set of image files, sorted by name.

    Args:
      labels: float32 [N, F] for multi-label sets, in the order of `examples`; None takes the examples' own labels.
    """
    order = sorted(range(len(examples)), key=lambda row: examples[row].name)
    examples = tuple(examples[row] for row in order)
    labels = np.asarray([e.label for e in examples], np.int32) if labels is None else labels[order]
    names, groups = tuple(e.name for e in examples), tuple(e.group for e in examples)
    # Threads: TensorFlow would be set up anew for every batch of rows that is asked for.
    pixels = FilePixels(examples, sizes.image_size, sizes.mask_size, 3, 1, "threads", sizes.resize)
    return LabelledSet(name, layout, tuple(classes), names, groups, labels, pixels, any(e.mask for e in examples))


def set_of_arrays(
    name: str,
    layout: str,
    classes: Sequence[str],
    arrays: Sequence[np.ndarray],
    labels: np.ndarray,
    sizes: Sizes,
    prefix: str,
) -> LabelledSet:
    """A set of N images held as (or read as) arrays, each uint8 [H, W, 3]; images are named `prefix/0000000`."""
    names = tuple(f"{prefix}/{row:07d}" for row in range(len(arrays)))
    pixels = ResizedArrays(arrays, sizes.image_size, sizes.resize)
    return LabelledSet(name, layout, tuple(classes), names, names, labels, pixels)


def existing_root(root: str, kind: str, expected: str) -> Path:
    """`data.root` as a folder; DataError that says where to get the data and what layout is expected."""
    if not root:
        raise DataError(f"data.root is empty: set --config.data.root to the folder of the {kind} data. {expected}")
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such folder. {expected}")
    return Path(root)
