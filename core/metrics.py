"""Detection and localisation metrics and thresholds: exact, ties handled, plain numpy.

Axes: N images, H W map, P anomalous pixels, U distinct score values. Intervals: `core/bootstrap.py`.
Higher scores mean more anomalous; labels are 1 (anomalous) or 0 (normal). Everything rests on one fact: a positive with
score s adds, as a function of the false-positive rate f, a ramp from 0 at f = P(normal > s) to 1 at f = P(normal >= s).
So one sort of the normal scores and one binary search per positive give AUROC, average precision and PRO exactly.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

AUPRO_FPR_LIMIT = 0.3  # Bergmann et al., MVTec AD, IJCV 2021
BMAD_NUM_THRESHOLDS = 200
PAIRS_AT_ONCE = 1_000_000  # of an anomalous and a normal image, in `matched_auroc`: some 10 MB
EIGHT_CONNECTED = np.ones((3, 3), dtype=int)


def check_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (scores [N] float, labels [N] bool); raises ValueError on anything no metric is defined on."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"expected scores [N] and labels [N], found shapes {scores.shape} and {labels.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"expected scores without NaN, found {np.isnan(scores).sum()} of {len(scores)}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"expected labels 0 (normal) or 1 (anomalous), found {np.unique(labels)[:10].tolist()}")
    labels = labels.astype(bool)
    if labels.all() or not labels.any():
        raise ValueError(f"expected both classes, found {labels.sum()} anomalous and {(~labels).sum()} normal")
    return scores, labels


def _false_positives(positives: np.ndarray, sorted_negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of negatives (above, at or above) each positive, both int64 in the shape of `positives`."""
    num_negatives = len(sorted_negatives)
    above = num_negatives - np.searchsorted(sorted_negatives, positives, side="right")
    return above, num_negatives - np.searchsorted(sorted_negatives, positives, side="left")


def _area_and_precision(sorted_positives: np.ndarray, above: np.ndarray, at_least: np.ndarray, num_negatives: int):
    """(AUROC, average precision) from the counts of `_false_positives`."""
    area = 1.0 - (above.sum() + at_least.sum()) / (2.0 * num_negatives * len(sorted_positives))
    hits = len(sorted_positives) - np.searchsorted(sorted_positives, sorted_positives, side="left")
    return float(area), float(np.mean(hits / (hits + at_least)))


