"""Folders of class folders, flat folders without labels, and BMAD-like folders read as normal against abnormal.

Axis alphabet: N images.
"""

import logging
from pathlib import Path

from input_pipeline.dicom import is_dicom
from input_pipeline.index import DataError, Example
from input_pipeline.sources import LabelledSet, Sizes, existing_root, set_of_files
from input_pipeline.tree import IMAGE_SUFFIXES, SPLIT_WORDS, find_images, read_tree

EXPECTED = (
    "Expected {train,valid,test}/<class>/*.png (or .jpg, .tif, .bmp; valid and test may be absent, the classes stand "
    "in every split by the same name), <class>/* without splits, or images directly in the folder (unlabelled)"
)
BMAD_EXPECTED = "Expected train/good and test/{good,Ungood}, see docs/data.md (sets: https://github.com/DorisBao/BMAD)"


def read_folder(root: str, name: str, sizes: Sizes) -> dict[str, LabelledSet]:
    """The splits ("train", "valid", "test") that stand in a folder; without split folders all of it is "train".

    Raises:
      DataError: no folder, no image, images beside class folders, an empty class, or a class unknown to train.
    """
    folder = existing_root(root, "folder", EXPECTED)
    children = _folders(folder)
    splits = {SPLIT_WORDS[c.name.lower()]: c for c in children if c.name.lower() in SPLIT_WORDS}
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
            sets[split] = _read_split(splits[split], folder, classes, name or folder.resolve().name, sizes)
    return sets


def _folders(root: Path) -> list[Path]:
    return sorted(c for c in root.iterdir() if c.is_dir() and not c.name.startswith((".", "__MACOSX")))


def _read_split(split: Path, root: Path, classes: tuple[str, ...], name: str, sizes: Sizes) -> LabelledSet:
    found = {c.name: c for c in _folders(split)}
    visible = [p for p in split.iterdir() if not p.name.startswith(".")]
    direct = [p for p in visible if p.suffix.lower() in IMAGE_SUFFIXES or is_dicom(p)]
    if found and direct:
        raise DataError(f"{direct[0]}: {len(direct)} images stand beside class folders in {split}. {EXPECTED}")
    if unknown := [c for c in found if c not in classes]:
        raise DataError(f"{split}: classes {', '.join(unknown[:5])} have no folder in train. {EXPECTED}")
    if not found:
        if not direct:
            raise DataError(f"{split}: no image in it. {EXPECTED}")
        examples = [_example(path, root, -1) for path in direct]
        return set_of_files(name, f"{len(direct)} images without labels in {split}", classes, examples, sizes)
    if absent := [c for c in classes if c not in found]:
        logging.warning("%s: no folder of the classes %s", split, ", ".join(absent[:5]))
    examples = []
    for label, word in enumerate(classes):
        if word not in found:
            continue
        images = [
            _example(found[word] / below / file, root, label)
            for below, files in find_images(found[word])[0].items()
            for file in files
        ]
        if not images:
            raise DataError(f"{found[word]}: class without an image; add images or remove the folder")
        examples += images
    return set_of_files(name, f"{len(examples)} images of {len(found)} classes in {split}", classes, examples, sizes)


def _example(path: Path, root: Path, label: int) -> Example:
    name = path.relative_to(root).as_posix()
    return Example(name, path, label, None, name)


def read_bmad(root: str, name: str, sizes: Sizes) -> dict[str, LabelledSet]:
    """A BMAD-like tree as classes normal and abnormal: "valid" where it holds both, and "test".

    The normal images of train/ are left out: with them, the classes would differ in number by the protocol of the
    set and not by anything in the images. Use kind 'folder' on train/good for unlabelled images.
    """
    folder = existing_root(root, "bmad", BMAD_EXPECTED)
    index = read_tree(folder, name or folder.resolve().name, calibration_fraction=0, require_train=False)
    sets = {}
    for split in ("valid", "test"):
        examples = index.splits.get(split, ())
        if {e.label for e in examples} == {0, 1}:
            sets[split] = set_of_files(index.dataset, index.layout, ("normal", "abnormal"), examples, sizes)
    if "test" not in sets:
        raise DataError(f"{folder}: no test split with normal and abnormal images ({index.layout}). {BMAD_EXPECTED}")
    return sets
