"""Metrics against scikit-learn, brute force and hand-written values. Tolerance 1e-12: float64 sums of < 1e4 terms."""

import tracemalloc

import numpy as np
import pytest
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from core import metrics

EXACT = 1e-12


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_image_metrics_equal_sklearn(random_scores, seed, ties):
    scores, labels = random_scores(seed, ties=ties)
    assert metrics.auroc(scores, labels) == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=EXACT)
    expected = sklearn_metrics.average_precision_score(labels, scores)
    assert metrics.average_precision(scores, labels) == pytest.approx(expected, abs=EXACT)
    expected_curve = sklearn_metrics.roc_curve(labels, scores, drop_intermediate=False)
    for ours, theirs in zip(metrics.roc_curve(scores, labels), expected_curve, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=EXACT)


def test_image_metrics_by_hand():
    labels = np.array([0, 0, 1, 1])
    # Pairs: 0.4 beats 0.1, ties 0.4; 0.8 beats both: 3.5 of 4. Precision at 0.8 is 1/1, at 0.4 it is 2/3.
    scores = np.array([0.1, 0.4, 0.4, 0.8])
    assert metrics.auroc(scores, labels) == 3.5 / 4
    assert metrics.average_precision(scores, labels) == pytest.approx((1 + 2 / 3) / 2, abs=EXACT)
    assert metrics.auroc(np.ones(4), labels) == 0.5
    assert metrics.average_precision(np.ones(4), labels) == 0.5
    assert metrics.auroc(np.array([0.0, 0.0, np.inf, np.inf]), labels) == 1.0


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, np.nan], [0, 1], "without NaN, found 1 of 2"),
        ([0.1, 0.2], [1, 1], "found 2 anomalous and 0 normal"),
        ([0.1, 0.2], [0, 2], r"found \[0, 2\]"),
        ([0.1, 0.2, 0.3], [0, 1], r"shapes \(3,\) and \(2,\)"),
    ],
)
def test_image_metrics_refuse(scores, labels, message):
    for function in (metrics.auroc, metrics.average_precision, metrics.roc_curve):
        with pytest.raises(ValueError, match=message):
            function(np.array(scores), np.array(labels))


def _regions(masks: np.ndarray) -> list[np.ndarray]:
    """Boolean map [N, H, W] of every 8-connected region, by flood fill."""
    regions, left = [], masks.copy()
    while left.any():
        region = np.zeros_like(left)
        region[tuple(np.argwhere(left)[0])] = True
        while True:
            grown = ndimage.maximum_filter(region, size=(1, 3, 3)) & masks
            if (grown == region).all():
                break
            region = grown
        regions.append(region)
        left &= ~region
    return regions


def _brute_pro_curve(maps, masks, thresholds, flagged):
    """(fpr, pro) at each threshold, one region at a time."""
    regions = _regions(masks)
    fpr = [flagged(maps[~masks], t).mean() for t in thresholds]
    pro = [np.mean([flagged(maps[region], t).mean() for region in regions]) for t in thresholds]
    return np.array(fpr), np.array(pro)


def _brute_aupro(maps, masks) -> float:
    fpr, pro = _brute_pro_curve(maps, masks, [np.inf, *np.unique(maps)[::-1]], np.greater_equal)
    last = np.flatnonzero(fpr <= 0.3)[-1]
    fpr_end, pro_end = fpr[: last + 1].tolist(), pro[: last + 1].tolist()
    if fpr[last] < 0.3:
        slope = (pro[last + 1] - pro[last]) / (fpr[last + 1] - fpr[last])
        fpr_end, pro_end = [*fpr_end, 0.3], [*pro_end, pro[last] + slope * (0.3 - fpr[last])]
    return np.trapezoid(pro_end, fpr_end) / 0.3


def _brute_aupro_bmad(maps, masks) -> float:
    low, high = float(maps.min()), float(maps.max())
    thresholds = [low + (high - low) / 200 * k for k in range(200)]
    fpr, pro = _brute_pro_curve(maps, masks, thresholds, np.greater)
    kept = fpr < 0.3
    return sklearn_metrics.auc(fpr[kept] / fpr[kept].max(), pro[kept])


