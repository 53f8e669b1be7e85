"""Trains the detector: config and data in, checkpoints and metrics.jsonl out. Run the same command again to resume."""

from pathlib import Path
from typing import Any

import jax

from core.checkpoint import Checkpointer
from core.logs import MetricLogger
from core.loop import train_loop
from core.mesh import check_batch_size
from core.optim import build_optimizer
from core.state import TrainState
from core.step import make_train_step_fn
from input_pipeline.dataset import Dataset, train_batches
from mtl_moe.losses import make_loss_fn
from mtl_moe.system import System, sample_images
from mtl_moe.teacher import make_refresh_fn, needs_teacher


def train(system: System, dataset: Dataset, workdir: Path) -> TrainState:
    """Trains to `config.train.num_steps`, from the newest checkpoint of `workdir` if there is one.

    Returns:
      The last state, saved.
    """
    config = system.config
    check_batch_size(config.train.batch_size, config.train.accumulation, system.mesh)
    tx = build_optimizer(config.optim, config.train.num_steps)
    state = system.init_state(tx, dataset)
    checkpointer = Checkpointer(workdir)
    if checkpointer.latest_step() is not None:
        state = checkpointer.restore_train(state)
        print(f"resuming after step {int(state.step)}")
    start = int(state.step)

    step_fn = make_train_step_fn(
        make_loss_fn(system.model, config, system.tasks),
        tx,
        ema_decay=config.train.ema_decay,
        accumulation=config.train.accumulation,
    )
    batches = train_batches(
        dataset.splits["train"],
        config.train.batch_size,
        seed=config.seed,
        start_step=start,
        num_steps=config.train.num_steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    try:
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
                events=_events(system, dataset),
            )
    finally:
        checkpointer.close()


def _events(system: System, dataset: Dataset) -> dict[int, Any]:
    """Refresh of the pseudo-labels, once."""
    config = system.config
    if not needs_teacher(system.tasks) or config.train.refresh_step >= config.train.num_steps:
        return {}
    refresh = make_refresh_fn(
        system.model.config, sample_images(dataset, config.seed), system.num_clusters, config.seed
    )

    def event(state: TrainState) -> TrainState:
        teacher = refresh(state.ema_params, jax.device_get(state.extra["teacher"]))
        return state.replace(extra=state.extra | {"teacher": system.place(teacher)})

    return {config.train.refresh_step: event}
