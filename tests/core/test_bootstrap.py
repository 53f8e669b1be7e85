"""Bootstrap intervals against sklearn, sampling distributions and the exact metrics."""

import warnings

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from core import bootstrap, metrics

EXACT = 1e-12
METRICS = ("auroc", "average_precision")


def test_weighted_metrics_equal_sklearn_with_sample_weights(random_scores):
    scores, labels = random_scores(3)
    weights = np.random.default_rng(0).integers(0, 3, size=(20, len(scores)))
    weights[0] = labels * 0 + 1
    references = (sklearn_metrics.roc_auc_score, sklearn_metrics.average_precision_score)  # as BOOTSTRAP_METRICS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [[reference(labels, scores, sample_weight=w) for w in weights] for reference in references]
    ours = bootstrap._weighted_metrics(scores, labels.astype(bool), weights)
    np.testing.assert_allclose(ours, expected, atol=EXACT)


def test_resamples_draw_whole_groups_within_strata():
    labels = np.array([0, 0, 0, 1, 1, 0, 1, 0], bool)
    group = np.array([0, 0, 1, 2, 2, 3, 3, 4])  # 0, 1, 4 normal; 2 anomalous; 3 mixed
    counts = bootstrap._resampled_counts(np.random.default_rng(0), labels, group, 500)
    for value in np.unique(group):
        assert (counts[:, group == value] == counts[:, group == value][:, :1]).all()
    per_group = np.stack([counts[:, np.flatnonzero(group == value)[0]] for value in range(5)], axis=1)
    assert (per_group[:, [0, 1, 4]].sum(axis=1) == 3).all()
    assert (per_group[:, [2, 3]] == 1).all()  # alone in their strata
    # Each of the three is left out with probability (2/3)^3 = 0.296; 5 standard deviations of 500 draws are 0.10.
    assert abs((per_group[:, 0] == 0).mean() - (2 / 3) ** 3) < 0.10


@pytest.mark.parametrize(
    ("groups", "possible"),
    [
        ([0, 0, 1, 2, 3, 3], True),  # two groups a class
        ([0, 0, 0, 1, 1, 1], False),  # one of each: intervals of no width
        ([0, 1, 2, 3, 3, 3], False),  # one patient has all anomalous images
        ([0, 0, 0, 1, 2, 3], False),
        ([0, 1, 2, 2, 3, 3], False),  # anomalous: one by itself, one mixed
        ([0, 1, 2, 1, 2, 2], True),  # two mixed ones
    ],
)
def test_classes_of_one_group_have_no_intervals(groups, possible, caplog):
    labels = np.array([0, 0, 0, 1, 1, 1])
    assert bootstrap.possible_resamples(labels, groups, 500) == (500 if possible else 0)
    assert len(caplog.messages) == (not possible)
    if not possible:
        assert "no confidence intervals" in caplog.text
    counts = bootstrap._resampled_counts(np.random.default_rng(0), labels > 0, np.array(groups), 50)
    assert possible == all((np.ptp(counts[:, labels == label], axis=0) > 0).any() for label in (0, 1))
    assert bootstrap.possible_resamples(labels, groups, 0) == 0


