"""What a teacher expects of its images; it travels with the weights into students and exports.

Axes: B batch, H W C image.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Evaluation preprocessing: resize the short side to `resize_size`, centre crop of `image_size`, normalise.

    Attributes:
      image_size: side of the model's input in pixels.
      mean, std: of each channel, for images in [0, 1].
      interpolation: one of INTERPOLATIONS.
      crop_fraction: image_size / resize_size, in (0, 1] (timm's crop_pct).
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_fraction: float = 1.0

    def __post_init__(self):
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation: expected one of {INTERPOLATIONS}, found {self.interpolation!r}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction: expected a share above 0 and up to 1, found {self.crop_fraction}")
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise ValueError(f"mean and std: expected a value a channel, std > 0, found {self.mean} and {self.std}")

    @property
    def resize_size(self) -> int:
        """Short side after resizing, in pixels (as timm: floor)."""
        # A hair more: 224 / (224 / 354) is 353.99999999999994.
        return math.floor(self.image_size / self.crop_fraction + 1e-6)

    def normalise(self, images: jax.Array) -> jax.Array:
        """Float images [B, H, W, C] in [0, 1] -> what the model takes."""
        mean, std = (jnp.asarray(values, images.dtype).reshape(1, 1, 1, -1) for values in (self.mean, self.std))
        return (images - mean) / std

    def centre_crop(self, images: jax.Array) -> jax.Array:
        """The middle `image_size` square of images [B, H, W, C].

        Raises:
          ValueError: if the images are smaller.
        """
        height, width = images.shape[1:3]
        if min(height, width) < self.image_size:
            raise ValueError(f"images of {height}x{width} are smaller than the model's {self.image_size}")
        # timm and torchvision round half to even here.
        top, left = round((height - self.image_size) / 2), round((width - self.image_size) / 2)
        return images[:, top : top + self.image_size, left : left + self.image_size]

    def evaluate(self, images: jax.Array) -> jax.Array:
        """uint8 images [B, S, S, C] already resized to `resize_size` -> the model's input, float32."""
        return self.normalise(self.centre_crop(images).astype(jnp.float32) / 255.0)
