"""The command as a user runs it: distil from a teacher's folder, look at what is there, restore, evaluate, refuse."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import workdir as saved
from configs.vit_distill import distill, probe, segment, table
from configs.vit_distill import teacher as teacher_config
from core.checkpoint import CheckpointError
from core.mesh import make_mesh
from core.sampling import even_rows
from core.tree import paths
from core.vit import VisionTransformer, VitConfig
from core.workdir import check_config
from input_pipeline.classification import load_labelled
from vit_distill import run
from vit_distill.formats.timm import OWN_SECTION, write_timm_folder
from vit_distill.images import few_shot_images, held_out_images
from vit_distill.model_card import model_card
from vit_distill.preprocessing import Preprocessing
from vit_distill.student_io import FREE_FIELDS, load_student
from vit_distill.teacher import load_teacher_of

CONFIG = VitConfig(depth=4, width=16, num_heads=2, mlp_dim=32, patch_size=4, image_size=8)


def write_teacher(folder: Path, seed: int) -> None:
    params = VisionTransformer(CONFIG).init(jax.random.key(seed), jnp.zeros((1, 8, 8, 3)))["params"]
    write_timm_folder(folder, CONFIG, params, Preprocessing(8, (0.5,) * 3, (0.25,) * 3, "bilinear", 0.8))


@pytest.fixture(autouse=True, scope="module")
def one_device() -> Iterator[None]:
    """Compiling for eight devices takes several times as long, and test_train.py has a test about them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vit_distill.distill.make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    write_teacher(folder, 0)
    return folder


def make_config(teacher: Path) -> ConfigDict:
    config = distill.get_config()
    config.teacher.checkpoint = str(teacher)
    config.data.update(kind="digits", name="digits")
    config.few_shot.per_class = 2
    config.calibration.num_images = 8
    config.lora.rank = 2
    config.train.update(batch_size=8, num_steps=2, log_every=1, save_every=1, tensorboard=False)
    return config


