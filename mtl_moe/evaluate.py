"""Evaluates a trained detector: calibrated scores, metrics with intervals, floors, predictions.csv, report.json/.html.

Axes: N test images, S evidences, M side of the finished maps. Nothing here chooses anything: every number is computed
once, from the checkpoint and the test split; calibration sees held-out training normals only.
"""

import dataclasses
import functools
import logging
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core.files import write_json
from core.logs import read_history
from core.metrics import threshold_at_fpr
from input_pipeline.dataset import Dataset, Split
from mtl_moe.calibration import Calibration
from mtl_moe.calibration_fit import check_calibration
from mtl_moe.infer import Scored, Scorer, calibrate, evidence_maps, own_calibration, restore_networks, router_use
from mtl_moe.outputs import write_maps, write_predictions
from mtl_moe.painted import criteria
from mtl_moe.painted_check import PaintedCheck, check_painted
from mtl_moe.patients import patients_of, write_patients
from mtl_moe.provenance import check_source, provenance, unfinished
from mtl_moe.report import write_report
from mtl_moe.report_data import Case, ReportData, select_cases
from mtl_moe.results import FLOORS, Results, evidence_map_rows
from mtl_moe.scoring import make_map_fn
from mtl_moe.seeds import seeds_together
from mtl_moe.system import System
from mtl_moe.training_data import calibration_normals, other_training_data, seen_in_training

LEFT_OUT = "the floors that are fitted on training images and the untrained network"  # without training images


def check_score(score: Any, dataset: Dataset) -> None:
    """Checks `config.score` and the data before anything is computed; ValueError as it has to be.

    Without training images there have to be test images, normal and abnormal ones: what else would be measured?
    """
    if "train" in dataset.splits:
        normals = dataset.splits.get("calibration")
        check_calibration(score.fusion, normals.groups if normals else ())
    elif len(np.unique(dataset.splits["test"].labels if "test" in dataset.splits else ())) != 2:
        found = ", ".join(f"{len(split)} in {name}/" for name, split in dataset.splits.items())
        raise ValueError(
            f"{dataset.name}: without train/ a detector is measured on test/, which has to hold normal and abnormal "
            f"images (test/good and test/Ungood); found {found}; --mode=predict scores images without labels"
        )
    if min(score.bootstrap, score.gallery, score.painted) < 0 or score.batch_size < 1:
        raise ValueError(
            "score: expected bootstrap, gallery and painted of at least 0 (0: none) and a batch_size of at least 1, "
            f"found {score.bootstrap}, {score.gallery}, {score.painted} and {score.batch_size}"
        )
    if not all(0 < rate < 1 for rate in score.false_positive_rates):
        raise ValueError(f"score.false_positive_rates: expected rates in (0, 1), found {score.false_positive_rates}")


def result_folder(data: Any, dataset: Dataset, workdir: Path) -> Path:
    """Where the evaluation on `dataset`, read as `data` (config.data) says, is written.

    That is `workdir`, and `workdir`/evaluate/NAME, NAME that of the data's folder or cache, for a data set other than
    the one that the detector learned from: what is predicted later is calibrated on the detector's own normals.

    Raises:
      ValueError: if the folder holds the results of data in another place.
    """
    if not other_training_data(dataset, workdir):
        return workdir
    source = _source(data)
    folder = workdir / "evaluate" / (Path(source).name.removesuffix(".npz") or dataset.name)
    check_source(folder, source, "move that folder away first")
    return folder


