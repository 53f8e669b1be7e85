"""Large images seen tile by tile: a small lesion keeps its pixels, and the network its size.

In training the network sees one random tile of an image at a time; in scoring tiles that overlap, and their maps are
joined to one of the image before it is reduced to a score. Axes: B images, H W C image (H = W), P side of a tile, n
tiles along a side, K = n * n tiles of an image.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mtl_moe.tasks.base import body_mask, to_float

OVERLAP = 0.25  # of a tile's side that it shares with the next, at least: what lies on an edge is seen whole by another


def tile_starts(size: int, side: int) -> np.ndarray:
    """Where tiles of `side` pixels begin along an image of `size`, evenly spread: int [n]; 0 where they are equal."""
    count = math.ceil((size - side) / (side * (1 - OVERLAP))) + 1
    return np.round(np.linspace(0, size - side, count)).astype(int)


def num_tiles(size: int, side: int) -> int:
    """Tiles of an image."""
    return len(tile_starts(size, side)) ** 2


def random_tiles(key: jax.Array, images: jax.Array, side: int) -> jax.Array:
    """Of each uint8 image [B, H, W, C] one tile [B, P, P, C] about a random pixel of the body; the image where it is no
    larger."""
    batch, size, _, channels = images.shape
    if size == side:
        return images
    body = body_mask(to_float(images)).reshape(batch, -1)
    pixel = jnp.argmax(jax.random.uniform(key, body.shape) * body, axis=-1)
    start = jnp.clip(jnp.stack(jnp.divmod(pixel, size), -1) - side // 2, 0, size - side)
    cut = lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (side, side, channels))  # noqa: E731
    return jax.vmap(cut)(images, start)


def map_by_tiles(fn: Callable[[jax.Array], jax.Array], images: jax.Array, side: int) -> jax.Array:
    """Maps of images [B, H, W, C] -> [B, S, H, W] by `fn`, which makes those of tiles: [B, P, P, C] -> [B, S, P, P].

    Where tiles overlap their maps are averaged, each weighted by the distance to its own edges. One tile of every image
    goes through `fn` at a time: memory is that of images of `side` pixels.
    """
    size = images.shape[1]
    if size == side:
        return fn(images)
    starts = tile_starts(size, side)
    tiles = jnp.stack([images[:, y : y + side, x : x + side] for y in starts for x in starts])
    maps = jax.lax.map(fn, tiles).reshape(len(starts), len(starts), len(images), -1, side, side)
    weights = jnp.asarray(_weights(starts, size, side))
    return jnp.einsum("yip,xjq,ijbspq->bsyx", weights, weights, maps, precision="highest")


def _weights(starts: np.ndarray, size: int, side: int) -> np.ndarray:
    """What pixel p of tile i adds to pixel y of the image along one axis: float32 [H, n, P]; sums to 1 for each y."""
    hat = np.minimum(np.arange(side) + 0.5, side - np.arange(side) - 0.5)
    weights = np.zeros((size, len(starts), side))
    for i, start in enumerate(starts):
        weights[start + np.arange(side), i, np.arange(side)] = hat
    return (weights / weights.sum((1, 2), keepdims=True)).astype(np.float32)