def _random_maps(seed: int, levels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = ndimage.gaussian_filter(rng.normal(size=(5, 16, 14)), (0, 1.5, 1.5)) > 0.25
    masks[0] = False
    maps = rng.normal(size=masks.shape) + 1.5 * masks * rng.random(size=(5, 1, 1))
    return (maps if levels is None else np.round(maps * levels) / levels).astype(np.float32), masks


@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("seed", range(4))
def test_pixel_metrics_equal_sklearn_and_brute_force(seed, levels):
    maps, masks = _random_maps(seed, levels)
    result = metrics.pixel_metrics(maps, masks)
    labels, scores = masks.ravel(), maps.ravel()
    assert result["pixel_auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=EXACT)
    assert result["pixel_ap"] == pytest.approx(sklearn_metrics.average_precision_score(labels, scores), abs=EXACT)
    assert result["aupro"] == pytest.approx(_brute_aupro(maps, masks), abs=EXACT)


@pytest.mark.parametrize("seed", range(4))
def test_aupro_bmad_equals_a_loop_over_its_thresholds(seed):
    maps, masks = _random_maps(seed)
    assert metrics.pixel_metrics(maps, masks)["aupro_bmad"] == pytest.approx(_brute_aupro_bmad(maps, masks), abs=EXACT)


def test_aupro_bmad_flags_strictly_above_its_thresholds():
    maps, masks = _random_maps(1)
    # Whole numbers from 0 to 200: every map value lies exactly on a threshold.
    maps = np.rint(np.interp(maps, (maps.min(), maps.max()), (0, 200))).astype(np.float32)
    assert metrics.pixel_metrics(maps, masks)["aupro_bmad"] == pytest.approx(_brute_aupro_bmad(maps, masks), abs=EXACT)


def test_pro_by_hand():
    masks = np.zeros((1, 4, 5), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True  # touch by a corner: one region of two pixels
    masks[0, 3, 4] = True  # a region of one pixel
    maps = np.zeros((1, 4, 5), np.float32)
    maps[0, 0, 0] = 2.0
    # One pixel of the first region stands above all 17 background pixels; the rest is tied with them, so the curve runs
    # straight from (0, 1/4) to (1, 1): mean over [0, 0.3] = 1/4 + 3/4 * 0.15.
    result = metrics.pixel_metrics(maps, masks)
    assert result["aupro"] == pytest.approx(0.25 + 0.75 * 0.15, abs=EXACT)
    assert result["pixel_auroc"] == pytest.approx(1 / 3 + 2 / 3 / 2, abs=EXACT)
    assert np.isnan(result["aupro_bmad"])  # no background pixel above any threshold: FPR 0 / 0 in theirs


def test_perfect_constant_and_inverted_maps():
    masks = np.zeros((2, 6, 6), bool)
    masks[0, 2:4, 2:4] = True
    perfect = metrics.pixel_metrics(masks.astype(np.float32), masks)
    assert (perfect["pixel_auroc"], perfect["pixel_ap"], perfect["aupro"]) == pytest.approx((1, 1, 1), abs=EXACT)
    constant = metrics.pixel_metrics(np.ones((2, 6, 6), np.float32), masks)
    expected = (0.5, masks.mean(), 0.15)
    assert (constant["pixel_auroc"], constant["pixel_ap"], constant["aupro"]) == pytest.approx(expected, abs=EXACT)
    inverted = metrics.pixel_metrics(-masks.astype(np.float32), masks)
    assert (inverted["pixel_auroc"], inverted["aupro"]) == (0.0, 0.0)


def test_pixel_metrics_do_not_change_their_input():
    maps, masks = _random_maps(0)
    before = maps.copy()
    metrics.pixel_metrics(maps, masks)
    np.testing.assert_array_equal(maps, before)


def test_pixel_metrics_refuse():
    maps, masks = _random_maps(0)
    broken = maps.copy()
    broken[1, 2, 3] = np.nan
    for arguments, message in [
        ((broken, masks), "found 1 of"),
        ((maps, np.zeros_like(masks)), "found 0 anomalous"),
        ((maps, np.ones_like(masks)), "anomalous and normal pixels"),
        ((maps[:, :8], masks), "found shapes"),
        ((maps, masks.astype(np.uint8)), "bool masks, found float32 and uint8"),
    ]:
        with pytest.raises(ValueError, match=message):
            metrics.pixel_metrics(*arguments)


def test_p_values_by_hand():
    calibration = np.array([1.0, 2.0, 2.0, 3.0])
    np.testing.assert_allclose(metrics.p_values(np.array([0.5, 2.0, 2.5, 9.0]), calibration), [1.0, 0.8, 0.4, 0.2])
    with pytest.raises(ValueError, match="N > 0"):
        metrics.p_values(np.ones(2), np.array([]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("num", [1, 18, 19, 20, 99, 130])
def test_threshold_flags_exactly_the_small_p_values(num, dtype):
    rng = np.random.default_rng(num)
    calibration = np.round(rng.normal(size=num), 1).astype(dtype)
    next_up = np.nextafter(calibration, np.array(np.inf, dtype))
    scores = np.concatenate([calibration, next_up, rng.normal(size=50).astype(dtype)])
    # Rates that are exact multiples of 1 / (n + 1) in decimals but not in binary are where rounding would bite.
    for fpr in [0.01, 0.05, 0.07, 0.29, 0.5, *(np.arange(1, num + 1) / (num + 1))]:
        threshold = metrics.threshold_at_fpr(calibration, fpr)
        np.testing.assert_array_equal(scores >= threshold, metrics.p_values(scores, calibration) <= fpr)
        assert np.mean(calibration >= threshold) <= fpr


def test_threshold_needs_enough_calibration_images():
    assert metrics.threshold_at_fpr(np.arange(18), 0.05) == np.inf
    assert metrics.threshold_at_fpr(np.arange(19), 0.05) == np.nextafter(18.0, np.inf)
    with pytest.raises(ValueError, match="between 0 and 1, found 5"):
        metrics.threshold_at_fpr(np.arange(19), 5)


@pytest.mark.parametrize("tolerance", [0.1, 0.5, 100.0])
def test_matched_auroc_equals_a_loop_over_pairs(random_scores, tolerance):
    scores, labels = random_scores(7)
    covariate = np.round(np.random.default_rng(1).normal(size=len(scores)), 1)
    wins, pairs = 0.0, 0
    for i in np.flatnonzero(labels == 1):
        for j in np.flatnonzero(labels == 0):
            if abs(covariate[i] - covariate[j]) < tolerance:
                pairs += 1
                wins += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    assert metrics.matched_auroc(scores, labels, covariate, tolerance) == (
        pytest.approx(wins / pairs, abs=EXACT),
        pairs,
    )
    if tolerance == 100.0:
        assert wins / pairs == pytest.approx(metrics.auroc(scores, labels), abs=EXACT)


def test_matched_auroc_of_many_pairs_takes_little_memory(random_scores, monkeypatch):
    scores, labels = random_scores(8, num=6000)
    covariate = np.random.default_rng(2).normal(size=len(scores))
    tracemalloc.start()
    found = metrics.matched_auroc(scores, labels, covariate, 0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # of 8 M pairs or more
    monkeypatch.setattr(metrics, "PAIRS_AT_ONCE", 10**9)
    assert metrics.matched_auroc(scores, labels, covariate, 0.5) == found


def test_matched_aurocs_of_many_scores_are_those_of_each(random_scores):
    several, labels = [random_scores(seed)[0] for seed in (7, 8)], random_scores(7)[1]
    covariate = np.random.default_rng(1).normal(size=len(labels))
    alone = [metrics.matched_auroc(scores, labels, covariate, 0.5) for scores in several]
    values, pairs = metrics.matched_aurocs(several, labels, covariate, 0.5)
    assert [(value, pairs) for value in values] == alone
    assert len(set(values)) == 2


def test_matched_auroc_without_pairs():
    value, pairs = metrics.matched_auroc(np.arange(4.0), np.array([0, 0, 1, 1]), np.array([0.0, 0, 9, 9]), 1.0)
    assert np.isnan(value)
    assert pairs == 0
