"""Folders of class folders, flat folders without labels, and BMAD-like folders read as normal against abnormal.

Axis alphabet: N images.
"""

import logging
from collections import defaultdict
from pathlib import Path, PurePosixPath

from input_pipeline.groups import groups_of_labelled
from input_pipeline.index import DataError, Example
from input_pipeline.sources import LabelledSet, Sizes, existing_root, set_of_files
from input_pipeline.tree import SPLIT_WORDS, find_images, left_out, no_image, read_tree, refuse_masks, split_folders

EXPECTED = (
    "Expected {train,valid,test}/<class>/*.png (or .jpg, .tif, .bmp, .webp; valid and test may be absent, the classes "
    "stand in every split by the same name), <class>/* without splits, or images directly in the folder (unlabelled)"
)
BMAD_EXPECTED = "Expected train/good and test/{good,Ungood}, see docs/data.md (sets: https://github.com/DorisBao/BMAD)"


def read_folder(root: str, name: str, sizes: Sizes, groups: str = "auto") -> dict[str, LabelledSet]:
    """The splits ("train", "valid", "test") that stand in a folder; without split folders all of it is "train".

    Args:
      groups: "auto": DICOM files of one patient are a group, and slices as --mode=slices names them; all other images,
        and with "image" all images, are a group each; or a regular expression on the name, see
        `groups.groups_of_labelled`.

    Raises:
      DataError: no folder, no image, images beside class folders, an empty class, or a class unknown to train.
    """
    folder = existing_root(root, "folder", EXPECTED)
    children = _folders(folder)
    splits = split_folders(folder)
    if splits and "train" not in splits:
        raise DataError(f"{folder}: found {', '.join(sorted(c.name for c in children))} but no train/. {EXPECTED}")
    others = [c.name for c in children if c.name.lower() not in SPLIT_WORDS]
    if splits and others:
        raise DataError(f"{folder}: folders {', '.join(others[:5])} stand beside train/: move them. {EXPECTED}")
    splits = splits or {"train": folder}
    classes = tuple(c.name for c in _folders(splits["train"]))
    sets = {}
    for split in ("train", "valid", "test"):
        if split in splits:
            sets[split] = _read_split(splits[split], folder, classes, name or folder.resolve().name, sizes, groups)
    return sets


def _folders(root: Path) -> list[Path]:
    return sorted(c for c in root.iterdir() if c.is_dir() and not c.name.startswith((".", "__MACOSX")))


def _read_split(split: Path, root: Path, classes: tuple[str, ...], name: str, sizes: Sizes, groups: str) -> LabelledSet:
    folders, others = find_images(split)
    if others:
        logging.warning("%s: %s", split, left_out(others))
    files = defaultdict(list)
    for below, names in folders.items():
        files[below.parts[0] if below.parts else ""] += [below / file for file in names]
    refuse_masks(split, [file.as_posix() for found in files.values() for file in found])
    found, direct = [c.name for c in _folders(split)], files.pop("", [])
    if found and direct:
        raise DataError(f"{split / direct[0]}: {len(direct)} images stand beside class folders in {split}. {EXPECTED}")
    if unknown := [c for c in found if c not in classes]:
        raise DataError(f"{split}: classes {', '.join(unknown[:5])} have no folder in train. {EXPECTED}")
    if not found:
        if not direct:
            raise DataError(f"{no_image(split, others)}. {EXPECTED}")
        examples = _examples(split, root, dict.fromkeys(direct, -1), groups)
        return set_of_files(name, f"{len(direct)} images without labels in {split}", classes, examples, sizes)
    if absent := [c for c in classes if c not in found]:
        logging.warning("%s: no folder of the classes %s", split, ", ".join(absent[:5]))
    if empty := [c for c in found if c not in files]:
        raise DataError(f"{split / empty[0]}: class without an image; add images or remove the folder")
    labels = {file: label for label, word in enumerate(classes) for file in files.get(word, ())}
    examples = _examples(split, root, labels, groups)
    return set_of_files(name, f"{len(examples)} images of {len(found)} classes in {split}", classes, examples, sizes)


def _examples(split: Path, root: Path, labels: dict[PurePosixPath, int], groups: str) -> list[Example]:
    """Of files given relative to `split`, named relative to `root`."""
    below = split.relative_to(root)
    names = [(below / file).as_posix() for file in labels]
    found = zip(names, labels.values(), groups_of_labelled(root, names, groups, list(labels.values())), strict=True)
    return [Example(name, root / name, label, None, group) for name, label, group in found]


def read_bmad(root: str, name: str, sizes: Sizes, groups: str = "auto") -> dict[str, LabelledSet]:
    """A BMAD-like tree as classes normal and abnormal: "valid" where it holds both, and "test".

    The normal images of train/ are left out: with them, the classes would differ in number by the protocol of the
    set and not by anything in the images. Use kind 'folder' on train/good for unlabelled images.
    """
    folder = existing_root(root, "bmad", BMAD_EXPECTED)
    index = read_tree(folder, name, calibration_fraction=0, require_train=False, groups=groups)
    sets = {}
    for split in ("valid", "test"):
        examples = index.splits.get(split, ())
        if {e.label for e in examples} == {0, 1}:
            sets[split] = set_of_files(index.dataset, index.layout, ("normal", "abnormal"), examples, sizes)
    if "test" not in sets:
        raise DataError(f"{folder}: no test split with normal and abnormal images ({index.layout}). {BMAD_EXPECTED}")
    return sets
