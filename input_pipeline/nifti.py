"""Volumes (NIfTI) to a folder of slices that the detector reads like any other: PNG files, one grey scale a volume.

The folders of the volumes are those of images (`tree.py`): a flat folder of normals, or train, valid and test with good
and Ungood, and masks as volumes of the same names; or a tree of patients' folders, all normals. A slice of an abnormal
volume in which nothing is marked counts as normal, as in BMAD's brain and liver sets. Needs nibabel.

Axis alphabet: X Y Z volume, towards the patient's right, front and head; H W image.
"""

import contextlib
import logging
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from input_pipeline.dicom import Window, check_window
from input_pipeline.index import DataError, Example, Index, stem_of
from input_pipeline.tree import known_word, read_tree

SUFFIXES = (".nii", ".nii.gz")
AXES = ("sagittal", "coronal", "axial")  # the axis of the volume that slices are cut across
AIR = -500  # Hounsfield units: volumes that go below are CT, whose useful range is a fraction of what they hold
WHITE = 99.5  # percentile of the voxels above the least one
BODY = 0.1  # of white; voxels above it are body


def write_slices(root: str, output: Path, axis: str, every: int, min_body: float, window: Window) -> Counter[str]:
    """Writes `output`/{train,valid,test}/{good,Ungood/img,Ungood/anomaly_mask}/<volume>_slice<number>.png.

    Volumes of a tree without known folder names, which may all be called alike, give <patient>+<folders>-<volume>.

    Args:
      root: folder of volumes.
      output: must not exist; it appears when all slices are written.
      axis: one of AXES.
      every: takes one slice of so many.
      min_body: slices with less body than this share of the volume's fullest slice are left out, in [0, 1].
      window: (centre, width) of what is mapped to black and white; () maps each volume's least value to black and the
        99.5th percentile of the voxels above it to white.

    Returns:
      How many files each folder got, and "left out".

    Raises:
      DataError: a layout that `tree.read_tree` refuses, a damaged or four-dimensional volume, two of one name in a
        split, CT without a window, a mask of another shape or place than its volume. ValueError: an impossible option.
    """
    check_window(window)
    if axis not in AXES or every < 1 or not 0 <= min_body <= 1:
        raise ValueError(
            f"slices: expected axis among {', '.join(AXES)}, every of at least 1 and min_body in [0, 1], found "
            f"axis={axis!r}, every={every}, min_body={min_body}"
        )
    if output.exists():
        raise ValueError(f"{output} exists: expected a new folder for the slices")
    index = read_tree(root, calibration_fraction=0, require_train=False, suffixes=SUFFIXES)
    for warning in index.warnings:
        logging.warning("%s: %s", root, warning)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        counts = _write(index, Path(folder) / "slices", AXES.index(axis), every, min_body, window)
        (Path(folder) / "slices").rename(output)
    return counts


def _write(index: Index, root: Path, number: int, every: int, min_body: float, window: Window) -> Counter[str]:
    counts: Counter[str] = Counter()
    volumes = [(split, example) for split, examples in index.splits.items() for example in examples]
    _check_names(volumes)
    unmarked = []
    for split, example in tqdm(volumes, "slices", unit=" volumes", delay=2):
        grey, mask = _read(example, window)
        body = (grey > BODY).mean(tuple(k for k in range(3) if k != number))
        wanted = body >= min_body * body.max()
        counts["left out"] += int((~wanted).sum())
        found = set()
        for position in np.flatnonzero(wanted)[::every]:
            for folder, picture in _pictures(example, grey, mask, number, position):
                path = root / split / folder / f"{stem_of_slices(example)}_slice{position:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)
                counts[f"{split}/{folder}"] += 1
                found.add(folder)
        if example.label == 1 and found == {"good"}:
            unmarked.append(example.name)
    if unmarked:
        logging.warning(
            "%d abnormal volumes have no marked slice among those that were cut, %s the first: they count as normal; a "
            "smaller slices.every or slices.min_body cuts more",
            len(unmarked),
            unmarked[0],
        )
    return counts


def _check_names(volumes: Sequence[tuple[str, Example]]) -> None:
    """Slices and groups of two volumes of one name in a split, normal or not, could not be told apart."""
    known: dict[tuple[str, str], Example] = {}
    for split, example in volumes:
        other = known.setdefault((split, stem_of_slices(example)), example)
        if other is not example:
            raise DataError(f"{example.image} and {other.image}: two volumes of one name in {split}: rename one")


