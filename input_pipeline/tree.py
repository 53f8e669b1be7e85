"""Reads a folder tree into an `Index`: which folder names mean a split, a label, an image or a mask folder.

Every folder between the root and a file must be one of these words (any case), in any order:
  split   train, valid (val), test; also `val_label`, `test_mask`: a split's mask folder
  label   good (normal, healthy) or Ungood (abnormal, anomaly, bad)
  images  img (image, images, data)
  masks   anomaly_mask (mask, masks, label, labels, ground_truth, gt)
A folder of any other name under a mask folder names a kind of defect (MVTec: `ground_truth/hole/000_mask.png`), and the
same name under a split then holds abnormal images (`test/hole/000.png`). So `valid/Ungood/anomaly_mask`,
`valid/label/Ungood` and `Val/val_label/Ungood` are one thing to the reader, and a name nobody expects is an error
instead of a guess. A tree without any of these words (a scanner's export, BIDS) holds training normals, as a
flat folder does, unless a folder's name says otherwise (`yes`, `benign`, `test_images`; `0` and `1` alone).

Axis alphabet: H W C image, N images of a split.
"""

import logging
import os
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from input_pipeline import dicom
from input_pipeline.groups import groups_of
from input_pipeline.index import (
    DataError,
    Example,
    Index,
    printable,
    split_calibration,
    stem_of,
)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", *dicom.SUFFIXES)

SPLIT_WORDS = {"train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid"}
SPLIT_WORDS |= {"test": "test", "testing": "test"}


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of `root` that are called as a split is: "train", "valid", "test" -> folder.

    Raises:
      DataError: for two folders of one split.
    """
    found: dict[str, Path] = {}
    for folder in sorted(child for child in root.iterdir() if child.is_dir()):
        if split := SPLIT_WORDS.get(folder.name.lower()):
            if split in found:
                raise DataError(
                    f"{root}: {found[split].name}/ and {folder.name}/ both name the {split} split: expected one of "
                    "them; put their images together, or move one away"
                )
            found[split] = folder
    return found


_NORMAL = ("good", "normal", "healthy")
_ABNORMAL = ("ungood", "abnormal", "anomaly", "bad")
_IMAGES = ("img", "image", "images", "data")
_MASKS = ("anomaly_mask", "mask", "masks", "label", "labels", "ground_truth", "gt")
# Masks by their names: sub-01_T1w_dseg, normal (1)_mask_1; what is found is the stem of the image.
_MASK_STEM = re.compile(
    r"(?:(.*)[-_. ])?(?:masks?[-_ ]?\d*|d?seg|segmentation|labels?|roi|anno|annotation)", re.IGNORECASE
)
# Words in the names of folders which say that images are divided, or which of them are abnormal.
_DIVIDED = re.compile(
    r"train(ing)?|val(id(ation)?)?|test(ing)?|class\d*|pos(itive)?|neg(ative)?|benign|malign(ant|ancy)?"
    r"|(no|non)?tumou?rs?|cancer(ous)?|\w*(carcinoma|glioma|meningioma|melanoma)|lesions?|patholog(y|ic|ical)"
    r"|diseased?|abnormal(ity|ities)?|anomal(y|ies|ous)|defects?|defective|bad|sick|(un)?infected|infection"
    r"|covid(19)?|pneumonia|tuberculosis|ha?emorrhage|fractured?|stroke"
)

EXPECTED = (
    "expected images directly in the folder or in folders of no known name (all of them normal), or train[/good], "
    "valid/{good,Ungood}, test/{good,Ungood}, each with or without img/, and masks of the abnormal images in "
    "anomaly_mask/ (label, mask) beside img/ or in ground_truth/<kind of defect>/"
)


@dataclass(frozen=True)
class _Place:
    """What a folder is: its split, label (None where the path does not say) and kind of defect; images or masks."""

    split: str | None = None
    label: int | None = None
    is_mask: bool = False
    defect: str = ""


def _split_and_mask(word: str) -> tuple[str | None, bool]:
    """(split, is a mask folder) of a lower-case folder name: `val` -> (valid, no), `val_label` -> (valid, yes)."""
    split, _, tail = word.partition("_")
    return SPLIT_WORDS.get(split if tail in _MASKS else word), tail in _MASKS and split in SPLIT_WORDS


def _place(folder: PurePosixPath, defects: set[str], root: Path) -> _Place:
    """Reads the words of one folder's path; DataError for an unknown word or one contradicting another."""
    found: dict[str, object] = {}

    def put(key: str, value: object) -> None:
        if found.setdefault(key, value) != value:
            raise DataError(f"{root / folder}: the path says two things ({key} {found[key]} and {value}); {EXPECTED}")

    for part in folder.parts:
        word = part.lower()
        split, split_mask = _split_and_mask(word)
        if split:
            put("split", split)
        elif word in _NORMAL:
            put("label", 0)
        elif word in _ABNORMAL:
            put("label", 1)
        elif word in defects:
            put("label", 1)
            put("defect", word)
        elif word not in _IMAGES and word not in _MASKS:
            known = ", ".join((*_NORMAL, *_ABNORMAL))
            raise DataError(f"{root / folder}: folder '{part}' is not a known label ({known}); {EXPECTED}")
        if split_mask or word in _MASKS:
            found["is_mask"] = True
    return _Place(**found)


