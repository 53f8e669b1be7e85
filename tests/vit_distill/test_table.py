"""The ablation table: its order of work, what is run again and what is not, its sums, and a small one end to end."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs.vit_distill.table import get_config
from core.loop import NonFiniteLossError
from core.vit import VisionTransformer, VitConfig
from input_pipeline.classification import load_labelled
from vit_distill import table, table_bench, table_summary, tune
from vit_distill.preprocessing import Preprocessing
from vit_distill.probe import score_metrics
from vit_distill.table import Group, build_groups, cell_config
from vit_distill.table_summary import markdown, summarise, verdicts
from vit_distill.teacher import LoadReport, Teacher
from vit_distill.tune import walk

NANO = VitConfig(depth=4, width=16, num_heads=2, mlp_dim=32, patch_size=8, image_size=16)


def make_teacher(sha256: str = "a" * 64, config: VitConfig = NANO) -> Teacher:
    params = VisionTransformer(config).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    report = LoadReport(("all",), (), (), (), sha256, "random")
    return Teacher("nano", config, params, Preprocessing(16, (0.5,) * 3, (0.5,) * 3), {}, report)


def small_config(**fields) -> Any:
    config = get_config()
    config.teacher.checkpoint = "nano"
    config.data.kind = "digits"
    config.lora.rank = 2
    config.train.update(batch_size=8, num_steps=2)
    config.table.update(ratios=(0.02,), reductions=(2,), num_seeds=2, held_out=32, learning_rates=(0.001, 0.01, 0.1))
    config.table.probe.update(kind="knn", per_class=4, batch_size=64)
    config.table.update(fields)
    return config


def cell(row: str, accuracy: float, ratio: float | None = 0.01, reduction: int = 2, seed: int = 0, **fields) -> dict:
    defaults = dict(
        title=f"<{row}>", l1=2.0, cls_l1=None, loss=2.0, seconds=1.0, params=1e6, gflops=0.1, num_trained=1e5,
        step_gflops=3.0, blocks=[0, 2], learning_rate=0.01, at_grid_edge=False, metric="top1", num_test=1_000_000,
        num_effective=1e6, probe={"at_grid_edge": 0.0},
    )  # fmt: skip
    defaults["valid_accuracy"] = accuracy
    return dict(row=row, accuracy=accuracy, ratio=ratio, reduction=reduction, seed=seed) | defaults | fields


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


@pytest.mark.parametrize(
    ("losses", "best", "tried"),
    [
        ([5, 3, 1, 2, 4], 2, {1, 2, 3}),
        ([1, 2, 3, 4, 5], 0, {0, 1, 2, 3}),
        ([5, 4, 3, 2, math.inf], 3, {1, 2, 3, 4}),
        ([1], 0, {0}),
        ([1, 1, 1], 0, {0, 1, 2}),
    ],
)
def test_the_walk_finds_the_valley(losses: list, best: int, tried: set):
    asked = set()
    grid = [10.0**i for i in range(len(losses))]

    def loss_of(rate: float) -> float:
        asked.add(grid.index(rate))
        return losses[grid.index(rate)]

    assert walk(grid, loss_of) == grid[best]
    assert asked == tried


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


def test_means_and_deviations():
    cells = [cell("copy", 0.3, None), *(cell("full", a, seed=i, l1=a) for i, a in enumerate((0.40, 0.42, 0.47)))]
    copy, full = summarise(cells)
    assert (copy["n"], copy["accuracy"], copy["accuracy_std"]) == (1, 0.3, None)
    assert full["n"] == 3
    assert full["accuracy"] == full["l1"] == pytest.approx(0.43)
    assert full["accuracy_std"] == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))
    assert full["cls_l1"] is None
    assert full["title"] == "<full>"
    for edge in (0.0, 1.0):  # of one seed's probe
        (row,) = summarise([cell("full", 0.4), cell("full", 0.4, seed=1, probe={"at_grid_edge": edge})])
        assert row["probe_at_grid_edge"] is (edge == 1.0)


def test_verdicts_on_the_papers_ordering():
    cells = [cell("copy", 0.30, None), cell("scratch", 0.32), cell("enhanced", 0.40), cell("full", 0.405)]
    cells += [cell("plain", 0.25, 0.1), cell("enhanced", 0.5, 0.1)]
    found = {(v["claim"], v["where"]): v["verdict"] for v in verdicts(summarise(cells))}
    assert found == {
        ("enhanced > full", "1 %, r=2"): "tie",
        ("full > copy", "1 %, r=2"): "holds",
        ("copy > scratch", "1 %, r=2"): "reversed",
        ("enhanced > scratch", "1 %, r=2"): "holds",
        ("enhanced > plain", "10 %, r=2"): "holds",
    }
    # Widely scattered seeds: 5 points are no difference then (two standard errors are 0.11).
    means = (("enhanced", 0.45), ("plain", 0.4))
    cells = [cell(row, mean + d, seed=i) for row, mean in means for i, d in enumerate((-0.1, 0, 0.1))]
    (verdict,) = verdicts(summarise(cells))
    assert verdict["verdict"] == "tie"
    assert verdict["margin"] == pytest.approx(2 * math.sqrt(2 * 0.1**2 / 3 + (0.45 * 0.55 + 0.4 * 0.6) / 1e6))


@pytest.mark.parametrize(
    ("metric", "effective", "verdict", "said"),
    [
        ("top1", 133.0, "tie", "133 test images;"),
        ("auc", 13.0, "tie", "133 "),
        ("mean_auc", None, "holds", "a mean AUC"),
        ("miou", None, "holds", "a mean IoU"),
    ],
)
def test_few_test_images_decide_nothing(metric: str, effective: float | None, verdict: str, said: str):
    """At 133 images the difference of two accuracies has a standard error of four points."""
    fields = dict(num_test=133, num_effective=effective, metric=metric)
    rows = summarise([cell(row, a, **fields) for row, a in (("enhanced", 0.75), ("plain", 0.70))])
    (found,) = verdicts(rows)
    assert (found["verdict"], found["num_seeds"]) == (verdict, 1)
    if effective:
        assert found["margin"] == pytest.approx(2 * math.sqrt((0.75 * 0.25 + 0.7 * 0.3) / effective))
    text = markdown("Students", {}, rows, metric)
    assert said in text
    assert "with one seed what seeds change is unknown." in text


def test_markdown():
    rows = summarise([cell("copy", 0.3, None, learning_rate=None), cell("full", 0.42), cell("full", 0.44, seed=1)])
    text = markdown("Students", {"teacher": "nano"}, rows, "top1")
    assert "- teacher: nano\n" in text
    assert "| Row | Images | r | top1 | valid | L1 |" in text
    assert "| <full> | 1 % | 2 | 0.4300 ± 0.0141 | 0.4300 | 2.000 ± 0.000 | 0.10 M | 1.00 M | 0.1 | 0.01 | 2 |" in text
    assert "| full > copy | 1 %, r=2 | +0.1300 |" in text
    lengths = {line.count("|") for line in text.splitlines() if line.startswith(("| Row", "| <"))}
    assert lengths == {12}


def test_held_out_loss_against_plain_code():
    """Mean absolute difference of the last blocks' tokens over all held-out images, of the untrained copy."""
    config = small_config()
    teacher = make_teacher()
    images = np.asarray(jax.random.normal(jax.random.key(3), (64, 16, 16, 3)))
    bench = table_bench.Bench(config, teacher, {}, images, "", (), Path("nowhere"))
    student = table_bench.train_student(bench, cell_config(config, Group("copy", None, 2)), None)
    assert student.distiller.blocks == (0, 2)
    found = table_bench.held_out_metrics(bench, student)
    tokens = VisionTransformer(NANO).apply({"params": teacher.params}, images).blocks[-1]
    small = {key: value for key, value in teacher.params.items() if key not in ("block_01", "block_02", "block_03")}
    small["block_01"] = teacher.params["block_02"]
    copied = VisionTransformer(dataclasses.replace(NANO, depth=2)).apply({"params": small}, images).blocks[-1]
    difference = np.abs(np.asarray(tokens - copied))
    assert found["loss"] == found["l1"] == pytest.approx(difference.mean(), rel=1e-5)
    assert found["cls_l1"] == pytest.approx(difference[:, 0].mean(), rel=1e-5)
    assert list(bench.targets) == [("pre_norm", (3,))]


