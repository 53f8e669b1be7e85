"""What a row of the table trains, and what it is measured by: held-out features and probes."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tables import NANO, make_teacher, small_config

from core.vit import VisionTransformer
from input_pipeline.classification import load_labelled
from vit_distill import table, table_bench, table_summary
from vit_distill.probe import score_metrics
from vit_distill.table import Group, cell_config


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
    # What is probed has to fit into memory, not what there is: 36 images take 6.0e-5 GiB, 40 take 6.7e-5.
    config.data.memory_limit_gb = 6.3e-5
    table_bench.load_bench(config, teacher, tmp_path)
    config.table.probe.per_class = 0
    with pytest.raises(ValueError, match=r"data\.memory_limit_gb is 6.3e-05"):
        table_bench.load_bench(config, teacher, tmp_path)
    config.data.memory_limit_gb = 8.0
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
