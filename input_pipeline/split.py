"""A decoded data set in memory or on disk behind the same few methods.

Axis alphabet: B batch, N images of a split, H W C image, M mask side.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from input_pipeline.decode import STRETCH, Resize, read_example, read_example_mask, read_image
from input_pipeline.dicom import Window
from input_pipeline.index import DataError, Example
from input_pipeline.reader import Decoded, choose_reader, decode_in_order

Rows = np.ndarray  # int [n]


class Pixels(Protocol):
    """Where a split's pixels come from."""

    def __len__(self) -> int: ...

    def images(self, rows: Rows) -> np.ndarray:
        """uint8 [n, H, W, C] of the given rows."""

    def masks(self, rows: Rows) -> np.ndarray:
        """uint8 {0, 1} [n, M, M, 1] of the given rows."""

    def batches(
        self, rows: Callable[[], Iterable[Rows]], with_masks: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """(images, masks or None) for each row array of `rows()`, read ahead."""


@dataclass
class ArrayPixels:
    """Decoded pixels in memory: image uint8 [N, H, W, C], mask uint8 {0, 1} [N, M, M, 1], or None for all zeros."""

    image: np.ndarray
    mask: np.ndarray | None
    mask_size: int

    def __len__(self) -> int:
        return len(self.image)

    def images(self, rows: Rows) -> np.ndarray:
        return self.image[rows]

    def masks(self, rows: Rows) -> np.ndarray:
        if self.mask is None:
            return np.zeros((len(rows), self.mask_size, self.mask_size, 1), np.uint8)
        return self.mask[rows]

    def batches(
        self, rows: Callable[[], Iterable[Rows]], with_masks: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for batch in rows():
            yield self.images(batch), self.masks(batch) if with_masks else None


@dataclass
class FilePixels:
    """Pixels decoded from files whenever they are asked for; a bad file raises DataError at that moment."""

    examples: tuple[Example, ...]
    image_size: int
    mask_size: int
    channels: int
    min_size: int
    reader: str = "auto"
    resize: Resize = STRETCH
    window: Window = ()

    def __len__(self) -> int:
        return len(self.examples)

    def decode(self, row: int, with_masks: bool = True) -> Decoded:
        """One example as `reader.Decoded`: a bad file is reported in the message, the arrays are then zero."""
        example, no_mask = self.examples[row], np.zeros(0, np.uint8)
        try:
            if with_masks:
                sizes = (self.image_size, self.mask_size, self.channels, self.min_size)
                return *read_example(example, *sizes, self.resize, self.window), ""
            image = read_image(example.image, self.image_size, self.channels, self.min_size, self.resize, self.window)
            return image, no_mask, ""
        except DataError as error:
            image = np.zeros((self.image_size, self.image_size, self.channels), np.uint8)
            mask = np.zeros((self.mask_size, self.mask_size, 1), np.uint8)
            return image, mask if with_masks else no_mask, str(error)

    def stream(self, rows: Callable[[], Iterable[int]], num_images: int, with_masks: bool) -> Iterator[Decoded]:
        """Decodes rows in order and in parallel; `num_images` (roughly how many) chooses the reader."""
        reader = choose_reader(self.reader, num_images)
        return decode_in_order(lambda row: self.decode(row, with_masks), rows, reader)

    def batches(
        self, rows: Callable[[], Iterable[Rows]], with_masks: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        return self._batches(rows, with_masks, len(self))

    def _batches(
        self, rows: Callable[[], Iterable[Rows]], with_masks: bool, num_images: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        stream = self.stream(lambda: (int(row) for batch in rows() for row in batch), num_images, with_masks)
        for batch in rows():
            decoded = []
            for _ in batch:
                image, mask, error = next(stream)
                if error:
                    raise DataError(error)
                decoded.append((image, mask))
            yield np.stack([d[0] for d in decoded]), np.stack([d[1] for d in decoded]) if with_masks else None

    def images(self, rows: Rows) -> np.ndarray:
        if len(rows) == 0:
            return np.zeros((0, self.image_size, self.image_size, self.channels), np.uint8)
        return next(self._batches(lambda: [rows], False, len(rows)))[0]

    def masks(self, rows: Rows) -> np.ndarray:
        out = np.empty((len(rows), self.mask_size, self.mask_size, 1), np.uint8)
        stream = decode_in_order(self._decode_mask, lambda: map(int, rows), choose_reader(self.reader, len(rows)))
        for position, (_, mask, error) in enumerate(stream):
            if error:
                raise DataError(error)
            out[position] = mask
        return out

    def _decode_mask(self, row: int) -> Decoded:
        """`decode` without the image."""
        no_image = np.zeros(0, np.uint8)
        try:
            return no_image, read_example_mask(self.examples[row], self.mask_size, self.resize), ""
        except DataError as error:
            return no_image, np.zeros((self.mask_size, self.mask_size, 1), np.uint8), str(error)


@dataclass
class Split:
    """N images of one split.

    `names` (unique, sorted) and `groups` (patient or near-duplicate group) are lists of N strings, `labels` is int32
    [N] (0 normal, 1 abnormal). `has_masks`: the abnormal images have pixel masks, so pixel metrics make sense.
    """

    names: list[str]
    groups: list[str]
    labels: np.ndarray
    has_masks: bool
    pixels: Pixels

    def __post_init__(self) -> None:
        sizes = {len(self.names), len(self.groups), len(self.labels), len(self.pixels)}
        if len(sizes) != 1:
            raise DataError(f"names, groups, labels and pixels of a split differ in length: {sorted(sizes)}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.pixels, ArrayPixels)

    def images(self, rows: Rows) -> np.ndarray:
        """uint8 [n, H, W, C] of the given rows (int [n])."""
        return self.pixels.images(np.asarray(rows, np.int64))

    def masks(self, rows: Rows) -> np.ndarray:
        """uint8 {0, 1} [n, M, M, 1] of the given rows; zeros for normal images and for splits without masks."""
        return self.pixels.masks(np.asarray(rows, np.int64))

    def take(self, rows: Rows) -> "Split":
        """The split of the given rows, of the same kind (in memory or on disk)."""
        rows = np.asarray(rows)
        if self.in_memory:
            mask = None if self.pixels.mask is None else self.pixels.mask[rows]
            pixels = ArrayPixels(self.pixels.image[rows], mask, self.pixels.mask_size)
        else:
            pixels = replace(self.pixels, examples=tuple(self.pixels.examples[row] for row in rows))
        names, groups = ([values[row] for row in rows] for values in (self.names, self.groups))
        return Split(names, groups, self.labels[rows], self.has_masks, pixels)


def join(parts: Sequence[Split]) -> Split:
    """Splits of normal images of one data set, all in memory or all on disk, as one without masks, sorted by name."""
    pixels = [part.pixels for part in parts]
    names, groups = ([value for part in parts for value in getattr(part, field)] for field in ("names", "groups"))
    order = sorted(range(len(names)), key=names.__getitem__)
    if parts[0].in_memory:
        image = np.empty((len(names), *pixels[0].image.shape[1:]), np.uint8)
        ends = np.cumsum([len(part) for part in pixels])[:-1]
        for part, rows in zip(pixels, np.split(np.argsort(order), ends), strict=True):
            image[rows] = part.image  # straight to its place: the pixels are in memory twice, not three times
        together = ArrayPixels(image, None, pixels[0].mask_size)
    else:
        examples = [example for part in pixels for example in part.examples]
        together = replace(pixels[0], examples=tuple(examples[row] for row in order))
    labels = np.concatenate([part.labels for part in parts])[order]
    return Split([names[row] for row in order], [groups[row] for row in order], labels, False, together)


@dataclass
class Dataset:
    """All splits of a data set (keys among `index.SPLITS`) and what they are: sizes in pixels, `channels` 1 or 3.

    `layout` says what was recognised, `manifest_hash` identifies the data (sha256).
    """

    name: str
    layout: str
    manifest_hash: str
    channels: int
    image_size: int
    mask_size: int
    splits: dict[str, Split]
