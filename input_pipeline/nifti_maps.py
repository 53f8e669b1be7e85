"""Anomaly maps of slices back to volumes (NIfTI) on the grid that they were cut from: the way back of `nifti.py`.

Axis alphabet: X Y Z volume, towards the patient's right, front and head; M side of a map; H W slice.
"""

import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from input_pipeline.index import DataError
from input_pipeline.nifti import AXES, SUFFIXES, load_volume, nibabel_module, stem_of_slices
from input_pipeline.tree import read_tree

_SLICE = re.compile(r"(?P<stem>.+)_slice(?P<position>\d+)(\.[A-Za-z]+)?\.npy")


def write_volumes(root: str, maps: Path, output: Path, axis: str, every: int) -> int:
    """Writes `output`/<volume>_anomaly.nii.gz for each volume below `root` that has maps.

    Values are those of the maps: 0 the normals' median, 1 their 95th percentile. What was not cut is 0; between slices
    that were cut every so many, values run from one to the next.

    Args:
      root: folder of the volumes that slices were cut from.
      maps: folder with the slices' maps, <volume>_slice<number>.png.npy of float [M, M], in any folders.
      output: must not exist; it appears when all volumes are written.
      axis, every: with which they were cut.

    Returns:
      The number of volumes written.

    Raises:
      DataError: no maps, maps of none of these volumes, of two slices of one name, or that do not fit their volume.
      ValueError: if `output` exists.
    """
    if output.exists():
        raise ValueError(f"{output} exists: expected a new folder for the volumes")
    nibabel, slices = nibabel_module(), _find(maps)
    number, written = AXES.index(axis), 0
    index = read_tree(root, calibration_fraction=0, suffixes=SUFFIXES)
    examples = [example for part in index.splits.values() for example in part]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        target = Path(folder) / "volumes"
        target.mkdir()
        for example in tqdm(examples, "volumes", unit=" volumes", delay=2):
            stem = stem_of_slices(example)
            if stem not in slices:
                continue
            volume, affine = load_volume(example.image)
            filled = _fill(example.image, volume.shape, slices[stem], number, every)
            nibabel.save(nibabel.Nifti1Image(filled, affine), target / f"{stem}_anomaly.nii.gz")
            written += 1
        if not written:
            some = ", ".join(sorted(slices)[:3])
            raise DataError(
                f"{root}: none of its {len(examples)} volumes has maps in {maps}, which holds those of {some}: "
                "expected the folder that --mode=slices cut"
            )
        target.rename(output)
    if written < len(examples):
        logging.warning("%s: %d of %d volumes have no maps in %s", root, len(examples) - written, len(examples), maps)
    return written


def _find(maps: Path) -> dict[str, dict[int, Path]]:
    """Volume's name -> position of a slice -> its map."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(maps.rglob("*.npy")):
        match = _SLICE.fullmatch(path.name)
        if match is None:
            continue
        known = found.setdefault(match["stem"], {})
        if other := known.get(int(match["position"])):
            raise DataError(f"{other} and {path} are maps of the same slice: expected one of each")
        known[int(match["position"])] = path
    if not found:
        raise DataError(
            f"{maps}: no map of a slice (<volume>_slice045.png.npy) in it; --mode=predict with "
            "--config.score.save_maps=True writes them to PREDICTION/maps"
        )
    return found


def _fill(volume: Path, shape: tuple[int, ...], slices: Mapping[int, Path], number: int, every: int) -> np.ndarray:
    """float32 [X, Y, Z] from the maps of some slices across axis `number`."""
    filled = np.zeros(shape, np.float32)
    across = np.moveaxis(filled, number, 0)  # a view
    if max(slices) >= len(across):
        raise DataError(
            f"{slices[max(slices)]}: slice {max(slices)} of {volume}, which has {len(across)} {AXES[number]} ones: "
            "expected the volumes and the slices.axis that the slices were cut with"
        )
    before = None
    for position in sorted(slices):
        across[position] = _turned_back(slices[position], across.shape[1:])
        if before is not None and position - before <= every:
            for between in range(before + 1, position):
                share = np.float32((between - before) / (position - before))
                across[between] = (1 - share) * across[before] + share * across[position]
        before = position
    return filled


def _turned_back(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The map of a slice as the volume lies: the way back of `nifti.display`, stretched to `shape`."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as a map ({error}): predict again") from error
    if values.ndim != 2 or values.dtype.kind != "f":
        raise DataError(f"{path}: expected a map of floats [M, M], found {values.dtype} {list(values.shape)}")
    picture = Image.fromarray(values.astype(np.float32)).resize(shape, Image.Resampling.BILINEAR)  # (width, height)
    return np.asarray(picture).T[::-1, ::-1]
