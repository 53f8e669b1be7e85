"""Evaluates a trained detector: calibrated scores, metrics with intervals, floors, predictions.csv, report.json/.html.

Axes: N test images, S evidences, M side of the finished maps. Nothing here chooses anything: every number is computed
once, from the checkpoint and the test split; calibration sees held-out training normals only.
"""

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core.bootstrap import bootstrap_interval, pixel_intervals, possible_resamples
from core.files import write_json
from core.logs import read_history
from core.metrics import (
    auroc,
    auroc_between,
    average_precision,
    matched_auroc,
    pixel_metrics,
    threshold_at_fpr,
)
from input_pipeline.batches import image_batches
from input_pipeline.dataset import Dataset, Split, eval_batches
from mtl_moe import floors
from mtl_moe.calibration import Calibration, check_calibration, evidence_names, task_evidences
from mtl_moe.infer import Scored, Scorer, Trained, calibrate, evidence_maps, restore, router_use
from mtl_moe.outputs import write_maps, write_predictions
from mtl_moe.provenance import check_source, provenance, unfinished
from mtl_moe.report import Case, ReportData, select_cases, write_report
from mtl_moe.scoring import make_map_fn
from mtl_moe.system import System
from mtl_moe.training_data import calibration_normals, other_training_data

# Pairs count as of like contrast when their log mean gradients differ by less: 7 % contrast.
MATCHED_TOLERANCE = 0.07
MASK_BATCH = 256  # masks read at a time
BANDS = [f"{low:g}-{high:g}" for low, high in itertools.pairwise(floors.BAND_SIGMAS)]


def check_score(score: Any, dataset: Dataset) -> None:
    """Checks `config.score` and the calibration normals before anything is computed; ValueError as it has to be."""
    normals = dataset.splits.get("calibration")
    check_calibration(score.fusion, normals.groups if normals else ())
    if min(score.bootstrap, score.gallery) < 0 or score.batch_size < 1:
        raise ValueError(
            f"score: expected bootstrap and gallery of at least 0 (0: none) and a batch_size of at least 1, found "
            f"{score.bootstrap}, {score.gallery} and {score.batch_size}"
        )
    if not all(0 < rate < 1 for rate in score.false_positive_rates):
        raise ValueError(f"score.false_positive_rates: expected rates in (0, 1), found {score.false_positive_rates}")


def result_folder(data: Any, dataset: Dataset, workdir: Path) -> Path:
    """Where the evaluation on `dataset`, read as `data` (config.data) says, is written.

    That is `workdir`, and `workdir`/evaluate/NAME, NAME that of the data's folder, for a data set other than the one
    that the detector learned from: what is predicted later is calibrated on the detector's own normals.

    Raises:
      ValueError: if the folder holds the results of data in another place.
    """
    if not other_training_data(dataset, workdir):
        return workdir
    source = _source(data)
    folder = workdir / "evaluate" / (Path(source).name or dataset.name)
    check_source(folder, source, "move that folder away first")
    return folder


