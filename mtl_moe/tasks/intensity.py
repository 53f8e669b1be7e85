"""Intensity restoration: undo a random monotone remapping of grey values.

Learns the L1 error; at inference the clean image goes in and the map is the absolute error. After the non-linear
transformation of Models Genesis (Zhou et al., MICCAI 2019).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_moe.tasks import base


@dataclasses.dataclass(frozen=True)
class Intensity:
    """See the module's docstring. `strength` is the spread of the curve's log slopes."""

    geometry: base.Geometry
    strength: float = 0.8
    num_knots: int = 6
    name: ClassVar[str] = "intensity"
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
        slopes = jnp.exp(self.strength * jax.random.normal(key, (images.shape[0], self.num_knots)))
        heights = jnp.cumsum(slopes, axis=-1)
        heights = jnp.pad(heights / heights[:, -1:], ((0, 0), (1, 0)))
        knots = jnp.linspace(0.0, 1.0, self.num_knots + 1)
        remapped = jax.vmap(lambda image, curve: jnp.interp(image, knots, curve))(images, heights)
        return base.with_plane(remapped), images

    def loss(self, output: jax.Array, target: Any) -> jax.Array:
        return base.absolute_error(output, target).mean((1, 2))

    def views(self, images: jax.Array) -> jax.Array:
        return base.with_plane(images)[None]

    def evidence(self, outputs: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> Mapping[str, jax.Array]:
        return {self.name: base.absolute_error(outputs[0], images)}
