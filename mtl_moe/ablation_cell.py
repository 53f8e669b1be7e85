"""One cell of the ablation: a row trained with one seed, its raw scores on disk, and what is measured from them.

A cell is an ordinary work directory (config.json, checkpoints, calibration.npz: --mode=evaluate and --mode=predict work
on it) with two files more: scores.npz, the raw scores of calibration, painted and test images, and cell.json, written
last, which says that the cell is finished. What differs from a trained row in fusion or calibration alone is measured
from the same scores.npz without training. Axes: N test images, n calibration normals, S evidences of tasks.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core.files import replacing, write_json
from core.loop import NonFiniteLossError
from core.metrics import auroc, auroc_between, average_precision, pixel_metrics
from core.tree import num_params
from core.workdir import check_config
from input_pipeline.dataset import Dataset, Split
from mtl_moe.calibration import Calibration
from mtl_moe.calibration_fit import fit_calibration, fit_folds, fit_scores
from mtl_moe.cost import score_macs
from mtl_moe.free_fields import DETECTOR
from mtl_moe.infer import Scored, Scorer, calibrate, restore
from mtl_moe.model import build_geometry
from mtl_moe.painted import KINDS, by_kind, criteria, painted_auroc, sources
from mtl_moe.painted_check import unseen_scores
from mtl_moe.scoring import make_map_fn
from mtl_moe.system import System, build_system
from mtl_moe.tasks import Task
from mtl_moe.tiling import num_tiles
from mtl_moe.train import train

# Of a cell's config, what does not change its training or its scores.
FREE_FIELDS = (*DETECTOR, "compress.")
FUSED = "fused"
ARRAYS = ("names", "groups", "labels", "normal_groups")  # of `Stored`


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a trained cell keeps for being measured; `scored`: "calibration", "painted", "test", no maps.

    `names`, `groups` and `labels` are of the test images, `normal_groups` [n] of the calibration normals.
    """

    names: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    normal_groups: np.ndarray
    scored: Mapping[str, Scored]

    def save(self, path: Path) -> None:
        """Writes an .npz, beside and renamed."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        for name, scored in self.scored.items():
            arrays |= {f"{name}/raw": scored.raw, f"{name}/texture": scored.texture}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)


def read_stored(path: Path) -> Stored:
    """Reads `Stored.save`'s file.

    Raises:
      ValueError: if it is of an earlier version.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if lacking := set(ARRAYS) - set(arrays):
        raise ValueError(
            f"{path} is of an earlier version (without {', '.join(sorted(lacking))}), which scored normals by fits "
            "that may know their patients: start the ablation anew in another --workdir"
        )
    fields: dict[str, dict[str, np.ndarray]] = {}
    for name, value in arrays.items():
        if "/" in name:
            part, _, key = name.partition("/")
            fields.setdefault(part, {})[key] = value
    scored = {part: Scored(**found) for part, found in fields.items()}
    return Stored(*(arrays[name] for name in ARRAYS), scored)


def run_cell(config: Any, load: Callable[[Any], tuple[Dataset, Split]], folder: Path) -> dict[str, Any]:
    """Trains (or resumes) and scores the detector of `config` in `folder`; a finished cell is read.

    Args:
      load: from a config to its data set and painted normals (`mtl_moe.painted.painted_normals`).

    Returns:
      The content of cell.json. A training whose loss became infinite gives {"error"} instead of results.

    Raises:
      ValueError: if the folder was made with another config.
    """
    path = folder / "cell.json"
    check_config(config, folder, FREE_FIELDS)
    if path.exists():
        return json.loads(path.read_text())
    dataset, painted = load(config)
    resumed, start = (folder / "metrics.jsonl").exists(), time.monotonic()
    system = build_system(config)
    facts = _size(system) | {"seed": int(config.seed), "num_steps": int(config.train.num_steps)}
    try:
        train(system, dataset, folder)
    except NonFiniteLossError as error:
        facts["error"] = str(error)
    else:
        # Of a training that was stopped in between the time is not known.
        facts["train_seconds"] = None if resumed else time.monotonic() - start
        facts |= _score(system, dataset, painted, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)
    return facts


def _size(system: System) -> dict[str, Any]:
    geometry = build_geometry(system.config)
    tiles = num_tiles(system.config.data.image_size, geometry.image_size)
    return {
        "num_params": num_params(jax.eval_shape(system.init_params, jax.random.key(0))),
        "gflops": 2e-9 * score_macs(system.model.config, system.tasks, geometry, tiles),
        "num_tasks": len(system.tasks),
    }


