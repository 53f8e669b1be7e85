"""AdamW with linear warm-up, cosine decay and clipping by global norm, from a config."""

from typing import Any

import optax

from core import tree


def build_schedule(config: Any, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear to `learning_rate` over `warmup_steps`, then cosine to 0 at `num_steps`.

    The first update already has a rate above 0 (the ramp starts at 1 / warmup_steps). The warm-up takes at most half
    of the run.

    Raises:
      ValueError: if `warmup_steps` is below 1.
    """
    if config.warmup_steps < 1:
        raise ValueError(f"optim.warmup_steps must be at least 1, found {config.warmup_steps}")
    warmup = min(config.warmup_steps, max(num_steps // 2, 1))

    def schedule(step):
        return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, num_steps + 1)(step + 1)

    return schedule


def build_optimizer(config: Any, num_steps: int) -> optax.GradientTransformation:
    """AdamW; weight decay on kernels, expert matrices and adapters, never on biases, norms or embeddings."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            build_schedule(config, num_steps),
            b1=0.9,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: tree.mask(params, r".*/(kernel|w1|w2|a|b)"),
        ),
    )
