"""Mean and deviation of several seeds, and their folders; the ensemble itself is in test_infer.py and test_main.py."""

import pytest

from mtl_moe import run
from mtl_moe.seeds import seed_folders, summarise


def test_summary():
    reports = [{"metrics": {"a": a, f"only_{i}": 1.0}, "provenance": i} for i, a in enumerate((0.5, 0.7, 0.9))]
    found = summarise(reports)
    assert found["metrics"] == {"a": pytest.approx(0.7)}
    assert found["std"] == {"a": pytest.approx(0.2)}
    assert found["values"] == {"a": [0.5, 0.7, 0.9]}
    assert found["provenance"] == [0, 1, 2]


def test_a_seed_is_its_own_folder_and_an_ensemble_its_neighbours(tiny_config, tmp_path):
    config = tiny_config()
    assert seed_folders(config, tmp_path / "w") == [tmp_path / "w"]
    config.update(seed=3, num_seeds=2)
    assert seed_folders(config, tmp_path / "w" / "ensemble") == [tmp_path / "w" / "seed_3", tmp_path / "w" / "seed_4"]


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