def evaluate(system: System, dataset: Dataset, workdir: Path) -> dict[str, Any]:
    """Restores what was trained for `workdir`, evaluates, writes all outputs to `result_folder`.

    Without a test split the calibration normals are shown instead, each scored by a fit without it, and neither
    accuracy nor rates are given; without abnormal images, defects painted on these normals show what is noticed.
    Without training images the scores are calibrated as those of a prediction are, and what would be fitted on them is
    left out: `LEFT_OUT`.

    Returns:
      The content of report.json.

    Raises:
      ValueError: if there are too few normals that the detector was not trained on, or as `result_folder`.
    """
    start = time.time()
    data = system.config.data
    output = result_folder(data, dataset, workdir)
    networks = restore_networks(system, workdir)
    step = networks[0].step
    scorer = Scorer(system, *networks)
    dataset, calibration, known = _calibrate(system, scorer, dataset, workdir, output, step)
    has_test = len(dataset.splits.get("test", ())) > 0
    split = dataset.splits["test" if has_test else "calibration"]
    save_maps = system.config.score.save_maps
    wanted = split.has_masks or save_maps
    map_fn = make_map_fn(calibration, dataset.image_size, dataset.mask_size) if wanted else None
    write = functools.partial(write_maps, output / "maps") if save_maps else None
    num_maps = len(calibration.evidences)
    keep = evidence_map_rows(split, num_maps, dataset.image_size) if has_test else ()
    scored = scorer.split(split, "score", map_fn, keep, write=write, keep_maps=split.has_masks)
    corrected = calibration.corrected(scored.raw, scored.texture)
    # The fit that a normal is part of finds it more normal than it finds a new image.
    fused = calibration.fuse(corrected) if has_test else calibration.fused
    p = calibration.p_values(fused)

    patients = patients_of(split.groups, split.labels, fused, calibration) if has_test else None
    results = Results(dataset.name, split, scored.texture, system.config.score.bootstrap)
    if results.has_both:
        results.add_detector(system, calibration, corrected, fused, scored.maps, scored.kept)
        if patients:
            results.add_patients(patients)
        results.add_floors(dataset, fused)
        if "train" in dataset.splits and system.config.score.untrained:
            results.add_untrained(system, scorer, dataset)
    painted = None
    if not results.has_both and "train" in dataset.splits and system.config.score.painted:
        painted = _painted(system, scorer, calibration, dataset, None if has_test else scored, results)
    labels = split.labels if has_test else np.full(len(split), -1)  # rates of the normals that set them are no test
    thresholds = _thresholds(system.config.score.false_positive_rates, calibration, fused, labels)
    report = {
        "metrics": results.metrics,
        "intervals": results.intervals,
        "thresholds": thresholds,
        "provenance": provenance(system, _facts(data, dataset, calibration), workdir, step, time.time() - start),
    }
    evidence_scores = calibration.by_name(calibration.tail_scores(corrected))
    write_predictions(output / "predictions.csv", split, fused, p, evidence_scores)
    write_patients(output / "patients.csv", patients, split.names)
    write_json(output / "report.json", report)
    page = ReportData(
        dataset=dataset.name,
        layout=dataset.layout,
        headline=_headline(system, dataset, calibration, other_training_data(dataset, workdir), known)
        + unfinished(system, step)
        + seen_in_training(scored.hashes, workdir),
        metrics=results.metrics,
        intervals=results.intervals,
        tasks=[task.name for task in system.tasks],
        names=split.names,
        labels=split.labels,
        scores=fused,
        p_values=p,
        evidence_scores=evidence_scores,
        calibration_scores=calibration.fused,
        groups=split.groups,
        num_calibration_groups=calibration.num_groups,
        tested=has_test,
        patients=patients,
        painted=painted,
        thresholds=thresholds,
        cases=gallery(system, scorer, calibration, split, fused, p),
        history=read_history(workdir),
        router=router_use(system, networks[0], split.images(np.arange(min(len(split), 32))))
        if len(networks) == 1
        else {},  # experts of another seed are others: each seed's own report shows them
        floors=FLOORS,
        provenance=report["provenance"],
        config=system.config.to_dict(),
    )
    write_report(output / "report.html", page)
    return report


