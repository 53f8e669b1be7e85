"""Bootstrap intervals of image and pixel metrics, by patient: groups of images are drawn with replacement.

Axes: N images, H W map, G groups (patients), R resamples, U distinct score values, Q score bins.
"""

import logging
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from core.metrics import AUPRO_FPR_LIMIT, EIGHT_CONNECTED, PAIRS_AT_ONCE, check_scores

BOOTSTRAP_METRICS = ("auroc", "average_precision")
LEVEL = 0.95  # coverage of intervals
MAX_SAMPLE = 1_000_000  # pixels that say where the bins are
NUM_BINS = 1024  # of all pixel scores, and as many of the anomalous ones; see `pixel_intervals`


def possible_resamples(labels: np.ndarray, groups: np.ndarray, num_resamples: int) -> int:
    """`num_resamples`, or 0 with a warning where the images of a class cannot be drawn in another way than they are.

    A group that is alone in its stratum is in every resample once: intervals would leave out how its class varies, and
    have no width at all where it is so with both classes.

    Args:
        labels: [N] of the images, both classes among them.
        groups: [N] patient or group of each image.
    """
    labels, group = np.asarray(labels, bool), np.unique(np.asarray(groups), return_inverse=True)[1]
    normal, anomalous, both = np.bincount(_strata(labels, group), minlength=3)
    if not num_resamples or min(max(normal, both), max(anomalous, both)) > 1:
        return num_resamples
    logging.warning(
        "no confidence intervals: they say how much depends on which patients or groups were drawn, and a class of "
        "images has one only (groups of normal images %d, of anomalous ones %d, of both %d); add images of other "
        "patients, or, if images of one group are of different patients, say so by data.groups",
        *(normal, anomalous, both),
    )
    return 0


def _strata(labels: np.ndarray, group: np.ndarray) -> np.ndarray:
    """[G]: 0 for groups of normal images only, 1 of anomalous ones only, 2 of both."""
    has_normal = np.bincount(group, ~labels) > 0
    return np.where(np.bincount(group, labels) > 0, 1 + has_normal, 0)


def _resampled_counts(rng: np.random.Generator, labels: np.ndarray, group: np.ndarray, num: int) -> np.ndarray:
    """How often each image is drawn, [num, N]: groups with replacement within strata.

    Strata: groups of anomalous images only, of normal ones only, and mixed ones; each keeps its number of groups, so
    every resample holds both classes.
    """
    stratum = _strata(labels, group)
    counts = np.empty((num, len(stratum)))
    for value in np.unique(stratum):
        members = np.flatnonzero(stratum == value)
        counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1.0 / len(members)), size=num)
    return counts[:, group]


