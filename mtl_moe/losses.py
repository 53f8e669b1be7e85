"""The training loss: every task on its own corruption of the same images, one forward, weighted sum.

Axes: B images, T tasks. Each task's loss is divided by its running mean over the first `scale_steps` updates, so that
after this warm-up all tasks weigh about 1 and stay in proportion.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_moe.augment import augment
from mtl_moe.model import Detector
from mtl_moe.tasks import Task
from mtl_moe.tasks.base import to_float
from mtl_moe.teacher import make_teacher
from mtl_moe.tiling import random_tiles


def init_extra(num_tasks: int) -> dict[str, jax.Array]:
    """State of the loss scales: sum of each task's loss over the warm-up, and how many updates it holds."""
    return {"loss_sum": jnp.zeros(num_tasks), "loss_count": jnp.zeros(())}


def make_corrupt_fn(model: Detector, config: Any, tasks: Sequence[Task]) -> Callable[..., Any]:
    """Function (extra, images, augmentation key, task key) -> (inputs, targets): every task's corruption of the images.

    Images are float32 [B, H, W, C] in [0, 1]; inputs are the model's, one view a task [1, B, H, W, C + 1]; targets are
    what `Task.loss` takes. Both are dicts by task name.
    """
    augments = [config.tasks[task.name].augment for task in tasks]

    def corrupt(extra: Any, images: jax.Array, key_augment: jax.Array, key_tasks: jax.Array) -> Any:
        # One augmented copy for all tasks that ask for the same kind: pseudo-labels are computed once for it.
        copies = {
            kind: augment(jax.random.fold_in(key_augment, i), images, kind)
            for i, kind in enumerate(sorted({*augments}))
        }
        teachers = {
            kind: make_teacher(model.config, extra["teacher"], copies[kind], model.dtype)
            for kind in {a for a, task in zip(augments, tasks, strict=True) if task.needs_teacher}
        }
        inputs, targets = {}, {}
        for i, (task, kind) in enumerate(zip(tasks, augments, strict=True)):
            view, target = task.corrupt(jax.random.fold_in(key_tasks, i), copies[kind], teachers.get(kind))
            inputs[task.name], targets[task.name] = view[None], target
        return inputs, targets

    return corrupt


def make_loss_fn(model: Detector, config: Any, tasks: Sequence[Task]) -> Callable[..., Any]:
    """Loss function for `core.step`: (params, extra, batch, key, step) -> (loss, (metrics, extra)).

    `batch` holds uint8 `image` [B, H, W, C]. Metrics: loss/<task> unscaled, router/<block>/{balance, entropy/<task>}.
    """
    if config.train.scale_steps < 1:
        raise ValueError(
            f"train.scale_steps={config.train.scale_steps}: expected at least 1 update to measure scales on"
        )
    weights = jnp.array([config.tasks[task.name].weight for task in tasks], jnp.float32)
    corrupt = make_corrupt_fn(model, config, tasks)

    def loss_fn(params: Any, extra: Any, batch: Any, key: jax.Array, step: jax.Array) -> Any:
        key_augment, key_router, key_tasks = jax.random.split(key, 3)
        images = random_tiles(jax.random.fold_in(key, 3), batch["image"], model.image_size)
        inputs, targets = corrupt(extra, to_float(images), key_augment, key_tasks)
        outputs, aux = model.apply({"params": params}, inputs, train=True, rngs={"router": key_router})

        losses = jnp.stack([task.loss(outputs[task.name][0], targets[task.name]).mean() for task in tasks])
        extra, scale = _loss_scale(extra, losses, step, config.train.scale_steps)
        loss = (weights * losses * scale).sum() / weights.sum()
        metrics = {f"loss/{task.name}": value for task, value in zip(tasks, losses, strict=True)}
        for name, stats in aux.items():
            loss += config.train.balance_weight * stats["load_balance"] + config.train.z_weight * stats["z_loss"]
            metrics[f"router/{name}/balance"] = stats["load_balance"]
            metrics |= {f"router/{name}/entropy/{t.name}": stats["entropy"][i] for i, t in enumerate(tasks)}
        return loss, (metrics, extra)

    return loss_fn


def _loss_scale(extra: Any, losses: jax.Array, step: jax.Array, scale_steps: int) -> tuple[Any, jax.Array]:
    losses = jax.lax.stop_gradient(losses)
    warm = (step < scale_steps).astype(jnp.float32)
    total = extra["loss_sum"] + warm * losses
    count = extra["loss_count"] + warm
    return extra | {"loss_sum": total, "loss_count": count}, count / (total + 1e-8)