def _score(system: System, dataset: Dataset, painted: Split, folder: Path) -> dict[str, Any]:
    """Writes calibration.npz and scores.npz; returns what needs the maps or the clock."""
    trained = restore(system, folder)
    scorer = Scorer(system, trained)
    normals, test = dataset.splits["calibration"], dataset.splits["test"]
    calibration = calibrate(system, scorer, normals)
    calibration.save(folder / "calibration.npz", trained.step)
    start = time.monotonic()
    scored = {"painted": scorer.split(painted, "painted")}
    speed = len(painted) / (time.monotonic() - start)
    scored["calibration"] = scorer.split(normals, "calibration")
    map_fn = make_map_fn(calibration, dataset.image_size, dataset.mask_size) if test.has_masks else None
    scored["test"] = scorer.split(test, "test", map_fn)
    pixels = {}
    if test.has_masks:
        found = pixel_metrics(scored["test"].maps, test.masks(np.arange(len(test)))[..., 0] > 0)
        pixels = {name: value for name, value in found.items() if np.isfinite(value)}
    facts = [np.array(test.names), np.array(test.groups), test.labels, np.array(normals.groups)]
    Stored(*facts, scored).save(folder / "scores.npz")
    return {"step": trained.step, "pixels": pixels, "score_images_per_second": speed}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a cell's scores say.

    Attributes:
      test: of the fused scores "image_auroc" and "image_ap", and the AUROC of normal and of abnormal images against the
        calibration normals, "normal_vs_calibration" and "abnormal_vs_calibration".
      evidences: image AUROC by evidence, each by itself.
      painted: by FUSED and evidence, AUROC by painted family.
      scores: [N] fused scores.
    """

    test: Mapping[str, float]
    evidences: Mapping[str, float]
    painted: Mapping[str, Mapping[str, float]]
    scores: np.ndarray

    @property
    def criteria(self) -> dict[str, float]:
        """Means of the fused scores' painted AUROC over "trained" and "unseen" families."""
        return criteria(self.painted[FUSED])


def measure(stored: Stored, calibration: Calibration, leave_out: Sequence[str] = ()) -> Measured:
    """Measures scores under a calibration of the stored normals, without the named evidences."""
    normals, images, test = (stored.scored[part] for part in ("calibration", "painted", "test"))
    keep = {name: i for i, name in enumerate(calibration.names) if name not in leave_out}
    _, folds = fit_folds(calibration.evidences, calibration.fusion, normals.raw, normals.texture, stored.normal_groups)

    _, clean = unseen_scores(folds, normals, np.arange(len(normals.raw)), leave_out)
    made_of = np.tile(sources(len(normals.raw), len(images.raw) // len(KINDS)), len(KINDS))
    corrected, fused = unseen_scores(folds, images, made_of, leave_out)
    painted = {FUSED: fused} | {name: corrected[:, i] for name, i in keep.items()}
    corrected = calibration.corrected(test.raw, test.texture)
    scores = calibration.fuse(corrected, leave_out)
    return Measured(
        test={
            "image_auroc": auroc(scores, stored.labels),
            "image_ap": average_precision(scores, stored.labels),
            "normal_vs_calibration": auroc_between(clean, scores[stored.labels == 0]),
            "abnormal_vs_calibration": auroc_between(clean, scores[stored.labels == 1]),
        },
        evidences={name: auroc(corrected[:, i], stored.labels) for name, i in keep.items()},
        painted={name: painted_auroc(by_kind(values)) for name, values in painted.items()},
        scores=scores,
    )


def load_trained(folder: Path, tasks: Sequence[Task], fusion: str) -> tuple[Stored, Calibration]:
    """Stored scores of a finished cell of these tasks and the calibration fitted on them, for image scores only.

    Not the cell's calibration.npz: that is of its last evaluation, which may have fused in another way or seen other
    normals.
    """
    stored = read_stored(folder / "scores.npz")
    normals = stored.scored["calibration"]
    return stored, fit_calibration(tasks, fusion, normals.raw, normals.texture, stored.normal_groups)


def joined(cells: Sequence[tuple[Stored, Calibration]]) -> tuple[Stored, Calibration]:
    """Cells of different tasks as one detector that has the evidences of all.

    For image scores only: finished maps were not kept.
    """
    stored, calibrations = [cell[0] for cell in cells], [cell[1] for cell in cells]
    first = stored[0]
    scored = {
        part: Scored(np.concatenate([one.scored[part].raw for one in stored], 1), found.texture)
        for part, found in first.scored.items()
    }
    # The texture is that of the images: the same in every cell, and one evidence.
    evidences, normals = [one for calibration in calibrations for one in calibration.evidences], scored["calibration"]
    calibration = fit_scores(evidences, calibrations[0].fusion, normals.raw, normals.texture, first.normal_groups)
    return dataclasses.replace(first, scored=scored), calibration


def uncorrected(stored: Stored, calibration: Calibration) -> Calibration:
    """The calibration fitted anew on the same normals, with no evidence corrected for texture.

    For image scores only.
    """
    evidences = [evidence._replace(corrected=False) for evidence in calibration.evidences]
    normals = stored.scored["calibration"]
    return fit_scores(evidences, calibration.fusion, normals.raw, normals.texture, stored.normal_groups)
