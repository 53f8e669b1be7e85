"""Calibration against plain numpy and scipy, its file, and the finished map against resize and Gaussian filter.

Axes: N images, n calibration normals, S evidences of tasks, K = S + 1 with the texture, H W map, M side of the
finished map.
"""

import dataclasses

import jax
import numpy as np
import pytest
from scipy import ndimage, stats

from mtl_moe.calibration import (
    FUSIONS,
    SCORING,
    TEXTURE,
    evidence_names,
    fused_names,
    load_calibration,
    task_evidences,
)
from mtl_moe.calibration_fit import FOLDS, TAIL_SHARE, check_calibration, fit_calibration
from mtl_moe.scoring import MAP_LIMIT, make_map_fn
from mtl_moe.tasks import TASKS, Geometry

GEOMETRY = Geometry(16, 8, 1, 16)
# masked: top; synthetic: top, twice; transform: mean.
TASK_SET = tuple(TASKS[name](geometry=GEOMETRY) for name in ("masked", "synthetic", "transform"))
NAMES = ("masked", "synthetic", "synthetic_clean", "transform")
ALL_NAMES = (*NAMES, TEXTURE)
KINDS = ("error", "defect", "error", "label", TEXTURE)
TOP = np.array([True, True, True, False])
SLOPES = (-2.0, 1.5, 3.0, 1.0)
NUM, SIDE = 200, 16


def make_data(num=NUM, seed=0, slopes=(0.0, 0.0, 0.0, 0.0)):
    """Skewed raw scores [N, S] plus `slopes` times the texture [N]."""
    rng = np.random.default_rng(seed)
    texture = rng.normal(-3, 0.5, num)
    raw = rng.gamma(2.0, 0.5, (num, len(NAMES))) + np.array(slopes) * texture[:, None]
    return raw.astype(np.float32), texture.astype(np.float32)


def make_maps(num=8, seed=0):
    rng = np.random.default_rng(seed)
    maps = rng.gamma(1.0, [[[[1.0]], [[2.0]], [[0.1]], [[30.0]]]], (num, len(NAMES), SIDE, SIDE))
    body = np.zeros((num, SIDE, SIDE), np.float32)
    body[:, 2:-2, 3:-3] = 1
    return maps.astype(np.float32), body


def fit(raw, texture, fusion="tail", groups=None):
    groups = [str(i) for i in range(len(raw))] if groups is None else groups
    return fit_calibration(TASK_SET, fusion, raw, texture, groups, *make_maps())


@pytest.fixture(scope="module")
def calibration():
    return fit(*make_data())


def test_evidences_keep_the_order_of_the_tasks():
    assert tuple(evidence_names(TASK_SET)) == NAMES
    assert tuple(fused_names(TASK_SET)) == ALL_NAMES
    assert task_evidences(TASK_SET) == {
        "masked": ("masked",), "synthetic": ("synthetic", "synthetic_clean"), "transform": ("transform",),
        "texture": ("texture",),
    }  # fmt: skip


def tail_score_by_hand(score, reference, threshold, scale, shape):
    """u of one score: mid-rank among n + 1, above the threshold a generalised Pareto tail (scipy's)."""
    n = len(reference)
    if score <= threshold:
        rank = np.sum(reference < score) + 0.5 * np.sum(reference == score) + 0.5
        return min(-np.log(1 - rank / (n + 1)), -np.log(1 - np.sum(reference <= threshold) / (n + 1)))
    beyond = np.sum(reference > threshold) + 1  # of n + 1
    return -np.log(beyond / (n + 1)) - stats.genpareto.logsf(score - threshold, shape, scale=scale)


def test_tail_scores_are_ranks_with_a_pareto_tail(calibration):
    fresh = calibration.corrected(*make_data(60, seed=1))
    found = calibration.tail_scores(fresh)
    assert found.shape == (60, len(ALL_NAMES))
    for s in range(len(ALL_NAMES)):
        wanted = [tail_score_by_hand(x, calibration.reference[:, s], *calibration.tail[s]) for x in fresh[:, s]]
        np.testing.assert_allclose(found[:, s], wanted, rtol=1e-9)


