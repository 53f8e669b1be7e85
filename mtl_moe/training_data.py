"""Which images a work directory's detector learned from, so that no other set passes for them.

Folders move and are decoded anew, so the names are compared, and for sets whose names are mere numbers how bright some
images are. Where a set is another one after all, hashes of the decoded pixels tell which of its images were trained on:
one image more in a folder, and the draw of the held-out ones is wholly another.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core.files import write_json
from core.sampling import even_rows
from input_pipeline.batches import image_batches
from input_pipeline.dataset import Dataset, Split
from input_pipeline.split import join
from mtl_moe.calibration_fit import MIN_NORMALS

FILE = "training_data.json"
NUM_SAMPLES = 16
TOLERANCE = 1.0  # grey levels of an image's mean: decoders of another version differ by less


def training_data(dataset: Dataset) -> dict[str, Any]:
    """Name, number, hash of the names, and mean grey levels of some of the images that a detector learns from.

    Calibration normals are among them: they are drawn from the same folder.
    """
    parts = [dataset.splits[name] for name in ("train", "calibration") if name in dataset.splits]
    names = sorted(name for part in parts for name in part.names)
    train = dataset.splits["train"]
    rows = even_rows(len(train), NUM_SAMPLES)
    return {
        "dataset": dataset.name,
        "num_images": len(names),
        "names_hash": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "mean_grey": [round(float(image.mean()), 2) for image in train.images(rows)],
    }


def other_training_data(dataset: Dataset, workdir: Path) -> str:
    """What the detector of `workdir` learned from, where that is not `dataset`; "" if it is, or nothing is known.

    A data set without training images is another one.
    """
    path = workdir / FILE
    if not path.exists():
        return "" if "train" in dataset.splits else "other images"
    there = json.loads(path.read_text())
    if "train" not in dataset.splits:
        return f"{there['num_images']} images of {there['dataset']}"
    here = training_data(dataset)
    grey = [np.asarray(facts["mean_grey"]) for facts in (there, here)]
    if there["names_hash"] == here["names_hash"] and np.allclose(*grey, rtol=0, atol=TOLERANCE):
        return ""
    return f"{there['num_images']} images of {there['dataset']}"


def calibration_normals(dataset: Dataset, workdir: Path) -> tuple[Split, bool]:
    """The normals of `dataset` on which the detector of `workdir` is calibrated, and whether they are known to be new
    to it: the held-out ones, and in a data set other than its own as `new_normals`.
    """
    held_out = dataset.splits["calibration"]
    if other_training_data(dataset, workdir):
        return new_normals(held_out, workdir, dataset.splits["train"])
    return held_out, (workdir / FILE).exists()


def new_normals(normals: Split, workdir: Path, others: Split | None = None) -> tuple[Split, bool]:
    """`normals` as far as the detector of `workdir` was not trained on them, and whether that is known.

    A patient of whom one image was trained on is left out. Where that leaves some out, what is new of `others`, normals
    of the same data set, comes in.

    Raises:
      ValueError: if too few are left to calibrate on.
    """
    path = workdir / FILE
    trained = json.loads(path.read_text()).get("images") if path.exists() else None
    if trained is None:  # a work directory of before these were written down
        return normals, False
    new = _without(normals, set(trained))
    if len(new) == len(normals):
        return normals, True
    left_out = len(normals) - len(new)
    if others is not None:
        new = join([new, _without(others, set(trained))])
    if len(new) < MIN_NORMALS:
        raise ValueError(
            f"the detector of {workdir} was trained on these normals: only {len(new)} are new to it, and calibration "
            f"needs {MIN_NORMALS}; add normals that it was not trained on, or use the very images it learned from"
        )
    logging.warning(
        "%d of %d normals do not calibrate, as they or others of their patients were trained on: %d do that were not",
        *(left_out, len(normals), len(new)),
    )
    return new, True


def _without(split: Split, trained: set[str]) -> Split:
    """The images of `split` of patients without any in `trained`, `pixel_hashes`."""
    patients = {group for group, key in zip(split.groups, pixel_hashes(split), strict=True) if key in trained}
    return split.take(np.flatnonzero([group not in patients for group in split.groups]))


def pixel_hashes(split: Split) -> list[str]:
    """`image_hashes` of a split; decodes the whole of it."""
    return [key for images in image_batches(split) for key in image_hashes(images)]


def image_hashes(images: np.ndarray) -> list[str]:
    """Of each of the uint8 images [n, H, W, C] 16 hexadecimal digits that its pixels determine."""
    return [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in images]


def seen_in_training(hashes: Sequence[str], workdir: Path) -> str:
    """A sentence, logged too, where some of the images with these `image_hashes` are ones that the detector of
    `workdir` was trained on; else, and where that is not known, "".
    """
    path = workdir / FILE
    trained = set(json.loads(path.read_text()).get("images", ()) if path.exists() else ())
    count = sum(key in trained for key in hashes)
    if not count:
        return ""
    text = f"{count} of the {len(hashes)} images scored were trained on: they look more normal than new ones would."
    logging.warning(text)
    return f" {text}"


def bind_training_data(dataset: Dataset, workdir: Path) -> None:
    """Compares with FILE, or writes it in a folder that nothing was trained in yet.

    Raises:
      ValueError: if the detector of `workdir` learned from other images.
    """
    if other := other_training_data(dataset, workdir):
        here = training_data(dataset)
        raise ValueError(
            f"{workdir} holds a detector that learned from other images ({other}; now {here['num_images']} of "
            f"{here['dataset']}, of other names or contents): use another --workdir, or --mode=evaluate to measure it "
            "on these"
        )
    if (workdir / "config.json").exists():  # or made before this file was: what it learned from is not known
        return
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        images = sorted(pixel_hashes(dataset.splits["train"]))
        write_json(workdir / FILE, training_data(dataset) | {"images": images})
