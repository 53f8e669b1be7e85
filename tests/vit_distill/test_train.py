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
from core.tree import paths, spec
from core.vit import VisionTransformer, VitConfig, init_params
from input_pipeline.batches import train_batches
from input_pipeline.classification import LabelledSet
from input_pipeline.split import ArrayPixels
from vit_distill import forward
from vit_distill.distill import (
    Distiller,
    base_fingerprint,
    build_distiller,
    build_state,
    make_step_fn,
    make_targets_fn,
    make_update_fn,
    make_views_fn,
    restore_target,
    start_fingerprint,
)
from vit_distill.evaluate import compare, run_blocks
from vit_distill.preprocessing import Preprocessing
from vit_distill.teacher import LoadReport, Teacher
from vit_distill.teacher_cache import TeacherCache, build_cache, cached_batches
from vit_distill.train import check_base, check_trains, start_values, train

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
    assert "agreement" not in metrics  # no classifier


@pytest.mark.parametrize("head_bias", [True, False])
def test_a_classifier_is_compared_too(config, teacher, images, head_bias):
    with_head = dataclasses.replace(teacher.config, num_classes=5, head_bias=head_bias)
    shape = (1, CONFIG.image_size, CONFIG.image_size, 3)
    head = VisionTransformer(with_head).init(jax.random.key(1), jnp.zeros(shape))["params"]["head"]
    teacher = dataclasses.replace(teacher, config=with_head, params=teacher.params | {"head": head})
    distiller, shown = build_distiller(config, teacher), images.pixels.images(np.arange(11))
    before = build_state(distiller, build_optimizer(config.optim, 1)).params
    # Other adapters than those at the start: the copy and the student name other classes.
    after = jax.tree.map(lambda leaf: leaf + 0.5 * np.sin(np.arange(leaf.size)).reshape(leaf.shape), before)
    metrics, _, _ = compare(distiller, after, shown)
    inputs = teacher.preprocessing.evaluate(jnp.asarray(shown))
    models = {"copy_": distiller.base, "": distiller.merged(after)}
    named = {
        prefix: VisionTransformer(distiller.student_config).apply({"params": params}, inputs).logits.argmax(1)
        for prefix, params in models.items()
    }
    expected = VisionTransformer(with_head).apply({"params": teacher.params}, inputs).logits.argmax(1)
    for prefix, found in named.items():
        assert metrics[f"{prefix}agreement"] == pytest.approx(float((found == expected).mean()))
    assert len({metrics["agreement"], metrics["copy_agreement"], 1.0}) == 3


def test_scratch_starts_from_random_weights_of_the_seed(config, teacher):
    config.student.method = "scratch"
    one, two = build_distiller(config, teacher), build_distiller(config, teacher)
    assert leaves_equal(one.base, two.base)
    assert not np.allclose(one.base["embed"]["proj"]["kernel"], teacher.params["embed"]["proj"]["kernel"])


def test_scratch_is_not_bound_to_what_a_device_draws(config, teacher, images, tmp_path):
    """The start weights have no say once training has begun; another teacher or seed is refused."""
    config.student.method = "scratch"
    drawn = build_distiller(config, teacher)
    base = jax.tree.map(lambda leaf: leaf * 1.001, drawn.base)
    elsewhere = dataclasses.replace(drawn, base=base)
    check_base(elsewhere, {"base": base_fingerprint(drawn)}, tmp_path)
    check_base(drawn, {"base": start_fingerprint(drawn)}, tmp_path)  # as earlier versions wrote it
    with pytest.raises(CheckpointError, match="read where it was trained"):
        check_base(elsewhere, {"base": start_fingerprint(drawn)}, tmp_path)
    before = base_fingerprint(drawn)
    config.seed = 1
    with pytest.raises(CheckpointError, match="other start weights"):
        check_base(build_distiller(config, teacher), {"base": before}, tmp_path)


