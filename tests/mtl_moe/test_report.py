"""The detector's report on synthetic results: what it says, when it warns, how large it is."""

import dataclasses
import re

import numpy as np
import pytest
from scipy import ndimage

from core.metrics import auroc
from mtl_moe import report_figures
from mtl_moe.report import p_value_phrase, write_report
from mtl_moe.report_data import Case, ReportData, select_cases

TASKS = ("masked", "denoise", "synthetic", "jigsaw", "transform", "intensity", "cluster", "self_distill")
NUM_CALIBRATION = 199


def synthetic_image(rng: np.random.Generator, abnormal: bool, side: int, channels: int):
    """A grey disc with texture, with a bright blob where abnormal: (uint8 [H, W, C], bool mask [H, W])."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    body = np.hypot(x * 1.2, y) < 0.42
    texture = ndimage.gaussian_filter(rng.normal(size=(side, side)), side / 40)
    values = 0.45 + 0.12 * texture / texture.std() + rng.normal(0, 0.02, (side, side))
    cy, cx = rng.uniform(-0.2, 0.2, 2)
    mask = (np.hypot(x - cx, (y - cy) * 1.3) < 0.08) & abnormal
    values = (values + 0.3 * ndimage.gaussian_filter(mask.astype(float), 2)) * body
    grey = np.clip(255 * values, 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], channels, 2), mask


def synthetic_case(rng, section, index, label, score, p_value, side, channels=1):
    image, mask = synthetic_image(rng, label == 1, side, channels)
    noise = ndimage.gaussian_filter(rng.normal(size=(side, side)), side / 20)
    anomaly_map = np.abs(noise) / noise.std() * 0.5 + (0.5 * score) * ndimage.gaussian_filter(
        mask.astype(float), side / 40
    )
    evidence_maps = {task: anomaly_map[::4, ::4] * rng.uniform(0.5, 1.5) for task in TASKS}
    return Case(
        section=section,
        name=f"case_{index:03d}.png",
        label=label,
        score=score,
        p_value=p_value,
        image=image,
        anomaly_map=anomaly_map,
        evidence_maps=evidence_maps,
        mask=mask if label == 1 else None,
    )


def synthetic_results(side=48, num_each=1, channels=1, known=True, shift=0.0) -> ReportData:
    """A detector of AUROC near 0.9 with eight tasks, on 60 normal and 80 abnormal images."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [60, 80])
    calibration = rng.gamma(2, 0.5, NUM_CALIBRATION)
    scores = rng.gamma(2, 0.5, 140) + shift + labels * rng.gamma(3, 0.7, 140)
    p_values = (1 + np.sum(calibration >= scores[:, None], axis=1)) / (NUM_CALIBRATION + 1)
    evidence_scores = {task: scores + rng.normal(0, 0.3 + 0.4 * i, 140) for i, task in enumerate(TASKS)}
    metrics = {f"test/demo/{name}": 0.5 + 0.05 * i for i, name in enumerate(("image_ap", "pixel_auroc", "aupro"))}
    metrics["test/demo/image_auroc"] = auroc(scores, labels)
    for i, task in enumerate(TASKS):
        metrics[f"test/demo/task/{task}/image_auroc"] = auroc(evidence_scores[task], labels)
        metrics[f"test/demo/leave_out/{task}/image_auroc"] = metrics["test/demo/image_auroc"] + 0.01 * (i - 5)
    for floor, value in (("mean_intensity", 0.61), ("mean_gradient", 0.83), ("pca", 0.44)):
        metrics[f"test/demo/floor/{floor}/image_auroc"] = value
    intervals = {key: (value - 0.04, min(1.0, value + 0.04)) for key, value in metrics.items()}
    thresholds = []
    for fpr in (0.1, 0.05, 0.01):
        threshold = float(np.quantile(calibration, 1 - fpr))
        flagged = scores >= threshold
        thresholds.append(
            {
                "fpr": fpr,
                "threshold": threshold,
                "observed_fpr": flagged[labels == 0].mean(),
                "tpr": flagged[labels == 1].mean(),
            }
        )
    if not known:
        labels, metrics, intervals = np.full(140, -1), {}, {}
        thresholds = [{"fpr": row["fpr"], "threshold": row["threshold"]} for row in thresholds]
    cases = [
        synthetic_case(rng, section, i, int(labels[i]), float(scores[i]), float(p_values[i]), side, channels)
        for section, indices in select_cases(labels, scores, num_each).items()
        for i in indices
    ]
    history = []
    for step in range(0, 1001, 10):
        losses = {f"loss/{task}": np.exp(-step / (200 + 50 * i)) + 0.2 for i, task in enumerate(TASKS)}
        history.append({"step": step, "loss": sum(losses.values()), **losses})
    return ReportData(
        dataset="demo",
        layout="BMAD with masks: train 900 normal; test 60 normal + 80 abnormal",
        headline="Eight tasks, tiny preset, 1000 steps.",
        metrics=metrics,
        intervals=intervals,
        tasks=TASKS,
        names=[f"case_{i:03d}.png" for i in range(140)],
        labels=labels,
        scores=scores,
        p_values=p_values,
        evidence_scores=evidence_scores,
        calibration_scores=calibration,
        groups=[f"p{i}" for i in range(140)],
        num_calibration_groups=NUM_CALIBRATION,
        thresholds=thresholds,
        cases=cases,
        history=[*history, {"step": 1000}],
        router={f"block_0{i}": rng.dirichlet(np.full(6, 2.0), len(TASKS)) for i in (2, 3)},
        floors={"mean_gradient": "minus mean gradient magnitude"},
        provenance={"seed": 0, "versions": {"jax": "0.10.2"}},
        config={"model": {"num_experts": 6}, "note": "<tag>"},
    )


