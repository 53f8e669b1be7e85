"""Images with a class for every pixel: {train,valid,test}/{images,masks}, pictures or .npy.

Axis alphabet: N images, S image side, M mask side.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from input_pipeline.decode import native_size, read_class_mask
from input_pipeline.groups import groups_of_labelled
from input_pipeline.index import DataError, Example
from input_pipeline.sources import LabelledSet, SelectedPixels, Sizes, existing_root, set_of_files
from input_pipeline.split import FilePixels, Rows
from input_pipeline.tree import IMAGE_SUFFIXES, split_folders

IGNORED = 255  # id of pixels that no class was given
MAX_UNNAMED = 64  # classes that need no classes.txt: blurred masks, which hold every value, look like more
EXPECTED = (
    "Expected {train,valid,test}/{images,masks} with equal file stems (valid and test may be absent); images .png, "
    ".jpg, .tif, .bmp, .webp or .npy (uint8 or 0..1, [H, W] or [H, W, 3]); masks grey or palette pictures or .npy of "
    "class ids from 0 (255: ignored; masks of 0 and 255 alone are background and foreground); names of the classes in "
    "classes.txt, one a line: needed only where no mask holds some of the ids. HYPSO-1: https://ntnu-smallsat-lab.github.io/hypso1_sea_land_clouds_dataset"
)


@dataclass
class ClassMasks:
    """Pixels of image files and of their masks of class ids; `binary` masks hold 0 and 255 for 0 and 1."""

    files: FilePixels
    masks_at: tuple[Path, ...]
    sizes: Sizes
    binary: bool

    def __len__(self) -> int:
        return len(self.files)

    def stream(self, rows: Callable[[], Iterable[int]], num_images: int, with_masks: bool) -> Iterator:
        """Decodes images as `FilePixels.stream`; masks are not looked at."""
        return self.files.stream(rows, num_images, False)

    def images(self, rows: Rows) -> np.ndarray:
        return self.files.images(rows)

    def masks(self, rows: Rows) -> np.ndarray:
        side = self.sizes.mask_size
        squares = [self._mask(self.masks_at[int(row)]) for row in rows]
        return np.stack(squares)[..., None] if squares else np.zeros((0, side, side, 1), np.uint8)

    def _mask(self, path: Path) -> np.ndarray:
        picture = Image.fromarray(read_class_mask(path))
        ids = np.asarray(self.sizes.resize.square(picture, self.sizes.mask_size, nearest=True))
        return (ids > 0).astype(np.uint8) if self.binary else ids

    def batches(
        self, rows: Callable[[], Iterable[Rows]], with_masks: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for batch in rows():
            yield self.images(batch), self.masks(batch) if with_masks else None


def read_segmentation(root: str, name: str, sizes: Sizes, groups: str = "auto") -> dict[str, LabelledSet]:
    """The splits of a segmentation set; labels are -1, `masks` gives the class of each pixel.

    Args:
      groups: as of `sources_folder.read_folder`.

    Raises:
      DataError: no such folder or split, an image without mask or the reverse, a mask of another size than its image,
        class ids that classes.txt does not name.
    """
    folder = existing_root(root, "segmentation", EXPECTED)
    splits = split_folders(folder)
    if "train" not in splits:
        raise DataError(f"{folder}: no train/. {EXPECTED}")
    pairs = {split: _pairs(splits[split], folder, groups) for split in ("train", "valid", "test") if split in splits}
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda pair: _ids(*pair), itertools.chain(*pairs.values())))
    ids = np.unique(np.concatenate(found))
    binary = set(ids.tolist()) <= {0, IGNORED} and IGNORED in ids
    number = 2 if binary else int(ids[ids != IGNORED].max(initial=0)) + 1
    if not binary and not (folder / "classes.txt").is_file():
        _check_unnamed(ids[ids != IGNORED], [path for _, path in itertools.chain(*pairs.values())], found)
    classes = _class_names(folder, number)
    sets = {}
    for split, found in pairs.items():
        layout = f"{len(found)} images with masks of {len(classes)} classes in {splits[split]}"
        one = set_of_files(name or folder.resolve().name, layout, classes, [image for image, _ in found], sizes)
        pixels = ClassMasks(one.pixels.source, tuple(mask for _, mask in found), sizes, binary)
        rows = np.arange(len(found))
        sets[split] = LabelledSet(
            one.name, layout, classes, one.names, one.groups, one.labels, SelectedPixels(pixels, rows, sizes), True
        )
    return sets


def _ids(example: Example, path: Path) -> np.ndarray:
    """Class ids in a mask, which has to be of its image's size; decoded once, though each load asks."""
    return _decoded_ids(example, path, tuple(file.stat().st_mtime_ns for file in (example.image, path)))


@functools.lru_cache(maxsize=2**20)
def _decoded_ids(example: Example, path: Path, changed: tuple[int, int]) -> np.ndarray:
    """`changed`: when the two files were, so that other content is read anew."""
    mask, size = read_class_mask(path), native_size(example.image)
    if mask.shape != size:
        raise DataError(
            f"{path}: mask of {mask.shape[0]}x{mask.shape[1]} pixels, its image {example.image} has "
            f"{size[0]}x{size[1]}; expected equal sizes: export the mask again at the image's size"
        )
    return np.unique(mask)


def _check_unnamed(ids: np.ndarray, paths: list[Path], found: list[np.ndarray]) -> None:
    """DataError unless `ids`, ascending, are 0, 1, ... without a gap; `found` are those in the mask of each path."""
    odd = next((int(value) for row, value in enumerate(ids) if value != row or row == MAX_UNNAMED), None)
    if odd is not None:
        path = next(path for path, held in zip(paths, found, strict=True) if odd in held)
        raise DataError(
            f"{path}: value {odd}, but the masks hold {len(ids)} values in all; expected class ids 0, 1, ... without a "
            f"gap and at most {MAX_UNNAMED} of them (255: ignored), or 0 and 255 alone: export masks with blurred "
            f"edges again, or name every class in classes.txt"
        )


def _class_names(folder: Path, number: int) -> tuple[str, ...]:
    path = folder / "classes.txt"
    if not path.is_file():
        return tuple(str(row) for row in range(number))
    classes = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if len(classes) < number:
        raise DataError(
            f"{path}: {len(classes)} names, but masks hold the id {number - 1}; expected a name for each id"
        )
    return classes


def _pairs(split: Path, root: Path, groups: str) -> list[tuple[Example, Path]]:
    """(image, mask) of each stem, sorted by the image's name."""
    by_stem = {}
    for word in ("images", "masks"):
        folder, suffixes = split / word, (*IMAGE_SUFFIXES, ".npy")
        if not folder.is_dir():
            raise DataError(f"{split}: no {word}/. {EXPECTED}")
        files = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in suffixes and not p.name.startswith(".")]
        by_stem[word] = {path.stem: path for path in files}
        if len(by_stem[word]) < len(files):
            raise DataError(f"{folder}: two files of one stem; expected a file for each image")
    images, masks = by_stem["images"], by_stem["masks"]
    if not images or set(images) != set(masks):
        odd = sorted(set(images) ^ set(masks))
        raise DataError(f"{split}: {len(images)} images, {len(masks)} masks, without partner {odd[:5]}. {EXPECTED}")
    names = {stem: path.relative_to(root).as_posix() for stem, path in images.items()}
    stems = sorted(images, key=names.__getitem__)
    found = zip(stems, groups_of_labelled(root, [names[stem] for stem in stems], groups), strict=True)
    return [(Example(names[stem], images[stem], -1, None, group), masks[stem]) for stem, group in found]
