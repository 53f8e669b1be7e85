"""Which images a work directory's detector learned from, so that no other set passes for them.

Folders move and are decoded anew, so the names are compared, and for sets whose names are mere numbers how bright some
images are. Axes: none.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core.files import write_json
from input_pipeline.dataset import Dataset

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
    rows = np.unique(np.linspace(0, len(train) - 1, NUM_SAMPLES).round().astype(int))
    return {
        "dataset": dataset.name,
        "num_images": len(names),
        "names_hash": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "mean_grey": [round(float(image.mean()), 2) for image in train.images(rows)],
    }


def other_training_data(dataset: Dataset, workdir: Path) -> str:
    """What the detector of `workdir` learned from, where that is not `dataset`; "" if it is, or nothing is known."""
    path = workdir / FILE
    if not path.exists():
        return ""
    there, here = json.loads(path.read_text()), training_data(dataset)
    grey = [np.asarray(facts["mean_grey"]) for facts in (there, here)]
    if there["names_hash"] == here["names_hash"] and np.allclose(*grey, rtol=0, atol=TOLERANCE):
        return ""
    return f"{there['num_images']} images of {there['dataset']}"


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
        write_json(workdir / FILE, training_data(dataset))
