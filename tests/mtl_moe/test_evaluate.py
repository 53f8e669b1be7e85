"""Evaluation writes every output with its documented keys, with and without masks, labels and a test split."""

import csv
import dataclasses
import html.parser
import json

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sklearn_metrics

from core.metrics import pixel_metrics
from input_pipeline.split import ArrayPixels, Split
from mtl_moe.calibration import evidence_names, fused_names, load_calibration
from mtl_moe.evaluate import FLOORS, check_score, evaluate
from mtl_moe.training_data import FILE

PIXEL_METRICS = {"pixel_auroc", "pixel_ap", "aupro", "aupro_bmad"}
IMAGE_METRICS = {"image_auroc", "image_ap"}


def strict_json(path):
    def refuse(name):
        raise AssertionError(f"{path}: {name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def predictions_of(workdir):
    with (workdir / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class References(html.parser.HTMLParser):
    """Collects what a page would load."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [value for key, value in attrs if key in ("src", "srcset") or (tag == "link" and key == "href")]


@pytest.fixture(scope="module")
def report(tiny_run):
    return evaluate(*tiny_run)


def test_all_outputs_are_written(tiny_run, report):
    names = {path.name for path in tiny_run.workdir.iterdir()}
    assert names == {
        "checkpoints", "metrics.jsonl", "calibration.npz", "predictions.csv", "report.json", "report.html"
    }  # fmt: skip
    page = (tiny_run.workdir / "report.html").read_text()
    assert all(reference.startswith("data:") for reference in References(page).found)
    assert strict_json(tiny_run.workdir / "report.json")["metrics"] == pytest.approx(report["metrics"])


def test_report_holds_the_documented_keys(tiny_run, report):
    stored = strict_json(tiny_run.workdir / "report.json")
    assert {"metrics", "intervals", "thresholds", "provenance"} <= set(stored)
    found = stored["metrics"]
    assert all(isinstance(value, float) for value in found.values())
    expected = {f"test/phantom/{name}" for name in IMAGE_METRICS | PIXEL_METRICS}
    for name in fused_names(tiny_run.system.tasks):
        expected |= {f"test/phantom/task/{name}/{metric}" for metric in IMAGE_METRICS}
    expected |= {f"test/phantom/leave_out/{task.name}/image_auroc" for task in tiny_run.system.tasks}
    expected |= {f"test/phantom/floor/{name}/image_auroc" for name in ("mean_intensity", "pca_error")}
    assert expected <= set(found)
    floors = {key.split("/")[3] for key in found if key.startswith("test/phantom/floor/")}
    assert floors <= set(FLOORS), "a floor without a description in the report"
    singles = [found[f"test/phantom/task/{name}/image_auroc"] for name in evidence_names(tiny_run.system.tasks)]
    assert found["test/phantom/best_single/image_auroc"] == max(singles)
    for key, interval in stored["intervals"].items():
        if None not in interval:  # a metric of too few images
            assert interval[0] <= interval[1]
            assert key in found
    provenance = {"versions", "devices", "seed", "git_revision", "manifest_hash", "evaluation_seconds", "counts"}
    assert provenance <= set(stored["provenance"])
    assert len(stored["provenance"]["devices"]) == 8
    assert stored["provenance"]["checkpoint_step"] == 3


def test_predictions_agree_with_the_report_and_the_calibration(tiny_run, report):
    rows, names = predictions_of(tiny_run.workdir), fused_names(tiny_run.system.tasks)
    split = tiny_run.dataset.splits["test"]
    assert list(rows[0]) == ["name", "label", "score", "p_value", *names]
    assert [row["name"] for row in rows] == split.names
    labels, scores = (np.array([float(row[key]) for row in rows]) for key in ("label", "score"))
    np.testing.assert_array_equal(labels, split.labels)
    # Six digits are written: ties of the full scores would be the only difference.
    found = report["metrics"]
    assert found["test/phantom/image_auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores))
    assert found["test/phantom/image_ap"] == pytest.approx(sklearn_metrics.average_precision_score(labels, scores))
    calibration = load_calibration(tiny_run.workdir / "calibration.npz", names, 3)
    against = np.concatenate([calibration.fused, scores[labels == 1]])
    expected = sklearn_metrics.roc_auc_score(np.arange(len(against)) >= len(calibration.fused), against)
    assert found["test/phantom/abnormal_vs_calibration"] == pytest.approx(expected)
    assert 0 <= found["test/phantom/normal_vs_calibration"] <= 1
    evidence = np.array([[float(row[name]) for name in names] for row in rows])
    kinds = np.array(calibration.kinds)
    assert set(kinds) == {"error", "defect", "label", "texture"}
    fused = np.mean([evidence[:, kinds == kind].mean(axis=1) for kind in set(kinds)], axis=0)
    np.testing.assert_allclose(scores, fused, rtol=1e-4)
    for row, score in zip(rows, scores, strict=True):
        at_least = np.sum(calibration.fused >= score * (1 - 1e-6))
        assert float(row["p_value"]) == pytest.approx((1 + at_least) / 7, rel=1e-5)  # six calibration normals


def test_thresholds_flag_what_their_p_value_says(tiny_run, report):
    rows = predictions_of(tiny_run.workdir)
    labels, p = (np.array([float(row[key]) for row in rows]) for key in ("label", "p_value"))
    rates = tiny_run.system.config.score.false_positive_rates
    assert [row["fpr"] for row in report["thresholds"]] == list(rates)
    for row in report["thresholds"]:
        assert row["observed_fpr"] == pytest.approx(np.mean(p[labels == 0] <= row["fpr"]))
        assert row["tpr"] == pytest.approx(np.mean(p[labels == 1] <= row["fpr"]))
    # Six normals cannot support any of these rates: infinite, which strict JSON has no number for.
    assert {row["threshold"] for row in strict_json(tiny_run.workdir / "report.json")["thresholds"]} == {None}


@pytest.fixture(scope="module")
def small_run(make_run, tiny_config):
    """Two tasks: quick to compile."""
    config = tiny_config()
    config.tasks.names = ("masked", "denoise")
    return make_run(config)


def test_without_a_test_split_no_accuracy_is_given(small_run):
    splits = {key: split for key, split in small_run.dataset.splits.items() if key != "test"}
    report = evaluate(small_run.system, dataclasses.replace(small_run.dataset, splits=splits), small_run.workdir)
    assert report["metrics"] == {}
    assert {row["tpr"] for row in report["thresholds"]} == {None}
    rows = predictions_of(small_run.workdir)
    assert [row["name"] for row in rows] == splits["calibration"].names
    assert {row["label"] for row in rows} == {"0"}
    assert "calibration normals" in (small_run.workdir / "report.html").read_text()
    strict_json(small_run.workdir / "report.json")


def changed(run, **score):
    """The run with other fields of config.score."""
    config = run.system.config.copy_and_resolve_references()
    config.score.update(**score)
    return run._replace(system=dataclasses.replace(run.system, config=config))


def test_cases_and_intervals_can_be_left_out(small_run):
    report = evaluate(*changed(small_run, gallery=0, bootstrap=0))
    assert report["intervals"] == {}
    assert "test/phantom/image_auroc" in report["metrics"]
    assert "Best hits" not in (small_run.workdir / "report.html").read_text()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("false_positive_rates", (0.05, 1.0), r"rates in \(0, 1\), found \(0.05, 1.0\)"),
        ("bootstrap", -1, "bootstrap and gallery of at least 0"),
        ("batch_size", 0, "batch_size of at least 1"),
        ("fusion", "vote", "score.fusion: expected one of"),
    ],
)
def test_impossible_scoring_is_refused_before_training(tiny_config, small_run, field, value, message):
    score = tiny_config().score
    check_score(score, small_run.dataset)
    score[field] = value
    with pytest.raises(ValueError, match=message):
        check_score(score, small_run.dataset)


def test_maps_are_written_for_every_image(small_run):
    evaluate(*changed(small_run, save_maps=True))
    split = small_run.dataset.splits["test"]
    for name in split.names:
        assert np.load(small_run.workdir / "maps" / f"{name}.npy").shape == (32, 32)
        with Image.open(small_run.workdir / "maps" / f"{name}.png") as picture:
            assert (picture.mode, picture.size) == ("RGB", (224, 224))
    stored = np.stack([np.load(small_run.workdir / "maps" / f"{name}.npy") for name in split.names])
    found = pixel_metrics(stored, split.masks(np.arange(len(split)))[..., 0] > 0)
    report = strict_json(small_run.workdir / "report.json")
    assert found["pixel_auroc"] == pytest.approx(report["metrics"]["test/phantom/pixel_auroc"])


def test_a_detector_of_other_images_is_said_to_be(small_run, caplog):
    (small_run.workdir / FILE).write_text(
        json.dumps({"dataset": "elsewhere", "num_images": 99, "names_hash": "x", "mean_grey": [1.0]})
    )
    evaluate(*small_run)
    (small_run.workdir / FILE).unlink()
    assert (
        "learned from scratch on 99 images of elsewhere, calibrated on 6"
        in (small_run.workdir / "report.html").read_text()
    )
    assert "learned from other images" in caplog.text


def without_masks(split, labels):
    pixels = ArrayPixels(split.images(np.arange(len(split))), None, 32)
    return Split(split.names, split.groups, np.asarray(labels, np.int32), False, pixels)


def test_with_image_labels_only_there_are_no_pixel_metrics(small_run):
    test = small_run.dataset.splits["test"]
    splits = small_run.dataset.splits | {"test": without_masks(test, test.labels)}
    config = small_run.system.config.copy_and_resolve_references()
    config.score.untrained = True
    system = dataclasses.replace(small_run.system, config=config)
    found = evaluate(system, dataclasses.replace(small_run.dataset, splits=splits), small_run.workdir)["metrics"]
    assert {f"test/phantom/{name}" for name in IMAGE_METRICS} <= set(found)
    assert not [key for key in found if key.rsplit("/", 1)[1] in PIXEL_METRICS]
    assert 0 <= found["test/phantom/floor/untrained/image_auroc"] <= 1


def test_a_test_split_of_one_class_gives_no_accuracy(small_run):
    test = small_run.dataset.splits["test"]
    normals = test.take(np.flatnonzero(test.labels == 0))
    splits = small_run.dataset.splits | {"test": without_masks(normals, normals.labels)}
    report = evaluate(small_run.system, dataclasses.replace(small_run.dataset, splits=splits), small_run.workdir)
    assert report["metrics"] == {}
    assert [row["name"] for row in predictions_of(small_run.workdir)] == normals.names
    assert all(0 <= row["observed_fpr"] <= 1 for row in report["thresholds"])
