"""From `config.data` to splits of decoded images.

Axis alphabet: N images of a split, H W C image, M mask side.
"""

import functools
import hashlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from input_pipeline import phantom
from input_pipeline.bmad import index_bmad
from input_pipeline.cache import load_npz
from input_pipeline.decode import largest_value, read_native_mask
from input_pipeline.dicom import check_window
from input_pipeline.groups import check_groups, groups_in, groups_of
from input_pipeline.index import DataError, Example, Index, calibration_rows, crossing_groups, warn_of_crossing
from input_pipeline.split import ArrayPixels, Dataset, FilePixels, Pixels, Split, join
from input_pipeline.tree import (
    find_images,
    in_mask_folder,
    left_out,
    no_image,
    patients_folders,
    read_tree,
    refuse_masks,
)

# Kinds of files: config.data and options of `build_index` -> Index. A new one is an entry (see docs/extending.md).
INDEX_FNS: dict[str, Callable[..., Index]] = {
    "bmad": lambda data, **options: index_bmad(data.name, data.root, **options),
    "folder": lambda data, **options: read_tree(data.root, data.name, **options),
}
KINDS = ("phantom", *INDEX_FNS, "npz")

__all__ = [
    "KINDS",
    "Dataset",
    "Split",
    "build_index",
    "dataset_from_index",
    "load_dataset",
    "load_images",
    "preprocessing",
]


def build_index(data: ConfigDict, require_train: bool = True) -> Index:
    """The index of a `data.kind` of INDEX_FNS, logged with its warnings and whether patients cross its splits.

    `require_train`: see `load_dataset`.
    """
    if not data.root:
        raise DataError(f"data.root is empty: set --config.data.root to the folder of the {data.kind} data")
    options = dict(calibration_fraction=data.calibration_fraction, seed=data.seed, groups=check_groups(data.groups))
    options["require_train"] = require_train
    index = INDEX_FNS[data.kind](data, **options)
    logging.info("%s: %s", index.dataset, index.layout)
    for warning in index.warnings:
        logging.warning("%s: %s", index.dataset, warning)
    warn_of_crossing(index.dataset, list(index.crossing_groups()))
    return index


def load_dataset(data: ConfigDict, min_size: int = 1, reader: str = "auto", require_train: bool = True) -> Dataset:
    """Loads the data set that `config.data` describes.

    Args:
      data: kind ('phantom', 'bmad', 'folder', 'npz'), name, root, image_size, mask_size, channels,
        window, calibration_fraction, groups (see `groups.groups_of`), seed, skip_corrupt, memory_limit_gb, cache, and
        phantom (arguments of `phantom.make_dataset`). With `cache`, or for kind 'npz' with `root`, pixels come from
        that file, and the calibration split is drawn anew, so that files and their cache give the same splits.
      min_size: smallest image side accepted, the model's patch size.
      reader: 'tf', 'threads' or 'auto' (see `input_pipeline.reader`).
      require_train: without training normals, raise (True) or return the other splits (False: evaluation only).

    Returns:
      A data set with splits train, calibration (unless its fraction is 0), and valid and test where there are any; in
      memory when the decoded pixels fit `memory_limit_gb` GiB, else decoded from files batch by batch.

    Raises:
      ValueError: an unknown kind or impossible size.
      DataError: data that is missing or not as it has to be. With `skip_corrupt`, files that cannot be decoded are left
        out with a logged warning instead.
    """
    if data.kind not in KINDS:
        raise ValueError(f"unknown data.kind '{data.kind}': expected one of {', '.join(KINDS)}")
    if data.channels not in (1, 3) or data.image_size < 1 or data.mask_size < 1:
        raise ValueError(
            f"data.channels must be 1 or 3 and the sizes positive, found channels={data.channels}, "
            f"image_size={data.image_size}, mask_size={data.mask_size}"
        )
    if data.kind == "npz" or data.cache:
        return _recarve(_from_cache(data), data, require_train)
    if data.kind == "phantom":
        return _recarve(_from_phantom(data), data, require_train)
    index = build_index(data, require_train)
    return dataset_from_index(index, data, data.skip_corrupt, data.memory_limit_gb, min_size, reader)