def find_images(
    root: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> tuple[dict[PurePosixPath, list[str]], Counter[str]]:
    """Image file names by folder relative to `root`, and the suffixes of the files that are no images.

    DICOM files count as images without a suffix too, as scanners write them; not where other suffixes are asked for.
    Links to folders are followed; a folder that is reached twice is read once, where it really lies if that is below
    `root`, with a warning.
    """
    folders, others = {}, Counter()
    for path, names in _walk(root):
        names = sorted(n for n in names if not n.startswith(".") and n != "Thumbs.db")
        bare = suffixes == IMAGE_SUFFIXES
        images = [n for n in names if n.lower().endswith(suffixes) or (bare and dicom.is_dicom(Path(path, n)))]
        others.update(Path(n).suffix.lower() or n for n in set(names).difference(images))
        if images:
            folders[PurePosixPath(Path(path).relative_to(root).as_posix())] = images
    return folders, others


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, file names) of every folder at or below `root`, each once; real folders come before links."""
    seen: dict[tuple[int, int], str] = {}
    starts = deque([str(root)])
    while starts:
        for path, children, names in os.walk(starts.popleft()):  # lists links to folders, but does not enter them
            status = os.stat(path)
            first = seen.setdefault((status.st_dev, status.st_ino), path)
            if first != path:  # a link to it, or one that leads back to a folder above
                logging.warning("%s: left out, it is the same folder as %s", path, first)
                children.clear()
                continue
            children[:] = sorted(c for c in children if not c.startswith((".", "__MACOSX")))
            links = (os.path.join(path, child) for child in children)
            starts.extend(link for link in links if os.path.islink(link))
            yield path, names


def left_out(others: Counter[str]) -> str:
    """What is said of the files that `find_images` left out beside images."""
    return f"{sum(others.values())} files are no images and were left out: {_suffixes(others)}"


def _suffixes(others: Counter[str]) -> str:
    shown = [printable(suffix) for suffix in sorted(others)[:10]] + ["..."] * (len(others) > 10)
    return ", ".join(shown) or "none"


def no_image(root: Path, others: Counter[str], suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> DataError:
    """The error for a folder in which `find_images` found other files at most."""
    hint = "; volumes are cut into images by --mode=slices" if {".nii", ".gz"} & others.keys() else ""
    return DataError(f"{root}: no image ({', '.join(suffixes)}) in it, other files: {_suffixes(others)}{hint}")


def known_word(name: str) -> bool:
    """Whether a folder of this name says what is in it: a split, a label, images or masks."""
    word = name.lower()
    return bool(_split_and_mask(word)[0]) or word in (*_NORMAL, *_ABNORMAL, *_IMAGES, *_MASKS)


def in_mask_folder(folder: PurePosixPath) -> bool:
    """Whether one of the path's folders is a mask folder by its name."""
    words = [part.lower() for part in folder.parts]
    return any(word in _MASKS or _split_and_mask(word)[1] for word in words)


def has_splits(root: Path) -> bool:
    """Whether `root` directly holds a split folder (train, valid, test in any spelling)."""
    return any(_split_and_mask(c.name.lower())[0] for c in root.iterdir() if c.is_dir())


def _only_folder(root: Path) -> Path | None:
    """The one folder that `root` holds, None if it holds anything else."""
    visible = [c for c in root.iterdir() if not c.name.startswith((".", "__MACOSX"))]
    return visible[0] if len(visible) == 1 and visible[0].is_dir() else None


