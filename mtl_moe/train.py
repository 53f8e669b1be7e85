"""Trains the detector: config and data in, checkpoints and metrics.jsonl out. Run the same command again to resume."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from core.checkpoint import Checkpointer, has_checkpoint
from core.logs import MetricLogger
from core.loop import train_loop
from core.mesh import check_batch_size
from core.optim import build_optimizer
from core.state import TrainState
from core.step import make_train_step_fn
from core.workdir import save_config
from input_pipeline.batches import train_batches
from input_pipeline.dataset import Dataset
from mtl_moe.losses import make_loss_fn
from mtl_moe.system import System, sample_images
from mtl_moe.teacher import make_refresh_fn, needs_teacher
from mtl_moe.tiling import random_tiles
from mtl_moe.training_data import FILE, bind_training_data

SAMPLINGS = ("images", "groups")


def train(system: System, dataset: Dataset, workdir: Path) -> TrainState:
    """Trains to `config.train.num_steps`, from the newest checkpoint of `workdir` if there is one.

    The folder is written to only after an update could be traced, and bound to the config and the training images by
    its first checkpoint, so that a mistake can be mended in the same folder.

    Returns:
      The last state, saved.

    Raises:
      ValueError: for a config that cannot be trained, or a folder of a detector that learned from other images.
    """
    config = system.config
    check_batch_size(config.train.batch_size, config.train.accumulation, system.mesh)
    if config.train.sampling not in SAMPLINGS:
        raise ValueError(f"train.sampling: expected one of {SAMPLINGS}, found {config.train.sampling!r}")
    tx = build_optimizer(config.optim, config.train.num_steps)
    step_fn = make_update_fn(system, tx)
    size = config.data.image_size
    image = jax.ShapeDtypeStruct((config.train.batch_size, size, size, config.data.channels), jnp.uint8)
    jax.eval_shape(step_fn, system.abstract_state(tx), {"image": image}, jax.random.key(0))
    learned, first_host = has_checkpoint(workdir), jax.process_index() == 0
    if first_host and not learned:
        _check_own(workdir)
        for name in (FILE, "config.json"):  # of a run that ended before it had learned anything
            (workdir / name).unlink(missing_ok=True)
    if first_host or learned:  # another host might read what the first one is about to remove
        bind_training_data(dataset, workdir)
    save_config(config, workdir)

    state = system.init_state(tx, dataset)
    with Checkpointer(workdir) as checkpointer:
        state = checkpointer.resume(state)
        start = int(state.step)
        refresh = _refresh_event(system, dataset)
        if refresh and start >= config.train.refresh_step and not bool(state.extra["teacher"]["refreshed"]):
            state = refresh(state)  # its time was the end of a shorter run, or the very start
        batches = train_batches(
            dataset.splits["train"],
            config.train.batch_size,
            seed=config.seed,
            start_step=start,
            num_steps=config.train.num_steps,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            by_group=config.train.sampling == "groups",
        )
        # Metrics are the same on every host: the first one writes them where users look.
        host = jax.process_index()
        with MetricLogger(workdir / f"host_{host}" if host else workdir, start, config.train.tensorboard) as logger:
            return train_loop(
                state,
                step_fn,
                ({"image": batch["image"]} for batch in batches),
                key=jax.random.key(config.seed + 1),
                num_steps=config.train.num_steps,
                mesh=system.mesh,
                logger=logger,
                checkpointer=checkpointer,
                log_every=config.train.log_every,
                save_every=config.train.save_every,
                images_per_step=config.train.batch_size,
                events={config.train.refresh_step: refresh} if refresh else {},
            )


def make_update_fn(system: System, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Compiled update as `core.step.make_train_step_fn` gives it, of the training loss and with its micro-batches."""
    train, loss_fn = system.config.train, make_loss_fn(system.model, system.config, system.tasks)
    return make_train_step_fn(loss_fn, tx, ema_decay=train.ema_decay, accumulation=train.accumulation)


def _check_own(workdir: Path) -> None:
    """Raises ValueError if the config.json of a folder without checkpoints is not that of a detector's own run."""
    path = workdir / "config.json"
    try:
        found = json.loads(path.read_text()) if path.exists() else {"system": "mtl_moe"}
    except ValueError:
        found = None
    own = isinstance(found, dict) and found.get("system") == "mtl_moe" and "command" not in found
    if not own or found.get("num_seeds", 1) != 1:
        raise ValueError(f"{path} is of something else than the training of one detector: use another --workdir")


def _refresh_event(system: System, dataset: Dataset) -> Any:
    """Refresh of the pseudo-labels, state -> state; None where no task reads any, or the run ends before."""
    config = system.config
    if not needs_teacher(system.tasks):
        return None
    if config.train.refresh_step >= config.train.num_steps:
        logging.warning(
            "train.refresh_step=%d is not before the end of the run (train.num_steps=%d): pseudo-labels stay those of "
            "raw patches and of an untrained encoder",
            config.train.refresh_step,
            config.train.num_steps,
        )
        return None
    images = random_tiles(jax.random.key(config.seed), sample_images(dataset, config.seed), system.model.image_size)
    refresh = make_refresh_fn(system.model.config, images, system.num_clusters, config.seed)

    def event(state: TrainState) -> TrainState:
        teacher = refresh(state.ema_params, jax.device_get(state.extra["teacher"]))
        return state.replace(extra=state.extra | {"teacher": system.place(teacher)})

    return event
