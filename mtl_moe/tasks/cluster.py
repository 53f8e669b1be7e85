"""Cluster pseudo-labels: tell the k-means cluster of hidden patches.

The clusters come from the training normals: first of the patches' pixels, after `train.refresh_step` of the averaged
encoder's tokens. Learns cross-entropy on hidden patches; at inference two complementary masks, and the map is
-log p(own cluster). DeepCluster (Caron et al., ECCV 2018).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_moe.tasks import base


@dataclasses.dataclass(frozen=True)
class Cluster:
    """See the module's docstring."""

    geometry: base.Geometry
    num_clusters: int = 32
    ratio: float = 0.5
    name: ClassVar[str] = "cluster"
    use_position: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True
    view_names: ClassVar[tuple[str, ...]] = ("hidden_0", "hidden_1")

    @property
    def head(self) -> base.Head:
        return base.Head("tokens", self.num_clusters)

    @property
    def reductions(self) -> Mapping[str, base.Reduction]:
        return {self.name: base.Reduction("top", "label")}

    def corrupt(self, key: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> tuple[jax.Array, Any]:
        view, cells = base.hide_random(key, images, self.geometry.patch_size, self.ratio)
        return view, (teacher.clusters, cells)

    def loss(self, output: jax.Array, target: Any) -> jax.Array:
        labels, cells = target
        return base.mean_where(base.cross_entropy(output, labels), cells)

    def views(self, images: jax.Array) -> jax.Array:
        return base.hidden_views(images, self.geometry.patch_size)

    def evidence(self, outputs: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> Mapping[str, jax.Array]:
        labels = jnp.broadcast_to(teacher.clusters, outputs.shape[:4])
        surprise = base.at_hidden(base.cross_entropy(outputs, labels))
        return {self.name: base.resize(surprise[..., None], self.geometry.image_size)[..., 0]}