@pytest.fixture(scope="module")
def workdir(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a warm start on calibrated blocks."""
    folder = tmp_path_factory.mktemp("run") / "w"
    config = make_config(teacher)
    config.student.blocks = "calibrated"
    config.lora.warm_start = True
    run.train_and_evaluate(config, folder)
    return folder


def test_a_run_leaves_everything_that_is_promised(workdir: Path):
    names = {path.name for path in workdir.iterdir()}
    files = {"config.json", "student.json", "manifest.json", "metrics.jsonl", "report.json", "report.html"}
    assert names == files | {"checkpoints"}
    report = json.loads((workdir / "report.json").read_text())
    assert {f"held_out/digits/{name}" for name in ("l1", "cls_l1", "patch_l1", "cosine", "copy_l1")} <= set(
        report["metrics"]
    )
    assert len(report["blocks"]["before"]) == len(report["blocks"]["after"]) == 2
    facts, config = report["student"], json.loads((workdir / "config.json").read_text())
    assert facts["few_shot"]["num_images"] == 20
    assert (facts["updates"], facts["num_steps"]) == (2, 2)
    assert json.loads((workdir / "student.json").read_text())["updates"] == 2
    assert len(facts["blocks"]) == 2
    loaded = load_teacher_of(saved.get_config(str(workdir))).report
    assert facts["teacher_loading"] == loaded.facts()
    assert facts["teacher_loading"]["matched"] == len(loaded.matched) > 40
    assert facts["loss"] == config["loss"]
    assert (facts["lora"]["scaling"], facts["lora"]["alpha"]) == (config["lora"]["scaling"], config["lora"]["alpha"])
    assert {row["rule"] for row in facts["choice"]} == {"removal", "first", "even", "last"}
    assert len(json.loads((workdir / "manifest.json").read_text())["names"]) == 20


def test_the_student_comes_back_as_it_was(workdir: Path, capsys: pytest.CaptureFixture):
    student = load_student(workdir)
    assert student.config.depth == 2
    assert len(student.blocks) == 2
    # Trained: not the copy. Merged: no adapters left in the tree.
    changed = [
        path for path, leaf in paths(student.params).items() if not np.array_equal(leaf, paths(student.base)[path])
    ]
    assert {path.split("/")[2] for path in changed} == {"query", "key", "value", "out", "fc1", "fc2"}
    before = json.loads((workdir / "report.json").read_text())["metrics"]
    run.evaluate(saved.get_config(str(workdir)), workdir)
    assert json.loads((workdir / "report.json").read_text())["metrics"] == before
    printed = capsys.readouterr().out
    assert f"devices: {jax.device_count()} cpu (cpu)\n" in printed
    assert "held_out/digits/l1" in printed


def test_a_training_that_was_stopped_is_no_finished_student(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert "WARNING" not in capsys.readouterr().out
    load_student(workdir)
    assert "WARNING" not in capsys.readouterr().out
    copy = tmp_path / "w"
    shutil.copytree(workdir, copy)
    config = saved.get_config(str(copy))
    config.train.num_steps = 9
    student = load_student(copy, config)
    assert f"WARNING: the student of {copy} has had 2 of 9 updates" in capsys.readouterr().out
    assert "| Updates | 2 of 9 |" in model_card(student)
    run.evaluate(config, copy)
    assert json.loads((copy / "report.json").read_text())["student"]["updates"] == 2


def test_longer_training_that_is_killed_keeps_what_was_measured(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = tmp_path / "w"
    shutil.copytree(workdir, copy)
    config = saved.get_config(str(copy))
    config.train.num_steps = 3
    metrics = json.loads((copy / "student.json").read_text())["metrics"]
    assert metrics

    def stop(*_, **__) -> None:
        raise KeyboardInterrupt

    def start(function: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(function, stop)
            with pytest.raises(KeyboardInterrupt):
                run.train_and_evaluate(config, copy)

    start("vit_distill.train.train_loop")  # killed before its first update
    facts = load_student(copy).facts
    assert (facts["metrics"], facts["updates"], facts["num_steps"]) == (metrics, 2, 3)
    start("vit_distill.run._report")  # killed after its last
    facts = load_student(copy).facts
    assert (facts["metrics"], facts["updates"]) == ({}, 3)
    run.train_and_evaluate(config, copy)
    assert load_student(copy).facts["metrics"] == json.loads((copy / "report.json").read_text())["metrics"] != metrics


def test_adapters_can_be_cut_to_a_lower_rank(workdir: Path, tmp_path: Path):
    copy = tmp_path / "w"
    shutil.copytree(workdir, copy)
    config = saved.get_config(str(copy))
    config.lora.truncate_to = 1
    run.evaluate(config, copy)
    student, whole = load_student(copy), load_student(workdir)
    assert set(dict(student.lora.ranks).values()) == {1}
    update = student.params["block_00"]["mlp"]["fc1"]["kernel"] - student.base["block_00"]["mlp"]["fc1"]["kernel"]
    full = whole.params["block_00"]["mlp"]["fc1"]["kernel"] - whole.base["block_00"]["mlp"]["fc1"]["kernel"]
    u, values, v = np.linalg.svd(full)
    np.testing.assert_allclose(update, values[0] * np.outer(u[:, 0], v[0]), atol=1e-5)
    assert values[1] > 1e-4  # there was something to cut


def test_a_run_chooses_its_learning_rate_by_what_is_held_out(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    config = make_config(teacher)
    config.student.update(blocks="calibrated", method="full")
    config.train.update(num_steps=4, cached_views=1)
    config.optim.update(learning_rates=(1e-5, 1e-2), tune_steps=2)
    run.train_and_evaluate(config, tmp_path / "tuned")
    assert "learning rate 0.01 by held-out loss (1e-05: " in capsys.readouterr().out
    found = json.loads((tmp_path / "tuned" / "report.json").read_text())["student"]["tuned"]
    assert found["learning_rate"] == 0.01
    assert found["held_out_losses"]["0.01"] < found["held_out_losses"]["1e-05"]
    # The student is that of the rate alone.
    alone = make_config(teacher)
    alone.student.update(config.student)
    alone.train.update(config.train)
    alone.optim.learning_rate = 1e-2
    run.train_and_evaluate(alone, tmp_path / "alone")
    params = [paths(load_student(tmp_path / name).params) for name in ("tuned", "alone")]
    assert all(np.array_equal(leaf, params[1][path]) for path, leaf in params[0].items())
    # All its weights trained: there are no adapters to cut, and nothing is written of that.
    cut = saved.get_config(str(tmp_path / "tuned"))
    cut.lora.truncate_to = 1
    for command in ("evaluate", "train"):
        with pytest.raises(ValueError, match=r"lora\.truncate_to=1 is of adapters, .* has none: set it to 0"):
            run_command(command, cut, tmp_path / "tuned")
    assert saved.get_config(str(tmp_path / "tuned")).lora.truncate_to == 0
    # Longer training goes on with the rate that was found.
    monkeypatch.setattr("vit_distill.tune.train_student", lambda *_: pytest.fail("tried again"))
    config.train.num_steps = 5
    run.train_and_evaluate(config, tmp_path / "tuned")
    assert load_student(tmp_path / "tuned").facts["tuned"] == found


def test_a_tuned_run_that_is_stopped_twice_and_made_longer(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rates are compared after equally many updates, and what was found is known before a report tells it."""
    config, tried = make_config(teacher), []
    config.optim.learning_rates = (1e-3, 1e-2)

    def train_student(bench, student, ratio) -> float:
        tried.append((student.optim.learning_rate, student.train.num_steps))
        if len(tried) == 2:
            raise KeyboardInterrupt
        return student.optim.learning_rate

    monkeypatch.setattr("vit_distill.tune.train_student", train_student)
    monkeypatch.setattr("vit_distill.tune.held_out_metrics", lambda bench, loss: {"loss": loss})
    with pytest.raises(KeyboardInterrupt):
        run.train_and_evaluate(config, tmp_path)
    config.train.num_steps = 3
    monkeypatch.setattr(run, "_report", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        run.train_and_evaluate(config, tmp_path)
    assert tried == [(1e-3, 2), (1e-2, 2), (1e-2, 2)]
    facts = load_student(tmp_path).facts
    assert (facts["tuned"]["learning_rate"], facts["updates"]) == (1e-3, 3)


def test_another_config_or_command_is_refused(workdir: Path, teacher: Path):
    config = saved.get_config(str(workdir))
    config.lora.rank = 3
    with pytest.raises(ValueError, match=r"lora\.rank: there 2, now 3"):
        run.train_and_evaluate(config, workdir)
    config.command = "quantise"
    with pytest.raises(ValueError, match="command: expected one of"):
        run.train_and_evaluate(config, workdir)


def test_a_teacher_is_called_by_its_folder(teacher: Path):
    assert load_teacher_of(make_config(teacher)).name == teacher.name


def test_another_teacher_file_is_refused(workdir: Path, tmp_path: Path):
    copy = tmp_path / "w"
    shutil.copytree(workdir, copy)
    write_teacher(tmp_path / "other", 1)
    config = json.loads((copy / "config.json").read_text())
    config["teacher"]["checkpoint"] = str(tmp_path / "other")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="put the same teacher file there"):
        load_student(copy)


def test_a_student_of_before_optimisers_had_a_kind_is_read(workdir: Path, tmp_path: Path):
    copy = tmp_path / "w"
    shutil.copytree(workdir, copy)
    config = json.loads((copy / "config.json").read_text())
    for field in ("kind", "learning_rates", "tune_steps"):
        del config["optim"][field]
    (copy / "config.json").write_text(json.dumps(config))
    assert load_student(copy).blocks == load_student(workdir).blocks
    check_config(saved.get_config(str(workdir)), copy, (*FREE_FIELDS, "optim.kind"))


def test_a_folder_without_a_student_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"config\.json, student\.json missing"):
        load_student(tmp_path)


