"""Mean, deviation and ensemble of several seeds."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from input_pipeline.split import ArrayPixels, Split
from mtl_moe import run
from mtl_moe.outputs import write_predictions
from mtl_moe.seeds import ensemble, read_scores, summarise


@pytest.fixture
def split():
    labels = np.repeat([0, 1], 10).astype(np.int32)
    names = [f"{i:02d}.png" for i in range(20)]
    pixels = ArrayPixels(np.zeros((20, 8, 8, 1), np.uint8), None, 8)
    return Split(names, names, labels, has_masks=False, pixels=pixels)


def write(folder, split, scores):
    folder.mkdir()
    write_predictions(folder / "predictions.csv", split, scores, np.ones(len(split)), {})
    return folder


def test_summary():
    reports = [{"metrics": {"a": a, f"only_{i}": 1.0}, "provenance": i} for i, a in enumerate((0.5, 0.7, 0.9))]
    found = summarise(reports)
    assert found["metrics"] == {"a": pytest.approx(0.7)}
    assert found["std"] == {"a": pytest.approx(0.2)}
    assert found["values"] == {"a": [0.5, 0.7, 0.9]}
    assert found["provenance"] == [0, 1, 2]


def test_the_ensemble_is_the_mean_score(tmp_path, split):
    rng = np.random.default_rng(0)
    scores = split.labels + rng.normal(size=(3, 20))
    folders = [write(tmp_path / f"seed_{i}", split, s) for i, s in enumerate(scores)]
    found = ensemble("lungs", split, folders, num_resamples=200)
    mean = scores.mean(0)
    assert found["metrics"]["test/lungs/ensemble/image_auroc"] == pytest.approx(roc_auc_score(split.labels, mean))
    assert found["metrics"]["test/lungs/ensemble/image_ap"] == pytest.approx(
        average_precision_score(split.labels, mean)
    )
    low, high = found["intervals"]["test/lungs/ensemble/image_auroc"]
    assert low < found["metrics"]["test/lungs/ensemble/image_auroc"] < high
    np.testing.assert_allclose(read_scores(folders[1] / "predictions.csv", split.names), scores[1], rtol=1e-5)


def test_no_resamples_no_intervals(tmp_path, split):
    folder = write(tmp_path / "seed_0", split, np.arange(len(split.names), dtype=float))
    found = ensemble("lungs", split, [folder], num_resamples=0)
    assert found["intervals"] == {}
    assert "test/lungs/ensemble/image_auroc" in found["metrics"]


def test_no_intervals_where_a_class_is_one_patient(tmp_path, split, caplog):
    folder = write(tmp_path / "seed_0", split, np.arange(len(split.names), dtype=float))
    one = dataclasses.replace(split, groups=split.names[:10] + ["patient"] * 10)
    assert ensemble("lungs", one, [folder], num_resamples=10)["intervals"] == {}
    assert [message[:23] for message in caplog.messages] == ["no confidence intervals"]


def test_one_class_has_no_ensemble_metrics(tmp_path, split):
    normals = split.take(np.arange(10))
    assert ensemble("lungs", normals, [tmp_path], 10) == {"metrics": {}, "intervals": {}}


def test_predictions_of_other_images_are_refused(tmp_path, split):
    folder = write(tmp_path / "seed_0", split.take(np.arange(5, 15)), np.zeros(10))
    with pytest.raises(ValueError, match=r"seed_0/predictions.csv: expected scores of the 20 test images.*found 10"):
        ensemble("lungs", split, [folder], 10)


def test_the_data_are_loaded_once_for_all_seeds(tiny_config, tmp_path, monkeypatch):
    config, used, loaded = tiny_config(), {}, []
    config.num_seeds = 2
    load, report = run.load_dataset, {"metrics": {}, "intervals": {}}
    monkeypatch.setattr(run, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(run, "load_dataset", lambda *args, **kwargs: loaded.append(load(*args, **kwargs)) or loaded[-1])
    monkeypatch.setattr(run, "train", lambda system, data, folder: used.update({system.config.seed: data}))
    monkeypatch.setattr(run.evaluation, "evaluate", lambda *args: report)
    monkeypatch.setattr(run, "_report_seeds", lambda config, data, *args: used.update(all=data))
    run.train_and_evaluate(config, tmp_path)
    assert len(loaded) == 1
    assert list(used) == [0, 1, "all"]
    assert all(data is loaded[0] for data in used.values())