@pytest.mark.parametrize("method", ["lora", "full", "scratch"])
def test_start_weights_are_no_constants_of_a_program(method, config, teacher, monkeypatch):
    """A ViT-L's would be compiled in; and what a checkpoint is restored into is shapes alone."""
    config.student.method, config.lora.dora = method, True
    distiller, tx = build_distiller(config, teacher), build_optimizer(config.optim, 4)
    state, target = build_state(distiller, tx), restore_target(distiller, tx)
    assert spec(target) == spec(state)
    assert {type(leaf) for leaf in jax.tree.leaves(target)} == {jax.ShapeDtypeStruct}
    assert [leaf.sharding for leaf in jax.tree.leaves(target)] == [leaf.sharding for leaf in jax.tree.leaves(state)]

    def num_constants(init_fn, key, tx, mesh, *given):
        return sum(np.size(const) for const in jax.make_jaxpr(init_fn)(key, *given).consts)

    monkeypatch.setattr("vit_distill.distill.init_state", num_constants)
    for start in (None, jax.device_get(state.params)):
        assert build_state(distiller, tx, start) <= 64


def test_runs_that_differ_in_their_rate_share_one_program(config, teacher, images, monkeypatch):
    """A table's runs; JAX's cache on disk goes by the program's text."""
    texts, seen = [], []
    for rate in (1e-3, 3e-3):
        config.optim.learning_rate = rate
        distiller, tx = build_distiller(config, teacher), build_optimizer(config.optim, 4)
        views = jnp.zeros((8, 8, 8, 3))
        batch = {"views": views, "targets": jax.eval_shape(make_targets_fn(distiller), teacher.params, views)}
        update = make_update_fn(distiller, tx)
        state = build_state(distiller, tx)
        lowered = update.lower(state, batch, jax.random.key(0), distiller.base, learning_rate=np.float32(rate))
        texts.append(lowered.as_text())
        spy = lambda *args, learning_rate: seen.append(learning_rate)  # noqa: E731
        monkeypatch.setattr("vit_distill.distill.make_update_fn", lambda *_, spy=spy: spy)
        make_step_fn(distiller, tx)(state, {"image": images.images(np.arange(8))}, jax.random.key(5))
    assert texts[0] == texts[1]
    assert seen == [np.float32(1e-3), np.float32(3e-3)]


def test_updates_with_a_teacher_in_bfloat16_are_close(config, teacher, images):
    """README's setting for speed: teacher and student in bfloat16."""
    batch, found = {"image": images.images(np.arange(8))}, {}
    for dtype in ("float32", "bfloat16"):
        config.teacher.dtype = config.train.dtype = dtype
        found[dtype] = run_one(build_distiller(config, teacher), batch, steps=2)
    (half, metrics), (full, wanted) = found["bfloat16"], found["float32"]
    assert metrics["loss"] == pytest.approx(wanted["loss"], rel=0.02)
    assert metrics["loss"] != wanted["loss"]
    half, full = (np.concatenate([leaf.ravel() for leaf in paths(params).values()]) for params in (half, full))
    assert np.linalg.norm(half - full) / np.linalg.norm(full) < 0.05


def test_the_smallest_crop_and_the_flip_are_the_configs(config, teacher, images):
    distiller, key, step = build_distiller(config, teacher), jax.random.key(0), jnp.int32(0)
    batch = {"image": images.images(np.arange(12))}
    config.augment.update(scale_min=1.0, flip=False)
    whole = np.asarray(make_views_fn(distiller)(batch, key, step))
    np.testing.assert_array_equal(whole, make_views_fn(distiller)(batch, jax.random.key(1), step))
    config.augment.flip = True
    flipped = np.asarray(make_views_fn(distiller)(batch, key, step))
    mirrored = [np.allclose(view, other[:, ::-1], atol=1e-5) for view, other in zip(flipped, whole, strict=True)]
    same = [np.allclose(view, other, atol=1e-5) for view, other in zip(flipped, whole, strict=True)]
    assert all(np.logical_xor(mirrored, same))
    assert 0 < sum(mirrored) < 12
    config.augment.update(scale_min=0.1, flip=False)
    assert not np.allclose(make_views_fn(distiller)(batch, key, step), whole, atol=0.1)


