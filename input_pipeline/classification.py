"""From `config.data` to one split of a labelled (or unlabelled) image set, for distillation, probing and teachers.

Axis alphabet: N images, H W C image, S image side, F findings.
"""

import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from input_pipeline.decode import Resize
from input_pipeline.groups import GROUPS, check_groups
from input_pipeline.index import DataError, warn_of_crossing
from input_pipeline.segmentation import read_segmentation
from input_pipeline.sources import ArraySource, LabelledSet, Sizes
from input_pipeline.sources_arrays import read_digits, read_npz
from input_pipeline.sources_folder import read_bmad, read_folder
from input_pipeline.sources_lists import read_chestxray14, read_inat19
from input_pipeline.sources_tfds import read_tfds

Source = Callable[[ConfigDict, Sizes], dict[str, LabelledSet]]

SOURCES: dict[str, Source] = {
    "folder": lambda data, sizes: read_folder(data.root, data.name, sizes, data.groups),
    "bmad": lambda data, sizes: read_bmad(data.root, data.name, sizes, data.groups),
    "tfds": lambda data, sizes: read_tfds(data.root, data.name, sizes),
    "chestxray14": lambda data, sizes: read_chestxray14(data.root, data.name, sizes, data.groups),
    "inat19": lambda data, sizes: read_inat19(data.root, data.name, sizes, data.groups),
    "segmentation": lambda data, sizes: read_segmentation(data.root, data.name, sizes, data.groups),
    "npz": lambda data, sizes: read_npz(data.root, data.name, sizes),
    "digits": lambda data, sizes: read_digits(sizes),
}
NUMBERED = ("tfds", "npz", "digits")  # of arrays: their names are numbers, in which no expression finds a patient

__all__ = ["SOURCES", "LabelledSet", "carve", "corrupt_rows", "load_labelled"]


def load_labelled(
    data: ConfigDict, split: str, image_size: int, interpolation: str = "bicubic", check: bool = True
) -> LabelledSet:
    """Loads one split; images are decoded when they are first asked for.

    Where the source holds no split of that name:
      test: its valid split, if it has one (valid then comes from train; ImageNet, iNaturalist); else `test_fraction` of
        train, if train has labels or masks. A BMAD set has no labelled train: half of its test split becomes train.
      valid: `valid_fraction` of train.
    Parts of train are drawn by class and whole groups, from `seed` and the names alone, and train is what they leave.

    Args:
      data: kind (a key of SOURCES), name, root, channels (1: luminance, 3: RGB), groups (see
        `sources_folder.read_folder`; no expression for NUMBERED kinds), skip_corrupt, memory_limit_gb (decoded images
        below it stay in memory), valid_fraction, test_fraction, seed.
      split: "train", "valid" or "test".
      image_size: S. The short side is resized to it, then the middle square is cut out.
      interpolation: "bicubic", "bilinear" or "nearest".
      check: whether `skip_corrupt` looks for corrupt files here, which decodes the whole split; whoever uses few of its
        images checks those (see `few_shot.select_few_shot`).

    Returns:
      A set with images uint8 [n, S, S, channels] (grey is repeated for 3).

    Raises:
      ValueError: an unknown kind, split or interpolation, an impossible size, groups that the kind cannot have.
      DataError: data that is missing or not as it has to be, or a split that cannot be had from it.
    """
    if data.kind not in SOURCES:
        raise ValueError(f"unknown data.kind '{data.kind}': expected one of {', '.join(sorted(SOURCES))}")
    if split not in ("train", "valid", "test"):
        raise ValueError(f"split: expected train, valid or test, found '{split}'")
    if image_size < 1 or data.channels not in (1, 3):
        raise ValueError(
            f"expected an image_size above 0 and data.channels 1 or 3, found {image_size} and {data.channels}"
        )
    if check_groups(data.groups) not in GROUPS and data.kind in NUMBERED:
        raise ValueError(
            f"data.groups: expected auto or image for data.kind '{data.kind}', whose images have numbers for names, "
            f"found '{data.groups}'; to keep patients together cut the splits yourself, or read image files"
        )
    sizes = Sizes(image_size, image_size, data.channels, Resize(crop=True, interpolation=interpolation))
    source = SOURCES[data.kind](data, sizes)
    sets = _split_up(source, data)
    if split not in sets:
        raise DataError(
            f"data '{data.kind}' {data.root}: no {split} split (found {', '.join(sets)}); "
            f"set data.{split}_fraction above 0 to take it from train, which needs "
            f"{'labels or masks and ' * (split == 'test')}two patients or groups in a class"
        )
    found = sets[split]
    drawn = [key for key in ("test", "valid") if key in sets and all(sets[key] is not own for own in source.values())]
    if split == "train" and "train" in source and drawn:
        parts = " and ".join(f"{len(sets[key])} for {key}" for key in drawn)
        layout = f"{found.layout}, of these {parts} set apart (data.test_fraction, data.valid_fraction)"
        found = replace(found, layout=layout)
    if split != "train" and "train" in sets:
        crossing = sorted(set(sets["train"].groups) & set(found.groups))
        warn_of_crossing(found.name, crossing, "sort each patient's images into one split")
    if data.skip_corrupt and check:
        found = _without_corrupt(found, split)
    logging.info("%s %s: %d images; %s", found.name, split, len(found), found.layout)
    return replace(found, pixels=replace(found.pixels, memory_limit=data.memory_limit_gb * 2**30))