def unwrap(root: Path) -> Path:
    """Goes down through folders that hold nothing but one folder of a meaningless name (`Brain_AD/BraTS2021_slice`).

    Also through a split's name around a whole set: BMAD's liver comes as `Liver/Train/hist_DIY/{train,valid,test}`.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set data.root to the folder of the data set")
    while (child := _only_folder(root)) is not None:
        if known_word(child.name):
            child = _only_folder(child)
            if child is None or known_word(child.name) or not has_splits(child):
                return root
        root = child
    return root


def _defects(folders: dict[PurePosixPath, list[str]]) -> set[str]:
    """Names that stand right under a mask folder and mean nothing else: kinds of defect."""
    pairs = (pair for folder in folders for pair in zip(folder.parts, folder.parts[1:], strict=False))
    return {child.lower() for parent, child in pairs if parent.lower() in _MASKS and not known_word(child)}


def _match_masks(
    images: dict[str, list[tuple[_Place, str]]], masks: dict[tuple[str, int, str, str], str], root: Path
) -> dict[str, str]:
    """Image name -> mask name, both relative to `root`, for the abnormal images; DataError where one has no partner."""
    matched, used = {}, {}
    for split, found in images.items():
        wanted = [(place, name) for place, name in found if place.label == 1]
        for place, name in wanted:
            stem = stem_of(name)
            keys = [(split, 1, place.defect, s) for s in (stem, f"{stem}_mask")]
            if key := next((k for k in keys if k in masks), None):
                if key in used:
                    raise DataError(
                        f"{root / name} and {root / used[key]} share one mask ({root / masks[key]}): rename"
                    )
                matched[name], used[key] = masks[key], name
        missing = [name for _, name in wanted if name not in matched]
        # valid may do without masks where test has them; a part of a split, or test alone, may not
        if missing and (len(missing) < len(wanted) or (split == "test" and any(key[1] == 1 for key in masks))):
            raise DataError(
                f"{root / missing[0]}: abnormal image without a mask ({len(missing)} such in {split}), though the set "
                f"has masks; expected a mask of the same file name, or no mask folder at all"
            )
    partners = {(split, p.label, p.defect, stem_of(image)) for split, found in images.items() for p, image in found}
    for key, name in masks.items():
        *place, stem = key
        if key not in used and partners.isdisjoint((*place, s) for s in (stem, stem.removesuffix("_mask"))):
            raise DataError(f"{root / name}: mask without an image; expected an image of the same name in {key[0]}")
    return matched


def read_tree(
    root: str | Path,
    dataset: str = "",
    calibration_fraction: float = 0.1,
    seed: int = 0,
    require_train: bool = True,
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
    groups: str = "auto",
) -> Index:
    """Indexes the tree under `root`; see the module's text for the folders it knows.

    Args:
      root: folder of one data set; folders that only wrap it are gone through.
      dataset: name given to the index; the folder's own name if empty.
      calibration_fraction, seed: the training normals held out, see `index.calibration_rows`.
      require_train: without training normals, raise (True) or return the other splits (False: evaluation only).
      suffixes: of the files that are images and masks.
      groups: see `groups.groups_of`.

    Raises:
      DataError: an unknown folder, unlabelled or abnormal training images, a mask without image or the reverse, no
        training normals.
    """
    dataset = dataset or Path(root).resolve().name
    root = unwrap(Path(root))
    folders, others = find_images(root, suffixes)
    if not folders:
        raise DataError(f"{no_image(root, others, suffixes)}; {EXPECTED}")
    words = {part for folder in folders for part in folder.parts}
    free = bool(words) and not any(map(known_word, words))
    defects = _defects(folders)
    images: dict[str, list[tuple[_Place, str]]] = {}
    masks: dict[tuple[str, int, str, str], str] = {}
    parts = []
    for folder, names in folders.items():
        place = _Place("train") if free else _place(folder, defects, root)
        if place.is_mask:
            label = 1 if place.label is None else place.label
            key = (place.split or "test", label, place.defect)
            masks |= {(*key, stem_of(n)): (folder / n).as_posix() for n in names}
        else:
            split = _image_split(place, folder, names, root, flat=len(folders) == 1)
            images.setdefault(split, []).extend((place, (folder / n).as_posix()) for n in names)
        parts.append(f"{folder.as_posix()} {len(names)}{' masks' if place.is_mask else ''}")
    names = [name for found in images.values() for _, name in found]
    refuse_masks(root, names, alone=free)
    matched = _match_masks(images, masks, root)
    if not images.get("train") and require_train:
        raise DataError(f"{root}: no normal training images (found {'; '.join(parts)}); {EXPECTED}")
    warnings, layout = [left_out(others)] if others else [], "; ".join(parts)
    if free:
        layout = f"{len(names)} images in {len(folders)} folders, none called train, good, ..."
        warnings.append(_said_of_free_tree(root, names, groups))
    group = dict(zip(names, groups_of(root, names, groups, by_folder=free), strict=True))
    splits = {
        split: _examples(images[split], matched, group, root) for split in ("train", "valid", "test") if split in images
    }
    if "train" in splits and calibration_fraction:
        splits["train"], splits["calibration"] = split_calibration(splits["train"], calibration_fraction, seed)
    return Index(dataset, layout, splits, tuple(warnings))


def refuse_masks(root: Path, names: Iterable[str], alone: bool = False) -> None:
    """DataError where files that would be read as images are masks by their names and lie beside their images.

    Args:
      names: of the images, relative to `root`.
      alone: refuses such names without an image beside them too.
    """
    files = {(PurePosixPath(name).parent, stem_of(name)): name for name in names}
    masks = []
    for (folder, stem), name in sorted(files.items()):
        match = _MASK_STEM.fullmatch(stem)
        if match and (alone or (folder, match[1]) in files):
            masks.append(name)
    if masks:
        raise DataError(
            f"{root / masks[0]}: a mask by its name ({len(masks)} such), and it would be read as an image: move the "
            f"masks out of the folders of images (those of abnormal images into anomaly_mask/ beside img/)"
        )


def _divided(names: Iterable[str]) -> PurePosixPath | None:
    """A folder of these images whose name says that they are divided (by split or class), None if there is none."""
    siblings = defaultdict(set)
    for folder in {parent for name in names for parent in PurePosixPath(name).parents if parent.name}:
        siblings[folder.parent].add(folder.name)
    for parent, children in sorted(siblings.items()):
        for name in sorted(children):
            words = re.split("[^a-z0-9]+", name.lower())
            if words in (["yes"], ["no"]) or any(map(_DIVIDED.fullmatch, words)):
                return parent / name
    # 0 and 1 are classes where there is nothing else beside them: patients and series are numbered on.
    classes = {parent: children for parent, children in siblings.items() if children & {"0", "1"}}
    both = [parent for parent, children in sorted(classes.items()) if len(children) > 1]
    return both[0] / "1" if both and all(children <= {"0", "1"} for children in classes.values()) else None


def patients_folders(names: Sequence[str]) -> bool:
    """Whether first-level folders may be patients': none has a known name or reads like a split or a class."""
    folders = {part for name in names for part in PurePosixPath(name).parent.parts}
    return bool(folders) and not any(map(known_word, folders)) and _divided(names) is None


