"""Rotation and flip: tell which of the eight symmetries of the square was applied.

Learns cross-entropy per token and pooled. At inference all eight go in; the map is the mean of -log p(applied), turned
back. GEOM (Golan and El-Yaniv, NeurIPS 2018).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_moe.tasks import base

NUM_SYMMETRIES = 8


def apply_symmetry(images: jax.Array, index: int) -> jax.Array:
    """Symmetry `index` of [B, H, W, C]: index % 4 quarter turns, after a left-right flip from 4 on."""
    images = images[:, :, ::-1] if index >= 4 else images
    return jnp.rot90(images, index % 4, axes=(1, 2))


def undo_symmetry(images: jax.Array, index: int) -> jax.Array:
    """Inverse of `apply_symmetry`."""
    images = jnp.rot90(images, -(index % 4), axes=(1, 2))
    return images[:, :, ::-1] if index >= 4 else images


@dataclasses.dataclass(frozen=True)
class Transform:
    """See the module's docstring."""

    geometry: base.Geometry
    name: ClassVar[str] = "transform"
    use_position: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False
    view_names: ClassVar[tuple[str, ...]] = ("clean", *(f"symmetry_{i}" for i in range(1, NUM_SYMMETRIES)))

    @property
    def head(self) -> base.Head:
        return base.Head("tokens", NUM_SYMMETRIES)

    @property
    def reductions(self) -> Mapping[str, base.Reduction]:
        return {self.name: base.Reduction("mean", "label")}

    def corrupt(self, key: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> tuple[jax.Array, Any]:
        index = jax.random.randint(key, (images.shape[0],), 0, NUM_SYMMETRIES)
        every = jnp.stack([apply_symmetry(images, i) for i in range(NUM_SYMMETRIES)])
        return base.with_plane(every[index, jnp.arange(images.shape[0])]), index

    def loss(self, output: jax.Array, target: Any) -> jax.Array:
        per_token = base.cross_entropy(output, jnp.broadcast_to(target[:, None, None], output.shape[:3])).mean((1, 2))
        pooled = base.cross_entropy(output.astype(jnp.float32).mean((1, 2)), target)
        return 0.5 * (per_token + pooled)

    def views(self, images: jax.Array) -> jax.Array:
        return jnp.stack([base.with_plane(apply_symmetry(images, i)) for i in range(NUM_SYMMETRIES)])

    def evidence(self, outputs: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> Mapping[str, jax.Array]:
        total = 0.0
        for i in range(NUM_SYMMETRIES):
            labels = jnp.full(outputs.shape[1:4], i)
            total += undo_symmetry(base.cross_entropy(outputs[i], labels)[..., None], i)
        maps = base.resize(total / NUM_SYMMETRIES, self.geometry.image_size)[..., 0]
        return {self.name: maps}
