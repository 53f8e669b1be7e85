"""Diagnostics against kernel-form CKA in float64, and at values known by hand."""

import numpy as np
import pytest

from vit_distill.diagnostics import block_moments, block_rows, combine


def block_diagnostics(student, teacher, pairs):
    return block_rows(block_moments(student, teacher), pairs)


def _hsic_cka(x, y):
    """From centred Gram matrices over samples, as the paper defines it."""
    n = len(x)
    centre = np.eye(n) - 1 / n
    k, l = (centre @ v @ v.T @ centre for v in (x, y))
    return (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())


def test_cka_is_that_of_centred_kernels():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5, 8)) + 4.0
    y = x @ rng.normal(size=(8, 8)) + 0.5 * rng.normal(size=(3, 5, 8))
    expected = _hsic_cka(x.reshape(15, 8), y.reshape(15, 8))
    assert 0.3 < expected < 0.98
    (row,) = block_diagnostics([x], [y], (0,))
    assert row["cka"] == pytest.approx(expected, rel=1e-5)


def test_rows_name_pairs_and_measure_them():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0].astype(np.float32)
    other = rng.normal(size=(2, 3, 4)).astype(np.float32)
    rows = block_diagnostics([x, x, x, x], [x, -2 * x, 1e3 * x @ rotation + 7, other], (1, 3, 5, 7))
    assert [(row["block"], row["teacher_block"]) for row in rows] == [(0, 1), (1, 3), (2, 5), (3, 7)]
    assert rows[0] == pytest.approx({"block": 0, "teacher_block": 1, "l1": 0.0, "cosine": 1.0, "cka": 1.0}, abs=1e-6)
    assert rows[1]["l1"] == pytest.approx(3 * np.abs(x).mean(), rel=1e-6)
    assert rows[1]["cosine"] == pytest.approx(-1, rel=1e-6)
    assert rows[2]["cka"] == pytest.approx(1, rel=1e-5)
    assert rows[3]["l1"] == pytest.approx(np.abs(x - other).mean(), rel=1e-6)
    cosines = (x * other).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(other, axis=-1)
    assert rows[3]["cosine"] == pytest.approx(cosines.mean(), rel=1e-5)


def test_batches_add_up_to_the_whole():
    """With features far from zero, where sums of squares would lose the variance."""
    rng = np.random.default_rng(3)
    x, y = (rng.normal(size=(7, 3, 4)).astype(np.float32) + 10 for _ in range(2))
    whole = block_diagnostics([x, y], [y, y], (1, 3))
    parts = [block_moments([x[rows], y[rows]], [y[rows], y[rows]]) for rows in (slice(3), slice(3, 6), slice(6, 7))]
    added = [combine(combine(first, second), third) for first, second, third in zip(*parts, strict=True)]
    for found, expected in zip(block_rows(added, (1, 3)), whole, strict=True):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert 0 < whole[0]["cka"] < 0.5


def test_extremes_stay_finite_and_mismatches_are_named():
    x = np.zeros((1, 3, 4), np.float32)
    assert block_diagnostics([x], [x], (0,))[0]["cka"] == 0
    large = np.random.default_rng(2).normal(size=(1, 3, 4), scale=1e12).astype(np.float32)
    assert block_diagnostics([large], [large], (0,))[0]["cka"] == pytest.approx(1)
    with pytest.raises(ValueError, match="equal shapes"):
        block_diagnostics([x], [x[:, :2]], (0,))
    with pytest.raises(ValueError, match="every pair"):
        block_diagnostics([x, x], [x], (0, 1))
