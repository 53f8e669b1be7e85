"""How far each student block is from the teacher block it stands for, batch by batch.

Axes: B batch, N tokens, D width, L layers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_distill.losses import cosine


class Moments(NamedTuple):
    """Of a student block's tokens x and a teacher block's y, float64; those of two batches `combine`.

    Attributes:
      count: tokens.
      l1, cosine: sums over tokens of the mean absolute difference and of the cosine.
      mean_x, mean_y: [D].
      xx, yy, yx: [D, D], sums over tokens of products of the centred features.
    """

    count: float
    l1: np.ndarray
    cosine: np.ndarray
    mean_x: np.ndarray
    mean_y: np.ndarray
    xx: np.ndarray
    yy: np.ndarray
    yx: np.ndarray


def block_moments(student: Sequence[jax.Array], teacher: Sequence[jax.Array]) -> list[Moments]:
    """Moments of one batch, one entry a student block.

    Args:
      student: tokens [B, N, D] after every student block.
      teacher: for each of them the teacher's tokens of the paired block, of the same shape.

    Raises:
      ValueError: if there are not as many teacher blocks as student blocks, or shapes differ.
    """
    shapes = [[tokens.shape for tokens in blocks] for blocks in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"diagnostics: expected tokens of equal shapes for every pair, found {shapes[0]}, {shapes[1]}")
    return [_moments(x, y) for x, y in zip(student, teacher, strict=True)]


def _moments(x: jax.Array, y: jax.Array) -> Moments:
    sums = (np.asarray(part, np.float64) for part in jax.device_get(_sums(x, y)))
    return Moments(x.shape[0] * x.shape[1], *sums)


def combine(a: Moments, b: Moments) -> Moments:
    """Of two batches together (Chan, Golub and LeVeque 1979: no large sums are subtracted)."""
    count = a.count + b.count
    dx, dy, weight = b.mean_x - a.mean_x, b.mean_y - a.mean_y, a.count * b.count / count
    return Moments(
        count,
        a.l1 + b.l1,
        a.cosine + b.cosine,
        a.mean_x + dx * (b.count / count),
        a.mean_y + dy * (b.count / count),
        a.xx + b.xx + weight * np.outer(dx, dx),
        a.yy + b.yy + weight * np.outer(dy, dy),
        a.yx + b.yx + weight * np.outer(dy, dx),
    )


def block_rows(moments: Sequence[Moments], pairs: Sequence[int]) -> list[dict[str, Any]]:
    """One row a student block: {"block", "teacher_block", "l1", "cosine", "cka"}.

    Args:
      pairs: numbers of the teacher blocks, of `weight_copy.aligned_targets`.

    Returns:
      l1: mean absolute difference; cosine: mean over tokens; cka: linear centred kernel alignment over all tokens of
      all images (Kornblith et al., arXiv 1905.00414), 1 for features equal up to rotation, shift and scale.
    """
    return [
        {
            "block": i,
            "teacher_block": int(block),
            "l1": float(found.l1 / found.count),
            "cosine": float(found.cosine / found.count),
            "cka": linear_cka(found),
        }
        for i, (found, block) in enumerate(zip(moments, pairs, strict=True))
    ]


def linear_cka(found: Moments) -> float:
    """|Y'X|^2 / (|X'X| |Y'Y|) of the centred features; 0 where one is constant."""
    xx, yy, yx = (float(np.square(product).sum()) for product in (found.xx, found.yy, found.yx))
    return yx / (xx**0.5 * yy**0.5) if xx and yy else 0.0


@jax.jit
def _sums(x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
    """The fields of Moments after `count`, float32, of tokens [B, N, D]."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    difference, cosines = jnp.abs(x - y).mean(-1).sum(), cosine(x, y).sum()
    x, y = (v.reshape(-1, v.shape[-1]) for v in (x, y))
    means = x.mean(0), y.mean(0)
    x, y = x - means[0][None], y - means[1][None]

    def product(u: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.matmul(u.T, v, precision=jax.lax.Precision.HIGHEST)

    return difference, cosines, *means, product(x, x), product(y, y), product(y, x)
