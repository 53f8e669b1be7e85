"""Scores a folder of new images with a trained detector: predictions.csv and report.html, no labels needed."""

from pathlib import Path

import numpy as np

from core.logs import read_history
from core.metrics import threshold_at_fpr
from input_pipeline.dataset import load_images
from mtl_moe.evaluate import gallery
from mtl_moe.infer import Scorer, restore
from mtl_moe.outputs import write_predictions
from mtl_moe.report import ReportData, write_report
from mtl_moe.scoring import fused_names, load_calibration
from mtl_moe.system import System


def predict(system: System, workdir: Path, source: Path, output: Path) -> np.ndarray:
    """Scores every image below `source` and writes the results to `output`.

    Returns:
      Image scores [N], in the order of the sorted names.

    Raises:
      ValueError: without images, checkpoint or calibration.
    """
    config = system.config
    trained = restore(system, workdir)
    calibration = load_calibration(workdir / "calibration.npz", fused_names(system.tasks), trained.step)
    if calibration.fusion != config.score.fusion:
        raise ValueError(
            f"score.fusion={config.score.fusion!r}, but the calibration was made for {calibration.fusion!r}: run "
            "--mode=evaluate with the same --config.score.fusion first"
        )
    split = load_images(source, config.data, min_size=config.model.patch_size)
    scorer = Scorer(system, trained)
    scored = scorer.split(split, "score")
    corrected = calibration.corrected(scored.raw, scored.texture)
    fused = calibration.fuse(corrected)
    p = calibration.p_values(fused)
    evidence = dict(zip(calibration.names, calibration.tail_scores(corrected).T, strict=True))
    output.mkdir(parents=True, exist_ok=True)
    write_predictions(output / "predictions.csv", split, fused, p, evidence)
    data = ReportData(
        dataset=source.name,
        layout=f"{len(split)} images below {source.name}",
        headline=f"Scored by the detector trained on {config.data.name}; {len(calibration.fused)} calibration normals.",
        metrics={},
        tasks=[task.name for task in system.tasks],
        names=split.names,
        labels=split.labels,
        scores=fused,
        p_values=p,
        task_scores=evidence,
        calibration_scores=calibration.fused,
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