def evaluate(system: System, dataset: Dataset, workdir: Path) -> dict[str, Any]:
    """Restores the newest checkpoint of `workdir`, evaluates, writes all outputs to `result_folder`.

    Without a test split the calibration normals are shown instead, each scored by a fit without it, and neither
    accuracy nor rates are given.

    Returns:
      The content of report.json.

    Raises:
      ValueError: if there are too few normals that the detector was not trained on, or as `result_folder`.
    """
    start = time.time()
    data = system.config.data
    output = result_folder(data, dataset, workdir)
    normals, known = calibration_normals(dataset, workdir)
    dataset = dataclasses.replace(dataset, splits=dataset.splits | {"calibration": normals})
    trained = restore(system, workdir)
    scorer = Scorer(system, trained)
    folder = Path(_source(data)).name
    calibration = dataclasses.replace(
        calibrate(system, scorer, normals),
        source=dataset.name + (f" ({folder})" if folder not in ("", dataset.name) else ""),
        manifest_hash=dataset.manifest_hash,
        dtype=system.config.score.dtype,
    )
    output.mkdir(parents=True, exist_ok=True)
    calibration.save(output / "calibration.npz", trained.step)
    has_test = len(dataset.splits.get("test", ())) > 0
    split = dataset.splits["test" if has_test else "calibration"]
    save_maps = system.config.score.save_maps
    wanted = split.has_masks or save_maps
    map_fn = make_map_fn(calibration, dataset.image_size, dataset.mask_size) if wanted else None
    write = functools.partial(write_maps, output / "maps") if save_maps else None
    scored = scorer.split(split, "score", map_fn, write=write, keep_maps=split.has_masks)
    corrected = calibration.corrected(scored.raw, scored.texture)
    # The fit that a normal is part of finds it more normal than it finds a new image.
    fused = calibration.fuse(corrected) if has_test else calibration.fused
    p = calibration.p_values(fused)

    results = Results(dataset.name, split, system.config.score.bootstrap)
    if results.has_both:
        results.add_detector(system, calibration, corrected, fused, scored)
        results.add_floors(dataset)
        if system.config.score.untrained:
            results.add_untrained(system, scorer, dataset)
    labels = split.labels if has_test else np.full(len(split), -1)  # rates of the normals that set them are no test
    thresholds = _thresholds(system.config.score.false_positive_rates, calibration, fused, labels)
    report = {
        "metrics": results.metrics,
        "intervals": results.intervals,
        "thresholds": thresholds,
        "provenance": provenance(system, _facts(data, dataset), workdir, trained.step, time.time() - start),
    }
    evidence_scores = dict(zip(calibration.names, calibration.tail_scores(corrected).T, strict=True))
    write_predictions(output / "predictions.csv", split, fused, p, evidence_scores)
    write_json(output / "report.json", report)
    page = ReportData(
        dataset=dataset.name,
        layout=dataset.layout,
        headline=_headline(system, dataset, has_test, other_training_data(dataset, workdir), known)
        + unfinished(system, trained.step),
        metrics=results.metrics,
        intervals=results.intervals,
        tasks=[task.name for task in system.tasks],
        names=split.names,
        labels=split.labels,
        scores=fused,
        p_values=p,
        task_scores=evidence_scores,
        calibration_scores=calibration.fused,
        groups=split.groups,
        num_calibration_groups=len(set(normals.groups)),
        tested=has_test,
        thresholds=thresholds,
        cases=gallery(system, scorer, calibration, split, fused, p),
        history=read_history(workdir),
        router=router_use(system, trained, split.images(np.arange(min(len(split), 32)))),
        floors=FLOORS,
        provenance=report["provenance"],
        config=system.config.to_dict(),
    )
    write_report(output / "report.html", page)
    return report


def _source(data: Any) -> str:
    """Where the data lie; "" for those that are generated."""
    return str(Path(data.cache or data.root).resolve()) if data.cache or data.root else ""


def _facts(data: Any, dataset: Dataset) -> dict[str, Any]:
    """What the report's provenance says of the data."""
    return {
        "dataset": dataset.name,
        "source": _source(data),
        "manifest_hash": dataset.manifest_hash,
        "counts": {name: len(part) for name, part in dataset.splits.items()},
    }