def _calibrate(
    system: System, scorer: Scorer, dataset: Dataset, workdir: Path, output: Path, step: int
) -> tuple[Dataset, Calibration, bool]:
    """Makes the folder `output` and, where there are training images, writes the calibration there.

    Returns:
      The data set with the normals that calibrate, the calibration, and whether they are known not to have been
      trained on.
    """
    if "train" not in dataset.splits:
        calibration = own_calibration(system, workdir, step)
        output.mkdir(parents=True, exist_ok=True)
        return dataset, calibration, True
    normals, known = calibration_normals(dataset, workdir)
    folder = Path(_source(system.config.data)).name.removesuffix(".npz")
    calibration = dataclasses.replace(
        calibrate(system, scorer, normals),
        source=dataset.name + (f" ({folder})" if folder not in ("", dataset.name) else ""),
        manifest_hash=dataset.manifest_hash,
        dtype=system.config.score.dtype,
    )
    output.mkdir(parents=True, exist_ok=True)
    calibration.save(output / "calibration.npz", step)
    return dataclasses.replace(dataset, splits=dataset.splits | {"calibration": normals}), calibration, known


def _painted(
    system: System, scorer: Scorer, calibration: Calibration, dataset: Dataset, scored: Scored | None, results: Results
) -> PaintedCheck:
    """Adds the AUROC of painted defects to `results`; `scored`: the calibration normals, None: not scored yet."""
    normals = dataset.splits["calibration"]
    scored = scored or scorer.split(normals, "calibration normals")
    found = check_painted(scorer, calibration, normals, scored, system.config.score.painted)
    prefix = f"painted/{dataset.name}/"
    results.metrics |= {prefix + name: value for name, value in criteria(found.aurocs).items()}
    results.metrics |= {f"{prefix}family/{name}": value for name, value in found.aurocs.items()}
    return found


def _source(data: Any) -> str:
    """Where the data lie; "" for those that are generated."""
    return str(Path(data.cache or data.root).resolve()) if data.cache or data.root else ""


def _facts(data: Any, dataset: Dataset, calibration: Calibration) -> dict[str, Any]:
    """What the report's provenance says of the data."""
    facts = {
        "dataset": dataset.name,
        "source": _source(data),
        "manifest_hash": dataset.manifest_hash,
        "counts": {name: len(part) for name, part in dataset.splits.items()},
    }
    if "train" not in dataset.splits:
        facts["calibration"] = {"source": calibration.source, "manifest_hash": calibration.manifest_hash}
        facts["left_out"] = LEFT_OUT
    return facts


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
            evidence_maps=by_evidence[i],
            mask=np.asarray(jax.image.resize(masks[i, ..., 0], (size, size), "nearest")) if split.has_masks else None,
        )
        for i, (title, row) in enumerate(rows)
    ]


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


def _headline(system: System, dataset: Dataset, calibration: Calibration, learned_from: str, known: bool) -> str:
    """
    Args:
      learned_from: what was trained on where it is not the data set's training split, else "".
      known: whether the calibration normals are known not to have been trained on.
    """
    has_train, has_test = "train" in dataset.splits, len(dataset.splits.get("test", ())) > 0
    which = f"{'' if learned_from else 'more '}that were not trained on" if known else "held-out normals"
    if not has_train:
        which = f"held-out normals of {calibration.source or 'its last evaluation'}"
    text = (
        f"{len(system.tasks)} proxy tasks learned from scratch on "
        + (learned_from or f"{len(dataset.splits['train'])} normal images")
        + seeds_together(system.config)
        + f", calibrated on {len(calibration.fused)} {which} ({calibration.num_groups} patients or groups)."
    )
    if not has_train:
        text += (
            f" The data hold no training images: thresholds are those of --mode=predict, and {LEFT_OUT} are left out."
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
        text += " valid/ is not used: call it test/ to be measured on it." if "valid" in dataset.splits else ""
        logging.warning("no test split: the report shows the calibration normals; score others with --mode=predict")
    return text