def written(tmp_path, results) -> str:
    write_report(tmp_path / "report.html", results)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def anchors(html: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)"', html)


def test_the_whole_page(tmp_path):
    results = synthetic_results()
    html = written(tmp_path, results)
    assert anchors(html) == [
        "result", "how-to-read-this-page", "scores", "thresholds", "cases", "tasks", "floors", "calibration", "router",
        "training", "provenance",
    ]  # fmt: skip
    value = results.metrics["test/demo/image_auroc"]
    assert f"higher score in {round(100 * value)}: image AUROC {value:.3f} (95 % interval {value - 0.04:.3f} to" in html
    assert "1 of 20 normals would be flagged" in html
    assert f"{round(100 * results.thresholds[1]['tpr'])} of 100" in html
    for section in ("Best hits", "Worst misses", "False alarms", "Quiet normals"):
        assert f"<h3>{section}</h3>" in html
    assert html.count('alt="map of ') == 4 * len(TASKS)
    assert "Not a medical device" in html
    assert "&lt;tag&gt;" in html
    assert not re.search(r"(src|href)=.(?!data:image/(png|jpeg)|#)|https?:", html)


def test_without_labels_there_are_scores_and_cases_only(tmp_path):
    html = written(tmp_path, synthetic_results(known=False))
    assert anchors(html) == [
        "result", "how-to-read-this-page", "scores", "thresholds", "cases", "router", "training", "provenance",
    ]  # fmt: skip
    assert "No labels are known" in html
    assert "<h3>Highest scores</h3>" in html
    assert "<h3>Lowest scores</h3>" in html
    assert "The 20 highest scores of 140" in html
    assert "label unknown" in html
    assert "Abnormal images found" not in html
    assert "AUROC" not in html.partition("How to read this page</h2>")[2].partition("</section>")[0]


def test_normals_only_check_the_calibration(tmp_path):
    results = dataclasses.replace(synthetic_results(), labels=np.zeros(140, int), metrics={}, cases=())
    html = written(tmp_path, results)
    assert "All labelled images are of one kind" in html
    assert "calibration" in anchors(html)
    assert "tasks" not in anchors(html)
    assert "calibration" not in anchors(written(tmp_path, dataclasses.replace(results, tested=False)))


def test_the_texture_is_not_called_the_best_task(tmp_path):
    results = synthetic_results()
    metrics = results.metrics | {"test/demo/task/texture/image_auroc": 0.999}
    html = written(tmp_path, dataclasses.replace(results, metrics=metrics, cases=()))
    best = max(TASKS, key=lambda task: metrics[f"test/demo/task/{task}/image_auroc"])
    assert f"Best single evidence of a task: {best}," in html


