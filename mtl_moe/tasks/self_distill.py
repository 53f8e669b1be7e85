"""Self-distillation: predict from a masked image the tokens that the averaged model has for the whole one.

The teacher is a frozen copy of the averaged encoder, taken at `train.refresh_step` (before that: of the first encoder,
random features). Learns 1 - cosine at every token; at inference two complementary masks, and the map is 1 - cosine
where hidden. SSMTL (Georgescu et al., CVPR 2021), AED-MAE (CVPR 2024).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_moe.tasks import base


@dataclasses.dataclass(frozen=True)
class SelfDistill:
    """See the module's docstring."""

    geometry: base.Geometry
    ratio: float = 0.5
    name: ClassVar[str] = "self_distill"
    use_position: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True
    view_names: ClassVar[tuple[str, ...]] = ("hidden_0", "hidden_1")

    @property
    def head(self) -> base.Head:
        return base.Head("tokens", self.geometry.width)

    @property
    def reductions(self) -> Mapping[str, base.Reduction]:
        return {self.name: base.Reduction("mean", "label")}

    def corrupt(self, key: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> tuple[jax.Array, Any]:
        view, _ = base.hide_random(key, images, self.geometry.patch_size, self.ratio)
        return view, teacher.tokens

    def loss(self, output: jax.Array, target: Any) -> jax.Array:
        return _cosine_distance(output, target).mean((1, 2))

    def views(self, images: jax.Array) -> jax.Array:
        return base.hidden_views(images, self.geometry.patch_size)

    def evidence(self, outputs: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> Mapping[str, jax.Array]:
        target = jnp.broadcast_to(teacher.tokens, outputs.shape)
        distance = base.at_hidden(_cosine_distance(outputs, target))
        return {self.name: base.resize(distance[..., None], self.geometry.image_size)[..., 0]}


def _cosine_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    norm = jnp.sqrt(jnp.square(a).sum(-1) * jnp.square(b).sum(-1) + base.EPS)
    return 1 - (a * b).sum(-1) / norm