def test_rows_of_either_target_are_measured_alike():
    """Before the norm, whatever is trained; the loss, which chooses the rate, is of what is trained."""
    teacher = make_teacher()
    images = np.asarray(jax.random.normal(jax.random.key(3), (32, 16, 16, 3)))
    found = {}
    for row in ("enhanced", "post", "cls"):
        config = cell_config(small_config(), Group(row, 0.02, 2))
        bench = table_bench.Bench(config, teacher, {}, images, "", (), Path("nowhere"))
        distiller = table_bench.build_distiller(config, teacher)
        start = table_bench.Trained(distiller, distiller.init_trainable(jax.random.key(0)), 0.0)
        found[row] = table_bench.held_out_metrics(bench, start)
    assert found["post"]["l1"] == found["enhanced"]["l1"] == found["enhanced"]["loss"]
    assert found["post"]["loss"] != pytest.approx(found["post"]["l1"], rel=1e-3)
    half = 0.5 * (found["enhanced"]["l1"] + found["enhanced"]["cls_l1"])
    assert found["cls"]["loss"] == pytest.approx(half, rel=1e-5)


def test_a_row_with_a_warm_start_begins_nearer(monkeypatch: pytest.MonkeyPatch):
    """The table trains a row from the closed-form start where its config says so; no update is made here."""
    teacher = make_teacher()
    few = load_labelled(small_config().data, "train", 16, "bilinear").take(np.arange(32))
    monkeypatch.setattr("vit_distill.train.train_loop", lambda state, *args, **kwargs: state)
    images = np.asarray(teacher.preprocessing.evaluate(jnp.asarray(few.images(np.arange(32)))))
    loss = {}
    for row in ("enhanced", "warm"):
        config = cell_config(small_config(), Group(row, 0.02, 2))
        config.lora.rank = 12
        bench = table_bench.Bench(config, teacher, {0.02: few}, images, "", (), Path("nowhere"))
        loss[row] = table_bench.held_out_metrics(bench, table_bench.train_student(bench, config, 0.02))["loss"]
    assert loss["warm"] < 0.8 * loss["enhanced"]


