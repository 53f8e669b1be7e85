"""The ablation table: its order of work, what is run again and what is not, and a small one end to end."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tables import NANO, make_teacher, small_config

from configs.vit_distill.table import get_config
from core.loop import NonFiniteLossError
from input_pipeline.classification import load_labelled
from vit_distill import table, table_bench, table_summary, tune
from vit_distill.table import Group, build_groups, cell_config


def test_the_default_config_makes_every_row():
    groups = build_groups(get_config().table)
    assert groups[:3] == [Group("teacher", None, 1), Group("copy", None, 2), Group("copy", None, 3)]
    assert len(groups) == 3 + 2 * 2 * 6
    assert len({group.name for group in groups}) == len(groups)
    assert {group.row for group in groups} <= set(table.ROWS)
    assert {row for pair in table_summary.CLAIMS + table_summary.QUESTIONS for row in pair} < set(table.ROWS)


def test_a_row_changes_its_method_and_nothing_else():
    config = small_config()
    plain = cell_config(config, Group("plain", 0.02, 4), seed=3, learning_rate=0.5)
    assert (plain.lora.preset, plain.student.reduction, plain.seed, plain.optim.learning_rate) == ("plain", 4, 3, 0.5)
    assert cell_config(config, Group("dora", 0.02, 2)).lora.dora
    assert cell_config(config, Group("truncate", 0.02, 2)).student.blocks == "truncate"
    changed = {key for key, value in plain.to_dict().items() if value != config.to_dict()[key]}
    assert changed == {"seed", "student", "lora", "optim"}
    assert not config.lora.dora
    assert config.seed == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rows=("copy", "magic")), "table.rows.*'magic'"),
        (dict(rows=()), "table.rows"),
        (dict(learning_rates=(0.1, 0.01)), "ascending rates"),
        (dict(learning_rates=()), "ascending rates"),
        (dict(num_seeds=0), "num_seeds"),
    ],
)
def test_fields_that_do_not_fit(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build_groups(small_config(**fields).table)


class Fakes:
    """Stands for training and probing: the held-out loss is a valley over learning rates, smallest at `best`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, best: float = 0.01, diverges: tuple[float, ...] = ()):
        self.best, self.diverges, self.trained, self.probed = best, diverges, [], 0
        self.teacher, self.hashes = make_teacher(), {"few_shot": "few", "held_out": "h"}
        monkeypatch.setattr(table, "load_teacher_of", lambda config: self.teacher)
        monkeypatch.setattr(table, "load_bench", self.bench)
        for module in (table, tune):
            monkeypatch.setattr(module, "train_student", self.train)
            monkeypatch.setattr(module, "held_out_metrics", self.metrics)
        monkeypatch.setattr(table, "probe_model", self.probe)

    def bench(self, config, teacher, workdir):
        images = type(
            "Images", (), {"manifest_hash": lambda self: "few", "__len__": lambda self: 9, "name": "digits"}
        )()
        return SimpleNamespace(
            config=config, teacher=teacher, few_shot=dict.fromkeys(config.table.ratios, images), metric="top1",
            held_out=range(32), probe_sets=(images,) * 3, num_test=9, num_effective=9.0,
            data_hashes=lambda ratio: self.hashes,
        )  # fmt: skip

    def train(self, bench, config, ratio):
        rate = config.optim.learning_rate
        self.trained.append((config.student.method, rate, config.seed, config.train.num_steps))
        if rate in self.diverges and config.student.method != "copy":
            raise NonFiniteLossError("step 1: loss not finite")
        distiller = SimpleNamespace(blocks=(0, 2), student_config=NANO)
        return SimpleNamespace(distiller=distiller, params=None, seconds=1.0, rate=rate)

    def metrics(self, bench, student):
        return {"loss": 1 + abs(math.log10(student.rate / self.best)), "l1": 1.0, "patch_l1": 1.0, "cls_l1": 1.0}

    def probe(self, bench, config, params):
        self.probed += 1
        return {"top1": 0.5, "valid_top1": 0.4, "at_grid_edge": 1.0}