def test_a_teacher_must_be_named(teacher: Path):
    config = make_config(teacher)
    config.teacher.checkpoint = ""
    with pytest.raises(ValueError, match=r"--config\.teacher\.checkpoint"):
        load_teacher_of(config)
    config.teacher.checkpoint = str(teacher)
    config.teacher.overrides.update(image_size=16, mean=(0.1, 0.2, 0.3), position_resize="bicubic")
    loaded = load_teacher_of(config)
    assert loaded.report.reshaped == ("pos_embed [1, 5, 16] -> [1, 17, 16] (bicubic)",)
    assert loaded.config.image_size == 16
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)


def test_the_manifest_of_an_earlier_run_gives_the_same_images(workdir: Path, teacher: Path, tmp_path: Path):
    config = make_config(teacher)
    config.few_shot.update(per_class=0, manifest=str(workdir / "manifest.json"))
    loaded = load_teacher_of(config)
    images, few, rest = few_shot_images(config, loaded.preprocessing, tmp_path)
    assert len(few) == 20
    assert not set(few) & set(rest)
    assert [images.names[row] for row in few] == json.loads((workdir / "manifest.json").read_text())["names"]
    # The run's own manifest wins over the config, once the run was accepted.
    config.few_shot.manifest = ""
    assert np.array_equal(few_shot_images(config, loaded.preprocessing, workdir)[1], few)
    shutil.copy(workdir / "manifest.json", tmp_path)
    assert len(few_shot_images(config, loaded.preprocessing, tmp_path)[1]) > 1000
    # Two ways to choose are one too many, and the record names the one that chose.
    config.few_shot.update(manifest=str(workdir / "manifest.json"), ratio=0.5)
    with pytest.raises(ValueError, match=r"few_shot\.manifest names the images: .*found ratio=0\.5"):
        few_shot_images(config, loaded.preprocessing, tmp_path)
    config.few_shot.ratio, config.student.method = 1.0, "copy"
    run.train_and_evaluate(config, tmp_path / "w")
    selection = json.loads((tmp_path / "w" / "manifest.json").read_text())["selection"]
    assert selection == {"manifest": str(workdir / "manifest.json")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.student.update(reduction=3), "reduction 3 does not divide"),
        (lambda c: c.lora.update(rank=64), "rank of .*found 64"),
        (lambda c: c.optim.update(kind="sgd"), "optim.kind"),
        (lambda c: c.train.update(batch_size=9, accumulation=2), "train.batch_size=9"),
        (lambda c: c.loss.update(kind="l3"), "loss.kind"),
        (lambda c: [c.student.update(method="full"), c.lora.update(warm_start=True)], "lora.warm_start=True is of ad"),
        (lambda c: [c.student.update(method="scratch"), c.lora.update(truncate_to=4)], "lora.truncate_to=4 is of ad"),
        (lambda c: c.few_shot.update(seed=-1), "few_shot.seed: expected .* at least 0, found -1"),
        (lambda c: c.train.update(cached_views=-1), "train.cached_views: expected .* at least 0, found -1"),
        (lambda c: c.calibration.update(num_images=0), "calibration.num_images: expected .* at least 1, found 0"),
        (lambda c: c.optim.update(learning_rates=(0.01,), tune_steps=-1), "optim.tune_steps: expected .*found -1"),
        (lambda c: c.calibration.update(criterion="typo"), "calibration.criterion: expected one of .*'typo'"),
        (lambda c: c.few_shot.update(ratio=0.5), "few_shot"),
        (lambda c: c.optim.update(learning_rates=(0.01, 0.001)), r"optim\.learning_rates: expected ascending"),
        (lambda c: [c.optim.update(learning_rates=(0.01,)), c.student.update(method="copy")], "trains nothing"),
        (
            lambda c: [
                c.optim.update(learning_rates=(0.01,)),
                c.data.update(split="valid"),
                c.few_shot.update(per_class=0),
            ],
            "chosen on held-out images, and none are",
        ),
    ],
)
def test_a_command_that_fails_leaves_nothing_behind(change, message: str, teacher: Path, tmp_path: Path):
    """So that the corrected command is not refused, nor uses the first one's images."""
    config = make_config(teacher)
    change(config)
    with pytest.raises(ValueError, match=message):
        run.train_and_evaluate(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_damaged_image_is_found_first_and_left_out_in_the_same_folder(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """A flat folder; all that is not for validation trains, and the validation images are what is measured on."""
    scans = tmp_path / "scans"
    scans.mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(scans / f"{i:02d}.png")
    config = make_config(teacher)
    config.data.update(kind="folder", name="noise", root=str(scans), valid_fraction=0.25)
    config.few_shot.per_class = 0
    broken = scans / load_labelled(config.data, "train", 10).names[7]
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=broken.name):
        run.train_and_evaluate(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()
    config.data.skip_corrupt = True
    run.train_and_evaluate(config, tmp_path / "w")
    assert "11 images to distil on, 4 held out (of the validation split)" in capsys.readouterr().out
    report = json.loads((tmp_path / "w" / "report.json").read_text())
    assert {name.split("/")[0] for name in report["metrics"]} == {"held_out"}
    assert report["student"]["few_shot"]["num_images"] == 11
    # The field is free: another value is no other config.
    config.data.skip_corrupt = False
    with pytest.raises(ValueError, match=broken.name):
        few_shot_images(config, load_teacher_of(config).preprocessing, None)[0].images(np.arange(12))
    check_config(config, tmp_path / "w", FREE_FIELDS)


def test_without_a_validation_split_nothing_is_held_out(teacher: Path):
    config = make_config(teacher)
    config.few_shot.per_class = 0
    loaded = load_teacher_of(config)
    images, few, rest = few_shot_images(config, loaded.preprocessing, None)
    assert len(few) == len(images)
    valid = load_labelled(config.data, "valid", 10)
    held_out = held_out_images(config, loaded.preprocessing, images, rest)
    assert len(held_out) == 8
    assert set(held_out.names) <= set(valid.names)
    assert len(set(held_out.labels)) > 3
    config.data.split = "valid"
    assert held_out_images(config, loaded.preprocessing, images, rest) is None
    config.data.update(split="train", valid_fraction=0.0)
    assert held_out_images(config, loaded.preprocessing, images, rest) is None


def test_images_of_patients_that_are_trained_on_are_not_held_out(teacher: Path, tmp_path: Path):
    for name in (f"{patient}{k}.png" for patient in "abcdef" for k in range(4)):
        Image.new("L", (8, 8)).save(tmp_path / name)
    config = make_config(teacher)
    config.data.update(kind="folder", root=str(tmp_path), valid_fraction=0.2, groups="([a-f])")
    config.few_shot.update(per_class=2)
    images, few, rest = few_shot_images(config, load_teacher_of(config).preprocessing, None)
    patients = np.asarray(images.groups)
    assert len(rest) == 8
    assert not set(patients[few]) & set(patients[rest])


def test_patients_of_train_are_not_held_out_of_one_s_own_validation_split_either(teacher: Path, tmp_path: Path):
    for name in ("train/a0", "train/a1", "train/b0", "valid/a2", "valid/b1", "valid/c0", "test/d0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    config = make_config(teacher)
    config.data.update(kind="folder", root=str(tmp_path), groups=r"([a-f])\d")
    config.few_shot.update(per_class=0)
    loaded = load_teacher_of(config)
    images, _, rest = run.few_shot_images(config, loaded.preprocessing, None)
    assert run.held_out_images(config, loaded.preprocessing, images, rest).names == ("valid/c0.png",)
    (tmp_path / "valid/c0.png").unlink()
    assert run.held_out_images(config, loaded.preprocessing, images, rest) is None


def test_calibration_and_a_report_without_held_out_images_see_the_whole_set(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Class folders are read class by class: the first images are of one class."""
    config = make_config(teacher)
    config.student.method = "copy"
    config.few_shot.per_class = 8
    config.data.split = "valid"
    monkeypatch.setattr(run, "held_out_images", lambda *_: None)
    seen = []
    real_build, real_compare = run.build_distiller, run.compare
    monkeypatch.setattr(run, "build_distiller", lambda c, t, s, b: seen.append(s) or real_build(c, t, s, b))
    monkeypatch.setattr(run, "compare", lambda d, t, s: seen.append(s) or real_compare(d, t, s))
    run.train_and_evaluate(config, tmp_path / "w")
    images, few, _ = few_shot_images(config, load_teacher_of(config).preprocessing, tmp_path / "w")
    for found in seen:
        np.testing.assert_array_equal(found, images.images(few[even_rows(len(few), 8)]))
    assert len(seen) == 2
    assert "on 8 images that were not trained on" in (tmp_path / "w" / "report.html").read_text()  # it is a copy


def run_command(command: str, config: ConfigDict, workdir: Path) -> None:
    if command == "export":
        run.export(config, workdir, "adapters", "")
    else:
        {"train": run.train_and_evaluate, "evaluate": run.evaluate}[command](config, workdir)


@pytest.mark.parametrize("command", ["train", "evaluate", "export"])
def test_another_teacher_is_refused_before_anything_is_written(command: str, workdir: Path, tmp_path: Path):
    copy = tmp_path / "w"
    shutil.copytree(workdir, copy)
    write_teacher(tmp_path / "other", 1)
    config = saved.get_config(str(copy))
    config.teacher.checkpoint = str(tmp_path / "other")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"was distilled from .* put the same teacher file there"):
        run_command(command, config, copy)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["train", "evaluate", "export"])
def test_a_teacher_that_computes_otherwise_with_its_weights_is_refused(command: str, workdir: Path, tmp_path: Path):
    copy = tmp_path / "w"
    shutil.copytree(workdir, copy)
    config = saved.get_config(str(copy))
    folder = tmp_path / "teacher"
    shutil.copytree(config.teacher.checkpoint, folder)
    content = json.loads((folder / "config.json").read_text())
    content[OWN_SECTION]["config"]["activation"] = "quick_gelu"
    (folder / "config.json").write_text(json.dumps(content))
    config.teacher.checkpoint = str(folder)
    with pytest.raises(ValueError, match=r"found activation 'quick_gelu', expected 'gelu', as the student of"):
        run_command(command, config, copy)


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(workdir: Path, tmp_path: Path):
    copy = tmp_path / "w"
    shutil.copytree(workdir, copy)
    config = saved.get_config(str(copy))
    config.train.num_steps = 4
    newest = copy / "checkpoints" / "2"
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    before = {path: path.read_bytes() for path in copy.glob("*.json")}
    with pytest.raises(CheckpointError):
        run.train_and_evaluate(config, copy)
    assert {path: path.read_bytes() for path in copy.glob("*.json")} == before


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_teacher_that_moved_is_read_where_the_command_says(
    command: str, workdir: Path, teacher: Path, tmp_path: Path
):
    copy = tmp_path / "w"
    shutil.copytree(workdir, copy)
    content = json.loads((copy / "config.json").read_text())
    content["teacher"]["checkpoint"] = "gone"
    (copy / "config.json").write_text(json.dumps(content))
    config = saved.get_config(str(copy))
    with pytest.raises(ValueError, match="gone: no such file"):
        run_command(command, config, copy)
    config.teacher.checkpoint = str(teacher)
    run_command(command, config, copy)
    if command == "export":
        assert (copy / "export" / "adapters" / "adapters.safetensors").exists()
        config.lora.truncate_to = 1  # not measured yet
        with pytest.raises(ValueError, match=r"lora\.truncate_to: there 0, now 1"):
            run_command(command, config, copy)


def test_resuming_keeps_the_calibrated_blocks_and_cuts_adapters_as_told(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = tmp_path / "w"
    shutil.copytree(workdir, copy)
    before = json.loads((copy / "student.json").read_text())
    monkeypatch.setattr("vit_distill.distill.calibrated_blocks", lambda *_: pytest.fail("searched again"))
    config = saved.get_config(str(copy))
    config.lora.truncate_to = 1
    run.train_and_evaluate(config, copy)
    for name in ("student.json", "report.json"):
        found = json.loads((copy / name).read_text())
        found = found.get("student", found)
        assert (found["blocks"], found["choice"]) == (before["blocks"], before["choice"])
        assert set(found["lora"]["ranks"].values()) == {1}
    assert set(before["lora"]["ranks"].values()) == {2}


@pytest.mark.parametrize("index", [0, 1])
def test_of_several_hosts_one_writes_and_one_evaluates_afterwards(
    index: int, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """What was trained lies on all hosts: none of them can merge it alone."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(run, "train", lambda *_: SimpleNamespace(step=2))
    run.train_and_evaluate(make_config(teacher), tmp_path / "w")
    assert "trained; now run on one host: python main.py --mode=evaluate" in capsys.readouterr().out
    written = {path.name for path in tmp_path.glob("w/*")}
    assert written == ({"config.json", "manifest.json", "student.json"} if index == 0 else set())
    for config in (probe.get_config(), segment.get_config(), teacher_config.get_config(), table.get_config()):
        with pytest.raises(ValueError, match=f"command '{config.command}' runs on one host"):
            run.train_and_evaluate(config, tmp_path / "other")


@pytest.mark.parametrize("config", [probe.get_config(), segment.get_config(), teacher_config.get_config()])
def test_only_distillations_are_planned(config: ConfigDict):
    with pytest.raises(ValueError, match=f"expected a config of command distill or table, found '{config.command}'"):
        run.plan(config, None)
