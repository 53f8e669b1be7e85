"""Supervised training: augmentation by hand-made values, one update by autodiff outside Flax, resuming, the export.

Axes: B batch, H W C image, S stored side, F classes.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs.vit_distill import teacher
from core import tree
from core.mesh import make_mesh
from core.optim import build_optimizer
from core.vit import VisionTransformer, VitConfig
from input_pipeline.classification import load_labelled
from vit_distill import supervised
from vit_distill.preprocessing import Preprocessing
from vit_distill.supervised_augment import mixup, random_crop
from vit_distill.teacher import load_teacher

SIDE = 12


def tiny_config(root: Path, **train: Any) -> ConfigDict:
    """Depth 2, width 16 on 8-pixel crops of 12-pixel images, six updates."""
    config = teacher.get_config("micro")
    config.data.update(kind="npz", root=str(root), name="toy", valid_fraction=0.25)
    config.model.update(depth=2, width=16, num_heads=2, mlp_dim=32, patch_size=4, image_size=8, crop_fraction=2 / 3)
    config.optim.update(learning_rate=1e-2, warmup_steps=2)
    config.train.update(batch_size=16, num_steps=6, log_every=2, save_every=3, ema_decay=0.5, tensorboard=False)
    config.train.update(train)
    return config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training and 24 test images of two classes that one colour channel tells apart."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 64), ("test", 24)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 60, (count, SIDE, SIDE, 3), np.uint8)
        images[..., 0] += (labels * 180)[:, None, None].astype(np.uint8)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    path = tmp_path_factory.mktemp("toy") / "toy.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ConfigDict, Path, dict]:
    config, workdir = tiny_config(data), tmp_path_factory.mktemp("teacher")
    return config, workdir, supervised.run_teacher(config, workdir)


def coordinates(batch: int) -> np.ndarray:
    """uint8 [B, SIDE, SIDE, 2]: every pixel holds its row and its column."""
    grid = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), -1).astype(np.uint8)
    return np.repeat(grid[None], batch, 0)


def test_crops_are_squares_of_the_image_at_every_place_and_half_of_them_flipped():
    crops = np.asarray(random_crop(jax.random.key(0), jnp.asarray(coordinates(400)), 8), np.int32)
    assert crops.shape == (400, 8, 8, 2)
    steps = np.diff(crops[:, 0, :, 1], axis=1)
    assert set(np.unique(steps)) == {-1, 1}
    assert 0.4 < (steps[:, 0] == -1).mean() < 0.6
    assert (np.diff(crops[..., 0], axis=1) == 1).all()
    corners = {tuple(corner) for corner in crops.min((1, 2))}
    assert corners == {(row, column) for row in range(5) for column in range(5)}


def test_without_flip_a_crop_that_fills_the_image_is_the_image():
    images = jnp.asarray(coordinates(3))
    np.testing.assert_array_equal(random_crop(jax.random.key(1), images, SIDE, flip=False), images)


def test_padding_mirrors():
    crops = np.asarray(random_crop(jax.random.key(0), jnp.asarray(coordinates(200)), SIDE, 2, flip=False), np.int32)
    rows = {tuple(row) for row in crops[:, :, 0, 0]}
    inside = list(range(SIDE))
    mirrored = [2, 1, *inside, SIDE - 2, SIDE - 3]
    assert rows == {tuple(mirrored[top : top + SIDE]) for top in range(5)}


@pytest.mark.parametrize(("size", "padding", "message"), [(13, 0, "crops of 13"), (8, 12, "augment.padding")])
def test_impossible_crops_are_named(size: int, padding: int, message: str):
    with pytest.raises(ValueError, match=message):
        random_crop(jax.random.key(0), jnp.asarray(coordinates(2)), size, padding)


def test_mixup_keeps_the_same_share_for_image_and_target():
    batch, classes = 6, 6
    targets = jnp.eye(classes)
    images = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.float32)[:, None, None, None], (batch, 2, 2, 1))
    mixed, soft = mixup(jax.random.key(0), images, targets, 0.8)
    share = np.asarray(soft)[np.arange(batch), np.arange(batch)]
    assert (share >= 0.5).all()
    assert share.min() < 0.95
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-6)
    expected = share * np.arange(batch) + (1 - share) * np.arange(batch)[::-1]
    np.testing.assert_allclose(mixed[:, 0, 0, 0], expected, rtol=1e-5)


def tiny_model(**fields: Any) -> tuple[VisionTransformer, Preprocessing]:
    sizes = dict(depth=1, width=8, num_heads=2, mlp_dim=16, patch_size=4, image_size=8, num_classes=3)
    return VisionTransformer(VitConfig(**sizes | fields)), Preprocessing(8, (0.5,) * 3, (0.25,) * 3)


def test_loss_is_smoothed_cross_entropy_of_normalised_images():
    model, preprocessing = tiny_model()
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    labels = np.asarray([0, 2, 1, 1], np.int32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    augment = ConfigDict(dict(padding=0, flip=False, label_smoothing=0.3, mixup=0.0))
    loss_fn = supervised.make_loss_fn(model, preprocessing, augment)
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
    loss, (metrics, _) = jax.jit(loss_fn)(params, {}, batch, jax.random.key(1), jnp.zeros((), jnp.int32))
    logits = np.asarray(model.apply({"params": params}, jnp.asarray((images / 255.0 - 0.5) / 0.25, jnp.float32)).logits)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -(0.7 * log_p[np.arange(4), labels] + 0.3 * log_p.mean(1)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["top1"], (logits.argmax(1) == labels).mean())


def test_muon_orthogonalises_each_kernel_of_a_block_as_a_matrix_and_nothing_else():
    model, _ = tiny_model()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    config = ConfigDict(dict(kind="muon", learning_rate=1.0, warmup_steps=1, weight_decay=0.0, b2=0.95, clip_norm=1e9))
    grads = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape), x.dtype), params)
    tx = build_optimizer(config, 10**6)
    updates = tree.paths(jax.jit(tx.update)(grads, tx.init(params), params)[0])
    matrices = {"query": (8, 8), "key": (8, 8), "value": (8, 8), "out": (8, 8), "fc1": (8, 16), "fc2": (16, 8)}
    found = {path.split("/")[-2]: np.asarray(leaf) for path, leaf in updates.items() if path.endswith("kernel")}
    for name, shape in matrices.items():
        # Singular values near one (the quintic iteration's range), times Liu et al.'s scale.
        values = np.linalg.svd(found[name].reshape(shape), compute_uv=False) / (0.2 * max(shape) ** 0.5)
        assert values.min() > 0.5, name
        assert values.max() < 1.4, name
    for name in ("proj", "head"):  # Adam's first update is the gradient's sign times a constant
        size = np.abs(found[name])
        np.testing.assert_allclose(size, size.mean(), rtol=1e-3)


def test_run_learns_reports_and_exports(run: tuple[ConfigDict, Path, dict], data: Path):
    config, workdir, report = run
    assert json.loads((workdir / "report.json").read_text())["metrics"] == report["metrics"]
    assert set(report["metrics"]) == {"valid/toy/top1", "test/toy/top1"}
    assert report["valid_top1"][report["chosen"]] == max(report["valid_top1"].values())
    assert report["teacher"]["num_images"] == {"train": 48, "valid": 16, "test": 24}

    loaded = load_teacher(str(workdir / "teacher"))
    assert loaded.config.num_classes == 2
    assert loaded.preprocessing.resize_size == SIDE
    test = load_labelled(config.data, "test", SIDE)
    images = jnp.asarray(test.images(np.arange(24)))
    output = VisionTransformer(loaded.config).apply({"params": loaded.params}, loaded.preprocessing.evaluate(images))
    hits = (np.asarray(output.logits).argmax(-1) == test.labels).mean()
    np.testing.assert_allclose(hits, report["metrics"]["test/toy/top1"])
    train = load_labelled(config.data, "train", SIDE).images(np.arange(48)) / 255.0
    np.testing.assert_allclose(loaded.preprocessing.mean, train.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(loaded.preprocessing.std, train.std((0, 1, 2)), atol=1e-4)


def test_grey_images_give_a_teacher_of_one_channel(data: Path, tmp_path: Path):
    config = tiny_config(data, num_steps=1)
    config.data.channels = 1
    report = supervised.run_teacher(config, tmp_path)
    loaded = load_teacher(str(tmp_path / "teacher"))
    assert loaded.config.in_channels == len(loaded.preprocessing.mean) == 1
    images = jnp.asarray(load_labelled(config.data, "test", SIDE).images(np.arange(24)))
    output = VisionTransformer(loaded.config).apply({"params": loaded.params}, loaded.preprocessing.evaluate(images))
    hits = (np.asarray(output.logits).argmax(-1) == load_labelled(config.data, "test", SIDE).labels).mean()
    np.testing.assert_allclose(hits, report["metrics"]["test/toy/top1"])


def test_an_interrupted_run_continues_bit_for_bit(run: tuple[ConfigDict, Path, dict], tmp_path: Path):
    config, workdir, report = run
    shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
    again = supervised.run_teacher(config, tmp_path / "again")
    assert again["metrics"] == report["metrics"]
    name = "teacher/model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (workdir / name).read_bytes()
    assert (tmp_path / "again" / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()


def test_accuracy_counts_each_image_once(data: Path):
    """21 images in batches of 8: the filled-up rows of the last batch count for nothing."""
    found = load_labelled(tiny_config(data).data, "test", SIDE).take(np.arange(21))
    calls = []

    def logits_fn(params: Any, images: jax.Array) -> jax.Array:
        calls.append(len(images))
        red = images[..., 0].astype(jnp.float32).mean((1, 2))
        return jnp.stack([jnp.full_like(red, 120.0), red], -1)

    assert supervised.accuracy(logits_fn, {}, found, 8, make_mesh(), "test") == 1.0
    assert calls == [8, 8, 8]
    flipped = lambda params, images: -logits_fn(params, images)  # noqa: E731
    assert supervised.accuracy(flipped, {}, found, 8, make_mesh(), "test") == 0.0


def test_channel_statistics_are_taken_a_few_images_at_a_time():
    class Images:
        pixels = np.random.default_rng(0).integers(0, 200, (301, SIDE, SIDE, 3), np.uint8) // np.uint8([1, 2, 4])
        most = 0

        def __len__(self) -> int:
            return len(self.pixels)

        def images(self, rows: np.ndarray) -> np.ndarray:
            self.most = max(self.most, len(rows))
            return self.pixels[rows]

    found = Images()
    mean, std = supervised.channel_statistics(found)
    assert found.most <= 64
    np.testing.assert_allclose(mean, (found.pixels / 255).mean((0, 1, 2)), atol=6e-5)  # rounded to 4 digits
    np.testing.assert_allclose(std, (found.pixels / 255).std((0, 1, 2)), atol=6e-5)


def test_a_batch_or_dtype_that_does_not_fit_leaves_no_folder(data: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"train\.batch_size=6 does not divide by the 8 devices"):
        supervised.run_teacher(tiny_config(data, batch_size=6), tmp_path / "run")
    with pytest.raises(ValueError, match=r"train\.dtype: expected one of .*found 'float16'"):
        supervised.run_teacher(tiny_config(data, dtype="float16"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unlabelled_images_are_refused(data: Path, tmp_path: Path):
    with np.load(data) as stored:
        arrays = dict(stored)
    arrays["train_labels"] = np.full(64, -1)
    np.savez(tmp_path / "flat.npz", **arrays)
    with pytest.raises(ValueError, match="one class an image"):
        supervised.load_sets(tiny_config(tmp_path / "flat.npz"))


@pytest.mark.parametrize("preset", sorted(teacher.PRESETS))
def test_every_preset_takes_an_abstract_step(preset: str):
    """Shapes and dtypes of one update; what the checkpoint holds afterwards is what it held before."""
    config = teacher.get_config(preset)
    config.model.depth = 2  # all blocks are alike
    vit = supervised.build_vit_config(config.model, 3, 10)
    model = VisionTransformer(vit, dtype=jnp.dtype(config.train.dtype))
    preprocessing = Preprocessing(
        config.model.image_size, (0.5,) * 3, (0.5,) * 3, "bicubic", config.model.crop_fraction
    )
    tx = build_optimizer(config.optim, config.train.num_steps)
    side, batch = preprocessing.resize_size, config.train.batch_size

    def update(params: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> Any:
        loss_fn = supervised.make_loss_fn(model, preprocessing, config.augment)
        grads = jax.grad(loss_fn, has_aux=True)(
            params, {}, {"image": images, "label": labels}, jax.random.key(0), jnp.zeros((), jnp.int32)
        )[0]
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    example = jnp.zeros((1, vit.image_size, vit.image_size, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), example)["params"])
    opt_state = jax.eval_shape(tx.init, params)
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8)
    after = jax.eval_shape(update, params, opt_state, images, jax.ShapeDtypeStruct((batch,), jnp.int32))
    assert tree.spec(after) == tree.spec((params, opt_state))


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match=r"preset: expected one of .*'micro'.*found 'huge'"):
        teacher.get_config("huge")
