"""Trains a student: few-shot images in, what was trained out; with a work directory resumable by the same command."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from core.checkpoint import Checkpointer, CheckpointError, has_checkpoint
from core.dense import DTYPES
from core.logs import MetricLogger
from core.loop import train_loop
from core.mesh import check_batch_size
from core.optim import build_optimizer
from core.sampling import even_rows
from core.state import TrainState
from input_pipeline.batches import train_batches
from input_pipeline.classification import LabelledSet
from vit_distill.distill import (
    Distiller,
    base_fingerprint,
    build_state,
    make_step_fn,
    restore_target,
    start_fingerprint,
    trace_update,
)
from vit_distill.evaluate import run_blocks
from vit_distill.forward import part_size
from vit_distill.teacher_cache import build_cache, cached_batches
from vit_distill.warm_start import check_targets, warm_start


def train(
    distiller: Distiller, images: LabelledSet, workdir: Path | None = None, cache_folder: Path | None = None
) -> TrainState:
    """Trains to `config.train.num_steps`, adapters from their closed-form start if config.lora.warm_start says so.

    Args:
      images: the few-shot images at teacher.preprocessing.resize_size; labels are not looked at.
      workdir: for checkpoints, metrics.jsonl and cached features; the newest checkpoint there is continued. None
        trains in memory.
      cache_folder: where a run in memory keeps (and finds) cached teacher features; None: in memory as well.

    Raises:
      ValueError: if the batch does not divide over devices and micro-batches, or the student has nothing to train.
      CheckpointError: if the checkpoint was trained on another base.
    """
    config = distiller.config
    check_batch_size(config.train.batch_size, config.train.accumulation, distiller.mesh)
    tx = build_optimizer(config.optim, config.train.num_steps)
    if workdir is None:
        state = build_state(distiller, tx, start_values(distiller, images))
        return _loop(distiller, images, state, tx, cache_folder, None, None)
    with Checkpointer(workdir) as checkpointer:
        state = _restored(distiller, tx, checkpointer, workdir)
        if state is None:
            state = build_state(distiller, tx, start_values(distiller, images))
        else:
            print(f"resuming after step {int(state.step)}")
        host = jax.process_index()
        folder = workdir / f"host_{host}" if host else workdir
        with MetricLogger(folder, int(state.step), config.train.tensorboard) as logger:
            return _loop(distiller, images, state, tx, folder / "teacher_features", logger, checkpointer)


def check_trains(distiller: Distiller, workdir: Path | None = None) -> None:
    """Finds what would stop `train`, without an update and before it has written anything.

    Raises:
      ValueError: for a batch, rank, optimiser or loss that does not fit the student.
      CheckpointError: for a checkpoint of `workdir` that does not.
    """
    config = distiller.config
    check_batch_size(config.train.batch_size, config.train.accumulation, distiller.mesh)
    if distiller.lora and config.lora.warm_start:
        check_targets(distiller.lora)
    tx = build_optimizer(config.optim, config.train.num_steps)
    trace_update(distiller, tx)
    if workdir is not None and has_checkpoint(workdir):
        with Checkpointer(workdir) as checkpointer:
            _restored(distiller, tx, checkpointer, workdir)


def _restored(
    distiller: Distiller, tx: optax.GradientTransformation, checkpointer: Checkpointer, workdir: Path
) -> TrainState | None:
    """The newest checkpoint, None where there is none."""
    if checkpointer.latest_step() is None:
        return None
    state = checkpointer.restore_train(restore_target(distiller, tx))
    check_base(distiller, state.extra, workdir)
    return state


def start_values(distiller: Distiller, images: LabelledSet) -> Any:
    """Adapters of the closed-form start, solved on `config.calibration.num_images` of the images; None without."""
    config, teacher = distiller.config, distiller.teacher
    if not (distiller.lora and config.lora.warm_start):
        return None
    sample = images.pixels.images(even_rows(len(images), config.calibration.num_images))
    inputs = np.asarray(teacher.preprocessing.evaluate(jnp.asarray(sample)))
    size = min(32, len(inputs))
    targets = run_blocks(teacher.config, teacher.params, inputs, size, distiller.pairs, DTYPES[config.teacher.dtype])
    return warm_start(
        distiller.student_config,
        distiller.base,
        distiller.init_trainable(jax.random.key(config.seed)),
        distiller.lora,
        inputs,
        targets,
        batch_size=part_size(distiller.student_config, size),
        dtype=DTYPES[config.train.dtype],
    )


def check_base(distiller: Distiller, extra: Any, workdir: Path) -> None:
    """Raises CheckpointError if a checkpoint's adapters were trained on other start weights than the distiller's."""
    found, expected = np.asarray(extra["base"], np.uint8), base_fingerprint(distiller)
    # Students from scratch of earlier versions hold the sha256 of what was drawn, on the device that it was drawn on.
    if not any(np.array_equal(found, own) for own in (expected, start_fingerprint(distiller))):
        advice = ""
        if distiller.config.student.method == "scratch":
            advice = "; of an earlier version, a student from scratch is read where it was trained"
        raise CheckpointError(
            f"{workdir}: what was trained there stands on other start weights (sha256 {bytes(found).hex()[:12]}) than "
            f"teacher.checkpoint and student.* give now ({bytes(expected).hex()[:12]}): use the same teacher file, or "
            f"another --workdir{advice}"
        )


def _loop(
    distiller: Distiller,
    images: LabelledSet,
    state: TrainState,
    tx: Any,
    cache_folder: Path | None,
    logger: MetricLogger | None,
    checkpointer: Checkpointer | None,
) -> TrainState:
    config = distiller.config
    return train_loop(
        state,
        make_step_fn(distiller, tx),
        training_batches(distiller, images, int(state.step), cache_folder),
        key=jax.random.key(config.seed + 1),
        num_steps=config.train.num_steps,
        mesh=distiller.mesh,
        logger=logger,
        checkpointer=checkpointer,
        log_every=config.train.log_every,
        save_every=config.train.save_every,
        images_per_step=config.train.batch_size,
    )


def training_batches(
    distiller: Distiller, images: LabelledSet, start: int, cache_folder: Path | None
) -> Iterator[dict[str, np.ndarray]]:
    """Host batches from update `start` on; with cached views the teacher's features are in them."""
    config = distiller.config
    process = dict(process_index=jax.process_index(), process_count=jax.process_count())
    batches = train_batches(
        images,
        config.train.batch_size,
        seed=config.seed,
        start_step=start,
        num_steps=config.train.num_steps,
        **process,
    )
    if not config.train.cached_views:
        return ({"image": batch["image"]} for batch in batches)
    cache = build_cache(distiller, images.pixels, images.manifest_hash(), cache_folder)
    return cached_batches(batches, cache, len(images), config.seed, start, **process)
