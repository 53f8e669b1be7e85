"""What a student is compared with its teacher by: which tokens, before or after the final norm, and how.

Axes: B batch, N tokens, D width. Everything is a mean over images, tokens and channels, in float32.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from core.vit import VitConfig, VitOutput, apply_final_norm

KINDS = ("l1", "mse", "smooth_l1", "cosine", "l1_kld")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Distance of student and teacher; the fields are those of config.loss.

    Attributes:
      kind: of one token: "l1", "mse", "smooth_l1" (quadratic below 1), each a mean over channels; "cosine": 1 - cosine;
        "l1_kld": l1 + kld_weight * KL(softmax(teacher) || softmax(student)) over channels.
      target: "pre_norm" (the paper's for adapters) | "post_norm": tokens before or after the final norm.
      blocks: "last": after the last block | "aligned": mean over every student block and the end of its group.
      cls_weight: w in (1 - w) * mean over all tokens + w * cls token; 0: the cls token counts as any other.
      kld_weight: of the divergence.
    """

    kind: str = "l1"
    target: str = "pre_norm"
    blocks: str = "last"
    cls_weight: float = 0.0
    kld_weight: float = 1.0

    def __post_init__(self):
        choices = {"kind": KINDS, "target": ("pre_norm", "post_norm"), "blocks": ("last", "aligned")}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"loss.{field}: expected one of {allowed}, found {getattr(self, field)!r}")
        if not 0 <= self.cls_weight <= 1:
            raise ValueError(f"loss.cls_weight: expected a share from 0 to 1, found {self.cls_weight}")


def teacher_targets(
    config: VitConfig, params: Mapping[str, Any], output: VitOutput, loss: LossConfig, pairs: Sequence[int]
) -> tuple[jax.Array, ...]:
    """The tokens [B, N, D] that a student is compared with.

    Args:
      config, params, output: the teacher's.
      pairs: of `weight_copy.aligned_targets`; with blocks="last" only the last of them is used.

    Raises:
      ValueError: for the post-norm target of a model that normalises after pooling.
    """
    chosen = [output.blocks[i] for i in (pairs if loss.blocks == "aligned" else pairs[-1:])]
    if loss.target == "post_norm":
        chosen = [apply_final_norm(config, params, tokens) for tokens in chosen]
    return tuple(chosen)


def student_targets(
    config: VitConfig, params: Mapping[str, Any], output: VitOutput, loss: LossConfig
) -> tuple[jax.Array, ...]:
    """The student's tokens in the order of `teacher_targets`."""
    return teacher_targets(config, params, output, loss, range(config.depth))


def distill_loss(
    student: Sequence[jax.Array], teacher: Sequence[jax.Array], loss: LossConfig, config: VitConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean distance over the pairs of tokens [B, N, D]; no gradient reaches the teacher.

    Args:
      config: of student or teacher: says which tokens are cls and registers.

    Returns:
      The loss, and metrics of the last pair, whatever the loss is: "l1" (all tokens), "patch_l1", "cls_l1" (with a cls
      token), "kld" (with l1_kld).

    Raises:
      ValueError: if the shapes differ, or a cls token is weighted that the model does not have.
    """
    if loss.cls_weight and not config.class_token:
        raise ValueError(f"loss.cls_weight: expected 0 for a model without a cls token, found {loss.cls_weight}")
    if [x.shape for x in student] != [x.shape for x in teacher]:
        shapes = f"{[x.shape for x in teacher]}, found {[x.shape for x in student]}"
        raise ValueError(f"distillation: expected the student's tokens in the teacher's shapes {shapes}")
    teacher = [jax.lax.stop_gradient(x).astype(jnp.float32) for x in teacher]
    pairs = [(x.astype(jnp.float32), y) for x, y in zip(student, teacher, strict=True)]
    total = sum(_weighted(token_loss(x, y, loss), loss.cls_weight) for x, y in pairs) / len(pairs)
    return total, _metrics(*pairs[-1], loss, config)


def token_loss(student: jax.Array, teacher: jax.Array, loss: LossConfig) -> jax.Array:
    """Distance of every token: [B, N, D] twice -> [B, N]."""
    difference = student - teacher
    if loss.kind == "mse":
        return jnp.square(difference).mean(-1)
    if loss.kind == "smooth_l1":
        size = jnp.abs(difference)
        return jnp.where(size < 1, 0.5 * jnp.square(difference), size - 0.5).mean(-1)
    if loss.kind == "cosine":
        return 1 - cosine(student, teacher)
    distance = jnp.abs(difference).mean(-1)
    return distance + loss.kld_weight * _kld(student, teacher) if loss.kind == "l1_kld" else distance


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Cosine along the last axis; 0 for a zero vector."""
    squares = jnp.square(x).sum(-1) * jnp.square(y).sum(-1)
    return (x * y).sum(-1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


def _kld(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(softmax(teacher) || softmax(student)) over channels, [B, N]."""
    expected, found = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return (jnp.exp(expected) * (expected - found)).sum(-1)


def _weighted(per_token: jax.Array, cls_weight: float) -> jax.Array:
    mean = per_token.mean()
    return (1 - cls_weight) * mean + cls_weight * per_token[:, 0].mean() if cls_weight else mean


def _metrics(student: jax.Array, teacher: jax.Array, loss: LossConfig, config: VitConfig) -> dict[str, jax.Array]:
    distance = jnp.abs(jax.lax.stop_gradient(student) - teacher).mean(-1)
    metrics = {"l1": distance.mean(), "patch_l1": distance[:, config.num_prefix :].mean()}
    if config.class_token:
        metrics["cls_l1"] = distance[:, 0].mean()
    if loss.kind == "l1_kld":
        metrics["kld"] = _kld(jax.lax.stop_gradient(student), teacher).mean()
    return metrics
