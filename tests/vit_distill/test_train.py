"""Distillation itself: where it starts, what it saves, that it resumes exactly, and that it goes on a base of its own.

Axes: n images, S stored side.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from core.checkpoint import CheckpointError
from core.mesh import make_mesh
from core.optim import build_optimizer
from core.tree import paths
from core.vit import VisionTransformer, VitConfig
from input_pipeline.classification import LabelledSet
from input_pipeline.split import ArrayPixels
from vit_distill.distill import Distiller, build_distiller, build_state, make_step_fn, make_targets_fn, make_views_fn
from vit_distill.evaluate import compare
from vit_distill.preprocessing import Preprocessing
from vit_distill.teacher import LoadReport, Teacher
from vit_distill.teacher_cache import build_cache
from vit_distill.train import train

CONFIG = VitConfig(depth=4, width=16, num_heads=2, mlp_dim=32, patch_size=4, image_size=8)
STORED = 10


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling for eight devices takes several times as long; one test is about them."""
    monkeypatch.setattr("vit_distill.distill.make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    shape = (1, CONFIG.image_size, CONFIG.image_size, 3)
    params = VisionTransformer(CONFIG).init(jax.random.key(3), jnp.zeros(shape))["params"]
    # No bias or scale at its special value: what is not copied or merged rightly shows.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.asarray(leaf + 0.1 * rng.normal(size=leaf.shape), np.float32), params)
    preprocessing = Preprocessing(CONFIG.image_size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 0.8)
    report = LoadReport((), (), (), (), "0" * 64, "test")
    return Teacher("tiny", CONFIG, params, preprocessing, {"sha256": "0" * 64, "format": "test"}, report)


@pytest.fixture(scope="module")
def images() -> LabelledSet:
    pixels = np.random.default_rng(1).integers(0, 256, (12, STORED, STORED, 3)).astype(np.uint8)
    names = tuple(f"{i:02d}.png" for i in range(len(pixels)))
    labels = np.full(len(pixels), -1, np.int32)
    return LabelledSet("noise", "made up", (), names, names, labels, ArrayPixels(pixels, None, STORED), False)


@pytest.fixture
def config() -> ConfigDict:
    config = common.distiller()
    config.lora.rank = 4
    config.train.update(batch_size=8, num_steps=4, log_every=1, save_every=2, tensorboard=False)
    config.optim.update(learning_rate=1e-2, warmup_steps=1)
    return config


def leaves_equal(a: Any, b: Any) -> bool:
    a, b = paths(a), paths(b)
    return list(a) == list(b) and all(np.array_equal(a[path], b[path]) for path in a)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_student_starts_as_the_copy_and_comes_closer(method, config, teacher, images):
    config.student.method = method
    distiller = build_distiller(config, teacher)
    assert distiller.blocks == (0, 2)
    before = build_state(distiller, build_optimizer(config.optim, 1)).params
    assert leaves_equal(distiller.merged(before), distiller.base)
    config.train.num_steps = 30
    after = train(distiller, images).ema_params
    metrics, rows_before, rows_after = compare(distiller, after, images.pixels.images(np.arange(12)))
    assert metrics["l1"] < 0.8 * metrics["copy_l1"]
    assert rows_after[-1]["l1"] == pytest.approx(metrics["l1"], rel=1e-4)  # of one block computed in two ways
    assert rows_before[-1]["l1"] == pytest.approx(metrics["copy_l1"], rel=1e-4)


def test_a_student_of_all_blocks_is_the_teacher(config, teacher, images):
    config.student.update(reduction=1, method="copy")
    metrics, _, _ = compare(build_distiller(config, teacher), None, images.pixels.images(np.arange(5)))
    assert metrics["l1"] == 0
    assert metrics["cosine"] == pytest.approx(1, abs=1e-6)


def test_scratch_starts_from_random_weights_of_the_seed(config, teacher):
    config.student.method = "scratch"
    one, two = build_distiller(config, teacher), build_distiller(config, teacher)
    assert leaves_equal(one.base, two.base)
    assert not np.allclose(one.base["embed"]["proj"]["kernel"], teacher.params["embed"]["proj"]["kernel"])


def test_only_adapters_are_trained_and_saved(config, teacher):
    state = build_state(build_distiller(config, teacher), build_optimizer(config.optim, 4))
    assert {path.split("/")[-1] for path in paths(state.params)} == {"a", "b"}
    assert len(paths(state.params)) == 2 * 2 * 6
    assert set(state.extra) == {"base"}


@pytest.mark.parametrize("cached_views", [0, 3])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(cached_views, config, teacher, images, tmp_path):
    config.train.cached_views = cached_views
    whole = train(build_distiller(config, teacher), images, tmp_path / "whole")
    longer = config.copy_and_resolve_references()

    class Killed(Exception):
        pass

    def killer(step: int) -> Callable:
        def save(self, state):
            original(self, state)
            if int(state.step) == step:
                self.wait()
                raise Killed

        return save

    from core.checkpoint import Checkpointer

    original = Checkpointer.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "save", killer(2))
        with pytest.raises(Killed):
            train(build_distiller(longer, teacher), images, tmp_path / "cut")
    resumed = train(build_distiller(longer, teacher), images, tmp_path / "cut")
    assert leaves_equal(whole.params, resumed.params)
    assert leaves_equal(whole.opt_state, resumed.opt_state)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert lines[0] == lines[1]