def test_tail_scores_of_the_normals_are_exponential(calibration):
    u = calibration.tail_scores(calibration.reference)
    np.testing.assert_allclose(np.median(u, axis=0), np.log(2), atol=0.02)
    np.testing.assert_allclose(np.quantile(u, 0.95, axis=0), -np.log(0.05), atol=0.35)  # ten normals lie above
    np.testing.assert_allclose(u.mean(0), 1, atol=0.05)


@pytest.mark.parametrize("num", [5, 12, NUM])
def test_tail_scores_rise_without_a_jump(num):
    calibration = fit(*make_data(num))
    threshold = calibration.tail[:, 0]
    fine = np.linspace(calibration.reference.min(0) - 1, calibration.reference.max(0) + 50, 4001)
    u = calibration.tail_scores(fine)
    assert np.isfinite(u).all()
    assert np.all(np.diff(u, axis=0) >= 0)
    assert np.all(np.diff(u[-100:], axis=0) > 0), "very odd scores cannot be told apart"
    below, above = (calibration.tail_scores((threshold + step)[None])[0] for step in (0.0, 1e-9))
    np.testing.assert_allclose(above, below, atol=1e-6)
    assert np.all(calibration.tail[:, 1] > 0)


def test_tied_normals_get_finite_scores():
    raw, texture = make_data(20)
    raw[:] = 1.0
    calibration = fit(raw, texture)
    u = calibration.tail_scores(np.array([[0.9] * 5, [1.0] * 5, [1.1] * 5]))
    assert np.isfinite(u).all()
    assert np.all(np.diff(u, axis=0) >= 0)
    assert np.all(u[2] > u[1])


@pytest.mark.parametrize(("shape", "tolerance"), [(0.0, 0.05), (0.25, 0.05)])
def test_pareto_moments_recover_a_known_tail(shape, tolerance):
    """Excesses over any threshold of GPD(shape, scale) are GPD(shape, scale + shape * threshold)."""
    n = 40_000
    quantiles = stats.genpareto.ppf((np.arange(n) + 0.5) / n, shape, scale=2.0)
    raw = np.repeat(np.random.default_rng(0).permutation(quantiles)[:, None], len(NAMES), axis=1)
    tail = fit(raw, np.random.default_rng(1).normal(size=n)).tail[3]  # "transform": a mean, not corrected
    threshold = stats.genpareto.ppf(1 - TAIL_SHARE, shape, scale=2.0)
    np.testing.assert_allclose(tail[0], threshold, rtol=1e-3)
    np.testing.assert_allclose(tail[2], shape, atol=tolerance)
    np.testing.assert_allclose(tail[1], 2.0 + shape * threshold, rtol=tolerance)


def test_pareto_moments_of_a_small_sample_are_hosking_and_wallis():
    raw, texture = make_data(60, seed=4)
    calibration = fit(np.exp(raw), texture)  # a heavy tail: a shape above 0
    count, unclipped = 12, 0
    for reference, tail in zip(calibration.reference.T, calibration.tail, strict=True):
        excess = reference[-count:] - reference[-count - 1]
        a0 = sum(excess) / count
        a1 = sum((1 - (j - 0.35) / count) * x for j, x in enumerate(excess, 1)) / count
        k = a0 / (a0 - 2 * a1) - 2  # their shape is minus ours
        if 0 <= -k <= 0.5:
            unclipped += 1
            np.testing.assert_allclose(tail, [reference[-count - 1], 2 * a0 * a1 / (a0 - 2 * a1), -k], rtol=1e-9)
        else:
            np.testing.assert_allclose(tail[1:], [a0 * (1 - np.clip(-k, 0, 0.5)), np.clip(-k, 0, 0.5)], rtol=1e-9)
    assert unclipped, "no sample tests the unclipped formula: choose another seed"


def test_tops_lose_what_texture_explains_and_means_keep_it():
    raw, texture = make_data(4000, slopes=SLOPES)
    calibration = fit(raw, texture)
    fit_by_scipy = [stats.linregress(texture.astype(float), raw[:, s].astype(float)) for s in range(len(NAMES))]
    np.testing.assert_allclose(calibration.slope, [r.slope * top for r, top in zip(fit_by_scipy, TOP, strict=True)])
    fresh, fresh_texture = make_data(4000, seed=1, slopes=SLOPES)
    corrected = calibration.corrected(fresh, fresh_texture)[:, : len(NAMES)]
    np.testing.assert_array_equal(corrected[:, ~TOP], fresh[:, ~TOP])
    correlation = np.array([np.corrcoef(column, fresh_texture)[0, 1] for column in corrected.T])
    assert np.all(np.abs(correlation[TOP]) < 0.07)  # three standard errors; it was 0.7 and more
    assert np.all(correlation[~TOP] > 0.5)


