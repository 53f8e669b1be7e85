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
from input_pipeline.nifti import AXES, SUFFIXES, nibabel_module, open_volume, stem_of_slices
from input_pipeline.tree import read_tree

_SLICE = re.compile(r"(?P<stem>.+)_slice(?P<position>\d+)(\.[A-Za-z]+)?\.npy")


def write_volumes(root: str, maps: Path, output: Path, axis: str, every: int) -> int:
    """Writes `output`/<volume>_anomaly.nii.gz for each volume below `root` that has maps, voxel by voxel as that lies.

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
      DataError: no maps, maps of none of these volumes, of two volumes or slices of one name, or that do not fit their
        volume.
      ValueError: for an impossible axis or every, or if `output` exists.
    """
    if axis not in AXES or every < 1:
        raise ValueError(
            f"volumes: expected axis among {', '.join(AXES)} and every of at least 1, found axis={axis!r}, "
            f"every={every}"
        )
    if output.exists():
        raise ValueError(f"{output} exists: expected a new folder for the volumes")
    slices = _find(maps)
    number, gaps = AXES.index(axis), []
    index = read_tree(root, calibration_fraction=0, require_train=False, suffixes=SUFFIXES)
    examples = [example for part in index.splits.values() for example in part]
    volumes: dict[str, Path] = {}
    for example in examples:
        stem = stem_of_slices(example)
        if stem in slices and stem in volumes:
            raise DataError(
                f"{example.image} and {volumes[stem]}: two volumes of one name, and the maps may be of either: set "
                "data.root to the folder of the one they are of"
            )
        volumes[stem] = example.image
    written = volumes.keys() & slices.keys()
    if not written:
        some = ", ".join(sorted(slices)[:3])
        raise DataError(
            f"{root}: none of its {len(examples)} volumes has maps in {maps}, which holds those of {some}: "
            "expected the folder that --mode=slices cut"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        target = Path(folder) / "volumes"
        target.mkdir()
        for stem in tqdm(sorted(written), "volumes", unit=" volumes", delay=2):
            gaps += [stem] * _write(volumes[stem], slices[stem], number, every, target / f"{stem}_anomaly.nii.gz")
        target.rename(output)
    if lacking := len(examples) - len(written):
        logging.warning("%s: %d of %d volumes have no maps in %s", root, lacking, len(examples), maps)
    if gaps:
        logging.warning(
            "%d of %d volumes, %s the first, have slices without a map between those that have one: they are 0; cut "
            "with another slices.every, left out by slices.min_body, or not predicted?",
            *(len(gaps), len(written), gaps[0]),
        )
    return len(written)


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


def _write(volume: Path, slices: Mapping[int, Path], number: int, every: int, target: Path) -> bool:
    """Writes the maps of one volume in the order of axes of its file; whether slices between them have none."""
    nibabel, image = nibabel_module(), open_volume(volume)
    turned = nibabel.io_orientation(image.affine)  # [3, 2]: which axis of X Y Z each of the file's is, and its sign
    shape = tuple(image.shape[axis] for axis in np.argsort(turned[:, 0]))
    filled, gap = _fill(volume, shape, slices, number, every)
    back = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), turned)
    header = image.header.copy()  # both of the file's transforms and their units
    header.set_data_dtype(np.float32)
    header["cal_min"] = header["cal_max"] = 0  # the range that viewers show the volume in
    maps = nibabel.orientations.apply_orientation(filled, back)
    nibabel.save(type(image)(maps, image.affine, header), target)
    return gap


def _fill(
    volume: Path, shape: tuple[int, ...], slices: Mapping[int, Path], number: int, every: int
) -> tuple[np.ndarray, bool]:
    """float32 [X, Y, Z] from the maps of some slices across axis `number`; whether some between these have none."""
    filled, gap = np.zeros(shape, np.float32), False
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
        gap |= before is not None and position - before > every
        before = position
    return filled, gap


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
