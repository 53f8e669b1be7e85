"""How far each student block is from the teacher block it stands for.

Axes: B batch, N tokens, D width, L layers.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vit_distill.losses import cosine


def block_diagnostics(
    student: Sequence[jax.Array], teacher: Sequence[jax.Array], pairs: Sequence[int]
) -> list[dict[str, Any]]:
    """One row a student block: {"block", "teacher_block", "l1", "cosine", "cka"}.

    Args:
      student: tokens [B, N, D] after every student block.
      teacher: for each of them the teacher's tokens of the paired block, of the same shape.
      pairs: numbers of those blocks, of `weight_copy.aligned_targets`.

    Returns:
      l1: mean absolute difference; cosine: mean over tokens; cka: linear centred kernel alignment over all tokens of
      all images (Kornblith et al., arXiv 1905.00414), 1 for features equal up to rotation, shift and scale.

    Raises:
      ValueError: if there are not as many teacher blocks as student blocks, or shapes differ.
    """
    if not len(student) == len(teacher) == len(pairs) or any(
        x.shape != y.shape for x, y in zip(student, teacher, strict=True)
    ):
        found = f"{[x.shape for x in student]} and {[y.shape for y in teacher]} for pairs {list(pairs)}"
        raise ValueError(f"diagnostics: expected tokens of equal shapes for every pair, found {found}")
    rows = []
    for i, (x, y, block) in enumerate(zip(student, teacher, pairs, strict=True)):
        l1, cos, cka = _compare(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
        rows.append({"block": i, "teacher_block": int(block), "l1": float(l1), "cosine": float(cos), "cka": float(cka)})
    return rows


@jax.jit
def _compare(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return jnp.abs(x - y).mean(), cosine(x, y).mean(), linear_cka(x, y)


def linear_cka(x: jax.Array, y: jax.Array) -> jax.Array:
    """|Y'X|^2 / (|X'X| |Y'Y|) of the centred features [..., D]; 0 where one is constant."""
    # Scaled to a largest entry of 1: fourth powers of a large residual stream leave float32 otherwise.
    flat = [v.reshape(-1, v.shape[-1]) for v in (x, y)]
    centred = [v - v.mean(0, keepdims=True) for v in flat]
    centred = [v / jnp.maximum(jnp.abs(v).max(), 1e-30) for v in centred]

    def cross(u: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.square(jnp.matmul(u.T, v, precision=jax.lax.Precision.HIGHEST)).sum()

    x, y = centred
    return cross(x, y) / jnp.maximum(jnp.sqrt(cross(x, x)) * jnp.sqrt(cross(y, y)), 1e-30)
