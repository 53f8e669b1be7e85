"""Muon or AdamW with linear warm-up, cosine decay and clipping by global norm, from a config."""

import re
from typing import Any

import optax

from core import tree

KINDS = ("muon", "adamw")
# Axes (inputs, outputs) of the matrices in a transformer's blocks by path; what matches none is not one of them.
# Kernels of query, key and value are [D, K, Dh], of out [K, Dh, D]; low-rank factors a [inputs, R] and b [R, outputs]
# split the same axes; experts are [E, D, F] and [E, F, D].
MATRICES = {
    r"(.*/)?attn/(query|key|value)/(kernel|b)": (0, (1, 2)),
    r"(.*/)?attn/out/(kernel|a)": ((0, 1), 2),
    r"(.*/)?attn/(query|key|value)/a|(.*/)?attn/out/b": (0, 1),
    r"(.*/)?(fc1|fc2|detail_\w+)/(kernel|a|b)": (0, 1),
    r"(.*/)?experts/(w1|w2)": (1, 2),
}


def build_schedule(config: Any, num_steps: int, learning_rate: Any = None) -> optax.Schedule:
    """Learning rate by step: linear to `learning_rate` over `warmup_steps`, then cosine to 0 at `num_steps`.

    The first update already has a rate above 0 (the ramp starts at 1 / warmup_steps). The warm-up takes at most half
    of the run.

    Args:
      learning_rate: the peak as a scalar that may be traced, in place of the config's.

    Raises:
      ValueError: if `warmup_steps` or `num_steps` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, found {num_steps}: without updates nothing is trained")
    if config.warmup_steps < 1:
        raise ValueError(f"optim.warmup_steps must be at least 1, found {config.warmup_steps}")
    warmup = min(config.warmup_steps, max(num_steps // 2, 1))

    def schedule(step):
        peak = config.learning_rate if learning_rate is None else 1.0
        value = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, num_steps + 1)(step + 1)
        return value if learning_rate is None else learning_rate * value

    return schedule


def build_optimizer(config: Any, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer that `config.kind` names.

    `update(grads, state, params, learning_rate=peak)` goes before `config.learning_rate`: as an argument of a compiled
    function the rate is no constant of it, so that one program serves all rates.

    muon: Muon on the blocks' matrices and factors (Jordan et al. 2024), Adam on the rest. Muon's updates are scaled to
      the size that AdamW's have (Liu et al., arXiv 2502.16982), so one learning rate serves both; weight decay on the
      matrices.
    adamw: weight decay on kernels, expert matrices and adapters, never on biases, norms or embeddings.

    Raises:
      ValueError: for another kind, or numbers with which nothing would be learned.
    """
    if config.kind not in KINDS:
        raise ValueError(f"optim.kind: expected one of {KINDS}, found {config.kind!r}")
    if not (config.learning_rate >= 0 and config.weight_decay >= 0 and config.clip_norm >= 0 and 0 <= config.b2 < 1):
        raise ValueError(
            "optim: expected learning_rate, weight_decay and clip_norm (0: no clipping) of at least 0 and b2 in "
            f"[0, 1), found {config.learning_rate}, {config.weight_decay}, {config.clip_norm} and {config.b2}"
        )

    def with_schedule(learning_rate: Any = None) -> optax.GradientTransformation:
        return _chain(config, build_schedule(config, num_steps, learning_rate))

    def update(grads: Any, state: Any, params: Any = None, *, learning_rate: Any = None) -> tuple[Any, Any]:
        return with_schedule(learning_rate).update(grads, state, params)

    return optax.GradientTransformationExtraArgs(with_schedule().init, update)


def _chain(config: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    if config.kind == "muon":
        optimizer = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b2=config.b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=matrix_axes,
        )
    else:
        optimizer = optax.adamw(
            schedule,
            b1=0.9,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: tree.mask(params, r".*/(kernel|w1|w2|a|b)"),
        )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optimizer)


def matrix_axes(params: Any) -> Any:
    """Which axes of a leaf are a matrix's inputs and outputs (MATRICES), None for what Muon leaves to Adam."""

    def axes(path: str, _: Any) -> Any:
        found = [value for pattern, value in MATRICES.items() if re.fullmatch(pattern, path)]
        return optax.contrib.MuonDimensionNumbers(*found[0]) if found else None

    return tree.map_with_path(axes, params)