@pytest.mark.parametrize(
    ("labels", "begun_with", "metric", "effective"),
    [
        ([0] * 30 + [1] * 10, "", "auc", 10.0),
        ([0] * 30 + [1] * 10, "top1", "top1", 40.0),
        ([0] * 30 + [1] * 5 + [2] * 5, "", "balanced_accuracy", 9 / (1 / 30 + 2 / 5)),
        ([0, 1, 2, 3] * 10, "", "balanced_accuracy", 40.0),
        ([[0, 1]] * 20 + [[1, 0]] * 20, "", "mean_auc", None),
    ],
)
def test_rows_are_compared_by_what_sees_rare_classes(labels: list, begun_with: str, metric: str, effective: float):
    labels = np.asarray(labels)
    images = SimpleNamespace(labels=labels, classes=tuple(map(str, range(labels.max() + 1))))
    bench = table_bench.Bench(small_config(), None, {}, None, "", (images,) * 3, Path("nowhere"), begun_with=begun_with)
    assert bench.metric == metric
    assert bench.num_effective == (effective and pytest.approx(effective))


def test_the_chance_of_a_test_split_is_not_underrated():
    """Simulated: 30 images of one class and 10 of the other; the deviation of AUC and balanced accuracy."""
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], [30, 10])
    images = SimpleNamespace(labels=labels, classes=("no", "yes"))
    found = []
    for _ in range(500):
        score = rng.normal(size=40) + 1.2 * labels - 0.6
        found.append(score_metrics(np.stack([0 * score, score], 1), labels, ("no", "yes")))
    for metric in ("auc", "balanced_accuracy"):
        values = [each[metric] for each in found]
        bench = table_bench.Bench(small_config(), None, {}, None, "", (images,) * 3, Path("nowhere"), begun_with=metric)
        error = math.sqrt(np.mean(values) * (1 - np.mean(values)) / bench.num_effective)
        assert 0.95 * np.std(values) < error < 1.8 * np.std(values)