def test_bootstrap_interval_matches_the_sampling_distribution():
    rng = np.random.default_rng(0)
    draws = [np.concatenate([rng.normal(0, 1, 100), rng.normal(1, 1, 100)]) for _ in range(400)]
    labels = np.repeat([0, 1], 100)
    true_spread = np.std([sklearn_metrics.roc_auc_score(labels, scores) for scores in draws])
    low, high = bootstrap.bootstrap_interval("auroc", draws[0], labels, seed=1)
    assert low < metrics.auroc(draws[0], labels) < high
    # The width of a 95 % interval is 3.92 spreads; both sides carry a sampling error of about 5-10 %.
    assert (high - low) / 3.92 == pytest.approx(true_spread, rel=0.3)
    assert bootstrap.bootstrap_interval("auroc", draws[0], labels, seed=1) == (low, high)
    narrow = bootstrap.bootstrap_interval("auroc", draws[0], labels, seed=1, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_by_group_is_wider_for_repeated_images(random_scores):
    scores, labels = random_scores(1, num=50, ties=False)
    repeated = [np.repeat(x, 8) for x in (scores, labels, [f"patient_{i}" for i in range(50)])]
    plain = np.ptp(bootstrap.bootstrap_interval("average_precision", *repeated[:2]))
    grouped = np.ptp(bootstrap.bootstrap_interval("average_precision", *repeated))
    # Eight copies of each image are no new evidence: without groups the interval is about sqrt(8) = 2.8 too narrow.
    assert 2.0 < grouped / plain < 4.0


def test_bootstrap_chunks_do_not_change_the_number_of_resamples(random_scores):
    scores, labels = random_scores(2, num=700)
    values = bootstrap._bootstrap([scores], labels, None, 3001, 0)
    assert values.shape == (1, 2, 3001)
    assert (values.std(axis=2) > 0).all()


def test_intervals_of_many_scores_are_those_of_each_drawn_once(random_scores, monkeypatch):
    scores, labels = random_scores(5)
    others = np.random.default_rng(0).normal(size=(2, len(scores)))
    several, groups = [scores, *others], np.arange(len(scores)) // 2
    alone = [{m: bootstrap.bootstrap_interval(m, s, labels, groups, 50) for m in METRICS} for s in several]
    draw, drawn = bootstrap._resampled_counts, []
    monkeypatch.setattr(bootstrap, "_resampled_counts", lambda *args: drawn.append(args) or draw(*args))
    assert bootstrap.bootstrap_intervals(several, labels, groups, 50) == alone
    assert len(drawn) == 1


def test_matched_interval_is_that_of_the_images_drawn(monkeypatch):
    rng = np.random.default_rng(3)
    labels, groups = rng.random(60) < 0.5, rng.integers(0, 20, 60)
    scores, covariate = rng.integers(0, 8, 60) + labels, rng.normal(size=60)
    monkeypatch.setattr(bootstrap, "PAIRS_AT_ONCE", 100)  # several blocks
    counts = bootstrap._resampled_counts(
        np.random.default_rng(5), labels, np.unique(groups, return_inverse=True)[1], 40
    ).astype(int)
    values = []
    for drawn in counts:
        rows = np.repeat(np.arange(60), drawn)
        values.append(metrics.matched_auroc(scores[rows], labels[rows], covariate[rows], 0.3)[0])
    found = bootstrap.matched_interval(scores, labels, covariate, 0.3, groups, 40, seed=5)
    np.testing.assert_allclose(found, np.quantile(values, [0.025, 0.975]), atol=1e-6)  # float32 sums of small counts
    with pytest.raises(ValueError, match="found none"):
        bootstrap.matched_interval(scores, labels, np.arange(60), 0.5, groups, 40)


def test_bootstrap_difference_is_paired(random_scores):
    scores, labels = random_scores(4, num=200)
    assert bootstrap.bootstrap_difference("auroc", scores, 3 * scores + 1, labels) == (0.0, 0.0)
    worse = scores + np.random.default_rng(0).normal(size=200) * 0.2
    low, high = bootstrap.bootstrap_difference("auroc", scores, worse, labels)
    assert low < metrics.auroc(scores, labels) - metrics.auroc(worse, labels) < high
    assert high - low < np.ptp(bootstrap.bootstrap_interval("auroc", scores, labels))
    mirrored = bootstrap.bootstrap_difference("auroc", worse, scores, labels)
    assert mirrored == pytest.approx((-high, -low), abs=EXACT)


def test_bootstrap_refuses(random_scores):
    scores, labels = random_scores(0)
    with pytest.raises(ValueError, match="found 'aupro'"):
        bootstrap.bootstrap_interval("aupro", scores, labels)
    with pytest.raises(ValueError, match="one group per image"):
        bootstrap.bootstrap_interval("auroc", scores, labels, groups=np.arange(3))


def _random_maps(num=24, size=20, seed=0):
    rng = np.random.default_rng(seed)
    masks = np.zeros((num, size, size), bool)
    for i in range(0, num, 2):
        row, column = rng.integers(0, size - 6, 2)
        masks[i, row : row + 5, column : column + 4] = True
    return (rng.normal(size=masks.shape) + 1.2 * masks).astype(np.float32), masks


def test_pixel_intervals_hold_the_exact_values_and_match_plain_resampling():
    maps, masks = _random_maps()
    groups = np.arange(len(maps)) // 2
    found = bootstrap.pixel_intervals(maps, masks, groups, num_resamples=200, seed=3)
    exact = metrics.pixel_metrics(maps, masks)
    counts = bootstrap._resampled_counts(
        np.random.default_rng(3), masks.any((1, 2)), np.unique(groups, return_inverse=True)[1], 200
    ).astype(int)
    resampled = [metrics.pixel_metrics(np.repeat(maps, c, 0), np.repeat(masks, c, 0)) for c in counts[:60]]
    for name in ("pixel_auroc", "pixel_ap", "aupro"):
        low, high = found[name]
        assert low < exact[name] < high
        # 60 of the very same resamples, metrics exact: their quartiles lie inside the interval, which they nearly fill.
        values = [r[name] for r in resampled]
        assert low - 2e-3 < np.quantile(values, 0.25)
        assert np.quantile(values, 0.75) < high + 2e-3
        assert np.ptp(values) > 0.6 * (high - low)


def test_pixel_intervals_of_one_image_per_class_are_the_metric_itself():
    maps, masks = _random_maps(num=2, size=40)
    found, exact = bootstrap.pixel_intervals(maps, masks), metrics.pixel_metrics(maps, masks)
    for name, (low, high) in found.items():
        assert low == high  # one group a class: every resample is the whole set
        assert low == pytest.approx(exact[name], abs=2e-3), name  # binned at 1024 quantiles


def test_pixel_intervals_of_small_lesions_hold_the_exact_values():
    """0.05 % of the pixels are anomalous: half of what one of 1024 bins at quantiles of all pixels holds."""
    rng = np.random.default_rng(0)
    masks = np.zeros((40, 80, 80), bool)
    for i, (row, column) in enumerate(rng.integers(0, 77, (20, 2))):
        masks[i, row : row + 2, column : column + 3] = True
    maps = (rng.normal(size=masks.shape) + 4 * masks).astype(np.float32)
    assert masks.mean() < 5e-4
    found, exact = bootstrap.pixel_intervals(maps, masks, num_resamples=200), metrics.pixel_metrics(maps, masks)
    for name, (low, high) in found.items():
        assert low < exact[name] < high, name
    repeated = bootstrap.pixel_intervals(maps, masks, np.zeros(40), num_resamples=1)  # one group: the metric itself
    assert repeated["pixel_ap"][0] == pytest.approx(exact["pixel_ap"], abs=2e-3)


def test_bins_of_the_pixels_come_from_all_columns():
    """Sampled at a stride, two million pixels would all be of the first of two columns, which holds other scores."""
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, 500_001, 2)).astype(np.float32)
    maps[..., 0] -= 20
    masks = np.zeros(maps.shape, bool)
    masks[0, 1000:1400, 1] = True
    maps += masks
    found, exact = bootstrap.pixel_intervals(maps, masks, num_resamples=2), metrics.pixel_metrics(maps, masks)
    assert found["pixel_auroc"] == pytest.approx((exact["pixel_auroc"],) * 2, abs=2e-3)
