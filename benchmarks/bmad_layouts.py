"""Synthetic copies of BMAD's six sets: folders, file names, native sizes, modes, masks and counts of the real ones.

Folders are those of the released archives, as BMAD's README and its authors' scripts name them (docs/bmad.md), or those
of the re-packed copies. File names carry what the reader looks at: patients (brain, liver, oct2017) or none (rsna,
camelyon16); how RESC names its slices is not known to us. Pixels are random cells: every image differs from the others.
Axis alphabet: H W image.
"""

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image

from input_pipeline.bmad import BMAD

CELLS = 64  # a side; written in blocks, so that files of a megapixel are small and quick to write
# A few of each kind at any scale: calibration needs five normals, metrics both labels.
MIN_TRAIN, MIN_OTHER = 60, 4
# The colours BMAD's brain slices were written with, uint8 [256, 4].
BONE = colormaps["bone"](np.arange(256), bytes=True)


@dataclass(frozen=True)
class Layout:
    """Folders of one set.

    `image` and `mask` (empty: no masks) are filled with split, Split (the same, capitalised) and label.
    """

    folder: str
    image: str
    mask: str = ""
    train: str = "train/good"
    valid: str = "valid"
    abnormal: str = "Ungood"
    normal_masks: bool = False


RELEASED = {
    "brain": Layout("Brain_AD/BraTS2021_slice", "{split}/{label}/img", "{split}/{label}/label"),
    "liver": Layout("Liver_AD/Liver/Train/hist_DIY", "{split}/img/{label}", "{split}/label/{label}", normal_masks=True),
    "resc": Layout(
        "Retina_RESC_AD/RESC", "{Split}/{split}/{label}", "{Split}/{split}_label/{label}", "Train/train/good", "val"
    ),
    "oct2017": Layout("Retina_OCT2017_AD/OCT2017", "{split}/{label}", valid="val"),
    "rsna": Layout("Chest-AD/Chest-RSNA", "{split}/{label}", valid="val"),
    "camelyon16": Layout("Histopathology_AD/camelyon16_256", "{split}/{label}"),
}
REPACKED = {
    name: replace(
        layout,
        image="{split}/{label}/img",
        mask=layout.mask and "{split}/{label}/anomaly_mask",
        train="train/good",
        abnormal="ungood",
    )
    for name, layout in RELEASED.items()
}
LAYOUTS = {"released": RELEASED, "repacked": REPACKED}


@dataclass(frozen=True)
class File:
    """One image to write, with its mask or None; paths relative to the folder of all six sets."""

    image: str
    mask: str | None
    split: str
    abnormal: bool


def scaled(count: int, scale: float, least: int) -> int:
    """`count` at `scale` of the size, not below `least`, not above `count`; exact at scale 1."""
    return min(count, max(least, round(count * scale)))


def stem(name: str, split: str, abnormal: bool, i: int) -> str:
    """Name of the i-th image of a part of a set."""
    first = {"train": 0, "valid": 3000, "test": 4000}[split] + 700 * abnormal
    if name == "brain":
        return f"{first + i // 8:05d}_{60 + i % 8}"
    if name == "liver":  # BTCV's and LiTS's volumes are numbered alike
        if split == "train":
            return f"{i // 52 + 1}_{i % 52}"
        return f"{i // 20 + 60 * (split == 'valid')}_{400 + 100 * abnormal + i % 20}"
    if name == "oct2017":
        kind = ("CNV", "DME", "DRUSEN")[i % 3] if abnormal else "NORMAL"
        return f"{kind}-{1000 * first + i // 5 + 1}-{i % 5 + 1}"
    if name == "rsna":
        kind = ("Lung_Opacity_", "No-Not-Normal_")[i % 2] if abnormal else "Normal-"
        return kind + str(uuid.uuid5(uuid.NAMESPACE_OID, f"{split}/{abnormal}/{i}"))
    return f"{1000 + i}" if name == "camelyon16" else f"{first + i // 40:04d}_{i % 40:03d}"