def test_what_is_run_and_what_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fakes = Fakes(monkeypatch)
    config = small_config(rows=("teacher", "copy", "enhanced"))
    rows = table.run_table(config, tmp_path)
    # Three rates for seed 0, whose best is the first cell; then seed 1 with the best.
    lora = [("lora", 0.001, 0, 2), ("lora", 0.01, 0, 2), ("lora", 0.1, 0, 2), ("lora", 0.01, 1, 2)]
    assert fakes.trained == [("copy", 0.001, 0, 2), *lora]
    assert fakes.probed == 4
    assert [(row["row"], row["n"], row["learning_rate"]) for row in rows] == [
        ("teacher", 1, None), ("copy", 1, None), ("enhanced", 2, 0.01)
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} >= {"table.md", "table.json", "table.png", "report.html"}

    fakes.trained.clear()
    assert table.run_table(config, tmp_path) == rows
    assert fakes.trained == []
    # A lost cell of the first seed is trained again with the rate that was found.
    (tmp_path / "cells" / "enhanced_r2_ratio0.02_seed0.json").unlink()
    config.table.num_seeds = 3
    assert table.run_table(config, tmp_path)[-1]["n"] == 3
    assert fakes.trained == [("lora", 0.01, 0, 2), ("lora", 0.01, 2, 2)]


def test_a_wider_grid_replaces_the_cells_of_its_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    fakes = Fakes(monkeypatch, best=1.0)
    config = small_config(rows=("enhanced",), num_seeds=1)
    (row,) = table.run_table(config, tmp_path)
    assert (row["learning_rate"], row["at_grid_edge"]) == (0.1, True)
    assert "at the edge of table.learning_rates" in capsys.readouterr().out
    text = (tmp_path / "table.md").read_text()
    assert "0.1*" in text
    assert "| 0.5000† |" in text
    assert "† a probe's hyper-parameter at the edge of its grid" in text
    assert "0.5000†" in (tmp_path / "report.html").read_text()
    fakes.trained.clear()
    config.table.learning_rates = (0.001, 0.01, 0.1, 1.0, 10.0)
    (row,) = table.run_table(config, tmp_path)
    assert (row["learning_rate"], row["at_grid_edge"]) == (1.0, False)
    assert [rate for _, rate, *_ in fakes.trained] == [1.0, 10.0]


def test_shorter_tuning_and_rates_that_diverge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    fakes = Fakes(monkeypatch, best=0.1, diverges=(0.1,))
    config = small_config(rows=("full",), num_seeds=1, tune_steps=1)
    (row,) = table.run_table(config, tmp_path)
    assert row["learning_rate"] == 0.01
    assert "0.1 does not train: step 1" in capsys.readouterr().out
    assert fakes.trained[-1] == ("full", 0.01, 0, 2)  # anew, with the table's number of updates
    assert {steps for *_, steps in fakes.trained[:-1]} == {1}
    # The rate that diverged is remembered.
    fakes.trained.clear()
    table.run_table(config, tmp_path)
    assert fakes.trained == []
    with pytest.raises(ValueError, match=r"no rate of table\.learning_rates"):
        table.run_table(small_config(rows=("plain",), learning_rates=(0.1,), tune_steps=1), tmp_path / "other")


def test_what_does_not_fit_the_work_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fakes = Fakes(monkeypatch)
    table.run_table(small_config(rows=("copy",)), tmp_path)
    config = small_config(rows=("copy",))
    config.train.num_steps = 5
    with pytest.raises(ValueError, match=r"another config.*\n.*train.num_steps"):
        table.run_table(config, tmp_path)
    fakes.teacher = make_teacher("b" * 64)
    with pytest.raises(ValueError, match=r"another teacher \(sha256 aaaaaaaaaaaa"):
        table.run_table(small_config(rows=("copy",)), tmp_path)


def test_cells_of_other_images_are_refused_and_older_ones_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fakes = Fakes(monkeypatch)
    config = small_config(rows=("copy",))
    rows = table.run_table(config, tmp_path)
    fakes.hashes = fakes.hashes | {"held_out": "others"}
    with pytest.raises(ValueError, match=r"copy_r2_seed0\.json was made of other images \(held_out\)"):
        table.run_table(config, tmp_path)
    path = tmp_path / "cells" / "copy_r2_seed0.json"
    older = json.loads(path.read_text())
    del older["data"], older["num_test"], older["num_effective"]
    path.write_text(json.dumps(older))
    fakes.trained.clear()
    assert table.run_table(config, tmp_path) == rows
    assert fakes.trained == []


def test_a_teacher_of_odd_depth_has_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fakes = Fakes(monkeypatch)
    fakes.teacher = make_teacher(config=dataclasses.replace(NANO, depth=3))
    rows = table.run_table(small_config(rows=("teacher", "copy"), reductions=(3,)), tmp_path)
    assert [(row["row"], row["reduction"]) for row in rows] == [("teacher", 1), ("copy", 3)]