def load_images(
    root: Path, data: ConfigDict, min_size: int = 1, need_groups: bool = False
) -> tuple[Split, dict[str, str]]:
    """Every image below `root`, whatever its folders are called, with unknown label (-1): what prediction scores.

    What lies in mask folders (`tree.in_mask_folder`) is left out with a warning; `root` itself may be called anything.

    Args:
      data: for image_size, mask_size, channels, window, groups, skip_corrupt and memory_limit_gb.
      min_size: smallest image side accepted.
      need_groups: whether names in which data.groups finds no patient are an error; else, with a warning, each image
        is then its own: scores of images need no patients.

    Returns:
      The images, all decoded here once (they stay in memory if they fit), and {name: reason} of those left out as they
      cannot be: with `skip_corrupt`, else {}.

    Raises:
      DataError: no folder, no image in it, masks beside their images, files that cannot be decoded (named, up to
        ten), or with `skip_corrupt` none that can.
    """
    if not root.is_dir():
        raise DataError(f"{root}: {'is a file' if root.exists() else 'no such folder'}; expected a folder of images")
    folders, others = find_images(root)
    if not folders:
        raise no_image(root, others)
    if others:
        logging.warning("%s: %s", root, left_out(others))
    masks = {folder: folders.pop(folder) for folder in list(folders) if in_mask_folder(folder)}
    if masks:
        count = sum(map(len, masks.values()))
        shown = ", ".join([*map(str, list(masks)[:3]), *["..."] * (len(masks) > 3)])
        if not folders:
            raise DataError(
                f"{root}: all of its {count} images lie in folders of masks by their names ({shown}); give the folder "
                "of the images, or that folder itself if it holds no masks"
            )
        logging.warning("%s: %d files in folders of masks were left out: %s", root, count, shown)
    names = sorted((folder / file).as_posix() for folder, files in folders.items() for file in files)
    refuse_masks(root, names)  # one would be scored, or calibrate, as an image
    groups = _groups(root, names, check_groups(data.groups), need_groups)
    examples = tuple(Example(name, root / name, -1, None, group) for name, group in zip(names, groups, strict=True))
    in_memory = len(names) * data.image_size**2 * data.channels <= data.memory_limit_gb * 2**30
    pixels = _file_pixels(examples, data, min_size)
    pixels, rows, skipped = _decode(pixels, False, in_memory, data.skip_corrupt, root.resolve().name)
    names, groups = ([values[row] for row in rows] for values in (names, groups))
    return Split(names, groups, np.full(len(names), -1, np.int32), False, pixels), skipped


def _groups(root: Path, names: list[str], groups: str, needed: bool) -> list[str]:
    common = os.path.commonpath([PurePosixPath(name).parent for name in names])  # folders that wrap all say nothing
    below = [PurePosixPath(name).relative_to(common).as_posix() for name in names]
    try:
        if groups == "auto" and patients_folders(below):
            return groups_of(root / common, below, alike=True)
        return groups_of(root, names, groups)
    except DataError as error:
        if needed:
            raise
        logging.warning("%s; each image is taken for a patient of its own", error)
        return names


def preprocessing(data: ConfigDict) -> dict[str, Any]:
    """How `load_dataset` and `load_images` make uint8 images of files, for programs that do it themselves."""
    return {
        "size": data.image_size,
        "channels": data.channels,
        "colour": "luminance (ITU-R 601, Pillow's mode L)" if data.channels == 1 else "RGB; grey is repeated",
        "resize": "stretched to a square, Pillow bilinear, antialiased; after the conversion to grey or RGB",
        "transparency": "laid on black; an opaque alpha is dropped",
        "orientation": "EXIF is ignored; TIFFs are turned, by Pillow",
        "16-bit grey": "divided by 257 as float32 (65535 becomes 255; TIFFs whose white is zero are turned round), "
        "resized as float32 (Pillow's mode F), then rounded (halves to even) and cut to 0..255",
        "floating point": "in 0..1, times 255, then as 16-bit grey",
        "DICOM": "modality table or rescaling, the window below to 0..1, MONOCHROME1 turned round, padding black; then "
        "as floating point",
        "window": list(data.window) or "the file's own",  # (centre, width)
    }