@pytest.mark.parametrize(
    ("floor", "said"),
    [
        (0.99, "A floor is higher: “mean_gradient” (minus mean gradient magnitude) alone reaches 0.990"),
        (0.90, "inside the detector&#39;s interval"),
        (0.70, "above it."),
    ],
)
def test_floors_are_judged_in_words(tmp_path, floor, said):
    results = synthetic_results()
    metrics = results.metrics | {"test/demo/image_auroc": 0.92, "test/demo/floor/mean_gradient/image_auroc": floor}
    intervals = results.intervals | {"test/demo/image_auroc": (0.88, 0.95)}
    html = written(tmp_path, dataclasses.replace(results, metrics=metrics, intervals=intervals, cases=()))
    assert said in html
    assert len(re.findall("A floor is higher|inside the detector|above it", html)) == 1
    marked = re.findall(r"<tr class='alert'><td class=''>(\w+)", html)
    assert marked == ["mean_gradient"]


def test_an_interval_over_a_half_is_called_chance(tmp_path):
    results = synthetic_results()
    key = "test/demo/image_auroc"
    results = dataclasses.replace(results, metrics={key: 0.55}, intervals={key: (0.46, 0.63)}, cases=())
    html = written(tmp_path, results)
    assert "does not tell the detector from guessing" in html
    assert "floors" not in anchors(html)


@pytest.mark.parametrize(("shift", "said"), [(0.0, "within what chance explains"), (1.5, "more than chance explains")])
def test_calibration_is_judged_in_words(tmp_path, shift, said):
    assert said in written(tmp_path, dataclasses.replace(synthetic_results(shift=shift), cases=()))


def test_too_few_flagged_normals_are_not_called_too_many(tmp_path):
    results = synthetic_results()
    labels, groups = np.zeros(600, int), [str(i) for i in range(600)]
    changes = dict(labels=labels, groups=groups, names=groups, scores=np.ones(600), p_values=np.full(600, 0.5))
    html = written(
        tmp_path, dataclasses.replace(results, **changes, evidence_scores={}, num_calibration_groups=600, cases=())
    )
    assert "0.0 % of the 600 test normals" in html
    assert "fewer than chance explains" in html
    assert "more than chance explains" not in html


def test_slices_of_few_patients_are_not_judged_as_many_images(tmp_path):
    """Twice the rate asked for is news from 60 patients, and chance from two."""
    results = synthetic_results()
    p_values = np.where(np.arange(140) % 7 == 0, 0.04, 0.5)
    few = dict(groups=["a", "b"] * 70, num_calibration_groups=3)
    for changes, said in (({}, "more than chance explains"), (few, "within what chance explains")):
        html = written(tmp_path, dataclasses.replace(results, p_values=p_values, cases=(), **changes))
        assert said in html, changes
    assert "60 test normals (2 patients or groups; 3 calibrate)" in html


def test_names_are_escaped(tmp_path):
    results = synthetic_results()
    cases = [dataclasses.replace(results.cases[0], name="<script>x</script>")]
    assert "<script" not in written(tmp_path, dataclasses.replace(results, cases=cases))


def test_24_cases_of_colour_stay_below_4_mb(tmp_path):
    # Grain of 2 % in colour at the size shown: more than the smooth images of most devices, so nearly the worst case.
    results = synthetic_results(side=224, channels=3, num_each=6)
    assert len(results.cases) == 24
    assert len(written(tmp_path, results)) < 4_000_000


def test_what_each_evidence_draws_stands_beside_what_it_ranks(tmp_path):
    results = synthetic_results()
    metrics = results.metrics | {f"test/demo/task/{TASKS[0]}/pixel_auroc": 0.7654}
    html = written(tmp_path, dataclasses.replace(results, metrics=metrics, cases=()))
    (row,) = re.findall(rf"<tr[^>]*><t[dh][^>]*>{TASKS[0]}</t[dh]>.*?</tr>", html, re.DOTALL)
    assert "0.765" in row
    assert "Maps of single evidences" in html


def test_what_is_left_where_the_strongest_floor_tells_nothing_is_said(tmp_path):
    results = synthetic_results()
    matched = {"test/demo/floor_matched_auroc": 0.777, "test/demo/floor/low_gradient/floor_matched_auroc": 0.523}
    html = written(tmp_path, dataclasses.replace(results, metrics=results.metrics | matched, cases=()))
    assert "alike in “low_gradient” it has 0.777, “low_gradient” itself 0.523" in html
    assert "alike in “" not in written(tmp_path, dataclasses.replace(results, cases=()))