def test_blocks_run_in_batches_are_those_run_at_once(teacher, images):
    inputs = np.asarray(teacher.preprocessing.evaluate(jnp.asarray(images.images(np.arange(12)))))
    tokens, whole = (run_blocks(CONFIG, teacher.params, inputs, n, (1, 3)) for n in (5, 12))
    assert [part.shape for part in tokens] == [(12, CONFIG.num_tokens, CONFIG.width)] * 2
    for part, wanted in zip(tokens, whole, strict=True):
        np.testing.assert_allclose(part, wanted, atol=1e-5)


def test_the_criterion_of_calibrated_blocks_is_the_configs(config, teacher, images):
    config.student.blocks, config.calibration.criterion = "calibrated", "influence"
    choice = build_distiller(config, teacher, images.images(np.arange(4))).choice
    assert "influence" in {row["rule"] for row in choice}
    assert "removal" not in {row["rule"] for row in choice}


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


def test_a_batch_cut_for_the_caches_is_one_batch(config, teacher, images, monkeypatch):
    """Tolerances as above."""
    config.train.batch_size = 8
    batch = {"image": images.pixels.images(np.arange(8))}
    one = build_distiller(config, teacher)
    one = dataclasses.replace(one, mesh=make_mesh(devices=jax.devices()[:1]))
    params, metrics = run_one(one, batch)
    student = one.student_config
    monkeypatch.setattr(forward, "PART_BYTES", 4 * student.num_tokens * student.mlp_dim)
    monkeypatch.setattr(forward, "TRAINED_PART_BYTES", 2 * 4 * student.num_tokens * student.mlp_dim)
    assert forward.micro_batches(student, 8, 1) == 4
    again, metrics_again = run_one(one, batch)
    assert metrics["loss"] == pytest.approx(metrics_again["loss"], rel=1e-5)
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


def test_the_teacher_takes_a_batch_in_the_parts_of_the_update(config, teacher):
    """Off one CPU; there the caches say how many."""
    config.train.accumulation = 2
    one = build_distiller(config, teacher)
    two = dataclasses.replace(one, mesh=make_mesh(devices=jax.devices()[:2]))
    views = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)
    assert "while" in make_targets_fn(two).lower(teacher.params, views).as_text()
    (found,), (expected,) = (make_targets_fn(it)(teacher.params, views) for it in (two, one))
    np.testing.assert_allclose(found, expected, atol=1e-5)


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


@pytest.mark.parametrize(("num_steps", "warned"), [(3, True), (4, False)])
def test_a_cache_that_costs_more_than_it_saves_is_said(num_steps, warned, config, teacher, images, tmp_path, capsys):
    config.train.update(cached_views=2, batch_size=8, num_steps=num_steps)  # 12 images
    build_cache(build_distiller(config, teacher), images.pixels, "hash", tmp_path)
    assert ("the teacher sees 24 views for the cache, in the loop it would see 24" in capsys.readouterr().out) == warned


