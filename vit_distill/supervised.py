"""Trains a vision transformer on labels from scratch: a teacher where none is published for the data at hand.

The result is a folder in timm's format, `WORKDIR/teacher`, that `vit_distill.teacher.load_teacher` (and timm) read like
any other checkpoint. Axes: B batch, H W C image, S side of the stored images, F classes, D width, K heads.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from core import tree
from core.checkpoint import Checkpointer
from core.compilation import enable_compilation_cache
from core.dense import named_dtype
from core.files import write_json
from core.logs import MetricLogger, progress_bar
from core.loop import train_loop
from core.mesh import check_batch_size, make_mesh, replicate, shard_batch
from core.optim import build_optimizer
from core.provenance import environment
from core.sampling import even_rows
from core.state import TrainState, init_state
from core.step import LossFn, make_train_step_fn
from core.vit import VisionTransformer, VitConfig
from core.workdir import LOGGING, check_config, save_config
from input_pipeline.batches import eval_batches, train_batches
from input_pipeline.classification import LabelledSet, load_labelled
from vit_distill.formats.timm import write_timm_folder
from vit_distill.preprocessing import Preprocessing
from vit_distill.supervised_augment import mixup, random_crop

# Without data.skip_corrupt of READING: nothing but the config says which images a teacher learns from.
FREE_FIELDS = ("data.root", "data.memory_limit_gb", *LOGGING, "train.num_steps")
STATISTICS_IMAGES = 5000  # mean and std of the channels are taken over so many training images at most
STATISTICS_BATCH = 64  # images read at a time for them


def run_teacher(config: Any, workdir: Path) -> dict[str, Any]:
    """Trains (or resumes), chooses the weights on the validation split, tests once, exports `workdir/teacher`.

    Args:
      config: configs/vit_distill/teacher.py.
      workdir: gets checkpoints/, metrics.jsonl, config.json, teacher/ and report.json.

    Returns:
      The content of report.json: metrics (`split/dataset/top1`), chosen ("averaged" or "last" weights).

    Raises:
      ValueError: for data without one class an image, another config than the work directory's, sizes that do not fit.
    """
    enable_compilation_cache()
    check_config(config, workdir, FREE_FIELDS)
    dtype = named_dtype(config.train.dtype, "train.dtype")
    preprocessing, sets = load_sets(config)
    vit = build_vit_config(config.model, config.data.channels, len(sets["train"].classes))
    model, mesh = VisionTransformer(vit, dtype=dtype), make_mesh()
    check_batch_size(config.train.batch_size, config.train.accumulation, mesh)
    save_config(config, workdir)
    start = time.time()
    state = train(config, model, preprocessing, sets["train"], mesh, workdir)
    seconds = time.time() - start

    logits_fn = make_logits_fn(model, preprocessing)
    size = config.train.batch_size
    candidates = {"averaged": state.ema_params, "last": state.params}
    valid = {
        name: accuracy(logits_fn, params, sets["valid"], size, mesh, f"valid, {name} weights")
        for name, params in candidates.items()
    }
    chosen = max(valid, key=valid.get)
    params = jax.device_get(candidates[chosen])
    name = sets["train"].name
    metrics = {
        f"valid/{name}/top1": valid[chosen],
        f"test/{name}/top1": accuracy(logits_fn, candidates[chosen], sets["test"], size, mesh, "test"),
    }
    facts = {
        "name": f"supervised_{name}",
        "dataset": name,
        "classes": list(sets["train"].classes),
        "manifest": {split: found.manifest_hash() for split, found in sets.items()},
        "num_images": {split: len(found) for split, found in sets.items()},
        "updates": int(state.step),
        "metrics": metrics,
    }
    write_timm_folder(workdir / "teacher", vit, params, preprocessing, facts)
    report = {
        "command": "teacher",
        "metrics": metrics,
        "chosen": chosen,
        "valid_top1": valid,
        "train_seconds": seconds,  # of this start; a resumed run counts its last part only
        "num_params": tree.num_params(params),
        "teacher": facts,
        "provenance": environment(),
    }
    write_json(workdir / "report.json", report)
    for key, value in metrics.items():
        print(f"  {key:<40} {value:.4f}")
    print(f"teacher: {workdir / 'teacher'} ({chosen} weights)\nreport: {workdir / 'report.json'}")
    return report


def load_sets(config: Any) -> tuple[Preprocessing, dict[str, LabelledSet]]:
    """(preprocessing with the channels' statistics of the training images, the sets "train", "valid" and "test").

    Raises:
      ValueError: if an image has several classes, none, or one that only a later split has.
    """
    model = config.model
    fresh = Preprocessing(model.image_size, (0.5,), (0.5,), model.interpolation, model.crop_fraction)
    sets = {
        split: load_labelled(config.data, split, fresh.resize_size, fresh.interpolation)
        for split in ("train", "valid", "test")
    }
    for split, found in sets.items():
        if found.multi_label or not found.labelled or not len(found.classes):
            kind = "several findings an image" if found.multi_label else "images without a class"
            raise ValueError(
                f"data {found.name}, {split}: expected one class an image to train a teacher, found {kind}"
            )
        if found.classes != sets["train"].classes:
            raise ValueError(f"data {found.name}: the classes of {split} are not those of train")
    mean, std = channel_statistics(sets["train"])
    return Preprocessing(model.image_size, mean, std, model.interpolation, model.crop_fraction), sets


def channel_statistics(found: LabelledSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1], rounded to 4 digits, over evenly spaced images."""
    rows = even_rows(len(found), STATISTICS_IMAGES)
    counts = 0  # of each grey level in each channel: exact, and no copy of all images
    for some in np.array_split(rows, -(-len(rows) // STATISTICS_BATCH)):
        channels = np.moveaxis(found.images(some), -1, 0)
        counts += np.stack([np.bincount(channel.ravel(), minlength=256) for channel in channels])
    values, share = np.arange(256) / 255, counts / counts.sum(1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1))
    return tuple(np.round(mean, 4).tolist()), tuple(np.maximum(np.round(std, 4), 1e-3).tolist())


def build_vit_config(model: Any, channels: int, num_classes: int) -> VitConfig:
    """Architecture of `config.model`: timm's plain ViT; ValueError as VitConfig raises it."""
    return VitConfig(
        depth=model.depth,
        width=model.width,
        num_heads=model.num_heads,
        mlp_dim=model.mlp_dim,
        patch_size=model.patch_size,
        image_size=model.image_size,
        in_channels=channels,
        num_classes=num_classes,
        activation=model.activation,
    )


def make_loss_fn(model: VisionTransformer, preprocessing: Preprocessing, augment: Any) -> LossFn:
    """Cross entropy of batches {image uint8 [B, S, S, C], label int32 [B]}, augmented from the step's key."""
    num_classes = model.config.num_classes

    def loss_fn(params, extra, batch, key, step):
        crop_key, mix_key = jax.random.split(key)
        images = random_crop(crop_key, batch["image"], preprocessing.image_size, augment.padding, augment.flip)
        images = preprocessing.normalise(images.astype(jnp.float32) / 255.0)
        targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], num_classes), augment.label_smoothing)
        if augment.mixup > 0:
            images, targets = mixup(mix_key, images, targets, augment.mixup)
        logits = model.apply({"params": params}, images).logits.astype(jnp.float32)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        hits = (logits.argmax(-1) == batch["label"]).mean()
        return loss, ({"top1": hits}, extra)

    return loss_fn


