"""Coarse-noise denoising: remove smooth noise from the body.

Learns the squared error on the body. At inference the clean image goes in: what the model takes for noise it changes.
The map is the absolute error inside the eroded body, median filtered. Kascenas et al., "Denoising autoencoders for
unsupervised anomaly detection in brain MRI", MIDL 2022.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_moe.tasks import base


@dataclasses.dataclass(frozen=True)
class Denoise:
    """See the module's docstring. Noise of `noise_min` and more: examples without noise would teach the identity."""

    geometry: base.Geometry
    noise_min: float = 0.05
    noise_max: float = 0.3
    cells: int = 8  # noise values along a side: one for 8 pixels of 64, as 16 for 128 in the paper
    name: ClassVar[str] = "denoise"
    use_position: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False
    view_names: ClassVar[tuple[str, ...]] = ("clean",)

    @property
    def head(self) -> base.Head:
        return base.Head("pixels", self.geometry.channels)

    @property
    def reductions(self) -> Mapping[str, base.Reduction]:
        return {self.name: base.Reduction("top", "error")}

    def corrupt(self, key: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> tuple[jax.Array, Any]:
        key_noise, key_size = jax.random.split(key)
        batch, size = images.shape[0], self.geometry.image_size
        noise = base.coarse_noise(key_noise, batch, size, self.cells, self.geometry.channels)
        std = jax.random.uniform(key_size, (batch, 1, 1, 1), minval=self.noise_min, maxval=self.noise_max)
        body = base.body_mask(images)
        return base.with_plane(images + noise * std * body), (images, body)

    def loss(self, output: jax.Array, target: Any) -> jax.Array:
        images, body = target
        return base.mean_where(jnp.square(output.astype(jnp.float32) - images), body)

    def views(self, images: jax.Array) -> jax.Array:
        return base.with_plane(images)[None]

    def evidence(self, outputs: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> Mapping[str, jax.Array]:
        error = base.absolute_error(outputs[0], images) * _erode(base.body_mask(images))[..., 0]
        return {self.name: _median3(error)}


def _neighbours(maps: jax.Array) -> jax.Array:
    """The 3x3 neighbourhood of each pixel, [B, H, W] -> [9, B, H, W], edges repeated."""
    padded = jnp.pad(maps, ((0, 0), (1, 1), (1, 1)), mode="edge")
    height, width = maps.shape[1:]
    return jnp.stack([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)])


def _erode(mask: jax.Array) -> jax.Array:
    return _neighbours(mask[..., 0]).min(0)[..., None]


def _median3(maps: jax.Array) -> jax.Array:
    return jnp.median(_neighbours(maps), axis=0)