def test_calibrated_blocks_see_all_classes(monkeypatch: pytest.MonkeyPatch):
    """Images are sorted by class: the first ones would be of one class."""
    few = load_labelled(small_config().data, "train", 16, "bilinear").take(np.arange(40))
    seen = []
    monkeypatch.setattr(
        table_bench,
        "build_distiller",
        lambda config, teacher, sample: seen.append(sample) or SimpleNamespace(blocks=(0,)),
    )
    config = cell_config(small_config(), Group("calibrated", 0.02, 2))
    config.calibration.num_images = 4
    bench = table_bench.Bench(config, None, {0.02: few}, None, "", (), Path("nowhere"))
    assert table_bench._calibrated(bench, config, 0.02) == (0,)
    np.testing.assert_array_equal(seen[0], few.images(np.array([0, 13, 26, 39])))


def test_impossible_fields_fail_before_anything_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fakes = Fakes(monkeypatch)
    config = small_config(rows=("copy", "enhanced"))
    config.lora.rank = 99
    with pytest.raises(ValueError, match=r"rank of query.*99"):
        table.run_table(config, tmp_path / "run")
    with pytest.raises(ValueError, match="reduction 3 does not divide"):
        table.run_table(small_config(rows=("copy",), reductions=(2, 3)), tmp_path / "run")
    config = small_config(rows=("copy",), reductions=(2, 4))
    config.student.blocks = "0,2"
    with pytest.raises(ValueError, match=r"keeps 2 of 4 blocks, which is not r=4"):
        table.run_table(config, tmp_path / "run")
    assert fakes.trained == []
    assert not (tmp_path / "run").exists()


def test_a_work_directory_of_a_table_with_fields_that_did_nothing_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Fakes(monkeypatch)
    config = small_config(rows=("copy",))
    assert "per_class" not in config.few_shot
    older = config.copy_and_resolve_references()
    older.few_shot = dict(ratio=1.0, per_class=0, seed=0, manifest="")
    older.data.split, older.lora.truncate_to = "train", 0
    table.save_config(older, tmp_path)
    assert table.run_table(config, tmp_path)


def test_a_small_table_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    teacher = make_teacher(config=dataclasses.replace(NANO, depth=2))
    monkeypatch.setattr(table, "load_teacher_of", lambda config: teacher)
    config = small_config(rows=("teacher", "copy", "enhanced"), num_seeds=1, learning_rates=(0.01,))
    config.train.cached_views = 1
    rows = {row["row"]: row for row in table.run_table(config, tmp_path)}
    assert rows["enhanced"]["loss"] < rows["copy"]["loss"]
    assert rows["teacher"]["l1"] is None
    assert all(0 < row["accuracy"] <= 1 for row in rows.values())
    assert rows["enhanced"]["num_trained"] == 2 * (4 * 32 + 2 * 48)
    assert len(list((tmp_path / "teacher_features").glob("*.npy"))) == 1
    stored = json.loads((tmp_path / "table.json").read_text())
    assert stored["metric"] == "balanced_accuracy"
    assert [row["row"] for row in stored["rows"]] == ["teacher", "copy", "enhanced"]
    assert stored["cells"][2]["num_images"] > 10
    few, held, *probed = stored["cells"][2]["data"].values()
    assert few == stored["cells"][2]["manifest_hash"]
    assert stored["cells"][1]["data"] == stored["cells"][2]["data"] | {"few_shot": None}
    assert len({few, held, *probed}) == 5
    assert "digits" in (tmp_path / "table.md").read_text()
    html = (tmp_path / "report.html").read_text()
    assert "copy + enhanced LoRA" in html
    # A table that an earlier version began compares top1, and goes on so: without what its cells do not know.
    for path in (tmp_path / "cells").glob("*_seed*.json"):
        older = json.loads(path.read_text())
        found = older["probe"]
        older |= {"metric": "top1", "accuracy": found["top1"], "valid_accuracy": found["valid_top1"]}
        older["probe"] = {key: found[key] for key in ("top1", "valid_top1", "at_grid_edge")}
        del older["num_effective"]
        path.write_text(json.dumps(older))
    (tmp_path / "cells" / "copy_r2_seed0.json").unlink()
    again = {row["row"]: row for row in table.run_table(config, tmp_path)}
    assert {row["metric"] for row in again.values()} == {"top1"}
    assert {row["num_effective"] for row in again.values()} == {float(rows["copy"]["num_test"])}
    assert "| Row | Images | r | top1 | valid |" in (tmp_path / "table.md").read_text()