class Results:
    """Metrics of one test split under their flat keys, with intervals."""

    def __init__(self, dataset: str, split: Split, num_resamples: int):
        self.metrics: dict[str, float] = {}
        self.intervals: dict[str, tuple[float, float]] = {}
        self._prefix = f"test/{dataset}/"
        self._split = split
        self._num_resamples = possible_resamples(split.labels, split.groups, num_resamples) if self.has_both else 0
        self._covariate: np.ndarray | None = None
        self._masks: np.ndarray | None = None

    @property
    def has_both(self) -> bool:
        """Whether there are normal and abnormal images."""
        return len(np.unique(self._split.labels)) == 2

    def add_detector(
        self, system: System, calibration: Calibration, corrected: np.ndarray, fused: np.ndarray, scored: Scored
    ) -> None:
        """Fused scores with intervals, each evidence, the best single one, each task left out."""
        self._covariate = scored.texture
        self._image("", fused, interval=True)
        for name, label in (("normal_vs_calibration", 0), ("abnormal_vs_calibration", 1)):
            against = auroc_between(calibration.fused, fused[self._split.labels == label])
            self.metrics[self._prefix + name] = against
        if self._split.has_masks:
            self._pixel("", scored.maps, interval=True)
        for name, scores in zip(calibration.names, corrected.T, strict=True):
            self._image(f"task/{name}/", scores, interval=True)
        # Named best with the test labels in sight: a comparison, never a choice.
        singles = [self.metrics[f"{self._prefix}task/{name}/image_auroc"] for name in evidence_names(system.tasks)]
        self.metrics[self._prefix + "best_single/image_auroc"] = max(singles)
        for task, names in task_evidences(system.tasks).items():
            self._image(f"leave_out/{task}/", calibration.fuse(corrected, leave_out=names))

    def add_floors(self, dataset: Dataset) -> None:
        """Scores and maps that learn next to nothing, fitted on the same training normals."""
        fit = floors.statistics(_some_images(dataset.splits["train"]))
        for name, scores in floors.floor_scores(fit, floors.statistics(image_batches(self._split))).items():
            self._image(f"floor/{name}/", scores)
        if self._split.has_masks:
            map_fn, size, parts = floors.make_floor_map_fn(fit), dataset.mask_size, []
            for images in image_batches(self._split):
                resized = {
                    name: np.asarray(jax.image.resize(maps, (len(maps), size, size), "bilinear"))
                    for name, maps in map_fn(images).items()
                }
                parts.append(resized)
            for name in list(parts[0]):
                self._pixel(f"floor/{name}/", np.concatenate([part.pop(name) for part in parts]))

    def add_untrained(self, system: System, scorer: Scorer, dataset: Dataset) -> None:
        """The same network before its first update, calibrated and fused in the same way."""
        init = jax.jit(system.init_fn(system.patch_centers(dataset)))
        params, extra = init(jax.random.key(system.config.seed))
        scorer = scorer.trained_as(Trained(system.place(params), system.place(extra), 0))
        calibration = calibrate(system, scorer, dataset.splits["calibration"])
        size, mask_size = dataset.image_size, dataset.mask_size
        map_fn = make_map_fn(calibration, size, mask_size) if self._split.has_masks else None
        scored = scorer.split(self._split, "untrained", map_fn)
        self._image("floor/untrained/", calibration.fuse(calibration.corrected(scored.raw, scored.texture)))
        if scored.maps is not None:
            self._pixel("floor/untrained/", scored.maps)

    def _image(self, key: str, scores: np.ndarray, interval: bool = False) -> None:
        labels = self._split.labels
        key = self._prefix + key
        self.metrics[key + "image_auroc"] = auroc(scores, labels)
        self.metrics[key + "image_ap"] = average_precision(scores, labels)
        matched, pairs = matched_auroc(scores, labels, self._covariate, MATCHED_TOLERANCE)
        if pairs:
            self.metrics[key + "matched_auroc"] = matched
        if interval and self._num_resamples:
            groups = np.array(self._split.groups)
            for name, metric in (("image_auroc", "auroc"), ("image_ap", "average_precision")):
                self.intervals[key + name] = bootstrap_interval(metric, scores, labels, groups, self._num_resamples)

    def _pixel(self, key: str, maps: np.ndarray, interval: bool = False) -> None:
        if self._masks is None:
            batches = eval_batches(self._split, MASK_BATCH)
            self._masks = np.concatenate([batch["mask"][batch["valid"]][..., 0] > 0 for batch in batches])
        if interval and self._num_resamples:
            groups = np.array(self._split.groups)
            found = pixel_intervals(maps, self._masks, groups, self._num_resamples)
            self.intervals |= {self._prefix + key + name: value for name, value in found.items()}
        values = pixel_metrics(maps, self._masks)
        self.metrics |= {self._prefix + key + name: value for name, value in values.items() if np.isfinite(value)}