def test_texture_is_an_evidence_to_either_side_of_the_normals(calibration):
    raw, texture = make_data()
    median = np.median(texture.astype(float))
    smooth_and_rough = calibration.corrected(np.tile(raw[:1], (3, 1)), median + np.array([-4.0, 0.0, 4.0]))
    np.testing.assert_allclose(smooth_and_rough[:, -1], [4, 0, 4], atol=1e-6)
    u = calibration.tail_scores(smooth_and_rough)[:, -1]
    assert u[0] == pytest.approx(u[2])
    assert u[0] > calibration.tail_scores(calibration.reference)[:, -1].max(), "odder than every normal"
    assert u[1] < 0.1


def test_map_scale_is_read_inside_the_body(calibration):
    maps, body = make_maps()
    for s in range(len(NAMES)):
        inside = maps[:, s][body > 0]
        np.testing.assert_allclose(calibration.map_low[s], np.median(inside), rtol=1e-6)
        wanted = np.percentile(inside, 95) - np.median(inside)
        np.testing.assert_allclose(calibration.map_scale[s], wanted, rtol=1e-5)


@pytest.mark.parametrize("leave_out", [(), ("synthetic", "synthetic_clean"), (TEXTURE,)])
def test_fusions_are_what_they_say(leave_out):
    data = make_data()
    keep = [i for i, name in enumerate(ALL_NAMES) if name not in leave_out]
    fresh = make_data(30, seed=1)

    def mean_of_kinds(values):
        kinds = {KINDS[i] for i in keep}
        return sum(np.mean([values[:, i] for i in keep if KINDS[i] == kind], 0) for kind in kinds) / len(kinds)

    for fusion in FUSIONS:
        calibration = fit(*data, fusion)
        corrected = calibration.corrected(*fresh)
        u = calibration.tail_scores(corrected)
        reference = calibration.reference
        z = (corrected - np.median(reference, 0)) / stats.median_abs_deviation(reference, axis=0, scale="normal")
        wanted = {
            "tail": mean_of_kinds(u),
            "max": u[:, keep].max(1),
            "mean": mean_of_kinds(corrected),
            "robust_z": mean_of_kinds(z),
        }
        np.testing.assert_allclose(calibration.fuse(corrected, leave_out), wanted[fusion], rtol=1e-4)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_scores_are_the_same_in_jax(fusion):
    """As exported programs have them: float32, so that only rounding differs. In NumPy they are float64."""
    calibration = fit(*make_data(slopes=SLOPES), fusion)
    fresh = make_data(300, seed=1, slopes=SLOPES)
    expected = calibration.fuse(calibration.corrected(*fresh))
    assert expected.dtype == np.float64
    found = jax.jit(lambda raw, texture: calibration.fuse(calibration.corrected(raw, texture)))(*fresh)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_p_values_count_the_normals_at_least_as_odd(calibration):
    fused = np.concatenate([calibration.fused[::25], [-1.0, 100.0]])
    wanted = [(1 + sum(c >= x for c in calibration.fused)) / (NUM + 1) for x in fused]
    np.testing.assert_allclose(calibration.p_values(fused), wanted, rtol=1e-12)


def test_normals_are_scored_by_a_fit_without_them():
    raw, texture = make_data(NUM, seed=3, slopes=SLOPES)
    found = []
    for fold in np.array_split(np.arange(NUM), FOLDS):
        others = np.setdiff1d(np.arange(NUM), fold)
        without = fit(raw[others], texture[others])
        found.extend(without.fuse(without.corrected(raw[fold], texture[fold])))
    np.testing.assert_allclose(fit(raw, texture).fused, found, rtol=1e-9)