def _split_up(sets: dict[str, LabelledSet], data: ConfigDict) -> dict[str, LabelledSet]:
    """Adds the splits that the source lacks; see `load_labelled`."""
    sets = dict(sets)
    if "train" not in sets:
        _take_from(sets, "test", "train", 0.5, data.seed)
    if "test" not in sets and "valid" in sets:
        sets["test"] = sets.pop("valid")
    if "test" not in sets and (sets["train"].labelled or sets["train"].has_masks):
        _take_from(sets, "train", "test", data.test_fraction, data.seed + 1)
    if "valid" not in sets:
        _take_from(sets, "train", "valid", data.valid_fraction, data.seed)
    return sets


def _take_from(sets: dict[str, LabelledSet], source: str, split: str, fraction: float, seed: int) -> None:
    taken = carve(sets[source], fraction, seed)
    if taken.any():
        sets[split], sets[source] = (sets[source].take(np.flatnonzero(rows)) for rows in (taken, ~taken))


def name_order(names: Sequence[str], seed: int) -> np.ndarray:
    """int64 [N]: rows in a shuffled order that depends on each name and the seed alone.

    Sorting by a hash needs no random generator, so the order is the same with every version of every library, and
    images added to a set leave the order of the others as it is.
    """
    keys = [hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in names]
    return np.asarray(sorted(range(len(names)), key=lambda row: (keys[row], names[row])), np.int64)


def carve(found: LabelledSet, fraction: float, seed: int) -> np.ndarray:
    """Rows to set apart: of each class about `fraction` of its images, whole groups.

    A group belongs to the class of its first image; all images of multi-label sets are of one class here. Of each class
    at least one group is taken and at least one left, where it has two; a group that is too large for what is wanted is
    passed over, and where all are the smallest is taken, with a warning where that is more than twice too many.

    Returns:
      bool [N], nowhere true for fraction 0.

    Raises:
      ValueError: a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"valid_fraction and test_fraction must be in [0, 1), found {fraction}")
    if fraction == 0:
        return np.zeros(len(found), bool)
    groups, first, inverse, counts = np.unique(
        np.asarray(found.groups), return_index=True, return_inverse=True, return_counts=True
    )
    labels = np.zeros(len(groups), np.int64) if found.multi_label else found.labels[first]
    order, chosen = name_order([str(g) for g in groups], seed), np.zeros(len(groups), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        total, taken = counts[members].sum(), 0
        target = max(1, round(fraction * total))
        for group in members if len(members) > 1 else ():
            if taken + counts[group] <= target:
                chosen[group] = True
                taken += counts[group]
        if len(members) > 1 and not taken:
            chosen[smallest := members[np.argmin(counts[members])]] = True
            if (taken := counts[smallest]) > 2 * target:
                logging.warning(
                    "%d of %d images are set apart, not %d: the smallest of %d patients or groups is that large; add "
                    "patients, or, if images of one group are of different patients, say so by data.groups",
                    *(taken, total, target, len(members)),
                )
    return chosen[inverse]


def corrupt_rows(found: LabelledSet, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` (int [n]) whose files cannot be decoded, each logged."""
    if isinstance(found.pixels.source, ArraySource):
        return np.zeros(0, np.int64)
    stream = found.pixels.source.stream(lambda: found.pixels.rows[rows].tolist(), len(rows), found.has_masks)
    interval = 0.5 if sys.stderr.isatty() else 60.0  # a log file gets a line a minute
    decoded = tqdm(stream, f"{found.name}: checked", len(rows), unit=" images", delay=2, mininterval=interval)
    bad = []
    for row, (_, _, error) in zip(rows, decoded, strict=True):
        if error:
            logging.warning("skipped: %s", error)
            bad.append(row)
    return np.asarray(bad, np.int64)


def _without_corrupt(found: LabelledSet, split: str) -> LabelledSet:
    bad = corrupt_rows(found, np.arange(len(found)))
    if len(bad) == len(found):
        title = f"{found.name} {split}"
        raise DataError(f"{title}: none of its {len(found)} images can be decoded; check data.root and the files")
    return found.take(np.setdiff1d(np.arange(len(found)), bad)) if len(bad) else found