def train(
    config: Any,
    model: VisionTransformer,
    preprocessing: Preprocessing,
    found: LabelledSet,
    mesh: Mesh,
    workdir: Path,
) -> TrainState:
    """Trains to `config.train.num_steps`, from the newest checkpoint of `workdir` if there is one.

    Returns:
      The last state, saved.
    """
    tx = build_optimizer(config.optim, config.train.num_steps)
    example = jnp.zeros((1, preprocessing.image_size, preprocessing.image_size, model.config.in_channels))
    state = init_state(lambda key: (model.init(key, example)["params"], {}), jax.random.key(config.seed), tx, mesh)
    with Checkpointer(workdir) as checkpointer:
        state = checkpointer.resume(state)
        step_fn = make_train_step_fn(
            make_loss_fn(model, preprocessing, config.augment),
            tx,
            ema_decay=config.train.ema_decay,
            accumulation=config.train.accumulation,
        )
        batches = train_batches(
            found,
            config.train.batch_size,
            seed=config.seed,
            start_step=int(state.step),
            num_steps=config.train.num_steps,
        )
        with MetricLogger(workdir, int(state.step), config.train.tensorboard) as logger:
            return train_loop(
                state,
                step_fn,
                ({"image": batch["image"], "label": found.labels[batch["index"]]} for batch in batches),
                key=jax.random.key(config.seed + 1),
                num_steps=config.train.num_steps,
                mesh=mesh,
                logger=logger,
                checkpointer=checkpointer,
                log_every=config.train.log_every,
                save_every=config.train.save_every,
                images_per_step=config.train.batch_size,
            )


def make_logits_fn(
    model: VisionTransformer, preprocessing: Preprocessing
) -> Callable[[Any, Mapping[str, jax.Array]], jax.Array]:
    """Compiled (params, images uint8 [B, S, S, C]) -> logits float32 [B, F] of the centre crops."""

    @jax.jit
    def logits(params: Any, images: jax.Array) -> jax.Array:
        return model.apply({"params": params}, preprocessing.evaluate(images)).logits.astype(jnp.float32)

    return logits


def accuracy(
    logits_fn: Callable[..., jax.Array], params: Any, found: LabelledSet, batch_size: int, mesh: Mesh, title: str
) -> float:
    """Share of the images whose largest logit is their class; every image is counted once."""
    params, hits = replicate(params, mesh), 0
    with progress_bar(len(found), description=title) as bar:
        for batch in eval_batches(found, batch_size):
            chosen = np.asarray(logits_fn(params, shard_batch({"image": batch["image"]}, mesh)["image"])).argmax(-1)
            hits += int(((chosen == batch["label"]) & batch["valid"]).sum())
            bar.update(int(batch["valid"].sum()))
    return hits / len(found)