def _said_of_free_tree(root: Path, names: Sequence[str], groups: str) -> str:
    """The warning about a tree without known words; DataError where names of folders say it is not all normals."""
    if folder := _divided(names):
        raise DataError(
            f"{root / folder}: no folder is called train, good, ..., so that all images would be normal training "
            f"images, but '{folder.name}' reads like a split or a class: set data.root to the folder of the normal "
            f"images, or sort all as train/good, test/good and test/Ungood; if it is neither, rename it; {EXPECTED}"
        )
    rule = {
        "auto": "first-level folders are groups, unless DICOM headers or file names say the patient",
        "image": "each is its own group",
    }.get(groups, f"groups are what '{groups}' finds")
    return f"no folder is called train, good, ...: all {len(names)} images are taken as normal training images; {rule}"


def _image_split(place: _Place, folder: PurePosixPath, names: list[str], root: Path, flat: bool) -> str:
    """The split of a folder of images, after the rules on training and unlabelled images."""
    if place.split is None:
        if flat and place.label != 1:
            return "train"
        raise DataError(f"{root / folder / names[0]}: image outside train/, valid/ and test/; {EXPECTED}")
    if place.split == "train" and place.label == 1:
        raise DataError(
            f"{root / folder}: {len(names)} abnormal images under train; training is on normal images only: move "
            f"them to valid/ or test/"
        )
    if place.split != "train" and place.label is None:
        raise DataError(f"{root / folder / names[0]}: {place.split} image in neither good/ nor Ungood/; {EXPECTED}")
    return place.split


def _examples(
    found: list[tuple[_Place, str]], matched: dict[str, str], group: dict[str, str], root: Path
) -> tuple[Example, ...]:
    examples = []
    for place, name in sorted(found, key=lambda item: item[1]):
        mask = root / matched[name] if name in matched else None
        examples.append(Example(name, root / name, place.label or 0, mask, group[name]))
    return tuple(examples)