def _from_cache(data: ConfigDict) -> Dataset:
    path = data.cache or data.root
    dataset = load_npz(path)
    for key in ("image_size", "mask_size", "channels"):
        if getattr(dataset, key) != data[key]:
            raise DataError(
                f"{path}: cache with {key}={getattr(dataset, key)}, the config says data.{key}={data[key]}; write the "
                f"cache again with --mode=prepare or change the config"
            )
    if data.name and data.kind != "npz" and data.name != dataset.name:
        raise DataError(f"{path}: cache of data set '{dataset.name}', the config says data.name='{data.name}'")
    return dataset


def _from_phantom(data: ConfigDict) -> Dataset:
    arrays = phantom.make_dataset(image_size=data.image_size, mask_size=data.mask_size, **data.phantom)
    digest, splits = hashlib.sha256(), {}
    for key, split in arrays.items():
        if len(split["name"]) == 0:
            continue
        image, mask, label = split["image"], split["mask"], np.asarray(split["label"], np.int32)
        digest.update(repr((key, list(split["name"]))).encode() + image.tobytes() + mask.tobytes() + label.tobytes())
        has_masks = bool(label.any())
        pixels = ArrayPixels(np.repeat(image, data.channels, axis=-1), mask if has_masks else None, data.mask_size)
        splits[key] = Split(list(split["name"]), list(split["group"]), label, has_masks, pixels)
    counts = ", ".join(f"{key} {len(split)}" for key, split in splits.items())
    facts = (data.channels, data.image_size, data.mask_size, splits)
    return Dataset(data.name or "phantom", f"generated phantoms: {counts}", digest.hexdigest(), *facts)


def _recarve(dataset: Dataset, data: ConfigDict, require_train: bool) -> Dataset:
    """Draws the calibration split from train (with a stored calibration split put back first), where there is one."""
    splits = dict(dataset.splits)
    if check_groups(data.groups) == "image":
        splits = {key: replace(split, groups=split.names) for key, split in splits.items()}
    elif data.groups != "auto":
        splits = {key: replace(split, groups=groups_in(split.names, data.groups)) for key, split in splits.items()}
    if "train" not in splits and require_train:
        raise DataError(f"data set '{dataset.name}' has no training normals: found {', '.join(splits) or 'nothing'}")
    crossing = crossing_groups({key: split.groups for key, split in splits.items()})
    warn_of_crossing(dataset.name, list(crossing))
    if "train" not in splits:
        return replace(dataset, splits=splits)
    parts = [splits.pop(key) for key in ("train", "calibration") if key in splits]
    dataset.splits = {}
    train = join(parts)
    del parts  # nothing else holds the arrays as they were stored
    held_out = calibration_rows(train.groups, data.calibration_fraction, data.seed)
    dataset.splits = {"train": train.take(np.flatnonzero(~held_out)), **splits}
    if held_out.any():
        dataset.splits["calibration"] = train.take(np.flatnonzero(held_out))
    return dataset


def dataset_from_index(
    index: Index,
    data: ConfigDict,
    skip_corrupt: bool,
    memory_limit_gb: float,
    min_size: int = 1,
    reader: str = "auto",
    look: Callable[[str, str, np.ndarray], None] | None = None,
) -> Dataset:
    """The data set of an index, in memory if its decoded pixels fit `memory_limit_gb` GiB; else as `load_dataset`.

    In memory or with `skip_corrupt` every file is decoded here: `look(split, name, image)` is called with each image,
    and masks in which nothing is marked are found: a warning, or a DataError where a split has no others.
    """
    has_masks = {key: any(e.mask for e in examples) for key, examples in index.splits.items()}
    per_image, per_mask = data.image_size**2 * data.channels, data.mask_size**2
    num_bytes = sum(len(found) * (per_image + has_masks[key] * per_mask) for key, found in index.splits.items())
    in_memory = num_bytes <= memory_limit_gb * 2**30
    splits = {}
    for key, examples in index.splits.items():
        pixels = _file_pixels(examples, data, min_size, reader)
        if in_memory or skip_corrupt:  # on disk, one pass only finds the corrupt files
            title = f"{index.dataset} {key}"
            empty, look_here = [], look and functools.partial(look, key)
            pixels, rows, _ = _decode(pixels, has_masks[key], in_memory, skip_corrupt, title, look_here, empty)
            examples = [examples[row] for row in rows]
            _check_masks(empty, sum(e.mask is not None for e in examples), data.mask_size, title)
        labels = np.asarray([e.label for e in examples], np.int32)
        splits[key] = Split([e.name for e in examples], [e.group for e in examples], labels, has_masks[key], pixels)
    facts = (data.channels, data.image_size, data.mask_size, splits)
    return Dataset(index.dataset, index.layout, index.manifest_hash(), *facts)