def test_normals_are_scored_by_a_fit_without_their_patient():
    """Whatever the order of the rows: six patients of ten images, fewer than there are folds."""
    raw, texture = make_data(60, seed=3, slopes=SLOPES)
    patients = np.random.default_rng(0).permutation(np.repeat(list("abcdef"), 10))
    found = fit(raw, texture, groups=patients).fused
    for patient in "abcdef":
        own = patients == patient
        without = fit(raw[~own], texture[~own])
        np.testing.assert_allclose(found[own], without.fuse(without.corrected(raw[own], texture[own])), rtol=1e-9)


def test_patients_with_many_images_keep_the_rate_they_state():
    """New patients' images are flagged at 10 % by design: by fits that know the patient 24 % were."""
    flagged = []
    for seed in range(40):
        raw, texture = make_data(160, seed=seed, slopes=SLOPES)
        own = np.random.default_rng((seed, 1)).gamma(2.0, 1.0, (16, 1, len(NAMES)))  # each patient's, of ten images
        raw += np.repeat(own, 10, axis=1).reshape(raw.shape)
        calibration = fit(raw[:60], texture[:60], groups=np.arange(60) // 10)
        fused = calibration.fuse(calibration.corrected(raw[60:], texture[60:]))
        flagged.append(np.mean(calibration.p_values(fused) <= 0.1))
    assert np.mean(flagged) < 0.13


def test_a_patient_with_nearly_all_normals_is_scored_row_by_row():
    raw, texture = make_data(40, slopes=SLOPES)
    lone = fit(raw, texture, groups=["a"] * 38 + ["b"] * 2).fused
    np.testing.assert_array_equal(lone, fit(raw, texture).fused)


@pytest.mark.parametrize("num", [9, 19])
def test_few_normals_keep_the_rate_they_state(num):
    """New normals of the same kind are flagged at 10 % by design: scored by the fit they are part of, calibration
    normals would look too normal, and 25 and 17 % were."""
    flagged = []
    for seed in range(150):
        raw, texture = make_data(num + 50, seed=seed, slopes=SLOPES)
        calibration = fit(raw[:num], texture[:num])
        fused = calibration.fuse(calibration.corrected(raw[num:], texture[num:]))
        flagged.append(np.mean(calibration.p_values(fused) <= 0.1))
    assert np.mean(flagged) == pytest.approx(0.1, abs=0.02)


def test_a_blank_normal_does_not_decide_what_texture_explains(caplog):
    raw, texture = make_data(64, slopes=SLOPES)
    clean = fit(raw, texture)
    assert not caplog.records
    raw[10], texture[10] = 50.0, -13.8  # black, and hard to restore
    np.testing.assert_allclose(fit(raw, texture).slope, clean.slope, atol=0.1)
    assert "1 of 64 calibration normals are blank" in caplog.text


def test_too_few_normals_and_unknown_fusion_are_errors():
    with pytest.raises(ValueError, match=r"only 4 calibration normals: at least 5 .*data.calibration_fraction"):
        check_calibration("tail", list("abcd"))
    with pytest.raises(ValueError, match=r"score.fusion: expected one of .*'tail'.*found 'vote'"):
        check_calibration("vote", list("abcde"))


def test_many_slices_of_few_patients_are_said_to_be_few(caplog):
    check_calibration("tail", [f"patient {i}" for i in range(10)])
    assert not caplog.records
    check_calibration("tail", ["one patient"] * 200)
    assert "200 calibration normals come from 1 patient(s)" in caplog.text


def test_file_round_trip(calibration, tmp_path):
    path = tmp_path / "calibration.npz"
    full = dataclasses.replace(calibration, fused_low=0.25, fused_scale=3.0, source="scans", dtype="float32")
    full.save(path, 7)
    loaded = load_calibration(path, ALL_NAMES, 7)
    for field in dataclasses.fields(full):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(full, field.name))
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.npz"]
    corrected = full.corrected(*make_data(9, seed=1))
    np.testing.assert_array_equal(loaded.fuse(corrected), full.fuse(corrected))
    with np.load(path) as file:
        older = {name: file[name] for name in file.files if name not in ("source", "manifest_hash", "dtype")}
    np.savez(path, **older)
    assert load_calibration(path, ALL_NAMES, 7).source == ""


