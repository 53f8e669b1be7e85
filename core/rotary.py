"""Rotary positions of image patches as in DINOv3 (Siméoni et al., arXiv 2508.10104), after Su et al., arXiv 2104.09864.

Axes: B batch, N tokens, K heads, Dh width of a head (a multiple of 4), P patches.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rotary(NamedTuple):
    """Which tokens are patches, and how fast they are turned.

    Attributes:
      grid: patches on a side of the square image, P = grid * grid.
      num_prefix: tokens before the patches; they are not turned.
      base: ratio of the longest to the shortest period, in the limit of wide heads.
    """

    grid: int
    num_prefix: int
    base: float


@functools.lru_cache(maxsize=32)
def angles(rotary: Rotary, head_dim: int) -> np.ndarray:
    """[N, Dh / 2] float32, radians: Dh / 4 by row and as many by column; centres of patches lie in -1 to 1."""
    periods = rotary.base ** (4 / head_dim * np.arange(head_dim // 4))
    centres = (2 * np.arange(rotary.grid) + 1) / rotary.grid - 1
    rows_and_columns = np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    patches = (2 * np.pi * rows_and_columns / periods).reshape(len(rows_and_columns), head_dim // 2)
    return np.concatenate([np.zeros((rotary.num_prefix, head_dim // 2)), patches]).astype(np.float32)


def rotate(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Queries or keys [B, N, K, Dh], each pair (i, i + Dh / 2) turned by its token's angle in float32; dtype of `x`."""
    turned = angles(rotary, x.shape[-1])[None, :, None]
    cos, sin = np.cos(turned), np.sin(turned)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
