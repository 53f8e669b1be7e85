"""Evaluation writes every output with its documented keys, with and without masks, labels and a test split."""

import csv
import dataclasses
import functools
import html.parser
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sklearn_metrics

from core.metrics import auroc, pixel_metrics
from input_pipeline.batches import image_batches
from input_pipeline.index import calibration_rows
from input_pipeline.split import ArrayPixels, Split, join
from mtl_moe import results
from mtl_moe.calibration import evidence_names, fused_names, load_calibration
from mtl_moe.evaluate import check_score, evaluate, result_folder
from mtl_moe.infer import Scorer, Trained, calibrate, restore
from mtl_moe.painted import KINDS, UNSEEN
from mtl_moe.scoring import make_map_fn
from mtl_moe.training_data import FILE, bind_training_data

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


def changed(run, **score):
    """The run with other fields of config.score."""
    config = run.system.config.copy_and_resolve_references()
    config.score.update(**score)
    return run._replace(system=dataclasses.replace(run.system, config=config))


RATES = (0.1, 0.3, 0.8)  # of six calibration normals, which give p-values of sevenths


@pytest.fixture(scope="module")
def report(tiny_run):
    return evaluate(*changed(tiny_run, false_positive_rates=RATES))


def test_all_outputs_are_written(tiny_run, report):
    names = {path.name for path in tiny_run.workdir.iterdir()}
    assert names == {
        "checkpoints", "metrics.jsonl", "calibration.npz", "predictions.csv", "patients.csv", "report.json",
        "report.html",
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
    assert floors <= set(results.FLOORS), "a floor without a description in the report"
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
    for name, label in (("normal", 0), ("abnormal", 1)):
        against = np.concatenate([calibration.fused, scores[labels == label]])
        expected = sklearn_metrics.roc_auc_score(np.arange(len(against)) >= len(calibration.fused), against)
        assert found[f"test/phantom/{name}_vs_calibration"] == pytest.approx(expected)
    evidence = np.array([[float(row[name]) for name in names] for row in rows])
    kinds = np.array(calibration.kinds)
    assert set(kinds) == {"error", "defect", "label", "texture"}
    fused = np.mean([evidence[:, kinds == kind].mean(axis=1) for kind in set(kinds)], axis=0)
    np.testing.assert_allclose(scores, fused, rtol=1e-4)
    for row, score in zip(rows, scores, strict=True):
        at_least = np.sum(calibration.fused >= score * (1 - 1e-6))
        assert float(row["p_value"]) == pytest.approx((1 + at_least) / 7, rel=1e-5)  # six calibration normals


def test_the_map_of_each_evidence_is_measured(tiny_run, report):
    split, names = tiny_run.dataset.splits["test"], evidence_names(tiny_run.system.tasks)
    calibration = load_calibration(tiny_run.workdir / "calibration.npz", fused_names(tiny_run.system.tasks), 3)
    scorer = Scorer(tiny_run.system, restore(tiny_run.system, tiny_run.workdir))
    scored = scorer.images(split.images(np.arange(len(split))))
    masks = split.masks(np.arange(len(split)))[..., 0] > 0
    for i, name in enumerate(names):
        low, scale = calibration.map_low[i : i + 1], calibration.map_scale[i : i + 1]
        alone = dataclasses.replace(calibration, map_low=low, map_scale=scale)
        finish = make_map_fn(alone, 32, masks.shape[-1])
        expected = pixel_metrics(np.asarray(finish(scored["maps"][:, i : i + 1], scored["body"])), masks)
        for metric in ("pixel_auroc", "aupro"):
            found = report["metrics"][f"test/phantom/task/{name}/{metric}"]
            assert found == pytest.approx(expected[metric], abs=1e-4)
    page = (tiny_run.workdir / "report.html").read_text()
    assert "Maps of single evidences: of at most 256 images" in page


def test_maps_of_evidences_are_measured_on_as_many_images_as_fit(tiny_run):
    split = tiny_run.dataset.splits["test"]
    assert len(results.evidence_map_rows(split, 7, 224)) == len(split)
    fitting = results.EVIDENCE_MAP_BYTES / (4 * 7 * 2900**2)
    assert 1 < fitting < len(split)
    assert len(results.evidence_map_rows(split, 7, 2900)) == int(fitting)
    assert len(results.evidence_map_rows(split, 7, 100_000)) == 1
    assert not len(results.evidence_map_rows(without_masks(split, split.labels), 7, 224))


def test_maps_of_evidences_without_a_lesion_among_them_are_not_measured(small_run, monkeypatch):
    labels = small_run.dataset.splits["test"].labels
    normal = np.flatnonzero(labels == 0)[:1]
    monkeypatch.setattr("mtl_moe.results.even_rows", lambda total, most: normal if most < total else np.arange(total))
    monkeypatch.setattr(results, "MAX_EVIDENCE_MAPS", 1)
    found = evaluate(*changed(small_run, gallery=0, bootstrap=0))["metrics"]
    assert "test/phantom/pixel_auroc" in found
    assert not [key for key in found if key.startswith("test/phantom/task/") and key.endswith("pixel_auroc")]


def test_thresholds_flag_what_their_p_value_says(tiny_run, report):
    rows = predictions_of(tiny_run.workdir)
    labels, p = (np.array([float(row[key]) for row in rows]) for key in ("label", "p_value"))
    assert [row["fpr"] for row in report["thresholds"]] == list(RATES)
    for row in report["thresholds"]:
        assert row["observed_fpr"] == pytest.approx(np.mean(p[labels == 0] <= row["fpr"]))
        assert row["tpr"] == pytest.approx(np.mean(p[labels == 1] <= row["fpr"]))
    assert np.isfinite(row["threshold"])
    assert report["thresholds"][0]["tpr"] < row["tpr"], "no rate flags more than another"
    # Six normals cannot support a rate of 0.1: infinite, which strict JSON has no number for.
    stored = strict_json(tiny_run.workdir / "report.json")["thresholds"]
    assert [row["threshold"] is None for row in stored] == [True, False, False]


@pytest.fixture(scope="module")
def small_run(make_run, tiny_config):
    """Two tasks: quick to compile."""
    config = tiny_config()
    config.tasks.names = ("masked", "denoise")
    return make_run(config)


def test_without_a_test_split_no_accuracy_is_given(small_run):
    splits = dict(small_run.dataset.splits)
    splits["valid"] = splits.pop("test")
    report = evaluate(small_run.system, dataclasses.replace(small_run.dataset, splits=splits), small_run.workdir)
    # But for defects that were painted on them: of each family, on so many as are asked for.
    prefix, metrics = "painted/phantom/", report["metrics"]
    families = [f"{prefix}family/{name}" for name in KINDS[1:]]
    assert set(metrics) == {*families, prefix + "trained", prefix + "unseen"}
    unseen = [metrics[f"{prefix}family/{name}"] for name in UNSEEN]
    assert metrics[prefix + "unseen"] == pytest.approx(np.mean(unseen))
    # Nor a rate of false positives: these are the very normals that set the thresholds.
    assert {row[name] for row in report["thresholds"] for name in ("observed_fpr", "tpr")} == {None}
    rows = predictions_of(small_run.workdir)
    assert [row["name"] for row in rows] == splits["calibration"].names
    assert {row["label"] for row in rows} == {"0"}
    names = fused_names(small_run.system.tasks)
    without_them = load_calibration(small_run.workdir / "calibration.npz", names, 3).fused
    np.testing.assert_allclose([float(row["score"]) for row in rows], without_them, rtol=1e-5)
    page = (small_run.workdir / "report.html").read_text()
    assert "the images shown are the calibration normals" in page
    assert "valid/ is not used: call it test/ to be measured on it." in page
    assert "Test normals flagged" not in page
    assert '<section id="calibration"' not in page
    assert page.count('alt="painted: ') == len(KINDS) - 1
    assert "(trained on)" not in page, "there is no task synthetic"
    strict_json(small_run.workdir / "report.json")


def test_abnormal_images_of_one_patient_give_no_intervals(small_run, caplog):
    splits = small_run.dataset.splits
    test = splits["test"]
    groups = ["patient" if label else group for label, group in zip(test.labels, test.groups, strict=True)]
    dataset = dataclasses.replace(small_run.dataset, splits=splits | {"test": dataclasses.replace(test, groups=groups)})
    report = evaluate(changed(small_run, gallery=0, untrained=False).system, dataset, small_run.workdir)
    assert report["intervals"] == {}
    assert "test/phantom/image_auroc" in report["metrics"]
    assert sum("no confidence intervals" in message for message in caplog.messages) == 1


def test_cases_and_intervals_can_be_left_out(small_run, monkeypatch):
    report = evaluate(*changed(small_run, gallery=0, bootstrap=0))
    assert report["intervals"] == {}
    assert "test/phantom/image_auroc" in report["metrics"]
    monkeypatch.setattr(results, "image_batches", functools.partial(image_batches, batch_size=3))
    monkeypatch.setattr(results, "MASK_BATCH", 3)
    in_parts = evaluate(*changed(small_run, gallery=0, bootstrap=0))  # a split is never in memory as a whole
    assert in_parts["metrics"] == pytest.approx(report["metrics"], rel=1e-6)
    assert "Best hits" not in (small_run.workdir / "report.html").read_text()


def test_floors_are_measured_without_a_detector(small_run):
    split = small_run.dataset.splits["test"]
    found = results.Results("phantom", split, np.zeros(len(split)), 0)
    found.add_floors(small_run.dataset, np.zeros(len(split)))
    floor = "test/phantom/floor/pca_error/"
    assert found.metrics[floor + "matched_auroc"] == pytest.approx(found.metrics[floor + "image_auroc"])


def test_a_score_that_is_its_strongest_floor_is_near_chance_over_pairs_alike_in_it(small_run):
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 2
    brightness = np.clip(rng.normal(100, 15, 400) + 15 * labels, 0, 255)
    images = np.broadcast_to(brightness[:, None, None, None], (400, 32, 32, 1)) + rng.normal(0, 20, (400, 32, 32, 1))
    images = images.clip(0, 255).astype(np.uint8)
    names = [str(i) for i in range(400)]
    split = Split(names, names, labels, False, ArrayPixels(images, None, 32))
    learned = rng.normal(0, 1, 400) + 2 * labels
    for fused, low, high in ((brightness, 0.45, 0.6), (learned, 0.85, 0.98)):
        found = results.Results("grey", split, np.zeros(400), 50)
        dataset = dataclasses.replace(small_run.dataset, splits={"test": split})  # floors that need no fit
        found.add_floors(dataset, fused)
        assert found.metrics["test/grey/floor/mean_intensity/image_auroc"] > 0.7
        assert found.metrics["test/grey/floor/mean_intensity/floor_matched_auroc"] < 0.6
        value, interval = (part["test/grey/floor_matched_auroc"] for part in (found.metrics, found.intervals))
        assert low < value < high
        assert interval[0] < value < interval[1]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("false_positive_rates", (0.05, 1.0), r"rates in \(0, 1\), found \(0.05, 1.0\)"),
        ("bootstrap", -1, "bootstrap, gallery and painted of at least 0"),
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
    metrics = evaluate(*changed(small_run, save_maps=True, untrained=True))["metrics"]
    split = small_run.dataset.splits["test"]
    for name in split.names:
        assert np.load(small_run.workdir / "maps" / f"{name}.npy").shape == (32, 32)
        with Image.open(small_run.workdir / "maps" / f"{name}.png") as picture:
            assert (picture.mode, picture.size) == ("RGB", (224, 224))
    stored = np.stack([np.load(small_run.workdir / "maps" / f"{name}.npy") for name in split.names])
    found = pixel_metrics(stored, split.masks(np.arange(len(split)))[..., 0] > 0)
    report = strict_json(small_run.workdir / "report.json")
    assert found["pixel_auroc"] == pytest.approx(report["metrics"]["test/phantom/pixel_auroc"])

    # The untrained network, which no checkpoint has a part in.
    system, dataset, _ = small_run
    params, extra = jax.jit(system.init_fn(system.patch_centers(dataset)))(jax.random.key(system.config.seed))
    scorer = Scorer(system, Trained(system.place(params), system.place(extra), 0))
    calibration = calibrate(system, scorer, dataset.splits["calibration"])
    scored = scorer.split(split, "by hand", make_map_fn(calibration, 32, 32))
    fused = calibration.fuse(calibration.corrected(scored.raw, scored.texture))
    assert metrics["test/phantom/floor/untrained/image_auroc"] == pytest.approx(auroc(fused, split.labels))
    found = pixel_metrics(scored.maps, split.masks(np.arange(len(split)))[..., 0] > 0)
    assert metrics["test/phantom/floor/untrained/aupro"] == pytest.approx(found["aupro"])
    assert metrics["test/phantom/aupro"] != pytest.approx(found["aupro"])


@pytest.fixture
def bound_run(small_run, tmp_path):
    """A copy of the run that knows what it learned from, evaluated: its calibration and its report."""
    run = small_run._replace(workdir=shutil.copytree(small_run.workdir, tmp_path / "w"))
    bind_training_data(run.dataset, run.workdir)
    evaluate(*run)
    return run, {name: (run.workdir / name).read_bytes() for name in ("calibration.npz", "report.html", "report.json")}


def kept(run, files):
    return all((run.workdir / name).read_bytes() == content for name, content in files.items())


def test_after_its_folder_changed_no_image_that_was_trained_on_calibrates(bound_run, caplog):
    run, files = bound_run
    parts = run.dataset.splits
    assert "6 more that were not trained on" in files["report.html"].decode()
    everything = join([parts["train"], parts["calibration"]])
    gone = parts["train"].groups[0]  # one patient less
    left = everything.take([row for row, group in enumerate(everything.groups) if group != gone])
    held_out = calibration_rows(left.groups, 0.25, 0)
    drawn = {"train": left.take(np.flatnonzero(~held_out)), "calibration": left.take(np.flatnonzero(held_out))}
    assert set(drawn["calibration"].names) & set(parts["train"].names), "the same draw: nothing to find out"
    changed_folder = dataclasses.replace(run.dataset, splits=drawn)
    config = run.system.config.copy_and_resolve_references()
    config.data.cache = "site_64.npz"
    evaluate(dataclasses.replace(run.system, config=config), changed_folder, run.workdir)
    assert kept(run, files), "predictions were calibrated on this from now on"
    folder = run.workdir / "evaluate" / "site_64"
    with np.load(folder / "calibration.npz") as stored:
        assert stored["source"] == "phantom (site_64)"
    rows = predictions_of(folder)  # without a test split, the calibration normals
    assert [row["name"] for row in rows] == parts["calibration"].names
    assert "calibrated on 6 that were not trained on" in (folder / "report.html").read_text()
    assert "were trained on: 6 do that were not" in caplog.text
    few = {name: split.take(np.arange(4)) for name, split in drawn.items()}
    with pytest.raises(ValueError, match=r"only \d are new to it, and calibration needs 5"):
        evaluate(run.system, dataclasses.replace(run.dataset, splits=few), run.workdir)


def test_a_detector_of_other_images_is_said_to_be(bound_run, caplog):
    """Measured on another set, of which nothing is known to have been trained on, and its own calibration stays."""
    run, files = bound_run
    facts = {"dataset": "elsewhere", "num_images": 99, "names_hash": "x", "mean_grey": [1.0]}
    for more, claim in (({}, "6 held-out normals"), ({"images": ["a"]}, "6 that were not trained on")):
        (run.workdir / FILE).write_text(json.dumps(facts | more))
        evaluate(*run)
        page = (run.workdir / "evaluate" / "phantom" / "report.html").read_text()
        assert f"learned from scratch on 99 images of elsewhere, calibrated on {claim}" in page
        assert ("was not written down" in page) == (not more)
        assert "training is unfinished: step 3 of 4" in page
    assert kept(run, files)
    assert "learned from other images" in caplog.text
    assert "newest checkpoint is of step 3 of 4" in caplog.text
    stored = run.workdir / "evaluate" / "phantom" / "report.json"
    stored.write_text(json.dumps({"provenance": {"source": "/another/phantom"}}))
    with pytest.raises(ValueError, match=r"holds the results of /another/phantom, .*move that folder away"):
        evaluate(*run)


def test_a_test_split_alone_is_measured_as_predictions_are(bound_run):
    """Without training images nothing is calibrated anew, and of the floors there are those that need no fit."""
    run, _ = bound_run
    whole = evaluate(*changed(run, untrained=True))["metrics"]
    own, files = predictions_of(run.workdir), {path.name: path.read_bytes() for path in run.workdir.glob("*.*")}
    test = dataclasses.replace(run.dataset, splits={"test": run.dataset.splits["test"]})
    found = evaluate(run.system, test, run.workdir)
    folder = run.workdir / "evaluate" / "phantom"
    assert predictions_of(folder) == own
    assert {path.name: path.read_bytes() for path in run.workdir.glob("*.*")} == files
    assert not (folder / "calibration.npz").exists()
    assert "test/phantom/pixel_auroc" in found["metrics"]
    floors = {key: value for key, value in found["metrics"].items() if "/floor/" in key}
    unfitted = {"mean_intensity", "low_gradient", *(f"band_{i}_low" for i in range(4)), "smoothed_intensity"}
    assert {key.split("/")[3] for key in floors} == unfitted
    assert floors == {key: whole[key] for key in floors}
    facts = strict_json(folder / "report.json")["provenance"]
    assert facts["calibration"] == {"source": "phantom", "manifest_hash": run.dataset.manifest_hash}
    assert "untrained network" in facts["left_out"]
    page = (folder / "report.html").read_text()
    assert "calibrated on 6 held-out normals of phantom" in page
    assert "hold no training images" in page
    assert f"and {facts['left_out']} are left out" in page
    data = run.system.config.data.copy_and_resolve_references()
    for where, name in (("root", "site.v2"), ("cache", "site.v2.npz")):
        data[where] = name
        assert result_folder(data, test, run.workdir) == run.workdir / "evaluate" / "site.v2"
    normals = dataclasses.replace(test, splits={"test": test.splits["test"].take(np.array([0]))})
    with pytest.raises(ValueError, match=r"without train/ .* normal and abnormal images .*; found 1 in test/"):
        check_score(run.system.config.score, normals)


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
    assert "test/phantom/floor/untrained/image_auroc" in found


def test_a_test_split_of_one_class_gives_no_accuracy(small_run):
    test = small_run.dataset.splits["test"]
    normals = test.take(np.flatnonzero(test.labels == 0))
    splits = small_run.dataset.splits | {"test": without_masks(normals, normals.labels)}
    report = evaluate(small_run.system, dataclasses.replace(small_run.dataset, splits=splits), small_run.workdir)
    assert {key.split("/")[0] for key in report["metrics"]} == {"painted"}
    assert [row["name"] for row in predictions_of(small_run.workdir)] == normals.names
    assert all(0 <= row["observed_fpr"] <= 1 for row in report["thresholds"])
