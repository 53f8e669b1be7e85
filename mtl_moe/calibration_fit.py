"""Fits a `Calibration` on normals that were not trained on: see `calibration.py` for what is fitted and why.

Axes: n calibration normals, S evidences with a map, K = S + 1 evidences, H W map.
"""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from mtl_moe.calibration import FUSIONS, Calibration, Evidence
from mtl_moe.tasks import Task
from mtl_moe.tasks.base import EPS

TAIL_SHARE = 0.2  # of the calibration scores, fitted by the Pareto tail
FOLDS = 20  # at most, of whole patients: calibration normals are scored by a fit on the other folds
BLANK = 10.0  # deviations from the median texture beyond which a normal has no say: one black image decides the fit
MIN_NORMALS = 5  # to calibrate at all
FEW_GROUPS = 10  # patients below which a warning says how little they know of the others


def check_calibration(fusion: str, groups: Sequence[str]) -> None:
    """What can be said before any training about a calibration on images of these groups (patients), one an image.

    Raises:
      ValueError: for an unknown fusion or too few normals.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"score.fusion: expected one of {FUSIONS}, found {fusion!r}")
    if len(groups) < MIN_NORMALS:
        raise ValueError(
            f"only {len(groups)} calibration normals: at least {MIN_NORMALS} are needed (20 for a 5 % threshold, 100 "
            "for 1 %); add normal images, or raise data.calibration_fraction"
        )
    if (count := len(set(groups))) < FEW_GROUPS:
        logging.warning(
            "the %d calibration normals come from %d patient(s) or group(s): thresholds and p-values say how odd an "
            "image is among these few; bring normals of more patients",
            len(groups),
            count,
        )


def fit_calibration(
    tasks: Sequence[Task],
    fusion: str,
    raw: np.ndarray,
    texture: np.ndarray,
    groups: Sequence[str],
    maps: np.ndarray | None = None,
    body: np.ndarray | None = None,
) -> Calibration:
    """Fits on calibration normals.

    Args:
      raw, texture: [n, S] and [n], n at least MIN_NORMALS (`check_calibration`).
      groups: [n], the patient of each.
      maps, body: [m, S, H, W] and [m, H, W] of some of the normals; None: for image scores only.
    """
    if num_blank := (~_plain(texture.astype(np.float64))).sum():
        logging.warning(
            "%d of %d calibration normals are blank or of quite another texture than the rest: they have no say in how "
            "scores are corrected for texture",
            num_blank,
            len(texture),
        )
    evidences = [Evidence(name, r.kind, r.how == "top") for task in tasks for name, r in task.reductions.items()]
    evidences *= raw.shape[1] // len(evidences)  # networks: the mean over a kind is the mean over them too
    calibration = fit_scores(evidences, fusion, raw, texture, groups)
    if maps is None:
        return calibration
    inside = body > 0
    low, high = np.array([np.quantile(maps[:, s][inside], (0.5, 0.95)) for s in range(maps.shape[1])]).T
    return dataclasses.replace(calibration, map_low=low, map_scale=np.maximum(high - low, EPS))


def _plain(texture: np.ndarray) -> np.ndarray:
    """Which of the calibration normals have a say in the texture fit, bool [n]; see BLANK."""
    off = np.abs(texture - np.median(texture))
    return off <= BLANK * 1.4826 * np.median(off) + EPS


def fit_scores(
    evidences: Sequence[Evidence], fusion: str, raw: np.ndarray, texture: np.ndarray, groups: Sequence[str]
) -> Calibration:
    """The calibration of image scores; maps keep their scale. `raw`, `texture`, `groups`: see `fit_calibration`."""
    whole, folds = fit_folds(evidences, fusion, raw, texture, groups)
    fused = np.empty(len(raw))
    for fold, others in folds:
        fused[fold] = others.fuse(others.corrected(raw[fold], texture[fold]))
    names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    return dataclasses.replace(whole, fused=fused, num_groups=len(names), groups=numbers)


def fit_folds(
    evidences: Sequence[Evidence], fusion: str, raw: np.ndarray, texture: np.ndarray, groups: Sequence[str]
) -> tuple[Calibration, list[tuple[np.ndarray, Calibration]]]:
    """Arguments as of `fit_scores` -> the fit on all normals, and for each fold its rows [m] and the fit on the others.

    None of these has the calibration normals' fused scores.
    """
    raw, texture = raw.astype(np.float64), texture.astype(np.float64)
    plain = _plain(texture)

    def fit(rows: np.ndarray) -> Calibration:
        used = rows[plain[rows]]
        # Linear, of one measure: a curve, or several that vary together, extrapolate badly to images unlike normals.
        top = [evidence.corrected for evidence in evidences]
        fits = [np.polyfit(texture[used], raw[used, i], 1) if fitted else (0.0, 0.0) for i, fitted in enumerate(top)]
        slope, intercept = np.array(fits).T
        calibration = Calibration(
            evidences=tuple(evidences),
            fusion=fusion,
            slope=slope,
            intercept=intercept,
            texture_median=float(np.median(texture[rows])),
            reference=np.zeros((0, 0)),
            tail=np.zeros((0, 3)),
            map_low=np.zeros(len(evidences)),
            map_scale=np.ones(len(evidences)),
            fused=np.zeros(0),
        )
        reference = np.sort(calibration.corrected(raw[rows], texture[rows]), axis=0)
        tail = np.stack([_fit_tail(column) for column in reference.T])
        return dataclasses.replace(calibration, reference=reference, tail=tail)

    rows = np.arange(len(raw))
    return fit(rows), [(fold, fit(np.setdiff1d(rows, fold))) for fold in _folds(groups)]


def _folds(groups: Sequence[str]) -> list[np.ndarray]:
    """Rows of each fold: whole groups, in the order they come in; single rows where that leaves too few to fit on."""
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    numbers = np.array([number[group] for group in groups])
    parts = np.array_split(np.arange(len(number)), min(len(number), FOLDS))
    folds = [np.flatnonzero(np.isin(numbers, part)) for part in parts]
    if max(map(len, folds)) > len(numbers) - (MIN_NORMALS - 1):
        return np.array_split(np.arange(len(numbers)), min(len(numbers), FOLDS))
    return folds


def _fit_tail(reference: np.ndarray) -> np.ndarray:
    """Threshold, scale and shape of a generalised Pareto distribution above the (1 - TAIL_SHARE) point.

    Probability-weighted moments (Hosking and Wallis 1987), stable with tens of points; the shape is kept in [0, 0.5],
    so that no finite score is called impossible.
    """
    count = max(int(TAIL_SHARE * len(reference)), 2)
    threshold = reference[-count - 1]
    excess = reference[-count:] - threshold
    weights = (np.arange(count, 0, -1) - 0.65) / count  # 1 - plotting position (i - 0.35) / n
    first, second = excess.mean(), (weights * excess).mean()
    shape = np.clip(2 - first / max(first - 2 * second, EPS), 0.0, 0.5)
    return np.array([threshold, max(first * (1 - shape), EPS), shape])