def test_an_unreachable_threshold_and_an_undefined_metric_are_left_out(tmp_path):
    results = synthetic_results()
    row = {"fpr": 0.001, "threshold": np.inf, "observed_fpr": 0.0, "tpr": 0.0}
    metrics = results.metrics | {"test/demo/matched_auroc": np.nan}
    html = written(tmp_path, dataclasses.replace(results, thresholds=[row], metrics=metrics, cases=()))
    assert "1 of 1,000 normals would be flagged" in html
    assert "never: too few calibration normals" in html
    assert "like contrast" not in html


def test_select_cases_against_a_hand_written_choice():
    labels = np.array([1, 0, 1, 0, 1, 1, 0, -1, 0, 1])
    scores = np.array([9.0, 1, 2, 8, 5, 7, 3, 99, 4, 6])
    chosen = {title: indices.tolist() for title, indices in select_cases(labels, scores, 2).items()}
    assert chosen == {"Best hits": [0, 5], "Worst misses": [2, 4], "False alarms": [3, 8], "Quiet normals": [1, 6]}
    # Too few for both: each image once, the extra one to the high side.
    chosen = {title: indices.tolist() for title, indices in select_cases(labels[:3], scores[:3], 2).items()}
    assert chosen == {"Best hits": [0], "Worst misses": [2], "False alarms": [1]}
    chosen = {title: indices.tolist() for title, indices in select_cases(np.full(3, -1), scores[:3], 1).items()}
    assert chosen == {"Highest scores": [0], "Lowest scores": [1]}


@pytest.mark.parametrize(
    ("p_value", "phrase"),
    [
        (0.005, "odder than all 199 calibration normals"),
        (0.02, "1 of 50 normals looks this odd"),
        (0.3, "30 of 100 normals look this odd"),
        (1.0, "100 of 100 normals look this odd"),
    ],
)
def test_p_values_in_words(p_value, phrase):
    assert p_value_phrase(p_value, 199) == phrase


def test_overlay_is_clear_at_zero_and_scaled_alike_in_every_case():
    image = np.full((report_figures.CASE_SIDE, report_figures.CASE_SIDE, 1), 100, np.uint8)
    anomaly_map = np.zeros(image.shape[:2], np.float32)
    anomaly_map[:, 112:] = 3.0
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[50:60, 20:30] = 1
    shown, blended = report_figures.overlay(image, anomaly_map, mask)
    np.testing.assert_array_equal(shown, image[:, :, 0])
    np.testing.assert_array_equal(blended[0, :112], 100)
    np.testing.assert_array_equal(blended[55, 25], 100)  # inside the outline the picture stays
    np.testing.assert_array_equal(blended[55, 19], report_figures.OUTLINE_COLOR)
    top = report_figures.map_colors(np.array([3.0]))[0].astype(float)
    opacity = report_figures.OVERLAY_OPACITY
    np.testing.assert_array_equal(blended[0, 112:], np.tile(np.rint((1 - opacity) * 100 + opacity * top), (112, 1)))
    # A higher value elsewhere changes nothing here: the scale is fixed, not the picture's own.
    anomaly_map[200, 50] = 50.0
    np.testing.assert_array_equal(report_figures.overlay(image, anomaly_map, mask)[1][:190], blended[:190])


def test_sizes_that_do_not_fit_are_refused():
    results = synthetic_results()
    with pytest.raises(ValueError, match=r"p_values of shape \(140,\)"):
        dataclasses.replace(results, p_values=results.p_values[:-1])
    with pytest.raises(ValueError, match=r"evidence_scores\['masked'\]"):
        dataclasses.replace(results, evidence_scores={"masked": np.zeros(3)})
    with pytest.raises(ValueError, match=r"router\['b'\] as \[8 tasks, E\]"):
        dataclasses.replace(results, router={"b": np.ones((3, 6))})
    with pytest.raises(ValueError, match="finite scores"):
        dataclasses.replace(results, scores=np.full(140, np.nan))
    with pytest.raises(ValueError, match="test/demo/image_auroc"):
        dataclasses.replace(results, metrics={})
