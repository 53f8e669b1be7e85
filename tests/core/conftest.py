"""A toy system with everything that a real one has (experts, noise, extra state, decay mask, schedule), and scores."""

from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from core.optim import build_optimizer

NUM_STEPS = 6


def init_fn(key):
    kernel, w1 = jax.random.split(key)
    params = {
        "dense": {"kernel": jax.random.normal(kernel, (4, 3)), "bias": jnp.zeros(3)},
        "block": {"experts": {"w1": jax.random.normal(w1, (2, 4, 3))}},
    }
    return params, {"count": jnp.zeros((), jnp.int32), "mean": jnp.zeros(3)}


def loss_fn(params, extra, batch, key, step):
    """Mean squared error of a linear model with noise of standard deviation batch["noise"] on its output."""
    x, y = batch["x"], batch["y"]
    noise_key, draw_key = jax.random.split(key)
    out = x @ params["dense"]["kernel"] + params["dense"]["bias"][None]
    out = out + jnp.tanh(jnp.einsum("bd,edf->bf", x, params["block"]["experts"]["w1"]))
    out = out + batch["noise"][:, None] * jax.random.normal(noise_key, out.shape)
    extra = extra | {"count": extra["count"] + 1, "mean": 0.9 * extra["mean"] + 0.1 * out.mean(0)}
    loss = jnp.mean((out - y) ** 2)
    return loss, ({"draw": jax.random.normal(draw_key), "updates_before": step.astype(jnp.float32)}, extra)


def make_batch(step: int, noise: float = 0.5, rows: int = 8) -> dict[str, np.ndarray]:
    """The batch that update `step` (from 1) uses."""
    rng = np.random.default_rng(step)
    x, y = rng.normal(size=(rows, 4)), rng.normal(size=(rows, 3))
    return {"x": x.astype(np.float32), "y": y.astype(np.float32), "noise": np.full(rows, noise, np.float32)}


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    optim = ConfigDict(dict(kind="adamw", learning_rate=0.05, warmup_steps=2, weight_decay=0.1, b2=0.95, clip_norm=1.0))
    return SimpleNamespace(
        init_fn=init_fn,
        loss_fn=loss_fn,
        make_batch=make_batch,
        num_steps=NUM_STEPS,
        tx=build_optimizer(optim, NUM_STEPS),
        sgd=optax.sgd(0.1),
    )


@pytest.fixture(scope="session")
def random_scores() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Makes scores and labels [num], a third of them 1, whose scores are one deviation higher."""

    def make(seed: int, num: int = 60, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.arange(num) % 3 == 0).astype(int)
        scores = rng.normal(size=num) + labels
        return (np.round(scores, 1) if ties else scores), labels

    return make
