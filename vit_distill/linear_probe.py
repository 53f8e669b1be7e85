"""The linear probe of MAE and WeCoLoRA: batch norm without affine, one dense layer, LARS; on features in memory.

Axes: N images, D feature width, F classes or findings, G learning rates, B batch. All G learning rates train at once on
the same batches. Batch statistics normalise in training; at evaluation, where the reference has a running average of
the last batches' statistics, those of the whole training set do (features are frozen, so they are known).
"""

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from core.logs import progress_bar
from core.optim import build_schedule

NORM_EPS = 1e-6
INIT_STD = 0.01


class LinearHeads(NamedTuple):
    """G trained heads: kernel [G, D, F], bias [G, F]; mean and variance [D] of the training features."""

    kernel: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    def scores(self, features: np.ndarray, index: int) -> np.ndarray:
        """Logits [n, F] of features [n, D] by the head of learning rate `index`."""
        normed = (features - self.mean[None]) / np.sqrt(self.variance[None] + NORM_EPS)
        return normed @ self.kernel[index] + self.bias[index][None]


class _State(NamedTuple):
    heads: Any  # {"kernel": [G, D, F], "bias": [G, F]}
    optimizer: Any


def train_linear(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    learning_rates: Sequence[float],
    epochs: int,
    warmup_epochs: int,
    batch_size: int,
    seed: int,
) -> LinearHeads:
    """Trains one head for each learning rate: LARS (momentum 0.9, trust 0.001, no decay), warm-up, cosine to 0.

    Every epoch is cut into ceil(N / batch_size) equal batches of a fresh order; of the images that cannot be shared out
    equally (fewer than batches) other ones sit out each time.

    Args:
      features: float32 [N, D].
      labels: int32 [N] (softmax cross-entropy) or {0, 1} [N, F] (binary cross-entropy).
      learning_rates: G peaks for 256 images a batch, scaled with the batch.

    Raises:
      ValueError: for fewer than two images a batch, or weights that became infinite (with the learning rate).
    """
    steps = -(-len(features) // batch_size) if batch_size > 0 else 0
    size = len(features) // max(steps, 1)
    if size < 2 or not steps or epochs < 1:
        raise ValueError(
            f"linear probe: expected two images a batch and an epoch at least, found {len(features)} images, "
            f"batch_size {batch_size}, epochs {epochs}"
        )
    x, y = jnp.asarray(features, jnp.float32), jnp.asarray(labels)
    peaks = jnp.asarray(learning_rates, jnp.float32) * size / 256
    key_init, key_order = jax.random.split(jax.random.key(seed))
    state = _init(key_init, len(learning_rates), x.shape[1], num_classes)
    warmup = max(warmup_epochs * steps, 1)
    with progress_bar(epochs * steps, scale=size, description="linear probe") as bar:
        for epoch in range(epochs):
            order = jax.random.permutation(jax.random.fold_in(key_order, epoch), len(x))
            rows = order[: steps * size].reshape(steps, size)
            state = _train_epoch(state, x, y, rows, peaks, warmup, epochs * steps)
            bar.update(steps)
    kernel, bias = (np.asarray(state.heads[name]) for name in ("kernel", "bias"))
    heads = LinearHeads(kernel, bias, np.asarray(x.mean(0)), np.asarray(x.var(0)))
    finite = np.isfinite(heads.kernel).all((1, 2)) & np.isfinite(heads.bias).all(1)
    if not finite.all():
        bad = [rate for rate, good in zip(learning_rates, finite, strict=True) if not good]
        raise ValueError(f"linear probe: the weights became infinite at learning rate {bad}: take it off the grid")
    return heads


def _optimizer(peak: jax.Array | float, warmup: int, total: int) -> optax.GradientTransformation:
    unit = build_schedule(SimpleNamespace(learning_rate=1.0, warmup_steps=warmup), total)
    # As MAE's LARS (optax.lars has the rate inside the momentum): decay is 0, the trust ratio is for matrices only.
    trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=0.001), {"kernel": True, "bias": False})
    return optax.chain(trust, optax.trace(0.9), optax.scale_by_learning_rate(lambda step: peak * unit(step)))


def _init(key: jax.Array, num_heads: int, width: int, num_classes: int) -> _State:
    """The same initial weights for every learning rate."""
    kernel = INIT_STD * jax.random.normal(key, (1, width, num_classes))
    heads = {
        "kernel": jnp.broadcast_to(kernel, (num_heads, width, num_classes)),
        "bias": jnp.zeros((num_heads, num_classes)),
    }
    return _State(heads, jax.vmap(_optimizer(0.0, 1, 1).init)(heads))


@functools.partial(jax.jit, static_argnames=("warmup", "total"))
def _train_epoch(
    state: _State, x: jax.Array, y: jax.Array, rows: jax.Array, peaks: jax.Array, warmup: int, total: int
) -> _State:
    """One pass over the batches `rows` int32 [steps, B]."""

    def loss_fn(head: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        logits = inputs @ head["kernel"] + head["bias"][None]
        if labels.ndim == 2:
            return optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype)).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def update(peak: jax.Array, head: Any, optimizer: Any, inputs: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(loss_fn)(head, inputs, labels)
        updates, optimizer = _optimizer(peak, warmup, total).update(grads, optimizer, head)
        return optax.apply_updates(head, updates), optimizer

    def step(state: _State, batch: jax.Array) -> tuple[_State, None]:
        inputs, labels = x[batch], y[batch]
        normed = (inputs - inputs.mean(0)[None]) * jax.lax.rsqrt(inputs.var(0)[None] + NORM_EPS)
        heads, optimizer = jax.vmap(update, in_axes=(0, 0, 0, None, None))(
            peaks, state.heads, state.optimizer, normed, labels
        )
        return _State(heads, optimizer), None

    return jax.lax.scan(step, state, rows)[0]