def _image_metrics(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    scores, labels = check_scores(scores, labels)
    positives, negatives = np.sort(scores[labels]), np.sort(scores[~labels])
    return _area_and_precision(positives, *_false_positives(positives, negatives), len(negatives))


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: P(anomalous > normal) + P(equal) / 2. scores [N], labels [N] in {0, 1}.

    Raises ValueError on NaN, unequal shapes or a missing class.
    """
    return _image_metrics(scores, labels)[0]


def auroc_between(lower: np.ndarray, upper: np.ndarray) -> float:
    """`auroc` of two samples of scores [N] and [M], the second called anomalous: 0.5 where they are alike."""
    return auroc(np.concatenate([lower, upper]), np.repeat([0, 1], [len(lower), len(upper)]))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Sum over thresholds of (recall step) * precision, no interpolation (scikit-learn's definition).

    scores [N], labels [N] in {0, 1}. Raises like `auroc`.
    """
    return _image_metrics(scores, labels)[1]


def roc_curve(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ROC points at every distinct score, flagged when score >= threshold.

    Returns:
        (fpr, tpr, thresholds), each [U + 1] float64; the first point is (0, 0, inf), the last (1, 1, min score).
    """
    scores, labels = check_scores(scores, labels)
    thresholds = np.unique(scores)[::-1]
    _, fpr = _false_positives(thresholds, np.sort(scores[~labels]))
    _, tpr = _false_positives(thresholds, np.sort(scores[labels]))
    points = (fpr / (~labels).sum(), tpr / labels.sum(), thresholds)
    fpr, tpr, thresholds = (np.concatenate([[start], x]) for start, x in zip((0.0, 0.0, np.inf), points, strict=True))
    return fpr, tpr, thresholds


def region_weights(masks: np.ndarray) -> np.ndarray:
    """1 / (number of regions * size of its region) for each anomalous pixel in C order, [P] float64: sums to 1."""
    weights, num_regions = [], 0
    for mask in masks[masks.any(axis=(1, 2))]:
        regions, count = ndimage.label(mask, EIGHT_CONNECTED)
        region = regions[mask]
        weights.append(1.0 / np.bincount(region)[region])
        num_regions += count
    return np.concatenate(weights) / num_regions


def _pro_integral(weights: np.ndarray, fpr_low: np.ndarray, fpr_high: np.ndarray) -> float:
    """Mean of the PRO curve over 0 <= FPR <= limit; each pixel's ramp is integrated in closed form."""
    width = fpr_high - fpr_low
    reached = np.clip(AUPRO_FPR_LIMIT - fpr_low, 0.0, width)
    ramp = np.divide(reached**2, 2.0 * width, out=np.zeros_like(width), where=width > 0)
    plateau = np.maximum(AUPRO_FPR_LIMIT - fpr_high, 0.0)
    return float(weights @ (ramp + plateau) / AUPRO_FPR_LIMIT)


def _pro_bmad(sorted_positives: np.ndarray, weights: np.ndarray, sorted_negatives: np.ndarray) -> float:
    """BMAD's sampled PRO, see `pixel_metrics`; `weights` in the order of `sorted_positives`."""
    low = min(sorted_positives[0], sorted_negatives[0])
    high = max(sorted_positives[-1], sorted_negatives[-1])
    # In the maps' dtype: a wider key would make searchsorted copy all negatives into the wider type.
    thresholds = (low + (high - low) / BMAD_NUM_THRESHOLDS * np.arange(BMAD_NUM_THRESHOLDS)).astype(low.dtype)
    fpr = 1.0 - np.searchsorted(sorted_negatives, thresholds, side="right") / len(sorted_negatives)
    missed = np.concatenate([[0.0], np.cumsum(weights)])
    pro = 1.0 - missed[np.searchsorted(sorted_positives, thresholds, side="right")]
    kept = fpr < AUPRO_FPR_LIMIT
    fpr, pro = fpr[kept][::-1], pro[kept][::-1]
    if len(fpr) < 2 or fpr[-1] == 0.0:
        return float("nan")
    return float(np.trapezoid(pro, fpr / fpr[-1]))


def pixel_metrics(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Localisation metrics over all pixels of all images, normal images included.

    `aupro` is the exact area under the per-region-overlap curve up to a false-positive rate of 0.3, divided by 0.3
    (Bergmann et al., IJCV 2021): every distinct score is a threshold, regions are 8-connected, the curve starts at
    (0, 0), is linear between neighbouring thresholds and is interpolated at 0.3.

    `aupro_bmad` is what the code published with BMAD (arXiv 2306.11876; `compute_pro` in its MKD and UTRAD folders,
    after RD4AD) computes on the whole test set, for comparison with its tables. It differs from `aupro`: 200 equally
    spaced thresholds from the smallest to below the largest map value, so it depends on the maps' scale; points with
    FPR < 0.3 are kept and nothing is interpolated at 0.3; the FPR is divided by the largest one kept instead of 0.3;
    there is no point at FPR 0, so the area left of the smallest sampled FPR is missing. It is NaN where theirs is
    undefined: fewer than two points kept, or none of them with a false positive. Not reproduced: the 201st threshold
    that rounding in their `arange` can add, and the calls on one anomalous image at a time that RD4AD itself makes.

    Args:
        maps: [N, H, W] any float dtype (float32 is the fast one), finite; higher is more anomalous.
        masks: [N, H, W] bool, True where anomalous.

    Returns:
        {"pixel_auroc", "pixel_ap", "aupro", "aupro_bmad"}.

    Raises:
        ValueError: wrong shape or dtype, a map value that is not finite, no anomalous or no normal pixel.
    """
    maps, masks = np.asarray(maps), np.asarray(masks)
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise ValueError(f"expected maps and masks [N, H, W], found shapes {maps.shape} and {masks.shape}")
    if not np.issubdtype(maps.dtype, np.floating) or masks.dtype != bool:
        raise ValueError(f"expected floating maps and bool masks, found {maps.dtype} and {masks.dtype}")
    if not np.isfinite(maps).all():
        raise ValueError(
            f"expected finite maps, found {(~np.isfinite(maps)).sum()} of {maps.size} values NaN or infinite"
        )
    if masks.all() or not masks.any():
        raise ValueError(f"expected anomalous and normal pixels, found {masks.sum()} anomalous of {masks.size}")
    negatives = maps[~masks]
    negatives.sort()
    positives = maps[masks]
    # Sorted keys make the binary searches walk through memory in order.
    order = np.argsort(positives)
    positives, weights = positives[order], region_weights(masks)[order]
    above, at_least = _false_positives(positives, negatives)
    area, precision = _area_and_precision(positives, above, at_least, len(negatives))
    return {
        "pixel_auroc": area,
        "pixel_ap": precision,
        "aupro": _pro_integral(weights, above / len(negatives), at_least / len(negatives)),
        "aupro_bmad": _pro_bmad(positives, weights, negatives),
    }


def _check_calibration(calibration_scores: np.ndarray) -> np.ndarray:
    calibration = np.asarray(calibration_scores)
    calibration = calibration if np.issubdtype(calibration.dtype, np.floating) else calibration.astype(np.float64)
    if calibration.ndim != 1 or not len(calibration) or np.isnan(calibration).any():
        raise ValueError(f"expected calibration scores [N > 0] without NaN, found shape {calibration.shape}")
    return np.sort(calibration)


def p_values(scores: np.ndarray, calibration_scores: np.ndarray) -> np.ndarray:
    """Conformal p-value of each score against calibration normals: (1 + #{calibration >= score}) / (n + 1).

    scores [...], calibration_scores [n]; returns float64 in [1 / (n + 1), 1]. For a normal image exchangeable with the
    calibration images P(p <= a) <= a (Vovk et al. 2005; Bates et al. 2023, eq. 2).
    """
    calibration, scores = _check_calibration(calibration_scores), np.asarray(scores)
    if np.isnan(scores).any():
        raise ValueError(f"expected scores without NaN, found {np.isnan(scores).sum()} of {scores.size}")
    return (1.0 + _false_positives(scores, calibration)[1]) / (len(calibration) + 1.0)


def threshold_at_fpr(calibration_scores: np.ndarray, fpr: float) -> float:
    """Smallest t such that flagging score >= t is the same as p-value <= fpr; at most `fpr` of normals are flagged.

    It lies one float (of the scores' dtype) above a calibration score. It is inf, nothing is ever flagged, when there
    are too few calibration images for the rate: n < 1 / fpr - 1 (19 for 5 %, 99 for 1 %).
    """
    calibration = _check_calibration(calibration_scores)
    if not 0.0 < fpr < 1.0:
        raise ValueError(f"expected a false-positive rate between 0 and 1, found {fpr}")
    n = len(calibration)
    # How many calibration scores may reach t; by the very division of `p_values`, so that both agree to the last bit.
    allowed = np.searchsorted((1.0 + np.arange(n + 1)) / (n + 1.0), fpr, side="right") - 1
    if allowed < 0:
        return float("inf")
    return float(np.nextafter(calibration[n - 1 - allowed], np.asarray(np.inf, calibration.dtype)))


def matched_auroc(scores: np.ndarray, labels: np.ndarray, covariate: np.ndarray, tolerance: float) -> tuple[float, int]:
    """AUROC over the (anomalous, normal) pairs whose covariate differs by less than `tolerance`.

    Shows what a score adds to a nuisance statistic that separates the classes by itself: the covariate-adjusted AUROC
    by matching (Janes and Pepe 2008). scores, labels, covariate [N]; pairs are looked at PAIRS_AT_ONCE at a time.

    Returns:
        (AUROC with ties counted half, number of pairs); (nan, 0) when no pair is that close.
    """
    (value,), num_pairs = matched_aurocs([scores], labels, covariate, tolerance)
    return value, num_pairs


def matched_aurocs(
    all_scores: Sequence[np.ndarray], labels: np.ndarray, covariate: np.ndarray, tolerance: float
) -> tuple[list[float], int]:
    """`matched_auroc` of each of `all_scores` [N], and the number of pairs, which are looked for once for all."""
    checked = [check_scores(scores, labels) for scores in all_scores]
    labels, covariate = checked[0][1], np.asarray(covariate)
    if covariate.shape != labels.shape or not np.isfinite(covariate).all():
        raise ValueError(f"expected a finite covariate of shape {labels.shape}, found shape {covariate.shape}")
    positive_covariate, negative_covariate = covariate[labels], covariate[~labels]
    num_pairs, wins = 0, [0] * len(checked)  # a win counts two, a tie one
    rows = max(1, PAIRS_AT_ONCE // len(negative_covariate))
    for start in range(0, len(positive_covariate), rows):
        some = slice(start, start + rows)
        matched = np.abs(positive_covariate[some, None] - negative_covariate) < tolerance
        num_pairs += np.count_nonzero(matched)
        for i, (scores, _) in enumerate(checked):
            positives, negatives = scores[labels][some, None], scores[~labels]
            wins[i] += np.count_nonzero(matched & (positives > negatives))
            wins[i] += np.count_nonzero(matched & (positives >= negatives))
    return [count / 2 / num_pairs if num_pairs else float("nan") for count in wins], num_pairs
