"""One training update as a compiled function of (state, batch, key)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from core.state import TrainState

# loss_fn(params, extra, batch, key, step, *frozen) -> (loss, (metrics, extra))
LossFn = Callable[..., tuple[jax.Array, tuple[dict[str, jax.Array], Any]]]


def make_train_step_fn(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, ema_decay: float, accumulation: int = 1
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Compiled update: (state, batch, run key, *frozen) -> (state, metrics). The state's buffers are donated.

    What is passed as `frozen` reaches the loss function as it is: weights that neither train nor are saved. The update
    also takes `learning_rate` (a scalar), the peak in place of the optimizer's own: other rates compile nothing anew.

    Args:
      loss_fn: mean loss over the batch it is given.
      ema_decay: decay of the averaged parameters; ramped up as (1 + t) / (10 + t) at the start.
      accumulation: micro-batches per update. Gradients are averaged over them; the batch must divide by it.
    """

    def grads_of(params, extra, batch, key, step, *frozen):
        (loss, (metrics, extra)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, extra, batch, key, step, *frozen
        )
        return grads, extra, metrics | {"loss": loss}

    def accumulated(params, extra, batch, key, step, *frozen):
        size = jax.tree.leaves(batch)[0].shape[0]
        if size % accumulation:
            raise ValueError(f"batch size {size} does not divide by train.accumulation {accumulation}")
        # Strided micro-batches: with the batch split over devices, each device keeps its own rows.
        micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch)

        def body(carry, inputs):
            grads, extra = carry
            index, rows = inputs
            new, extra, metrics = grads_of(params, extra, rows, jax.random.fold_in(key, index), step, *frozen)
            return (jax.tree.map(jnp.add, grads, new), extra), metrics

        zeros = jax.tree.map(jnp.zeros_like, params)
        (grads, extra), metrics = jax.lax.scan(body, (zeros, extra), (jnp.arange(accumulation), micro))
        return jax.tree.map(lambda g: g / accumulation, grads), extra, jax.tree.map(lambda m: m.mean(0), metrics)

    def train_step(
        state: TrainState, batch: Any, key: jax.Array, *frozen: Any, learning_rate: Any = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        compute = grads_of if accumulation == 1 else accumulated
        grads, extra, metrics = compute(state.params, state.extra, batch, key, state.step, *frozen)
        # Optimizers of optax alone take no rate.
        given = {} if learning_rate is None else {"learning_rate": learning_rate}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **given)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
        ema = optax.incremental_update(params, state.ema_params, 1.0 - decay)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(step, params, ema, opt_state, extra), metrics

    return jax.jit(train_step, donate_argnums=0)