def test_missing_foreign_and_damaged_files_are_errors(calibration, tmp_path):
    path = tmp_path / "calibration.npz"
    with pytest.raises(ValueError, match=r"no .*calibration.npz: run --mode=evaluate"):
        load_calibration(path, ALL_NAMES, 7)
    calibration.save(path, 7)
    with pytest.raises(ValueError, match=r"at step 7; expected .* at step 8"):
        load_calibration(path, ALL_NAMES, 8)
    with pytest.raises(ValueError, match=r"made for evidences .*transform.* expected \('masked',\)"):
        load_calibration(path, ("masked",), 7)
    whole = path.read_bytes()
    for content in (b"", b"not an archive", whole[: len(whole) // 2], whole[: len(whole) - 40]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"calibration.npz is damaged .*run --mode=evaluate again"):
            load_calibration(path, ALL_NAMES, 7)
    path.write_bytes(whole)
    with np.load(path) as file:
        stored = dict(file)
    for name, reason in (("kinds", "kinds"), ("scoring", f"scores of kind 1, now they are of kind {SCORING}")):
        np.savez(path, **{key: value for key, value in stored.items() if key != name})
        again = rf"calibration.npz is damaged or of an earlier version .*{reason}.*--mode=evaluate again"
        with pytest.raises(ValueError, match=again):
            load_calibration(path, ALL_NAMES, 7)
    np.savez(path, names=np.array(ALL_NAMES), step=7)
    with pytest.raises(ValueError, match=r"calibration.npz is damaged .*run --mode=evaluate again"):
        load_calibration(path, ALL_NAMES, 7)


@pytest.mark.parametrize("map_size", [SIDE, 56])
def test_finished_map_is_mean_resized_and_smoothed(calibration, map_size):
    calibration = dataclasses.replace(calibration, fused_low=0.5, fused_scale=2.0)
    maps, _ = make_maps(3, seed=2)
    finished = np.asarray(make_map_fn(calibration, SIDE, map_size)(maps, np.ones((3, SIDE, SIDE))))
    scaled = (maps - calibration.map_low[:, None, None]) / calibration.map_scale[:, None, None]
    fused = np.minimum(scaled, MAP_LIMIT).mean(1).astype(np.float32)
    resized = np.asarray(jax.image.resize(fused, (3, map_size, map_size), "bilinear"))
    sigma = 4.0 * map_size / 224
    wanted = (ndimage.gaussian_filter(resized, (0, sigma, sigma)) - 0.5) / 2.0
    np.testing.assert_allclose(finished, wanted, atol=2e-5)  # float32 sums of up to 56 terms near 1


def test_one_evidence_cannot_outvote_the_others_in_the_map(calibration):
    maps = np.tile(calibration.map_low[:, None, None], (1, 1, SIDE, SIDE)).astype(np.float32)
    maps[:, 0] = 1e6
    finished = np.asarray(make_map_fn(calibration, SIDE, SIDE)(maps, np.ones((len(maps), SIDE, SIDE))))
    np.testing.assert_allclose(finished, MAP_LIMIT / len(NAMES), rtol=1e-4)


def test_nothing_is_found_outside_the_body(calibration):
    """No task can tell empty tiles apart: however wrong it is there, the finished map is the normals' median."""
    maps = np.tile(calibration.map_low[:, None, None], (2, 1, SIDE, SIDE)).astype(np.float32)
    body = np.ones((2, SIDE, SIDE), np.float32)
    body[1, :, SIDE // 2 :] = 0
    maps[..., SIDE // 2 :] += 5 * calibration.map_scale[:, None, None]
    finished = np.asarray(make_map_fn(calibration, SIDE, SIDE)(maps, body))
    assert finished[0, :, -1].min() > 4
    np.testing.assert_allclose(finished[1], 0, atol=1e-5)


def test_a_map_is_not_rescaled_by_its_own_range(calibration):
    """Twice as odd must look twice as hot, and batch mates must not matter."""
    maps, _ = make_maps(4, seed=3)
    map_fn = make_map_fn(calibration, SIDE, SIDE)
    finish = lambda maps: map_fn(maps, np.ones((len(maps), SIDE, SIDE)))  # noqa: E731
    np.testing.assert_allclose(finish(maps)[1:2], finish(maps[1:2]), rtol=1e-5, atol=1e-6)
    low = calibration.map_low[:, None, None]
    away = np.clip(maps - low, 0, 4 * calibration.map_scale[:, None, None])
    once, twice = (np.asarray(finish((low + k * away).astype(np.float32))) for k in (1, 2))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-3, atol=1e-4)
