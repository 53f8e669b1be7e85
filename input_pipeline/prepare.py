"""Checks a folder of images before any training, and writes it decoded to one .npz.

Axis alphabet: H W C image, N images of a split.
"""

import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline.cache import save_npz
from input_pipeline.dataset import INDEX_FNS, build_index, dataset_from_index
from input_pipeline.decode import native_size, read_example, read_image
from input_pipeline.dicom import Window, is_dicom, own_window
from input_pipeline.index import DataError, Example, Index

HASH_SIZE = 64  # px; duplicates are equal pixels at this size, whatever the file format
DARK = 64  # of 255: images whose brightest pixel stays below were not windowed (12 bits stored in 16, for one)
FLAT = 32  # of 255: nor were images whose brightest pixel is no more than so much above the darkest
# An image is coloured when the channels of so large a share of its pixels differ by so much of 255: more than JPEG
# makes of grey, and more than the "bone" colour map, of which luminance loses nothing.
COLOURED, COLOURED_SHARE = 32, 0.01
COLOUR_SAMPLE = 64  # images looked at
SHRUNK = 4  # images that shrink by more lose what a larger data.image_size would keep
SHOWN = 10  # entries of a list on the terminal

_PART = {"calibration": "train"}  # calibration images are training images to these checks


def prepare(data: ConfigDict, out_path: str | Path = "", min_size: int = 1) -> dict:
    """Checks every image of `config.data` (a kind of `dataset.INDEX_FNS`) and writes the .npz cache to `out_path`.

    The cache is written when every file can be decoded, or with `data.skip_corrupt` from those that can. Without
    training normals it is one to measure a trained detector on.

    Returns:
      A dict of plain values: dataset, layout, manifest_hash, warnings (counts against the BMAD table among them),
      counts {split: {normal, abnormal, masks}}, calibration_groups [group of each calibration normal that can be
      decoded], corrupt {name: reason}, duplicates [[name, name, ...]] (equal at 64x64,
      over all splits), leaks (those of them that stand in train and in valid or test), crossing_groups {group: [split]}
      (patients in train and elsewhere), native_sizes {'HxW': images}, and cache (the path written, or '').

    Raises:
      ValueError: another kind of data. DataError: a layout that cannot be read (see `tree.read_tree`), or masks in none
        of which anything is marked.
    """
    if data.kind not in INDEX_FNS:
        raise ValueError(f"prepare checks files (data.kind: one of {', '.join(INDEX_FNS)}), found '{data.kind}'")
    index = build_index(data, require_train=False)
    same, extrema = defaultdict(list), []

    def look(key: str, name: str, image: np.ndarray) -> None:
        same[_thumbnail_hash(image)].append((_PART.get(key, key), name))
        if key == "train":
            extrema.append((image.min(), image.max()))

    # A set that fits memory is written from there; of another nothing is kept, and writing decodes it again.
    limit = data.memory_limit_gb if out_path else 0.0
    dataset = dataset_from_index(index, data, True, limit, min_size, look=look)
    kept = {name for split in dataset.splits.values() for name in split.names}
    bad = [e for examples in index.splits.values() for e in examples if e.name not in kept]
    corrupt = {e.name: _reason(e, data, min_size) for e in bad}
    duplicates = sorted(sorted(found) for found in same.values() if len(found) > 1)
    native_sizes = _native_sizes(index, kept)
    warnings = [*index.warnings, *_unwindowed(np.asarray(extrema, int)), *_windows(index, kept, data.window)]
    warnings += [*_coloured_images(index, kept, data), *_shrunk_images(native_sizes, data.image_size)]
    report = {
        "dataset": index.dataset,
        "layout": index.layout,
        "manifest_hash": dataset.manifest_hash,
        "warnings": warnings,
        "counts": _counts(index),
        "calibration_groups": list(dataset.splits["calibration"].groups) if "calibration" in dataset.splits else [],
        "corrupt": corrupt,
        "duplicates": [[name for _, name in same] for same in duplicates],
        "leaks": [[name for _, name in same] for same in duplicates if {"train"} < {part for part, _ in same}],
        "crossing_groups": index.crossing_groups(),
        "native_sizes": native_sizes,
        "cache": "",
    }
    if out_path and (not corrupt or data.skip_corrupt):
        save_npz(dataset, out_path)
        report["cache"] = str(out_path)
    return report


def _reason(example: Example, data: ConfigDict, min_size: int) -> str:
    try:
        read_example(example, data.image_size, data.mask_size, data.channels, min_size, window=data.window)
    except DataError as error:
        return str(error)
    raise RuntimeError(f"{example.image}: could not be decoded a moment ago and now can; is the disk failing?")


def _counts(index: Index) -> dict[str, dict[str, int]]:
    counts = {}
    for key, examples in index.splits.items():
        labels = [e.label for e in examples]
        masks = sum(e.mask is not None for e in examples)
        counts[key] = {"normal": labels.count(0), "abnormal": labels.count(1), "masks": masks}
    return counts


def _thumbnail_hash(image: np.ndarray) -> bytes:
    """Of uint8 [H, W, C] at 64x64: equal for equal images, whatever the file format."""
    small = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).resize((HASH_SIZE, HASH_SIZE))
    return hashlib.sha256(np.asarray(small).tobytes()).digest()


