"""Masked reconstruction: predict hidden patches from their context.

Learns L1 + structural similarity on the hidden patches. At inference two complementary fixed masks, so that every pixel
is predicted from context only; the map is the absolute error in units of the image's local gradient, because edges are
hard to predict in any image (chosen on painted normals, benchmarks/NOTES.md). After MAE-medical (Georgescu, KES 2023)
and AED-MAE (Ristea et al., CVPR 2024).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_moe.tasks import base

# Grey values per 64th of the image's side: about the noise of a flat region, so that noise does not count as error. In
# units of the side, as the gradients of one structure are smaller in an image of more pixels.
GRADIENT_FLOOR = 0.03


@dataclasses.dataclass(frozen=True)
class Masked:
    """See the module's docstring. `ratio` is the hidden share of patches in training."""

    geometry: base.Geometry
    ratio: float = 0.5
    ssim_weight: float = 0.1
    name: ClassVar[str] = "masked"
    use_position: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False
    view_names: ClassVar[tuple[str, ...]] = ("hidden_0", "hidden_1")

    @property
    def head(self) -> base.Head:
        return base.Head("pixels", self.geometry.channels)

    @property
    def reductions(self) -> Mapping[str, base.Reduction]:
        return {self.name: base.Reduction("top", "error")}

    def corrupt(self, key: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> tuple[jax.Array, Any]:
        view, cells = base.hide_random(key, images, self.geometry.patch_size, self.ratio)
        return view, (images, cells)

    def loss(self, output: jax.Array, target: Any) -> jax.Array:
        images, cells = target
        predicted = base.to_cells(output.astype(jnp.float32), self.geometry.patch_size)
        wanted = base.to_cells(images, self.geometry.patch_size)
        error = jnp.abs(predicted - wanted).mean((-2, -1)) + self.ssim_weight * (1 - _ssim(predicted, wanted))
        return base.mean_where(error, cells)

    def views(self, images: jax.Array) -> jax.Array:
        return base.hidden_views(images, self.geometry.patch_size)

    def evidence(self, outputs: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> Mapping[str, jax.Array]:
        cells = jnp.stack([base.to_cells(base.absolute_error(o, images), self.geometry.patch_size) for o in outputs])
        error = base.at_hidden(cells)
        size, patch = self.geometry.image_size, self.geometry.patch_size
        grid = self.geometry.grid
        maps = error.reshape(-1, grid, grid, patch, patch).swapaxes(2, 3).reshape(-1, size, size)
        return {self.name: maps / (base.local_gradient(images) + GRADIENT_FLOOR * 64 / size)}


def _ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity within each patch [B, h, w, pixels, C] -> [B, h, w] (Wang et al. 2004, window = patch)."""
    mean_a, mean_b = a.mean(-2), b.mean(-2)
    var_a, var_b = a.var(-2), b.var(-2)
    cov = (a * b).mean(-2) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return ssim.mean(-1)