@pytest.mark.parametrize("held_out", [0, 33, 100_000])
def test_held_out_images_that_cannot_be(held_out: int, tmp_path: Path):
    with pytest.raises(ValueError, match=f"table.held_out={held_out}"):
        table_bench.load_bench(small_config(held_out=held_out), make_teacher(), tmp_path)


def test_students_can_be_probed_on_another_set_than_they_are_distilled_on(tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(80):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(photos / f"{i:02d}.png")
    config = small_config(ratios=(0.5,))
    config.data.update(kind="folder", name="photos", root=str(photos), valid_fraction=0.4)
    config.table.probe_data.update(kind="folder", root=str(photos))
    with pytest.raises(ValueError, match=r"table\.probe_data: photos has images without labels"):
        table_bench.load_bench(config, make_teacher(), tmp_path)
    config.table.probe_data.update(kind="digits", root="")
    bench = table_bench.load_bench(config, make_teacher(), tmp_path)
    assert (bench.few_shot[0.5].name, len(bench.few_shot[0.5]), len(bench.held_out)) == ("photos", 24, 32)
    digits = small_config()
    digits.data.valid_fraction = 0.4  # what probe_data does not name is that of data
    for found, split in zip(bench.probe_sets[1:], ("valid", "test"), strict=True):
        assert found.names == load_labelled(digits.data, split, 16, "bilinear").names
    facts = table_summary.shared_facts(bench)
    assert facts["images to distil on"].startswith("photos, 50 % = 24")
    assert "digits, 40 train" in facts["probe"]
    assert config.data.kind == "folder"

    config.data.groups = r"(\d+)\.png"
    with pytest.raises(ValueError, match=r"data\.groups: expected auto or image for data\.kind 'digits'"):
        table_bench.load_bench(config, make_teacher(), tmp_path)
    config.table.probe_data.groups = "auto"
    names = table_bench.load_bench(config, make_teacher(), tmp_path).probe_sets[2].names
    assert names == bench.probe_sets[2].names

    config.table.probe_data.update(kind="", root="somewhere")
    with pytest.raises(ValueError, match=r"table\.probe_data: expected a kind"):
        table_bench.load_bench(config, make_teacher(), tmp_path)


def test_images_without_labels_make_a_table_without_a_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(photos / f"{i:02d}.png")
    teacher = make_teacher(config=dataclasses.replace(NANO, depth=2))
    monkeypatch.setattr(table, "load_teacher_of", lambda config: teacher)
    rows = ("teacher", "copy", "enhanced", "full")
    config = small_config(rows=rows, ratios=(1.0,), num_seeds=1, learning_rates=(0.001, 0.01), held_out=6)
    config.data.update(kind="folder", name="photos", root=str(photos), valid_fraction=0.25)
    config.train.cached_views = 1
    found = {row["row"]: row for row in table.run_table(config, tmp_path / "w")}
    assert "photos has no labels: students are compared by held-out features" in capsys.readouterr().out
    assert found["full"]["l1"] < found["copy"]["l1"]
    assert found["full"]["learning_rate"] in (0.001, 0.01)
    assert {(row["metric"], row["accuracy"]) for row in found.values()} == {("", None)}
    text = (tmp_path / "w" / "table.md").read_text()
    assert "| Row | Images | r | cls L1 | L1 | Trained |" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {11}
    assert "Row against row" not in text
    assert "Distance against cost" in (tmp_path / "w" / "report.html").read_text()
    assert list(table.run_table(config, tmp_path / "w")) == list(found.values())


def test_students_are_compared_by_the_classes_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A bright square on a dark ground: what a patch token shows, a head that saw it says."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 24), ("valid", 8), ("test", 8)):
        for folder in ("images", "masks"):
            (tmp_path / "set" / split / folder).mkdir(parents=True)
        for i in range(number):
            mask = np.kron(rng.integers(0, 2, (2, 2)), np.ones((8, 8))).astype(np.uint8)
            noisy = np.clip(200 * mask + rng.integers(0, 40, (16, 16)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(tmp_path / "set" / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(tmp_path / "set" / split / "masks" / f"{i}.png")
    teacher = make_teacher(config=dataclasses.replace(NANO, depth=2))
    monkeypatch.setattr(table, "load_teacher_of", lambda config: teacher)
    rows = ("teacher", "copy", "enhanced")
    config = small_config(rows=rows, ratios=(1.0,), num_seeds=1, learning_rates=(0.01,), held_out=8)
    config.data.update(kind="segmentation", name="squares", root=str(tmp_path / "set"))
    config.table.probe.update(kind="segment", per_class=20, batch_size=8)
    config.table.probe.segment.update(num_steps=100, warmup_steps=5, learning_rates=(0.03,))
    found = {row["row"]: row for row in table.run_table(config, tmp_path / "w")}
    assert {row["metric"] for row in found.values()} == {"miou"}
    assert found["teacher"]["accuracy"] > 0.9  # 0.25 or less where all is called one class
    assert all(0 < row["accuracy"] <= 1 for row in found.values())
    text = (tmp_path / "w" / "table.md").read_text()
    assert "| Row | Images | r | miou | valid | L1 |" in text
    assert "segment on the patch tokens after the final norm, squares, 20 train, 8 valid, 8 test images" in text
    config.table.probe.kind = "logistic"
    table.run_table(config, tmp_path / "unprobed")
    assert "| Row | Images | r | cls L1 | L1 |" in (tmp_path / "unprobed" / "table.md").read_text()
    config.table.probe.kind = "segments"
    with pytest.raises(ValueError, match=r"table\.probe\.kind: expected one of .*'segment'\), found 'segments'"):
        table_bench.load_bench(config, teacher, tmp_path)
    digits = small_config()
    digits.table.probe.kind = "segment"
    with pytest.raises(ValueError, match="digits has no masks in train, valid, test"):
        table_bench.load_bench(digits, teacher, tmp_path)


@pytest.mark.parametrize(
    ("kind", "field", "hyper_parameter"),
    [("knn", "neighbours", "neighbours"), ("linear", "learning_rates", "learning_rate"), ("logistic", "c_values", "c")],
)
def test_the_settings_of_every_kind_of_probe_are_the_config_s(kind: str, field: str, hyper_parameter: str):
    config, teacher = small_config(), make_teacher()
    sets = (load_labelled(config.data, split, 16, "bilinear") for split in ("train", "valid", "test"))
    sets = tuple(images.take(np.arange(40)) for images in sets)
    config.table.probe.update({"kind": kind, field: (2,), "epochs": 1, "warmup_epochs": 0, "linear_batch_size": 20})
    bench = table_bench.Bench(config, teacher, {}, None, "", sets, Path("nowhere"))
    found = table_bench.probe_model(bench, teacher.config, teacher.params)
    assert found[hyper_parameter] == 2


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
