"""A decoded data set as one .npz file, from which training runs without TensorFlow and without the image files.

Axis alphabet: N images of a split, H W C image, M mask side.
"""

import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np

from input_pipeline.index import SPLITS, DataError
from input_pipeline.split import ArrayPixels, Dataset, Split

FORMAT = "mtl_moe_vit_distill dataset"
VERSION = 1
WRITTEN_AT_ONCE = 32  # images


def save_npz(dataset: Dataset, path: str | Path) -> None:
    """Writes all splits decoded (uncompressed, about H * W * C bytes an image) and puts the file in place in one step.

    Images go to the file a few at a time, as `np.savez` would have written them: a set on disk stays there.
    Whatever stood at `path` stays whole when writing fails (a full disk raises OSError, a bad image DataError). Less
    room than the images need is a DataError before anything is written.
    """
    path = Path(path)
    facts = {k: getattr(dataset, k) for k in ("name", "layout", "manifest_hash", "channels", "image_size", "mask_size")}
    header = {"format": FORMAT, "version": VERSION, "splits": list(dataset.splits), **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    per_image, per_mask = dataset.image_size**2 * dataset.channels, dataset.mask_size**2
    needed = sum(len(split) * (per_image + split.has_masks * per_mask) for split in dataset.splits.values())
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise DataError(
            f"{path}: the images need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: make room, or "
            "name a file on another disk"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                _write(archive, "header", np.asarray(json.dumps(header)))
                for key, split in dataset.splits.items():
                    _write_split(archive, key, split, dataset)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _write_split(archive: zipfile.ZipFile, key: str, split: Split, dataset: Dataset) -> None:
    _write(archive, f"{key}/label", split.labels)
    _write(archive, f"{key}/name", np.asarray(split.names, dtype=str))
    _write(archive, f"{key}/group", np.asarray(split.groups, dtype=str))
    sides = {"image": (dataset.image_size, dataset.image_size, dataset.channels)}
    if split.has_masks:
        sides["mask"] = (dataset.mask_size, dataset.mask_size, 1)
    starts = range(0, len(split), WRITTEN_AT_ONCE)
    rows = [np.arange(start, min(start + WRITTEN_AT_ONCE, len(split))) for start in starts]
    for which, side in sides.items():
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(split), *side)}
        with archive.open(f"{key}/{which}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for images, masks in split.pixels.batches(lambda: rows, which == "mask"):
                file.write((images if which == "image" else masks).tobytes())


def load_npz(path: str | Path) -> Dataset:
    """Reads what `save_npz` wrote, into memory; DataError for a missing, truncated, foreign or newer file."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; write it with --mode=prepare, or unset data.cache to read the images")
    foreign = DataError(f"{path}: not a data cache of this program; write one with --mode=prepare")
    try:
        with path.open("rb") as file:
            if file.read(2) not in (b"PK", b""):  # a text, or one array
                raise foreign
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if "header" not in stored:
                raise foreign
            header = json.loads(str(stored["header"]))
            if header.get("format") != FORMAT or header.get("version") != VERSION:
                raise DataError(
                    f"{path}: cache of format '{header.get('format')}' version {header.get('version')}, expected "
                    f"'{FORMAT}' version {VERSION}; write it again with --mode=prepare"
                )
            splits = {key: _load_split(stored, key, header["mask_size"]) for key in header["splits"] if key in SPLITS}
    except DataError:
        raise
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = error if zipfile.is_zipfile(path) else "no .npz file, or a part of one"  # numpy would speak of pickles
        raise DataError(f"{path}: damaged or truncated ({reason}); write it again with --mode=prepare") from error
    facts = {k: header[k] for k in ("name", "layout", "manifest_hash", "channels", "image_size", "mask_size")}
    return Dataset(**facts, splits=splits)


def _load_split(stored: np.lib.npyio.NpzFile, key: str, mask_size: int) -> Split:
    mask = stored.get(f"{key}/mask")
    names, groups = ([str(s) for s in stored[f"{key}/{field}"]] for field in ("name", "group"))
    pixels = ArrayPixels(stored[f"{key}/image"], mask, mask_size)
    return Split(names, groups, stored[f"{key}/label"], mask is not None, pixels)