FLOORS = {
    "mean_intensity": "how bright the image is",
    "intensity_distance": "how far its brightness is from the normals'",
    "low_gradient": "how smooth the image is",
    "gradient_distance": "how far its smoothness is from the normals'",
    **{f"band_{i}_low": f"how little texture it has, sigma {s} pixels" for i, s in enumerate(BANDS)},
    **{f"band_{i}_distance": f"how unusual its texture is, sigma {s} pixels" for i, s in enumerate(BANDS)},
    "histogram_distance": "distance of its grey-level histogram to the normals'",
    "pca_error": "error after 40 principal components at 32 x 32",
    "nearest_neighbour": "distance to the nearest training image at 32 x 32",
    "smoothed_intensity": "blurred brightness as a map",
    "untrained": "the same network before training",
}


def gallery(
    system: System, scorer: Scorer, calibration: Calibration, split: Split, fused: np.ndarray, p: np.ndarray
) -> list[Case]:
    """Cases of the report: hits, misses, false alarms and quiet normals, scored once more for their maps."""
    sections = select_cases(split.labels, fused, system.config.score.gallery)
    rows = [(title, int(row)) for title, indices in sections.items() for row in indices]
    if not rows:
        return []
    indices = np.array([row for _, row in rows])
    images, masks = split.images(indices), split.masks(indices)
    scored = scorer.images(images)
    maps, body, size = scored["maps"], scored["body"], images.shape[1]
    fused_maps = np.asarray(make_map_fn(calibration, size, size)(maps, body))
    by_evidence = evidence_maps(system, calibration, maps, body)
    return [
        Case(
            section=title,
            name=split.names[row],
            label=int(split.labels[row]),
            score=float(fused[row]),
            p_value=float(p[row]),
            image=images[i],
            anomaly_map=fused_maps[i],
            task_maps=by_evidence[i],
            mask=np.asarray(jax.image.resize(masks[i, ..., 0], (size, size), "nearest")) if split.has_masks else None,
        )
        for i, (title, row) in enumerate(rows)
    ]


def _some_images(split: Split, most: int = 5000) -> Iterator[np.ndarray]:
    """At most `most` images, evenly spaced, in batches: floors need no more."""
    rows = np.unique(np.linspace(0, len(split) - 1, min(len(split), most)).round().astype(int))
    return image_batches(split if len(rows) == len(split) else split.take(rows))


def _thresholds(rates: Any, calibration: Calibration, fused: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for rate in rates:
        threshold = threshold_at_fpr(calibration.fused, rate)
        flagged = fused >= threshold
        row = {"fpr": float(rate), "threshold": threshold}
        row["observed_fpr"] = float(flagged[labels == 0].mean()) if (labels == 0).any() else None
        row["tpr"] = float(flagged[labels == 1].mean()) if (labels == 1).any() else None
        rows.append(row)
    return rows


def _headline(system: System, dataset: Dataset, has_test: bool, learned_from: str, known: bool) -> str:
    """
    Args:
      learned_from: what was trained on where it is not the data set's training split, else "".
      known: whether the calibration normals are known not to have been trained on.
    """
    normals = dataset.splits["calibration"]
    text = (
        f"{len(system.tasks)} proxy tasks learned from scratch on "
        + (learned_from or f"{len(dataset.splits['train'])} normal images")
        + f", calibrated on {len(normals)} "
        + (f"{'' if learned_from else 'more '}that were not trained on" if known else "held-out normals")
        + f" ({len(set(normals.groups))} patients or groups)."
    )
    if not known:
        text += (
            " Which images this detector learned from was not written down when it was trained: these normals may be "
            "among them, and p-values then come out too small."
        )
    if learned_from:
        logging.warning("this detector learned from other images: %s", learned_from)
    if not has_test:
        text += (
            " There is no test split: the images shown are the calibration normals. Score others with --mode=predict."
        )
        logging.warning("no test split: the report shows the calibration normals; score others with --mode=predict")
    return text
