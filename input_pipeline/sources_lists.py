"""Sets whose labels stand in list files: ChestX-ray14 (CSV) and iNaturalist 2019 (JSON).

Axis alphabet: N images, F findings.
"""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.groups import groups_of, groups_of_labelled
from input_pipeline.index import DataError, Example
from input_pipeline.sources import LabelledSet, Sizes, existing_root, set_of_files
from input_pipeline.sources_folder import read_folder
from input_pipeline.tree import find_images

FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia", "No Finding",
)  # fmt: skip
EXPECTED_CHEST = (
    "Expected the files of https://nihcc.app.box.com/v/ChestXray-NIHCC as they are: Data_Entry_2017*.csv, "
    "train_val_list.txt, test_list.txt, and the PNG files in images*/ (images_001/images/ and so on, or images/)"
)
EXPECTED_INAT = (
    "Expected the files of https://github.com/visipedia/inat_comp/tree/master/2019: train2019.json, val2019.json and "
    "train_val2019/; or class folders {train,val}/<class>/*.jpg"
)


def read_chestxray14(root: str, name: str, sizes: Sizes, groups: str = "auto") -> dict[str, LabelledSet]:
    """Official splits "train" and "test" of ChestX-ray14: 14 findings and No Finding.

    Args:
      groups: "auto": the CSV's patients; else as `groups.groups_of`, of the names in the lists.

    Raises:
      DataError: a missing file, an unknown finding, list entries without a row in the CSV or without an image file.
    """
    folder = existing_root(root, "chestxray14", EXPECTED_CHEST)
    tables = sorted(folder.glob("Data_Entry_2017*.csv"))
    if not tables:
        raise DataError(f"{folder}: no Data_Entry_2017*.csv. {EXPECTED_CHEST}")
    with tables[0].open(newline="", encoding="utf-8-sig") as file:
        rows = {row["Image Index"]: row for row in _with_columns(csv.DictReader(file), tables[0])}
    paths = {}
    for images in sorted(folder.glob("images*")):
        paths |= {file: images / below / file for below, files in find_images(images)[0].items() for file in files}
    sets = {}
    for split, list_name in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        listed = folder / list_name
        if not listed.is_file():
            raise DataError(f"{folder}: no {list_name}. {EXPECTED_CHEST}")
        names = listed.read_text().split()
        _check_listed(listed, names, rows, f"row in {tables[0].name}")
        _check_listed(listed, names, paths, "image file")
        labels = np.zeros((len(names), len(FINDINGS)), np.float32)
        for row, image in enumerate(names):
            labels[row, _findings(rows[image]["Finding Labels"], image, tables[0])] = 1
        auto = groups == "auto"
        patients = [rows[image]["Patient ID"] for image in names] if auto else groups_of(folder, names, groups)
        found = zip(names, patients, strict=True)
        examples = [Example(image, paths[image], -1, None, patient) for image, patient in found]
        layout = f"ChestX-ray14, {len(names)} images of {list_name}"
        sets[split] = set_of_files(name or "chestxray14", layout, FINDINGS, examples, sizes, labels)
    return sets


def _with_columns(reader: csv.DictReader, path: Path) -> csv.DictReader:
    needed = {"Image Index", "Finding Labels", "Patient ID"}
    if absent := needed - set(reader.fieldnames or ()):
        raise DataError(f"{path}: no column {', '.join(sorted(absent))}. {EXPECTED_CHEST}")
    return reader


def _findings(text: str, image: str, path: Path) -> list[int]:
    words = text.split("|")
    if unknown := [word for word in words if word not in FINDINGS]:
        raise DataError(f"{path}: {image} has the finding '{unknown[0]}'; expected some of {', '.join(FINDINGS)}")
    return [FINDINGS.index(word) for word in words]


def _check_listed(listed: Path, names: Iterable[str], known: dict[str, Any], what: str) -> None:
    if missing := [name for name in names if name not in known]:
        raise DataError(
            f"{listed}: {len(missing)} of its images have no {what}: {', '.join(missing[:5])}; unpack all of the "
            f"images, or shorten the list"
        )


def read_inat19(root: str, name: str, sizes: Sizes, groups: str = "auto") -> dict[str, LabelledSet]:
    """Splits "train" and "valid" of iNaturalist 2019, by its JSON files or from class folders.

    Args:
      groups: as of `sources_folder.read_folder`.

    Raises:
      DataError: no such folder, a damaged JSON file, or images it names that do not exist.
    """
    folder = existing_root(root, "inat19", EXPECTED_INAT)
    if not (folder / "train2019.json").is_file():
        try:
            return read_folder(root, name or "inat19", sizes, groups)
        except DataError as error:
            raise DataError(f"{error}. {EXPECTED_INAT}") from error
    classes, sets = (), {}
    for split, file in (("train", "train2019.json"), ("valid", "val2019.json")):
        path = folder / file
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text())
            label_of = {a["image_id"]: a["category_id"] for a in content["annotations"]}
            images = [(image["file_name"], label_of[image["id"]]) for image in content["images"]]
            categories = {c["id"]: c["name"] for c in content["categories"]}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a list of images, annotations and categories ({error!r})") from error
        ids = sorted(categories)
        classes = classes or tuple(categories[key] for key in ids)
        number = {key: row for row, key in enumerate(ids)}
        existing = {image: None for image, _ in images if (folder / image).is_file()}
        _check_listed(path, [image for image, _ in images], existing, "image file")
        found = zip(images, groups_of_labelled(folder, [image for image, _ in images], groups), strict=True)
        examples = [Example(image, folder / image, number[key], None, group) for (image, key), group in found]
        layout = f"iNaturalist 2019, {len(images)} images of {file}"
        sets[split] = set_of_files(name or "inat19", layout, classes, examples, sizes)
    return sets
