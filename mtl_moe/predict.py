"""Scores a folder of new images with a trained detector: predictions.csv and report.html, no labels needed."""

import dataclasses
import functools
import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.files import write_json
from core.logs import read_history
from core.metrics import threshold_at_fpr
from input_pipeline.dataset import load_images
from mtl_moe.calibration import TEXTURE, Calibration
from mtl_moe.calibration_fit import check_calibration
from mtl_moe.evaluate import gallery
from mtl_moe.infer import Scorer, calibrate, own_calibration, restore_networks
from mtl_moe.outputs import write_maps, write_predictions
from mtl_moe.patients import patients_of, write_patients
from mtl_moe.provenance import provenance, unfinished
from mtl_moe.report import write_report
from mtl_moe.report_data import ReportData
from mtl_moe.scoring import make_map_fn
from mtl_moe.seeds import seeds_together
from mtl_moe.system import System
from mtl_moe.training_data import new_normals, seen_in_training

CHECKED_RATE = 0.1  # of normals flagged by design, at which an unlabelled folder is compared with its calibration


def source_of(source: Path, normals: Path | None) -> str:
    """What a prediction is of, as its report.json says: the folders of the images and of the site's normals."""
    return " against ".join(str(folder.resolve()) for folder in (source, normals) if folder)


def predict(system: System, workdir: Path, source: Path, output: Path, normals: Path | None = None) -> np.ndarray:
    """Scores every image below `source` and writes the results to `output`, in place of an earlier prediction there.

    Args:
      normals: folder of normal images of the site that `source` comes from, which calibrate the scores; None: the
        training set's held-out normals do, as the last evaluation left them in `workdir`. Those that the detector was
        trained on are left out.

    Returns:
      Image scores [N], in the order of the sorted names.

    Raises:
      ValueError: without images, checkpoint or calibration, or if one of the two folders lies inside the other.
    """
    start = time.time()
    config = system.config
    networks = restore_networks(system, workdir)
    step = networks[0].step
    split, skipped = load_images(source, config.data, min_size=config.model.patch_size)
    scorer = Scorer(system, *networks)
    if normals is None:
        calibration = own_calibration(system, workdir, step)
    else:
        calibration = _calibrate(system, scorer, workdir, normals, source)
    map_fn = make_map_fn(calibration, config.data.image_size, config.data.mask_size)
    output.mkdir(parents=True, exist_ok=True)
    if _wrote_maps(output):  # of an earlier prediction, whose images may have been others
        shutil.rmtree(output / "maps", ignore_errors=True)
    write = functools.partial(write_maps, output / "maps")
    scored = scorer.split(split, "score", map_fn if config.score.save_maps else None, write=write, keep_maps=False)
    corrected = calibration.corrected(scored.raw, scored.texture)
    fused = calibration.fuse(corrected)
    p = calibration.p_values(fused)
    evidence = calibration.by_name(calibration.tail_scores(corrected))
    caution = unlike_calibration(p, evidence[TEXTURE], split.groups, calibration)
    if caution:
        logging.warning("%s", caution)
    write_predictions(output / "predictions.csv", split, fused, p, evidence, skipped)
    patients = patients_of(split.groups, split.labels, fused, calibration)
    write_patients(output / "patients.csv", patients, split.names)
    thresholds = [
        {"fpr": float(rate), "threshold": threshold_at_fpr(calibration.fused, rate)}
        for rate in config.score.false_positive_rates
    ]
    facts = {
        "source": source_of(source, normals),
        "counts": {"images": len(split), "skipped": len(skipped), "calibration": len(calibration.fused)},
        "calibration": {"source": calibration.source, "manifest_hash": calibration.manifest_hash},
    }
    report = {
        "maps": bool(config.score.save_maps),
        "thresholds": thresholds,
        "provenance": provenance(system, facts, workdir, step, time.time() - start),
    }
    write_json(output / "report.json", report)
    name = source.resolve().name  # of "." too
    data = ReportData(
        dataset=name,
        layout=f"{len(split)} images below {name}"
        + (f", {len(skipped)} more could not be read: {', '.join(skipped)}" if skipped else ""),
        headline=f"Scored by the detector trained on {config.data.name}{seeds_together(config)}; "
        f"{len(calibration.fused)} calibration normals of {calibration.source or 'its last evaluation'}."
        + unfinished(system, step)
        + seen_in_training(scored.hashes, workdir),
        caution=caution,
        metrics={},
        tasks=[task.name for task in system.tasks],
        names=split.names,
        labels=split.labels,
        scores=fused,
        p_values=p,
        evidence_scores=evidence,
        calibration_scores=calibration.fused,
        groups=split.groups,
        num_calibration_groups=calibration.num_groups,
        patients=patients,
        thresholds=thresholds,
        cases=gallery(system, scorer, calibration, split, fused, p),
        history=read_history(workdir),
        provenance=report["provenance"],
        config=config.to_dict(),
    )
    write_report(output / "report.html", data)
    return fused


