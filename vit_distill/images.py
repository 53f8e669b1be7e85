"""The images of a student: those it is distilled on, and those it is measured on."""

from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.batches import image_batches
from input_pipeline.classification import corrupt_rows, load_labelled
from input_pipeline.few_shot import read_manifest, select_few_shot
from input_pipeline.index import DataError
from input_pipeline.sources import LabelledSet
from vit_distill.preprocessing import Preprocessing

MANIFEST = "manifest.json"


def few_shot_images(
    config: Any, preprocessing: Preprocessing, workdir: Path | None
) -> tuple[LabelledSet, np.ndarray, np.ndarray]:
    """(all images at the model's resize size, rows to train on, `calibration.num_images` rows of other groups).

    Raises:
      ValueError: as `load_labelled`, `read_manifest` and `select_few_shot`; for a manifest beside a ratio or number.
    """
    section, own = config.few_shot, workdir and own_manifest(workdir)
    if section.manifest and not own and (section.per_class or section.ratio != 1):
        raise ValueError(
            "few_shot.manifest names the images: leave few_shot.ratio at 1 and few_shot.per_class at 0, found "
            f"ratio={section.ratio} and per_class={section.per_class}"
        )
    images = _load(config, preprocessing, config.data.split)
    if manifest := own or section.manifest:
        few = read_manifest(Path(manifest), images)
    else:
        chosen = dict(ratio=section.ratio, per_class=section.per_class, seed=section.seed)
        few = select_few_shot(images, **chosen, skip_corrupt=config.data.skip_corrupt)
    trained_on = {images.groups[row] for row in few}  # patients whose other images are not held out either
    rest = np.flatnonzero([group not in trained_on for group in images.groups])
    return images, few, _some(config, images, rest)


def held_out_images(
    config: Any, preprocessing: Preprocessing, images: LabelledSet, rest: np.ndarray
) -> LabelledSet | None:
    """Images to measure on that were not trained on: `rest` of `images`, else some of the validation split, if any.

    Where that split is the user's own, those of its patients (groups) that stand in `images` too are left out.
    """
    if len(rest):
        return images.take(rest)
    if config.data.split != "train":
        return None
    try:
        valid = _load(config, preprocessing, "valid")
    except DataError:  # the training split was read: there is just no validation split
        return None
    trained_on = set(images.groups)
    rows = _some(config, valid, np.flatnonzero([group not in trained_on for group in valid.groups]))
    return valid.take(rows) if len(rows) else None


def draw(rows: np.ndarray, num_images: int, seed: int) -> np.ndarray:
    """`num_images` of the rows (all, if there are fewer), drawn by the seed of the few-shot images, ascending."""
    return np.sort(np.random.default_rng((seed, 3)).permutation(rows)[:num_images])


def decode(images: LabelledSet) -> None:
    """Reads what stays in memory anyway: a damaged image is an error before the run has written anything."""
    if images.pixels.in_memory:
        for _ in image_batches(images):
            pass


def own_manifest(workdir: Path) -> Path | None:
    """The manifest of a run that was accepted: it was written before config.json; None where there is none yet."""
    path = workdir / MANIFEST
    return path if path.exists() and (workdir / "config.json").exists() else None


def _load(config: Any, preprocessing: Preprocessing, split: str) -> LabelledSet:
    """A split in which corrupt files are still to be looked for, among those that are used."""
    return load_labelled(config.data, split, preprocessing.resize_size, preprocessing.interpolation, check=False)


def _some(config: Any, images: LabelledSet, rows: np.ndarray) -> np.ndarray:
    """`calibration.num_images` of the rows, as `draw`; with data.skip_corrupt those of them that can be decoded."""
    drawn = draw(rows, config.calibration.num_images, config.few_shot.seed)
    return np.setdiff1d(drawn, corrupt_rows(images, drawn)) if config.data.skip_corrupt else drawn
