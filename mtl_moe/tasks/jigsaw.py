"""Jigsaw: tell the place of each tile of a shuffled image, without position embedding.

Learns cross-entropy per tile. At inference the unshuffled image goes in; the map is 1 - p(own place). A model without
positions is equivariant to the permutation, so that one view is enough. Jigsaw-VAD (Wang et al., ECCV 2022), SSMTL++.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange

from mtl_moe.tasks import base


@dataclasses.dataclass(frozen=True)
class Jigsaw:
    """See the module's docstring. `tiles` along a side; a tile is a whole number of patches."""

    geometry: base.Geometry
    tiles: int = 4
    name: ClassVar[str] = "jigsaw"
    use_position: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    view_names: ClassVar[tuple[str, ...]] = ("clean",)

    def __post_init__(self):
        if self.geometry.grid % self.tiles:
            raise ValueError(
                f"tasks.jigsaw.tiles={self.tiles} does not divide the token grid {self.geometry.grid}: choose a divisor"
            )

    @property
    def head(self) -> base.Head:
        return base.Head("tokens", self.tiles**2)

    @property
    def reductions(self) -> Mapping[str, base.Reduction]:
        return {self.name: base.Reduction("mean", "label")}

    def corrupt(self, key: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> tuple[jax.Array, Any]:
        keys = jax.random.split(key, images.shape[0])
        order = jax.vmap(lambda k: jax.random.permutation(k, self.tiles**2))(keys)
        side = self.geometry.image_size // self.tiles
        tiles = rearrange(images, "b (i p) (j q) c -> b (i j) p q c", p=side, q=side)
        shuffled = jnp.take_along_axis(tiles, order[:, :, None, None, None], axis=1)
        shuffled = rearrange(shuffled, "b (i j) p q c -> b (i p) (j q) c", i=self.tiles)
        return base.with_plane(shuffled), order

    def loss(self, output: jax.Array, target: Any) -> jax.Array:
        return base.cross_entropy(self._tile_logits(output), target).mean(-1)

    def views(self, images: jax.Array) -> jax.Array:
        return base.with_plane(images)[None]

    def evidence(self, outputs: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> Mapping[str, jax.Array]:
        own = jnp.broadcast_to(jnp.arange(self.tiles**2), (images.shape[0], self.tiles**2))
        wrong = 1 - jnp.exp(-base.cross_entropy(self._tile_logits(outputs[0]), own))
        grid = wrong.reshape(-1, self.tiles, self.tiles, 1)
        return {self.name: base.resize(grid, self.geometry.image_size)[..., 0]}

    def _tile_logits(self, output: jax.Array) -> jax.Array:
        """Token logits [B, h, w, places] averaged over each tile: [B, tiles^2, places]."""
        side = self.geometry.grid // self.tiles
        return base.to_cells(output.astype(jnp.float32), side).mean(3).reshape(output.shape[0], self.tiles**2, -1)
