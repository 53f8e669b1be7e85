"""Augmentation for training from scratch on small images: whole-pixel crops and flips, mixup of images and targets.

Cheaper than `augment.random_resized_crop`, which resamples, and better where the training is short: objects keep their
size. Axes: B batch, H W C image, S side of the stored images, F classes.
"""

import jax
import jax.numpy as jnp


def random_crop(key: jax.Array, images: jax.Array, size: int, padding: int = 0, flip: bool = True) -> jax.Array:
    """A random square of each image, in whole pixels, and flipped with probability one half.

    Args:
      images: [B, S, S, C], any dtype.
      size: side of the result.
      padding: pixels of mirrored border around the images before they are cut.
      flip: whether to flip at all (not for digits).

    Returns:
      [B, size, size, C] of the same dtype.

    Raises:
      ValueError: if the images are too small or not square, or for more padding than there is to mirror.
    """
    batch, height, side, channels = images.shape
    room = side + 2 * padding - size
    if height != side or room < 0:
        raise ValueError(f"random crops of {size} pixels with padding {padding} from images of {height}x{side}")
    if not 0 <= padding < side:
        raise ValueError(f"augment.padding: expected 0 to {side - 1} for images of {side} pixels, found {padding}")
    border = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    images = jnp.pad(images, border, mode="reflect") if padding else images
    corner_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(corner_key, (batch, 2), 0, room + 1)

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, channels))

    crops = jax.vmap(cut)(images, corners)
    if not flip:
        return crops
    flips = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
    return jnp.where(flips, crops[:, :, ::-1], crops)


def mixup(key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Convex combinations of each image with the one at the mirrored place of the batch (Zhang et al., 1710.09412).

    Args:
      images: float [B, H, W, C].
      targets: float [B, F], each row sums to 1.
      alpha: of the Beta(alpha, alpha) that an image's share is drawn from; above 0.

    Returns:
      The mixed images and targets. The larger share is the image's own, so `argmax` of a target is mostly its class.
    """
    share = jax.random.beta(key, alpha, alpha, (images.shape[0],))
    share = jnp.maximum(share, 1.0 - share)
    wide, flat = share[:, None, None, None], share[:, None]
    return wide * images + (1 - wide) * images[::-1], flat * targets + (1 - flat) * targets[::-1]