def unlike_calibration(p: np.ndarray, texture: np.ndarray, groups: Sequence[str], calibration: Calibration) -> str:
    """A caution where so many images are flagged that something else than disease may be the reason; "" where not.

    Without labels nothing tells a folder of patients from one of another scanner: both are odd. More than half of the
    images beyond what chance explains, where CHECKED_RATE of normals would be, is too much to pass over in silence.

    Args:
      p, texture: [N] p-values, and tail scores u of the evidence texture.
      groups: [N], patient of each image.
    """
    flagged, spread = p <= CHECKED_RATE, CHECKED_RATE * (1 - CHECKED_RATE)
    # Of which images came, half of them flagged, and of which normals set the rate, a tenth of them beyond it.
    error = np.sqrt(0.25 / len(set(groups)) + spread / max(calibration.num_groups, 1))
    if flagged.mean() - 2 * error <= 0.5:
        return ""
    text = (
        f"{flagged.sum()} of {len(p)} images are flagged where {100 * CHECKED_RATE:g} % of normal ones are: either "
        "most of them are abnormal, or they were made otherwise than the calibration normals (another device, "
        "protocol, resolution or window), and then scores and p-values do not tell disease"
    )
    odd = int((texture >= -np.log(CHECKED_RATE)).sum())
    if 2 * odd > len(p):
        text += (
            f"; {odd} are beyond {100 - 100 * CHECKED_RATE:g} % of normals by their amount of texture alone, which "
            "another device or processing changes too"
        )
    return text + ". Normals of the very same origin tell which: --mode=predict --normals=FOLDER calibrates on them."


def check_output(output: Path, *folders: Path | None) -> None:
    """What is found in `output` may be replaced, so it is no work directory and holds none of the images of `folders`.

    Raises:
      ValueError: if it is or does.
    """
    if any((output / name).exists() for name in ("config.json", "checkpoints")):
        raise ValueError(f"--output={output} is a work directory, whose results would be lost: name another folder")
    for folder in (folder.resolve() for folder in folders if folder):
        if output.resolve().is_relative_to(folder) or folder.is_relative_to((output / "maps").resolve()):
            raise ValueError(f"--output={output} lies among the images of {folder}: name a folder outside of it")


def _wrote_maps(output: Path) -> bool:
    """Whether the maps in `output` are those of an earlier prediction; a folder of that name may be the user's."""
    path = output / "report.json"
    return path.exists() and bool(json.loads(path.read_text()).get("maps"))


def _calibrate(system: System, scorer: Scorer, workdir: Path, normals: Path, source: Path) -> Calibration:
    if normals.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(normals.resolve()):
        raise ValueError(
            f"--normals={normals} and --input={source} hold the same images, which would look as normal as themselves: "
            "expected two folders, neither inside the other"
        )
    split, _ = load_images(normals, system.config.data, min_size=system.config.model.patch_size, need_groups=True)
    split, known = new_normals(split, workdir)
    check_calibration(system.config.score.fusion, split.groups)
    calibration = calibrate(system, scorer, dataclasses.replace(split, labels=np.zeros_like(split.labels)))
    claim = "" if known else ", of which it is not known whether the detector was trained on them"
    return dataclasses.replace(calibration, source=normals.resolve().name + claim)