def plan_files(name: str, layout: str = "released", scale: float = 1.0) -> list[File]:
    """Every image of a set at its published count, or at a share `scale` of it.

    Raises:
      ValueError: an unknown set or layout.
    """
    if name not in BMAD or layout not in LAYOUTS:
        raise ValueError(
            f"expected a set of {', '.join(BMAD)} and a layout of {', '.join(LAYOUTS)}, found {name!r} and {layout!r}"
        )
    where, files = LAYOUTS[layout][name], []
    for split in ("train", "valid", "test"):
        word = where.valid if split == "valid" else split
        for abnormal, count in enumerate(getattr(BMAD[name], split)):
            words = {"split": word, "Split": word.capitalize(), "label": where.abnormal if abnormal else "good"}
            folder = where.train if split == "train" else where.image.format(**words)
            masks = split != "train" and where.mask and (abnormal or where.normal_masks)
            for i in range(scaled(count, scale, MIN_TRAIN if split == "train" else MIN_OTHER)):
                file = f"{stem(name, split, bool(abnormal), i)}.png"
                mask = f"{where.folder}/{where.mask.format(**words)}/{file}" if masks else None
                files.append(File(f"{where.folder}/{folder}/{file}", mask, split, bool(abnormal)))
    return files


def picture(name: str, seed: int, abnormal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Image and mask at the native size and in the mode of set `name`.

    Returns:
      uint8 [H, W] grey, [H, W, 3] (camelyon16) or [H, W, 4] (brain, coloured with "bone"); mask uint8 [H, W], of 0 and
      255 (liver: 0 and 1), all zero for normal images.
    """
    rng = np.random.default_rng(seed)
    color = (3,) if name == "camelyon16" else ()
    cells = rng.integers(90, 160, (CELLS, CELLS, *color), dtype=np.uint8)
    mask = np.zeros((CELLS, CELLS), np.uint8)
    if abnormal:
        row, column, side = (*rng.integers(16, 40, 2), rng.integers(3, 9))
        cells[row : row + side, column : column + side] += 80
        mask[row : row + side, column : column + side] = 1 if name == "liver" else 255
    if name in ("brain", "liver"):  # cut out on black
        rows, columns = np.ogrid[:CELLS, :CELLS]
        cells[(rows - CELLS / 2) ** 2 + (columns - CELLS / 2) ** 2 > (0.45 * CELLS) ** 2] = 0
    image, mask = (_blocks(values, BMAD[name].native_size) for values in (cells, mask))
    return (BONE[image] if name == "brain" else image), mask


def _blocks(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[CELLS, CELLS, ...] repeated to [H, W, ...]."""
    rows, columns = (np.arange(side) * CELLS // side for side in size)
    return cells[rows[:, None], columns[None]]


def write_tree(root: Path, name: str, layout: str = "released", scale: float = 1.0) -> tuple[list[File], int]:
    """Writes the copy of set `name` below `root`, and empty folders of the other five sets beside it.

    Returns:
      What was written, and its size in bytes.
    """
    files = plan_files(name, layout, scale)
    for other in LAYOUTS[layout].values():
        (root / other.folder).mkdir(parents=True, exist_ok=True)
    for folder in {(root / path).parent for file in files for path in _paths(file)}:
        folder.mkdir(parents=True, exist_ok=True)

    def write(numbered: tuple[int, File]) -> int:
        seed, file = numbered
        size = 0
        for path, values in zip(_paths(file), picture(name, seed, file.abnormal), strict=False):
            Image.fromarray(values).save(root / path, compress_level=1)
            size += (root / path).stat().st_size
        return size

    with ThreadPoolExecutor(2) as pool:  # Pillow compresses outside the GIL
        return files, sum(pool.map(write, enumerate(files)))


def _paths(file: File) -> Iterator[str]:
    yield file.image
    if file.mask:
        yield file.mask
