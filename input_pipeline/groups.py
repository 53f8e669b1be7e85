"""Which images belong to one patient or near-duplicate group, so that no split divides them."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from input_pipeline import dicom
from input_pipeline.index import DataError, stem_of

# `data.groups`: patients as headers and names tell, every image by itself, or a regular expression, see `groups_in`.
GROUPS = ("auto", "image")

# Where the patient (or the near-duplicate group) stands in names that carry one.
_GROUP_PATTERNS = (
    re.compile(r"^([^+]+)\+.+_slice\d+$"),  # PAT0+ST0-SE0-IM0001_slice045: of a tree of patients' folders, see nifti.py
    re.compile(r"^(sub-[A-Za-z0-9]+)_"),  # sub-01_ses-2_T1w_slice045: BIDS
    re.compile(r"^(.+)_slice\d+$"),  # BraTS-GLI-00005-000_slice045: slices of a volume, see nifti.py
    re.compile(r"^((?:[A-Za-z]+\d*-)?IM-\d+)(?:-\d+)+$"),  # IM-0115-0001, NORMAL2-IM-0451-0001-0002: chest_xray
    re.compile(r"^(person\d+)_"),  # person100_bacteria_475: chest_xray
    re.compile(r"^((?:CNV|DME|DRUSEN|NORMAL)-\d+)-\d+$"),  # NORMAL-1001666-12: OCT2017
    re.compile(r"^([A-Za-z]*\d+)_[A-Za-z]*\d+$"),  # 00003_60: BraTS patient_slice; n085_no0: group_image
)
_SLICE = re.compile(r"_slice\d+$")  # what the names that nifti.py writes end in


def check_groups(groups: str) -> str:
    """`data.groups` as it was given; ValueError unless it is one of GROUPS or a regular expression with one group."""
    try:
        if groups in GROUPS or re.compile(groups).groups == 1:
            return groups
        reason = ""
    except re.error as error:
        reason = f" ({error})"
    raise ValueError(
        f"data.groups: expected {', '.join(GROUPS)} or a regular expression with one pair of parentheses around the "
        f"patient, as '([^/]+)_[^/]*$' for smith_01.png, found '{groups}'{reason}"
    )


def groups_in(names: Iterable[str], expression: str) -> list[str]:
    """The group of each image: what `expression`'s parentheses find in its name, a path relative to the data's root.

    Raises:
      DataError: for names in which nothing is found, so that no image of a patient is grouped otherwise unnoticed.
    """
    names, pattern = list(names), re.compile(expression)
    found = [match[1] if (match := pattern.search(name)) else None for name in names]
    if without := [name for name, group in zip(names, found, strict=True) if not group]:
        raise DataError(
            f"data.groups: '{expression}' finds no patient in {len(without)} of {len(names)} names, '{without[0]}' the "
            "first: it must match the path of every image, relative to the data's root"
        )
    return found


def group_of(stem: str) -> str:
    """Patient or near-duplicate group of a file stem (`00003_60` -> `00003`), the stem itself if it carries none."""
    for pattern in _GROUP_PATTERNS:
        if match := pattern.match(stem):
            return match[1]
    return stem


def groups_of(
    root: Path, names: Sequence[str], groups: str = "auto", by_folder: bool = False, alike: bool = False
) -> list[str]:
    """The group of each image `root`/name: images of one group are never divided among splits.

    Args:
      groups: "auto": the patient of the DICOM header, else of the file name, else each image by itself; "image": each
        image by itself, whatever header and name say; or a regular expression on the name, see `groups_in`.
      by_folder: images whose header and name say nothing form one group with all of their first-level folder.
      alike: whether names that begin alike in several first-level folders (IM-0001-0002) make these the groups of all,
        as with `by_folder`.
    """
    if groups == "image":
        return list(names)
    if groups != "auto":
        return groups_in(names, groups)
    patients = dicom.patients_of(root, names)
    others = [name for name in names if name not in patients]
    known = patients | _groups_of_names(root, others, by_folder, alike or by_folder)
    return [known[name] for name in names]


def groups_of_labelled(root: Path, names: Sequence[str], groups: str = "auto", labels: Sequence[int] = ()) -> list[str]:
    """As `groups_of`, but under "auto" names say nothing: n01440764_10026, cat1_0002 would make a group of a class.

    Names that end as those of --mode=slices do say the patient, unless a class would be a single one of its own
    (bread_slice001).

    Args:
      labels: class of each image, in sets that have some.
    """
    if groups != "auto":
        return groups_of(root, names, groups)
    cut = {name: group_of(stem_of(name)) for name in names if _SLICE.search(stem_of(name))}
    found, classes = defaultdict(set), defaultdict(set)
    for name, label in zip(names, labels, strict=False):  # no labels: all are kept
        found[label].add(cut.get(name, name))
        classes[cut.get(name, name)].add(label)
    for name, label in zip(names, labels, strict=False):
        if len(found[label]) == len(classes[cut.get(name, name)]) == 1:
            cut.pop(name, None)
    known = cut | dicom.patients_of(root, names)
    return [known.get(name, name) for name in names]


def _groups_of_names(root: Path, names: Sequence[str], by_folder: bool, alike: bool) -> dict[str, str]:
    found, folders = {}, defaultdict(set)
    for name in names:
        path, stem = PurePosixPath(name), stem_of(name)
        group = group_of(stem)
        # IM-0001-0002 in patients' folders is an export's series and image, the same in all of them.
        if by_folder and len(path.parts) > 1 and (group == stem or group.startswith("IM-")):
            found[name] = path.parts[0]
        elif group == stem:
            found[name] = (path.parent / stem).as_posix()  # equal stems of two folders are two groups
        else:
            found[name] = group
            if len(path.parts) > 1 and not group.startswith("sub-"):  # BIDS: a subject in every folder
                folders[group].add(path.parts[0])
    crossing = [group for group, where in folders.items() if len(where) > 1]
    if alike and crossing:
        logging.warning(
            "%s: names of files begin alike in several first-level folders (%s in %s), so that the folder is taken for "
            "the patient; if the name says the patient, set --config.data.groups='([^/]+)_[^/]*$'",
            root,
            crossing[0],
            ", ".join(sorted(folders[crossing[0]])[:3]),
        )
        found |= {name: PurePosixPath(name).parts[0] for name in names if "/" in name}
    return found
