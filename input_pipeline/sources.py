"""A labelled (or unlabelled) set of images, in memory or on disk, and how one is made of files or of arrays.

Axis alphabet: B batch, N images, H W C image, S image side, M mask side, F findings.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from input_pipeline.decode import Resize, resize_array
from input_pipeline.index import DataError, Example
from input_pipeline.reader import Decoded, decode_in_order
from input_pipeline.split import FilePixels, Pixels, Rows

_PART = 4096  # rows decoded by one call: bounds the copy beside the array


@dataclass(frozen=True)
class Sizes:
    """Sides of images and masks in pixels, 1 (luminance) or 3 (RGB) channels, and how pictures become squares."""

    image_size: int
    mask_size: int
    channels: int
    resize: Resize


@dataclass
class ArraySource:
    """Images given as (or decoded to) arrays, each uint8 [H, W, 3] of any size, resized whenever they are asked for."""

    arrays: Sequence[np.ndarray]
    sizes: Sizes

    def __len__(self) -> int:
        return len(self.arrays)

    def images(self, rows: Rows) -> np.ndarray:
        size, channels = self.sizes.image_size, self.sizes.channels
        if len(rows) == 0:
            return np.zeros((0, size, size, channels), np.uint8)
        return next(self.batches(lambda: [rows], with_masks=False))[0]

    def masks(self, rows: Rows) -> np.ndarray:
        raise DataError("arrays come without masks; expected a set with has_masks")

    def batches(
        self, rows: Callable[[], Iterable[Rows]], with_masks: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        stream = decode_in_order(self._decode, lambda: (int(row) for batch in rows() for row in batch), "threads")
        for batch in rows():
            yield np.stack([next(stream)[0] for _ in batch]), self.masks(batch) if with_masks else None

    def _decode(self, row: int) -> Decoded:
        size, channels, resize = self.sizes.image_size, self.sizes.channels, self.sizes.resize
        return resize_array(self.arrays[row], size, channels, resize), np.zeros(0, np.uint8), ""


@dataclass
class SelectedPixels:
    """Some rows of a source of pixels; an image is decoded once only where all of them fit `memory_limit` bytes.

    The array that holds them is allocated as a whole at the first use; its pages are taken as it is filled.
    """

    source: Pixels
    rows: Rows
    sizes: Sizes
    memory_limit: float = 0.0
    _image: np.ndarray | None = field(default=None, repr=False)
    _known: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def in_memory(self) -> bool:
        return len(self) * self.sizes.image_size**2 * self.sizes.channels <= self.memory_limit

    def images(self, rows: Rows) -> np.ndarray:
        rows = np.asarray(rows, np.int64)
        if not self.in_memory:
            return self.source.images(self.rows[rows])
        if self._image is None:
            side = self.sizes.image_size
            self._image = np.empty((len(self), side, side, self.sizes.channels), np.uint8)
            self._known = np.zeros(len(self), bool)
        missing = np.unique(rows[~self._known[rows]])
        for start in range(0, len(missing), _PART):
            part = missing[start : start + _PART]
            self._image[part] = self.source.images(self.rows[part])
            self._known[part] = True
        return self._image[rows]

    def masks(self, rows: Rows) -> np.ndarray:
        return self.source.masks(self.rows[np.asarray(rows, np.int64)])

    def batches(
        self, rows: Callable[[], Iterable[Rows]], with_masks: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        if not self.in_memory:  # read ahead
            yield from self.source.batches(lambda: (self.rows[np.asarray(batch)] for batch in rows()), with_masks)
            return
        for batch in rows():
            yield self.images(batch), self.masks(batch) if with_masks else None


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
      pixels: where images come from; decoded when asked for.
      has_masks: `masks` can be read.
    """

    name: str
    layout: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    groups: tuple[str, ...]
    labels: np.ndarray
    pixels: SelectedPixels
    has_masks: bool = False

    def __post_init__(self):
        sizes = {len(self.names), len(self.groups), len(self.labels), len(self.pixels)}
        if len(sizes) != 1:
            raise DataError(f"names, groups, labels and pixels of {self.name} differ in length: {sorted(sizes)}")
        if len(set(self.names)) != len(self.names):
            raise DataError(f"{self.name}: names of images must be unique, found {_repeated(self.names)} twice")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim == 2

    @property
    def labelled(self) -> bool:
        return self.multi_label or bool((self.labels >= 0).all())

    def images(self, rows: Rows) -> np.ndarray:
        """uint8 [n, S, S, C] of the given rows (int [n]); DataError for a file that cannot be decoded."""
        return self.pixels.images(rows)

    def masks(self, rows: Rows) -> np.ndarray:
        """uint8 [n, M, M]: class of each pixel (255: not labelled); of BMAD sets 0 and 1, zeros for normal images.

        Raises:
          DataError: the set has no masks, or a file cannot be decoded.
        """
        if not self.has_masks:
            raise DataError(f"{self.name} has no masks: use data.kind=segmentation, or bmad with a set that has masks")
        return self.pixels.masks(rows)[..., 0]

    def take(self, rows: Rows) -> "LabelledSet":
        """The set of the given rows; its images are decoded anew."""
        rows = np.asarray(rows, np.int64)
        pixels = replace(self.pixels, rows=self.pixels.rows[rows], _image=None, _known=None)
        names, groups = (tuple(values[row] for row in rows) for values in (self.names, self.groups))
        return replace(self, names=names, groups=groups, labels=self.labels[rows], pixels=pixels)

    def manifest_hash(self) -> str:
        """sha256 over names, labels and class names: equal for equal sets on every machine and at every image size."""
        digest = hashlib.sha256(repr((self.classes, self.multi_label)).encode())
        for name, label in zip(self.names, self.labels, strict=True):
            digest.update(repr((name, np.asarray(label, np.int64).tolist())).encode())
        return digest.hexdigest()


def _repeated(names: Sequence[str]) -> str:
    seen = set()
    return next(name for name in names if name in seen or seen.add(name))


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
    source = FilePixels(examples, sizes.image_size, sizes.mask_size, sizes.channels, 1, "threads", sizes.resize)
    pixels = SelectedPixels(source, np.arange(len(examples)), sizes)
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
    pixels = SelectedPixels(ArraySource(arrays, sizes), np.arange(len(arrays)), sizes)
    return LabelledSet(name, layout, tuple(classes), names, names, labels, pixels)


def existing_root(root: str, kind: str, expected: str) -> Path:
    """`data.root` as a folder; DataError that says where to get the data and what layout is expected."""
    if not root:
        raise DataError(f"data.root is empty: set --config.data.root to the folder of the {kind} data. {expected}")
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such folder. {expected}")
    return Path(root)