def test_adapters_of_another_base_are_refused(config, teacher, images, tmp_path):
    train(build_distiller(config, teacher), images, tmp_path)
    kernel = teacher.params["block_00"]["mlp"]["fc1"]["kernel"]
    other = jax.tree.map(lambda leaf: leaf + 1e-3 if leaf is kernel else leaf, teacher.params)
    with pytest.raises(CheckpointError, match="other start weights"):
        train(build_distiller(config, dataclasses.replace(teacher, params=other)), images, tmp_path)


def run_one(distiller: Distiller, batch: dict, steps: int = 1) -> Any:
    tx = build_optimizer(distiller.config.optim, 4)
    state, step_fn = build_state(distiller, tx), make_step_fn(distiller, tx)
    for _ in range(steps):
        state, metrics = step_fn(state, batch, jax.random.key(5))
    return jax.device_get((state.params, metrics))


def test_accumulated_micro_batches_are_one_batch(config, teacher, images):
    """Adam divides by the gradient's own size: a relative error of 1e-6 in it may show as 1e-4 of the update."""
    batch = {"image": images.pixels.images(np.arange(8))}
    one = build_distiller(config, teacher)
    params, metrics = run_one(one, batch)
    config.train.accumulation = 4
    again, metrics_again = run_one(one, batch)
    assert metrics["loss"] == pytest.approx(metrics_again["loss"], rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(metrics_again["grad_norm"], rel=1e-4)
    for path, leaf in paths(params).items():
        np.testing.assert_allclose(leaf, paths(again)[path], atol=2e-5, err_msg=path)


def test_one_device_and_eight_give_the_same_update(config, teacher, images):
    from core.mesh import shard_batch

    batch = {"image": images.pixels.images(np.arange(8))}
    one = build_distiller(config, teacher)
    many = dataclasses.replace(one, mesh=make_mesh())
    assert many.mesh.shape["data"] == 8
    params, metrics = run_one(many, shard_batch(batch, many.mesh))
    single, metrics_single = run_one(one, batch)
    assert metrics["loss"] == pytest.approx(metrics_single["loss"], rel=1e-5)
    for path, leaf in paths(params).items():
        np.testing.assert_allclose(leaf, paths(single)[path], atol=2e-5, err_msg=path)


@pytest.mark.parametrize(("kind", "targets"), [("last", 1), ("aligned", 2)])
def test_cached_features_are_those_of_the_teacher_on_the_same_views(kind, targets, config, teacher, images):
    config.loss.blocks, config.train.cached_views, config.train.batch_size = kind, 2, 8
    distiller = build_distiller(config, teacher)
    cache = build_cache(distiller, images.pixels, "hash", None)
    assert cache.features.shape == (targets, 24, CONFIG.num_tokens, CONFIG.width)
    index, view = np.array([11, 0, 7], np.int32), np.array([1, 0, 1], np.int32)
    batch = {"image": images.pixels.images(index), "index": index}
    extended = cache.extend(batch, view)
    views = make_views_fn(distiller)(batch | {"view": view}, jax.random.key(9), jnp.int32(4))
    for t, live in enumerate(make_targets_fn(distiller)(teacher.params, views)):
        np.testing.assert_allclose(extended[f"target_{t:02d}"], live, atol=1e-5)
    # The view is part of the crop: the other one of the same image differs.
    other = make_views_fn(distiller)(batch | {"view": 1 - view}, jax.random.key(9), jnp.int32(4))
    assert not np.allclose(views, other)


def test_cached_features_are_reused_for_the_same_run_alone(config, teacher, images, tmp_path, monkeypatch):
    config.train.cached_views = 2
    distiller = build_distiller(config, teacher)
    first = build_cache(distiller, images.pixels, "hash", tmp_path)
    monkeypatch.setattr("vit_distill.teacher_cache._compute", lambda *_: pytest.fail("computed again"))
    again = build_cache(distiller, images.pixels, "hash", tmp_path)
    assert np.array_equal(first.features, again.features)
    monkeypatch.undo()
    config.seed = 1  # other crops
    other = build_cache(build_distiller(config, teacher), images.pixels, "hash", tmp_path)
    assert not np.allclose(first.features, other.features)
    assert len(list(tmp_path.glob("*.npy"))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.student.update(method="prune"), "student.method: expected one of"),
        (lambda c: c.student.update(reduction=3), "3"),
        (lambda c: c.train.update(dtype="float16"), "train.dtype: expected one of"),
        (lambda c: c.train.update(batch_size=12, accumulation=8), "train.batch_size=12 does not divide by the 1 dev"),
        (lambda c: c.lora.update(rank=17), "17"),
        (lambda c: c.student.update(blocks="calibrated"), "needs images"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message, config, teacher, images):
    change(config)
    with pytest.raises(ValueError, match=message):
        train(build_distiller(config, teacher), images)