def _weighted_metrics(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision (as BOOTSTRAP_METRICS) of images counted `weights` [R, N] times, each [R] float64."""
    order = np.argsort(scores)[::-1]
    descending = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], descending[1:] != descending[:-1]]))
    counts, labels = weights[:, order], labels[order]
    positive = np.add.reduceat(counts * labels, starts, axis=1)
    negative = np.add.reduceat(counts * ~labels, starts, axis=1)
    hits, false_alarms = positive.cumsum(axis=1), negative.cumsum(axis=1)
    area = (negative * (hits - positive / 2)).sum(axis=1) / (hits[:, -1] * false_alarms[:, -1])
    # Above the largest score drawn nothing is flagged and no recall is gained: any denominator but 0 will do.
    return area, (positive * hits / np.maximum(hits + false_alarms, 1.0)).sum(axis=1) / hits[:, -1]


def _bootstrap(all_scores, labels, groups, num_resamples: int, seed: int = 0) -> np.ndarray:
    """Values of BOOTSTRAP_METRICS for each of `all_scores` on the same resamples, [len(all_scores), 2, R]."""
    checked = [check_scores(scores, labels) for scores in all_scores]
    labels = checked[0][1]
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    if groups.shape != labels.shape:
        raise ValueError(f"expected one group per image {labels.shape}, found groups of shape {groups.shape}")
    group = np.unique(groups, return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    values = []
    at_once = max(1, 2_000_000 // len(labels))  # bounds the memory on tens of thousands of images
    for start in range(0, num_resamples, at_once):
        counts = _resampled_counts(rng, labels, group, min(at_once, num_resamples - start))
        values.append([_weighted_metrics(scores, labels, counts) for scores, _ in checked])
    return np.concatenate(values, axis=2)


def _index(metric: str) -> int:
    if metric not in BOOTSTRAP_METRICS:
        raise ValueError(f"expected metric to be one of {BOOTSTRAP_METRICS}, found {metric!r}")
    return BOOTSTRAP_METRICS.index(metric)


def _interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    low, high = np.quantile(values, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def bootstrap_interval(
    metric: str,
    scores: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of a metric, resampling groups (patients) with replacement.

    Args:
        metric: "auroc" or "average_precision".
        scores, labels: [N]; infinite scores are allowed, NaN is not.
        groups: [N] group of each image (any sortable dtype), or None where each image stands for itself. Groups with
            anomalous images only, normal images only and both are resampled apart, keeping their numbers.
        level: coverage in (0, 1).
    """
    return _interval(_bootstrap([scores], labels, groups, num_resamples, seed)[0, _index(metric)], level)


def bootstrap_intervals(
    all_scores: Sequence[np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    num_resamples: int = 1000,
) -> list[dict[str, tuple[float, float]]]:
    """For each of `all_scores` [N] the `bootstrap_interval` of every metric, by its name: drawn once for all of them.

    Arguments as in `bootstrap_interval`.
    """
    values = _bootstrap(all_scores, labels, groups, num_resamples)
    return [{m: _interval(v) for m, v in zip(BOOTSTRAP_METRICS, both, strict=True)} for both in values]


def bootstrap_difference(
    metric: str,
    scores: np.ndarray,
    other_scores: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    num_resamples: int = 1000,
) -> tuple[float, float]:
    """Paired interval (low, high) of metric(scores) - metric(other_scores): both see the same resampled images.

    Arguments as in `bootstrap_interval`; either scores may also be [K, N], of K runs whose metrics are averaged.
    """
    first, second = np.atleast_2d(scores), np.atleast_2d(other_scores)
    values = _bootstrap([*first, *second], labels, groups, num_resamples)[:, _index(metric)]
    return _interval(values[: len(first)].mean(axis=0) - values[len(first) :].mean(axis=0))


def matched_interval(
    scores: np.ndarray,
    labels: np.ndarray,
    covariate: np.ndarray,
    tolerance: float,
    groups: np.ndarray | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """`bootstrap_interval` of `core.metrics.matched_auroc`, on the resamples that hold a matched pair.

    A pair counts as often as both its images are drawn. Pairs are looked at PAIRS_AT_ONCE at a time.

    Args:
        scores, labels, covariate: [N], tolerance: as in `core.metrics.matched_auroc`; one pair at least is that close.
        groups and the others: as in `bootstrap_interval`.
    """
    scores, labels = check_scores(scores, labels)
    covariate = np.asarray(covariate)
    group = np.unique(np.arange(len(labels)) if groups is None else np.asarray(groups), return_inverse=True)[1]
    counts = _resampled_counts(np.random.default_rng(seed), labels, group, num_resamples).astype(np.float32)
    positive, negative = np.flatnonzero(labels), np.flatnonzero(~labels)
    wins, pairs = np.zeros(num_resamples), np.zeros(num_resamples)
    rows = max(1, PAIRS_AT_ONCE // len(negative))
    for start in range(0, len(positive), rows):
        some = positive[start : start + rows]
        matched = np.abs(covariate[some, None] - covariate[negative]) < tolerance
        first, second = scores[some, None], scores[negative]
        won = matched * (1 + (first > second).astype(np.float32) - (first < second)) / 2  # a tie counts half
        for total, weight in ((wins, won), (pairs, matched)):
            total += (counts[:, some] @ weight.astype(np.float32) * counts[:, negative]).sum(axis=1, dtype=np.float64)
    drawn = pairs > 0
    if not drawn.any():
        raise ValueError(f"expected pairs whose covariate differs by less than {tolerance}, found none")
    return _interval(wins[drawn] / pairs[drawn])


def pixel_intervals(
    maps: np.ndarray,
    masks: np.ndarray,
    groups: np.ndarray | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals (low, high) of pixel_auroc, pixel_ap and aupro, resampling groups of images.

    Each image's pixels are counted once in bins at NUM_BINS quantiles of all scores and of those of anomalous pixels,
    which moves the metrics by far less than any interval; a resample is a weighted sum of these counts, and the curves
    are linear within a bin.

    Args:
        maps, masks: [N, H, W] floats and bool, as in `core.metrics.pixel_metrics`.
        groups: [N] patient of each image, or None where each image stands for itself.
    """
    labels = masks.any(axis=(1, 2))
    if not labels.any() or masks.all():
        raise ValueError("expected anomalous and normal pixels")
    group = np.unique(np.arange(len(labels)) if groups is None else np.asarray(groups), return_inverse=True)[1]
    scores = maps.ravel()
    if scores.size > MAX_SAMPLE:  # drawn: a stride may meet the same columns of all images
        scores = scores[np.random.default_rng(seed).integers(scores.size, size=MAX_SAMPLE)]
    # Of all pixels alone, small lesions would share a bin or two, which can do no better than their share in it.
    shares = np.linspace(0, 1, NUM_BINS)[1:-1]
    edges = np.unique(np.concatenate([np.quantile(x, shares) for x in (scores, maps[masks])]))
    counts = [_pixel_counts(m, k, edges) for m, k in zip(maps, masks, strict=True)]
    # Bins from the highest score down, as a threshold passes them.
    negative, positive, overlap = (np.stack([c[i] for c in counts])[:, ::-1] for i in range(3))
    weights = _resampled_counts(np.random.default_rng(seed), labels, group, num_resamples)
    fpr, tpr, pro = (_cumulative_share(weights @ c) for c in (negative, positive, overlap))
    hits = (weights @ positive).cumsum(axis=1)
    precision = hits / np.maximum(hits + (weights @ negative).cumsum(axis=1), 1.0)
    values = {
        "pixel_auroc": np.trapezoid(tpr, fpr, axis=1),
        "pixel_ap": (np.diff(tpr, axis=1) * precision).sum(axis=1),
        "aupro": np.array([_area_to_limit(f, p) for f, p in zip(fpr, pro, strict=True)]),
    }
    return {name: _interval(value) for name, value in values.items()}


def _pixel_counts(scores: np.ndarray, mask: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For one image by bin [Q]: normal pixels, anomalous pixels, and the sum over regions of the share of each."""
    bins = np.searchsorted(edges, scores, side="right")
    size = len(edges) + 1
    regions, _ = ndimage.label(mask, EIGHT_CONNECTED)
    areas = np.bincount(regions.ravel())
    share = 1.0 / areas[regions[mask]]
    inside = bins[mask]
    return (
        np.bincount(bins[~mask], minlength=size).astype(np.float64),
        np.bincount(inside, minlength=size).astype(np.float64),
        np.bincount(inside, weights=share, minlength=size),
    )


def _cumulative_share(counts: np.ndarray) -> np.ndarray:
    """[R, Q] -> [R, Q + 1] from 0 to 1."""
    total = counts.cumsum(axis=1)
    return np.pad(total / total[:, -1:], ((0, 0), (1, 0)))


def _area_to_limit(fpr: np.ndarray, pro: np.ndarray) -> float:
    """Mean of the PRO curve over 0 <= FPR <= limit, linear between its points."""
    kept = fpr < AUPRO_FPR_LIMIT
    x = np.append(fpr[kept], AUPRO_FPR_LIMIT)
    return float(np.trapezoid(np.append(pro[kept], np.interp(AUPRO_FPR_LIMIT, fpr, pro)), x) / AUPRO_FPR_LIMIT)
