"""Random resized crop and flip on the device, once for teacher and student.

A crop is two matrix products an image, rows then columns, whose weights follow from the box: antialiased resampling
with the filters of Pillow and torchvision (`RandomResizedCrop(antialias=True)`). A flip reverses the columns' weights.

Axis alphabet: B batch, H W C image, S side of the given images.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

_RATIO = (3 / 4, 4 / 3)  # of width to height
_TRIES = 10  # boxes drawn before the whole image is taken, as in torchvision


def _bilinear(x: jax.Array) -> jax.Array:
    return jnp.maximum(0.0, 1.0 - jnp.abs(x))


def _bicubic(x: jax.Array) -> jax.Array:
    """Keys' cubic with a = -0.5, the one of antialiased resampling."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


_FILTERS = {"bilinear": _bilinear, "bicubic": _bicubic}


def random_box(key: jax.Array, side: int, scale: tuple[float, float]) -> jax.Array:
    """A box as torchvision draws it: area uniform in `scale`, ratio of sides log-uniform in 3/4..4/3, whole pixels.

    Args:
      key: PRNG key [].
      side: S of the square image.
      scale: smallest and largest share of the area, 0 < smallest <= largest <= 1.

    Returns:
      int32 [4]: top, left, height, width.
    """
    shape_key, top_key, left_key = jax.random.split(key, 3)
    uniform = jax.random.uniform(shape_key, (2, _TRIES))
    area = side**2 * (scale[0] + (scale[1] - scale[0]) * uniform[0])
    low, high = (math.log(ratio) for ratio in _RATIO)
    ratio = jnp.exp(low + (high - low) * uniform[1])
    sizes = jnp.round(jnp.sqrt(jnp.stack([area / ratio, area * ratio])))  # [2, tries]: height, width
    fits = ((sizes >= 1) & (sizes <= side)).all(axis=0)
    size = jnp.where(fits.any(), sizes[:, jnp.argmax(fits)], float(side)).astype(jnp.int32)
    top = jax.random.randint(top_key, (), 0, side - size[0] + 1)
    left = jax.random.randint(left_key, (), 0, side - size[1] + 1)
    return jnp.stack([top, left, size[0], size[1]])


def _weights(start: jax.Array, length: jax.Array, side: int, size: int, interpolation: str) -> jax.Array:
    """float32 [B, size, side]: each output pixel's weights of the input pixels start..start+length (int [B])."""
    start, length = (x.astype(jnp.float32)[:, None, None] for x in (start, length))
    step = length / size
    centre = start + (jnp.arange(size, dtype=jnp.float32)[None, :, None] + 0.5) * step
    pixel = jnp.arange(side, dtype=jnp.float32)[None, None, :]
    inside = (pixel >= start) & (pixel < start + length)
    distance = (pixel + 0.5 - centre) / jnp.maximum(step, 1.0)  # a wider filter where the crop is reduced
    weights = jnp.where(inside, _FILTERS[interpolation](distance), 0.0)
    return weights / weights.sum(axis=-1, keepdims=True)


def crop_and_resize(
    images: jax.Array, boxes: jax.Array, flips: jax.Array, size: int, interpolation: str = "bicubic"
) -> jax.Array:
    """Cuts a box out of each image, resizes it to a square and flips it where told.

    Args:
      images: uint8 [B, S, S, C].
      boxes: int [B, 4]: top, left, height, width.
      flips: bool [B]: mirror left and right.
      size: side of the result.
      interpolation: "bicubic" or "bilinear", antialiased.

    Returns:
      float32 [B, size, size, C] in [0, 1].

    Raises:
      ValueError: another interpolation, or images that are not square.
    """
    if interpolation not in _FILTERS:
        raise ValueError(f"interpolation of crops: expected one of {sorted(_FILTERS)}, found {interpolation!r}")
    batch, height, side, channels = images.shape
    if height != side:
        raise ValueError(f"expected square images, found {height}x{side}")
    rows = _weights(boxes[:, 0], boxes[:, 2], side, size, interpolation)
    columns = _weights(boxes[:, 1], boxes[:, 3], side, size, interpolation)
    columns = jnp.where(flips[:, None, None], columns[:, ::-1], columns)
    precision = jax.lax.Precision.HIGHEST  # TPUs would round the pixels to bfloat16
    pixels = images.astype(jnp.float32).reshape(batch, side, side * channels)
    tall = jnp.einsum("bhs,bsx->bhx", rows, pixels, precision=precision).reshape(batch, size, side, channels)
    square = jnp.einsum("bws,bhsc->bhwc", columns, tall, precision=precision)
    return jnp.clip(square / 255.0, 0.0, 1.0)


def _views(
    keys: jax.Array, images: jax.Array, size: int, scale: tuple[float, float], flip: bool, interpolation: str
) -> jax.Array:
    """One crop an image from one key an image; see `random_resized_crop`."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale of crops: expected 0 < smallest <= largest <= 1, found {scale}")

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        box_key, flip_key = jax.random.split(key)
        return random_box(box_key, images.shape[1], scale), jax.random.bernoulli(flip_key) & flip

    boxes, flips = jax.vmap(draw)(keys)
    return crop_and_resize(images, boxes, flips, size, interpolation)


def random_resized_crop(
    key: jax.Array,
    images: jax.Array,
    size: int,
    scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = True,
    interpolation: str = "bicubic",
) -> jax.Array:
    """A random crop of each image, resized, and flipped with probability one half.

    Args:
      key: of the whole batch.
      images: uint8 [B, S, S, C].
      size: side of the result.
      scale: smallest and largest share of the image's area.
      flip: whether to flip at all (not for digits or for organs that have a side).
      interpolation: "bicubic" or "bilinear".

    Returns:
      float32 [B, size, size, C] in [0, 1], not normalised.
    """
    return _views(jax.random.split(key, len(images)), images, size, scale, flip, interpolation)


def view_keys(seed: int, rows: Any, view: Any) -> jax.Array:
    """Keys [B] of the fixed views (int [] or [B]) of images `rows` (int [B]): a function of (seed, row, view) alone."""
    key, rows = jax.random.key(seed), jnp.asarray(rows)
    views = jnp.broadcast_to(jnp.asarray(view), rows.shape)
    return jax.vmap(lambda row, view: jax.random.fold_in(jax.random.fold_in(key, row), view))(rows, views)


def fixed_view(
    seed: int,
    rows: Any,
    view: Any,
    images: jax.Array,
    size: int,
    scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = True,
    interpolation: str = "bicubic",
) -> jax.Array:
    """View number `view` of each image: the same crop whenever and in whatever batch it is made.

    Args:
      seed: of all views.
      rows: int [B], the images' rows in their set.
      view: int [] or [B], 0 .. number of views - 1.
      images, size, scale, flip, interpolation: as in `random_resized_crop`.

    Returns:
      float32 [B, size, size, C] in [0, 1].
    """
    return _views(view_keys(seed, rows, view), images, size, scale, flip, interpolation)