def stem_of_slices(example: Example) -> str:
    """What the slices of a volume are called: as it is, in front of that its folders where these say nothing else.

    PAT0/ST0/IM0001.nii becomes PAT0+ST0-IM0001, whose part before the plus is a group to `groups.group_of`; of a plus
    in the names themselves (T1+C.nii) a minus is made.
    """
    *folders, _ = PurePosixPath(example.name).parts
    stem = stem_of(example.name).replace("+", "-")
    if not folders or any(map(known_word, folders)):
        return stem
    folders = folders[1:] if folders[0] == example.group else folders
    return f"{example.group.replace('+', '-')}+{'-'.join((*folders, stem))}"


def _pictures(
    example: Example, grey: np.ndarray, mask: np.ndarray | None, number: int, position: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(folder below the split, uint8 [H, W]) of one slice and of its mask."""
    picture = np.rint(255 * display(grey, number, position)).astype(np.uint8)
    marked = None if mask is None else display(mask, number, position)
    if example.label == 0 or (marked is not None and not marked.any()):
        yield "good", picture
        return
    yield "Ungood/img", picture
    if marked is not None:
        yield "Ungood/anomaly_mask", 255 * marked.astype(np.uint8)


def display(volume: np.ndarray, number: int, position: int) -> np.ndarray:
    """One slice [H, W] as radiologists look at it: head or front up, the patient's right on the left, or front left.

    Args:
      volume: [X, Y, Z].
      number: of the axis that is cut, see AXES.
    """
    # Columns run along the first axis that is left, rows along the second; both are turned.
    return np.take(volume, position, axis=number)[::-1, ::-1].T


def _read(example: Example, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
    """(float32 [X, Y, Z] in 0..1, bool of the same shape or None)."""
    volume, affine = load_volume(example.image)
    values = _unit(example.image, volume, window)
    if example.mask is None:
        return values, None
    mask, place = load_volume(example.mask)
    if mask.shape != values.shape or not np.allclose(affine, place, atol=1e-3):
        raise DataError(
            f"{example.mask}: mask of shape {mask.shape}, its volume {example.image} has {values.shape}, or they lie "
            f"in other places; expected the same grid: resample the mask onto the volume"
        )
    return values, mask > 0


def load_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [X, Y, Z] turned to right, front, head; affine [4, 4]); DataError for what is no such volume."""
    nibabel, image = nibabel_module(), open_volume(path)
    with _named(path):
        image = nibabel.as_closest_canonical(nibabel.squeeze_image(image))
        return image.get_fdata(dtype=np.float32), image.affine


def open_volume(path: Path) -> Any:
    """The nibabel image of a volume as the file has it, its voxels not read; DataError as `load_volume`.

    Axes of length 1 beyond the third, which some tools write, may be there.
    """
    nibabel = nibabel_module()
    with _named(path):
        image = nibabel.load(path)
        if len(image.shape) < 3 or any(length > 1 for length in image.shape[3:]):
            raise DataError(f"{path}: shape {image.shape}; expected one volume of three axes: split the series")
        if image.get_data_dtype().kind not in "iuf":
            raise DataError(f"{path}: voxels of {image.get_data_dtype()}; expected one grey value each: convert it")
        if np.isnan(nibabel.io_orientation(image.affine)).any():
            raise DataError(f"{path}: its affine does not say how the axes lie in the patient: export it again")
        return image


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """DataError naming the file for whatever nibabel raises."""
    nibabel = nibabel_module()
    own = nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, ValueError, OverflowError, zlib.error, *own) as error:
        raise DataError(f"{path}: cannot be read as NIfTI ({error}); replace or remove it") from error


def nibabel_module() -> Any:
    """nibabel; DataError where it is not installed."""
    try:
        import nibabel
    except ImportError as error:
        raise DataError("NIfTI volumes need nibabel: pip install -e '.[medical]'") from error
    return nibabel


def _unit(path: Path, volume: np.ndarray, window: Window) -> np.ndarray:
    """The volume in 0..1, black to white."""
    volume = np.nan_to_num(volume)
    least = volume.min()
    if window:
        center, width = window
        black, white = center - width / 2, center + width / 2
    elif least < AIR:
        raise DataError(
            f"{path}: values down to {least:g}, as in CT; say what is black and white in Hounsfield units, for example "
            f'--config.data.window="(40., 400.)" for soft tissue'
        )
    else:
        inside = volume[volume > least]
        black, white = least, np.percentile(inside, WHITE) if inside.size else least
    if not white > black:
        raise DataError(f"{path}: nothing but the value {least:g} in it; replace or remove it")
    return np.clip((volume - black) / (white - black), 0, 1)