def _file_pixels(examples: tuple[Example, ...], data: ConfigDict, min_size: int, reader: str = "auto") -> FilePixels:
    sizes = (data.image_size, data.mask_size, data.channels, min_size)
    return FilePixels(examples, *sizes, reader, window=check_window(data.window))


def _decode(
    files: FilePixels,
    has_masks: bool,
    in_memory: bool,
    skip_corrupt: bool,
    title: str,
    look: Callable[[str, np.ndarray], None] | None = None,
    empty: list[Path] | None = None,
) -> tuple[Pixels, list[int], dict[str, str]]:
    """Decodes every file once, calls `look(name, image)` with each, appends mask files with nothing marked to `empty`.

    Returns:
      The pixels (in memory or still on disk), the rows that could be decoded, and {name: reason} of the others.

    Raises:
      DataError: files that cannot be decoded, without `skip_corrupt`, after all were tried; none that can be.
    """
    n, kept, skipped = len(files), [], {}
    image = np.empty((n if in_memory else 0, files.image_size, files.image_size, files.channels), np.uint8)
    mask = np.empty((n if in_memory and has_masks else 0, files.mask_size, files.mask_size, 1), np.uint8)
    stream = files.stream(lambda: range(n), n, has_masks)
    interval = 0.5 if sys.stderr.isatty() else 60.0  # a log file gets a line a minute
    progress = tqdm(stream, title, n, unit=" images", delay=2, mininterval=interval)
    for row, (one, its_mask, error) in enumerate(progress):
        if error:
            if skip_corrupt:
                logging.warning("skipped: %s", error)
            skipped[files.examples[row].name] = error
            continue
        if in_memory:
            image[len(kept)] = one
            if has_masks:
                mask[len(kept)] = its_mask
        example = files.examples[row]
        if look is not None:
            look(example.name, one)
        if empty is not None and example.mask and not its_mask.any():
            empty.append(example.mask)
        kept.append(row)
    if skipped and not skip_corrupt:
        first, *others = skipped
        shown = ", ".join([*others[:10], *["..."] * (len(others) > 10)])
        more = f"; {len(others)} more files of {title} cannot be decoded: {shown}" if others else ""
        raise DataError(skipped[first] + more)
    if skipped:
        logging.warning("%s: %d of %d images skipped, they cannot be decoded", title, len(skipped), n)
    if not kept:
        raise DataError(f"{title}: none of its {n} images can be decoded; check data.root and the files")
    if not in_memory:
        return replace(files, examples=tuple(files.examples[row] for row in kept)), kept, skipped
    return ArrayPixels(image[: len(kept)], mask[: len(kept)] if has_masks else None, files.mask_size), kept, skipped


def _check_masks(empty: list[Path], num_masks: int, mask_size: int, title: str) -> None:
    """A warning if some of a split's masks are empty; DataError if all are, which could not be measured against."""
    if not empty:
        return
    first = empty[0]
    if len(empty) < num_masks:
        logging.warning(
            "%s: nothing is marked in %d of %d masks at data.mask_size=%d, the first %s",
            *(title, len(empty), num_masks, mask_size, first),
        )
        return
    largest = largest_value(first)
    if read_native_mask(first).any():
        advice = "the marked places are lost when it is resized: raise data.mask_size"
    elif largest:
        advice = "masks stored as JPEG or WebP are cut at 127: store them as PNG, or with 255 for what is marked"
    else:
        advice = "export the masks again, or take the mask folder away"
    raise DataError(
        f"{first}: nothing is marked in it (largest value {largest:g}) at data.mask_size={mask_size}, nor in "
        f"the other masks of {title} ({num_masks} in all); {advice}"
    )
