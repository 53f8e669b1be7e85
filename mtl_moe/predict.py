"""Scores a folder of new images with a trained detector: predictions.csv and report.html, no labels needed."""

import dataclasses
from pathlib import Path

import numpy as np

from core.logs import read_history
from core.metrics import threshold_at_fpr
from input_pipeline.dataset import load_images
from mtl_moe.calibration import Calibration, check_calibration, fused_names, load_calibration
from mtl_moe.evaluate import gallery
from mtl_moe.infer import Scorer, calibrate, restore
from mtl_moe.outputs import write_maps, write_predictions
from mtl_moe.report import ReportData, write_report
from mtl_moe.scoring import make_map_fn
from mtl_moe.system import System


def predict(system: System, workdir: Path, source: Path, output: Path, normals: Path | None = None) -> np.ndarray:
    """Scores every image below `source` and writes the results to `output`.

    Args:
      normals: folder of normal images of the site that `source` comes from, which calibrate the scores; None: the
        training set's held-out normals do, as the last evaluation left them in `workdir`.

    Returns:
      Image scores [N], in the order of the sorted names.

    Raises:
      ValueError: without images, checkpoint or calibration, or if one of the two folders lies inside the other.
    """
    config = system.config
    trained = restore(system, workdir)
    split, skipped = load_images(source, config.data, min_size=config.model.patch_size)
    scorer = Scorer(system, trained)
    if normals is None:
        calibration = _load(system, workdir, trained.step)
    else:
        calibration = _calibrate(system, scorer, normals, source)
    map_fn = make_map_fn(calibration, config.data.image_size, config.data.mask_size)
    scored = scorer.split(split, "score", map_fn if config.score.save_maps else None)
    corrected = calibration.corrected(scored.raw, scored.texture)
    fused = calibration.fuse(corrected)
    p = calibration.p_values(fused)
    evidence = dict(zip(calibration.names, calibration.tail_scores(corrected).T, strict=True))
    output.mkdir(parents=True, exist_ok=True)
    write_predictions(output / "predictions.csv", split, fused, p, evidence, skipped)
    if scored.maps is not None:
        write_maps(output / "maps", split, scored.maps)
    data = ReportData(
        dataset=source.name,
        layout=f"{len(split)} images below {source.name}"
        + (f", {len(skipped)} more could not be read: {', '.join(skipped)}" if skipped else ""),
        headline=f"Scored by the detector trained on {config.data.name}; {len(calibration.fused)} calibration normals"
        + (f" of {normals.name}." if normals else "."),
        metrics={},
        tasks=[task.name for task in system.tasks],
        names=split.names,
        labels=split.labels,
        scores=fused,
        p_values=p,
        task_scores=evidence,
        calibration_scores=calibration.fused,
        groups=split.groups,
        num_calibration_groups=len(calibration.fused),  # not shown: nothing here is known to be normal
        thresholds=[
            {"fpr": float(rate), "threshold": threshold_at_fpr(calibration.fused, rate)}
            for rate in config.score.false_positive_rates
        ],
        cases=gallery(system, scorer, calibration, split, fused, p),
        history=read_history(workdir),
        config=config.to_dict(),
    )
    write_report(output / "report.html", data)
    return fused


def _load(system: System, workdir: Path, step: int) -> Calibration:
    calibration = load_calibration(workdir / "calibration.npz", fused_names(system.tasks), step)
    fusion = system.config.score.fusion
    if calibration.fusion != fusion:
        raise ValueError(
            f"score.fusion={fusion!r}, but the calibration was made for {calibration.fusion!r}: run --mode=evaluate "
            "with the same --config.score.fusion first"
        )
    return calibration


def _calibrate(system: System, scorer: Scorer, normals: Path, source: Path) -> Calibration:
    if normals.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(normals.resolve()):
        raise ValueError(
            f"--normals={normals} and --input={source} hold the same images, which would look as normal as themselves: "
            "expected two folders, neither inside the other"
        )
    split, _ = load_images(normals, system.config.data, min_size=system.config.model.patch_size)
    check_calibration(system.config.score.fusion, split.groups)
    return calibrate(system, scorer, dataclasses.replace(split, labels=np.zeros_like(split.labels)))