def test_cached_features_are_reused_for_the_same_run_alone(config, teacher, images, tmp_path, monkeypatch):
    config.train.cached_views = 2
    distiller = build_distiller(config, teacher)
    first = build_cache(distiller, images.pixels, "hash", tmp_path)
    monkeypatch.setattr("vit_distill.teacher_cache._compute", lambda *_: pytest.fail("computed again"))
    again = build_cache(distiller, images.pixels, "hash", tmp_path)
    assert np.array_equal(first.features, again.features)
    monkeypatch.undo()
    edited = images.pixels.images(np.arange(12))
    edited[7, 0, 0] ^= 255  # of the same name
    build_cache(distiller, ArrayPixels(edited, None, STORED), "hash", tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 2
    config.seed = 1  # other crops
    other = build_cache(build_distiller(config, teacher), images.pixels, "hash", tmp_path)
    assert not np.allclose(first.features, other.features)
    assert len(list(tmp_path.glob("*.npy"))) == 3
    function = dataclasses.replace(teacher, config=dataclasses.replace(teacher.config, activation="quick_gelu"))
    other = build_cache(build_distiller(config, function), images.pixels, "hash", tmp_path)  # the same weights
    assert len(list(tmp_path.glob("*.npy"))) == 4
    resized = dict(teacher.params) | {"pos_embedding": teacher.params["pos_embedding"] + 0.1}  # as by position_resize
    build_cache(build_distiller(config, dataclasses.replace(teacher, params=resized)), images.pixels, "hash", tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.student.update(method="prune"), "student.method: expected one of"),
        (lambda c: c.student.update(reduction=3), "reduction 3 does not divide"),
        (lambda c: c.train.update(dtype="float16"), "train.dtype: expected one of"),
        (lambda c: c.train.update(batch_size=12, accumulation=8), "train.batch_size=12 does not divide by the 1 dev"),
        (lambda c: c.lora.update(rank=17), "rank of .*found 17"),
        (lambda c: c.student.update(blocks="calibrated"), "needs images"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message, config, teacher, images):
    change(config)
    with pytest.raises(ValueError, match=message):
        train(build_distiller(config, teacher), images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.train.update(batch_size=12, accumulation=8), "train.batch_size=12 does not divide"),
        (lambda c: c.lora.update(rank=17), "rank of query.*found 17"),
        (lambda c: c.optim.update(kind="sgd"), "optim.kind: expected one of"),
        (lambda c: c.lora.update(preset="plain", warm_start=True), "warm start writes into fc2"),
    ],
)
def test_what_cannot_train_is_found_without_an_update(change, message, config, teacher, monkeypatch):
    monkeypatch.setattr("vit_distill.train.train_loop", lambda *args, **kwargs: pytest.fail("trained"))
    config.train.batch_size = 8
    change(config)
    with pytest.raises(ValueError, match=message):
        check_trains(build_distiller(config, teacher))


@pytest.mark.parametrize("method", ["lora", "full", "scratch"])
@pytest.mark.parametrize("cached_views", [0, 2])
def test_what_trains_passes_the_check(method, cached_views, config, teacher):
    config.student.method, config.train.cached_views, config.train.accumulation = method, cached_views, 2
    check_trains(build_distiller(config, teacher))


def test_the_warm_start_sees_images_of_the_whole_set(config, teacher, images, monkeypatch):
    """Sets are sorted by class: the first images would be of one class."""
    config.lora.warm_start, config.calibration.num_images = True, 4
    monkeypatch.setattr("vit_distill.train.warm_start", lambda *args, **kwargs: args[4])
    expected = teacher.preprocessing.evaluate(jnp.asarray(images.images(np.array([0, 4, 7, 11]))))
    np.testing.assert_array_equal(start_values(build_distiller(config, teacher), images), expected)


@pytest.mark.parametrize("method", ["full", "scratch"])
def test_training_all_weights_keeps_the_teachers_head(method, config, teacher, images):
    """No loss reaches it, but weight decay does."""
    small = dataclasses.replace(CONFIG, num_classes=3)
    params = dict(teacher.params) | {"head": {"kernel": np.ones((16, 3), np.float32), "bias": np.ones(3, np.float32)}}
    config.student.method = method
    config.optim.update(weight_decay=5.0, learning_rate=0.1)
    distiller = build_distiller(config, dataclasses.replace(teacher, config=small, params=params))
    trained, _ = run_one(distiller, {"image": images.images(np.arange(8))}, steps=2)
    assert leaves_equal(distiller.merged(trained)["head"], params["head"])
    assert not leaves_equal(distiller.merged(trained)["block_00"], distiller.base["block_00"])


