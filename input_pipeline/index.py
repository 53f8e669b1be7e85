"""What a data set is before a pixel is read: one (name, image, label, mask, group) per image and split.

Axis alphabet: B batch, H W C image, N images of a split.
"""

import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

SPLITS = ("train", "calibration", "valid", "test")


class DataError(ValueError):
    """The data on disk is not what it has to be; the message names the file, the expectation and the way out."""


@dataclass(frozen=True)
class Example:
    """One image. `name` is its path relative to the data root (posix).

    `label` is 0 normal or 1 abnormal; in a set of classes (`sources_folder`) the class, -1 where it is not known.
    """

    name: str
    image: Path
    label: int
    mask: Path | None
    group: str

    def __post_init__(self):
        try:
            str(self.image).encode()
        except UnicodeEncodeError as error:  # reports and tables of names could not be written, after all the training
            raise DataError(
                f"{printable(self.image)}: the file's name is not UTF-8 (from an old archive?): rename it, "
                f"for example with convmv -f latin1 -t utf8 -r --notest FOLDER"
            ) from error


@dataclass(frozen=True)
class Index:
    """All images of a data set, by split (keys among `SPLITS`), each split sorted by name.

    `layout` says in one line what was recognised, `warnings` what looks odd but is usable.
    """

    dataset: str
    layout: str
    splits: dict[str, tuple[Example, ...]]
    warnings: tuple[str, ...] = ()

    def crossing_groups(self) -> dict[str, list[str]]:
        """See the function of this name."""
        return crossing_groups({key: [e.group for e in examples] for key, examples in self.splits.items()})

    def manifest_hash(self) -> str:
        """sha256 over (name, file size in bytes, label) of every image and (name, size) of every mask, in name order.

        Independent of the calibration split, so equal data has one hash under every seed.
        """
        digest = hashlib.sha256()
        for example in sorted((e for split in self.splits.values() for e in split), key=lambda e: e.name):
            mask = (example.mask.name, _size(example.mask)) if example.mask else ("", 0)
            digest.update(repr((example.name, _size(example.image), example.label, *mask)).encode())
        return digest.hexdigest()


def crossing_groups(groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """{group: [split, ...]} of the patients or groups that stand in train (or calibration) and in valid or test.

    Args:
      groups: group of each image, by split.
    """
    splits = defaultdict(set)
    for key, found in groups.items():
        for group in found:
            splits[group].add("train" if key == "calibration" else key)
    return {group: sorted(found) for group, found in sorted(splits.items()) if {"train"} < found}


def warn_of_crossing(
    dataset: str, crossing: Sequence[str], advice: str = "--mode=prepare on the files lists them"
) -> None:
    """Logs how many groups cross the splits, if any do, the first of them and `advice`."""
    if crossing:
        logging.warning(
            "%s: %d patients or groups stand in train and in valid or test (%s): what is measured on patients of the "
            "training set looks too good; %s",
            dataset,
            len(crossing),
            ", ".join([*crossing[:3], *["..."] * (len(crossing) > 3)]),
            advice,
        )


def _size(path: Path) -> int:
    """File size in bytes, -1 of a link to nothing: where the file is read it is named, or left out."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def printable(name: str | Path) -> str:
    """A file name that can be printed: bytes that are no UTF-8 become question marks."""
    return str(name).encode(errors="replace").decode()


def stem_of(name: str) -> str:
    """File name without folders and suffix: `a/00003_60.png` -> `00003_60`, `x.nii.gz` -> `x`; `1.2.840` as it is."""
    base = PurePosixPath(name).name
    suffix = ".nii.gz" if base.lower().endswith(".nii.gz") else PurePosixPath(base).suffix
    return base if suffix[1:].isdigit() or not suffix else base[: -len(suffix)]


def calibration_rows(groups: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """Rows held out for calibration: whole groups, in an order drawn from `seed`, of about `fraction` of the images.

    Args:
      groups: group of each of the N training images.
      fraction: share of the images to hold out, in [0, 1); 0 holds none out.
      seed: of the draw, at least 0; the result depends on nothing else but the arguments.

    Returns:
      bool [N], True where held out: at least one group, with a warning where that is more than twice `fraction`.

    Raises:
      DataError: every image belongs to one group, so that none can be held out.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"calibration_fraction must be in [0, 1), found {fraction}")
    if seed < 0:
        raise ValueError(f"data.seed: expected at least 0, found {seed}")
    names, inverse, sizes = np.unique(np.asarray(groups, dtype=str), return_inverse=True, return_counts=True)
    if fraction == 0:
        return np.zeros(len(groups), bool)
    if len(names) < 2:
        raise DataError(_one_group(groups))
    target = max(1, round(fraction * len(groups)))
    order = np.random.default_rng(seed).permutation(len(names))
    chosen, count = [], 0
    for group in order:
        if count + sizes[group] <= target:  # a group too large for what is left is passed over
            chosen.append(group)
            count += sizes[group]
    if not chosen:  # every group is larger than the target
        chosen = [order[np.argmin(sizes[order])]]
        if (count := sizes[chosen[0]]) > 2 * target:
            logging.warning(
                "%d of %d training normals are held out for calibration, not %d (data.calibration_fraction=%g): the "
                "smallest of %d patients or groups is that large; add patients, or, if images of one group are of "
                "different patients, say so by data.groups",
                *(count, len(groups), target, fraction, len(names)),
            )
    return np.isin(inverse, chosen)


def _one_group(groups: Sequence[str]) -> str:
    """Why none of the images can be held out, and what to do about it."""
    if len(groups) < 2:
        return f"calibration needs at least two training normals, found {len(groups)}: add images"
    by_header = re.fullmatch(r"patient-[0-9a-f]{12}", groups[0])  # see `dicom.patients_of`
    origin = "the DICOM headers: PatientID, or StudyInstanceUID" if by_header else "the names of files and folders"
    return (
        f"calibration needs training normals of at least two patients or groups, found {len(groups)} images of one, "
        f"'{groups[0]}' (from {origin}). Images of one patient must not be on both sides of a split: add images of "
        f"other patients, or, if these are of different patients, set --config.data.groups=image"
    )


def split_calibration(
    examples: Sequence[Example], fraction: float = 0.1, seed: int = 0
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(train, calibration) of the training normals, by whole groups; see `calibration_rows`."""
    held_out = calibration_rows([e.group for e in examples], fraction, seed)
    train = tuple(e for e, out in zip(examples, held_out, strict=True) if not out)
    return train, tuple(e for e, out in zip(examples, held_out, strict=True) if out)
