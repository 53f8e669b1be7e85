"""The command as a user runs it: distil from a teacher's folder, look at what is there, restore, evaluate, refuse."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import workdir as saved
from configs.vit_distill import distill
from core.mesh import make_mesh
from core.tree import paths
from core.vit import VisionTransformer, VitConfig
from vit_distill import run
from vit_distill.formats.timm import write_timm_folder
from vit_distill.preprocessing import Preprocessing
from vit_distill.student_io import load_student, load_teacher_of

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
    facts = report["student"]
    assert facts["few_shot"]["num_images"] == 20
    assert len(facts["blocks"]) == 2
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
    assert "held_out/digits/l1" in capsys.readouterr().out


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


def test_another_config_or_command_is_refused(workdir: Path, teacher: Path):
    config = saved.get_config(str(workdir))
    config.lora.rank = 3
    with pytest.raises(ValueError, match=r"lora\.rank: there 2, now 3"):
        run.train_and_evaluate(config, workdir)
    config.command = "quantise"
    with pytest.raises(ValueError, match="command: expected one of"):
        run.train_and_evaluate(config, workdir)


def test_another_teacher_file_is_refused(workdir: Path, tmp_path: Path):
    copy = tmp_path / "w"
    shutil.copytree(workdir, copy)
    write_teacher(tmp_path / "other", 1)
    config = json.loads((copy / "config.json").read_text())
    config["teacher"]["checkpoint"] = str(tmp_path / "other")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="put the same teacher file there"):
        load_student(copy)


def test_a_folder_without_a_student_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"config\.json, student\.json missing"):
        load_student(tmp_path)


def test_a_teacher_must_be_named(teacher: Path):
    config = make_config(teacher)
    config.teacher.checkpoint = ""
    with pytest.raises(ValueError, match=r"--config\.teacher\.checkpoint"):
        load_teacher_of(config)
    config.teacher.checkpoint = str(teacher)
    config.teacher.overrides.update(image_size=16, mean=(0.1, 0.2, 0.3))
    loaded = load_teacher_of(config)
    assert loaded.config.image_size == 16
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)


def test_the_manifest_of_an_earlier_run_gives_the_same_images(workdir: Path, teacher: Path, tmp_path: Path):
    config = make_config(teacher)
    config.few_shot.update(per_class=0, manifest=str(workdir / "manifest.json"))
    names = run.few_shot_images(config, load_teacher_of(config), tmp_path)
    images, few, rest = names
    assert len(few) == 20
    assert not set(few) & set(rest)
    assert [images.names[row] for row in few] == json.loads((workdir / "manifest.json").read_text())["names"]
    # The run's own manifest wins over the config from then on.
    config.few_shot.manifest = ""
    assert np.array_equal(run.few_shot_images(config, load_teacher_of(config), tmp_path)[1], few)