@pytest.mark.parametrize("target", ["pre_norm", "post_norm"])
def test_a_student_from_scratch_has_the_teachers_norm_where_no_loss_reaches_it(target, config, teacher, images):
    config.student.method, config.loss.target = "scratch", target
    distiller = build_distiller(config, teacher)
    trained, _ = run_one(distiller, {"image": images.images(np.arange(8))})
    expected = teacher.params if target == "pre_norm" else trained
    assert leaves_equal(distiller.merged(trained)["norm"], expected["norm"])
    assert not leaves_equal(distiller.base["norm"], teacher.params["norm"])


@pytest.mark.parametrize("method", ["lora", "full", "scratch"])
def test_attention_pooling_stays_the_teachers(method, config, teacher, images):
    """No loss reaches it, but weight decay does."""
    pooling = dataclasses.replace(CONFIG, pool="attention")
    config.student.method = method
    config.optim.update(weight_decay=5.0, learning_rate=0.1)
    params = init_params(pooling, jax.random.key(3))
    distiller = build_distiller(config, dataclasses.replace(teacher, config=pooling, params=params))
    trained, _ = run_one(distiller, {"image": images.images(np.arange(8))}, steps=2)
    assert leaves_equal(distiller.merged(trained)["pool"], params["pool"])


def test_comparing_in_batches_changes_nothing(config, teacher, images, monkeypatch):
    distiller = build_distiller(config, teacher)
    adapters = jax.tree.map(lambda leaf: leaf + 0.05, distiller.init_trainable(jax.random.key(0)))
    found = {}
    for size in (5, 12):
        monkeypatch.setattr("vit_distill.evaluate.BATCH", size)
        found[size] = compare(distiller, adapters, images.images(np.arange(12)))
    assert found[5][0] == pytest.approx(found[12][0], rel=1e-6)
    for rows, expected in zip(found[5][1:], found[12][1:], strict=True):
        for row, other in zip(rows, expected, strict=True):
            assert row == pytest.approx(other, rel=1e-6)
    assert 0 < found[5][2][-1]["cka"] < 1


def test_cached_features_of_eight_devices_are_those_of_one(config, teacher, images, monkeypatch):
    """12 rows over 8 devices: each batch is split, and filled up where it does not divide."""
    config.train.update(cached_views=1, batch_size=8)
    one = build_distiller(config, teacher)
    devices = []

    def spy(distiller: Distiller) -> Callable:
        targets_fn = make_targets_fn(distiller)
        return lambda params, views: devices.append(len(views.sharding.device_set)) or targets_fn(params, views)

    monkeypatch.setattr("vit_distill.teacher_cache.make_targets_fn", spy)
    features = [
        build_cache(distiller, images.pixels, "hash", None).features
        for distiller in (one, dataclasses.replace(one, mesh=make_mesh()))
    ]
    np.testing.assert_allclose(features[1], features[0], atol=1e-5)
    assert devices == [1, 1, 8, 8]


def test_hosts_together_show_the_views_of_one(images):
    """Two hosts' parts of every batch, one after the other, are the batch of one host: images and their views."""
    cache = TeacherCache(np.zeros((1, 12 * 3, 1, 1), np.float32), 3)

    def shown(index: int, count: int) -> list[list[tuple[int, int]]]:
        process = dict(process_index=index, process_count=count)
        batches = train_batches(images, 8, seed=0, start_step=1, num_steps=9, **process)
        found = cached_batches(batches, cache, 12, 0, 1, **process)
        return [list(zip(batch["index"].tolist(), batch["view"].tolist(), strict=True)) for batch in found]

    together = [first + second for first, second in zip(shown(0, 2), shown(1, 2), strict=True)]
    assert together == shown(0, 1)
    views = [view for batch in together for image, view in batch if image == 0]
    assert len(set(views[:3])) == 3  # another view in each epoch