def _native_sizes(index: Index, kept: set[str]) -> dict[str, int]:
    """Images per native size, most frequent first."""
    examples = [e for found in index.splits.values() for e in found if e.name in kept]
    sizes = Counter("{}x{}".format(*native_size(e.image)) for e in examples)
    return dict(sizes.most_common())


def _unwindowed(extrema: np.ndarray) -> list[str]:
    """extrema: int [N, 2], the darkest and brightest value of each training image."""
    if not len(extrema):
        return []
    brightest, contrast = np.median(extrema[:, 1]), np.median(np.ptp(extrema, axis=1))
    if brightest < DARK:
        return [
            f"training images are very dark (median of their brightest pixels {brightest:.0f} of 255): 12-bit values "
            f"stored in 16 bits? Window them to the full range before training (DICOM: data.window)"
        ]
    if contrast < FLAT:
        return [
            f"training images hold few grey levels (median of brightest minus darkest pixel {contrast:.0f} of 255): "
            f"window them to the full range before training (DICOM: data.window)"
        ]
    return []


def _windows(index: Index, kept: set[str], window: Window) -> list[str]:
    examples = [e for found in index.splits.values() for e in found if e.name in kept and is_dicom(e.image)]
    found = {} if window else Counter(own_window(e.image) for e in examples)
    if len(found) < 2:
        return []
    return [
        f"{len(examples)} DICOM files bring {len(found)} different windows of their own, so that equal values differ "
        f"in brightness: for CT set data.window to one for all, for example --config.data.window='{next(iter(found))}'"
    ]


def _coloured_images(index: Index, kept: set[str], data: ConfigDict) -> list[str]:
    examples = [e for found in index.splits.values() for e in found if e.name in kept]
    if data.channels == 3:
        return []
    # core.sampling.even_rows, which the pipeline may not import
    rows = np.linspace(0, len(examples) - 1, min(len(examples), COLOUR_SAMPLE)).round().astype(int)
    coloured = sum(_is_coloured(read_image(examples[row].image, HASH_SIZE, 3, window=data.window)) for row in rows)
    if not coloured:
        return []
    return [
        f"{coloured} of {len(rows)} images{' looked at' * (len(rows) < len(examples))} are coloured; they become grey: "
        f"--config.data.channels=3 keeps colour"
    ]


def _is_coloured(image: np.ndarray) -> bool:
    """Whether the channels of uint8 [H, W, 3] differ noticeably."""
    return (np.ptp(image, axis=-1) > COLOURED).mean() > COLOURED_SHARE


def _shrunk_images(native_sizes: dict[str, int], image_size: int) -> list[str]:
    short = [min(map(int, size.split("x"))) for size, count in native_sizes.items() for _ in range(count)]
    side = np.median(short)
    if side <= SHRUNK * image_size:
        return []
    return [
        f"median short side {side:g} px, used at {image_size}: --config.data.image_size={2 * image_size} and a larger "
        f"preset (configs/mtl_moe/folder.py:preset=small) keep more, or --config.data.tile_size={image_size} with a "
        f"larger image_size, which trains as fast"
    ]


def format_report(report: dict) -> str:
    """The report as text for a terminal: lists longer than SHOWN are cut, saying so (corrupt files never are)."""

    def shown(items: list[str]) -> list[str]:
        rest = len(items) - SHOWN
        return [f"  {item}" for item in items[:SHOWN]] + ([f"  ... and {rest} more"] if rest > 0 else [])

    lines = [f"{report['dataset']}: {report['layout']}"]
    for key, count in report["counts"].items():
        lines.append(f"{key:12s} {count['normal']} normal, {count['abnormal']} abnormal, {count['masks']} masks")
    groups = report["calibration_groups"]
    calibrated = (
        f"smallest p-value: 1/{len(groups) + 1} = {1 / (len(groups) + 1):.2g}, by {len(groups)} calibration normals of "
        f"{len(set(groups))} patients or groups"
    )
    untrained = (
        "no training normals: none can be trained; a trained detector is measured on test/, normal and abnormal images"
    )
    lines.append(calibrated if "train" in report["counts"] else untrained)
    lines += ["native sizes (height x width):", *shown([f"{s}: {n}" for s, n in report["native_sizes"].items()])]
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    lines += [f"corrupt files: {len(report['corrupt'])}", *(f"  {reason}" for reason in report["corrupt"].values())]
    lines += [
        f"duplicate images: {len(report['duplicates'])} sets",
        *shown([" = ".join(d) for d in report["duplicates"]]),
    ]
    lines += [f"  of these in train and in valid or test: {len(report['leaks'])}"]
    crossing = [f"{group}: {', '.join(splits)}" for group, splits in report["crossing_groups"].items()]
    lines += [f"patients or groups in train and in another split: {len(crossing)}", *shown(crossing)]
    if report["cache"]:
        lines.append(f"written: {report['cache']}")
    elif report["corrupt"]:
        lines.append("no cache written: repair or remove the corrupt files, or set data.skip_corrupt")
    return "\n".join(lines)
