"""Pseudo-anomaly segmentation: find and remove a defect painted into a normal image.

Each training image gets one to three defects, each of a random family inside a random blob on the body (a share stays
clean). The model predicts the blobs (balanced cross-entropy + Dice) and the image without them (L1). At inference the
two evidences are the predicted defect probability and the reconstruction error. Families after FPI (Tan et al. 2020),
NSA (Schluter et al., ECCV 2022), CutPaste (Li et al., CVPR 2021), DRAEM (Zavrtanik et al., ICCV 2021); haze,
deformation and mass are ours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_moe.tasks import base


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """See the module's docstring.

    Attributes:
      families: names out of FAMILIES.
      clean_share: share of training images left without a defect.
      radius_min, radius_max: blob radius as a share of the image side.
      max_defects: most defects in one image; their number is uniform from 1.
      clean_weight: weight of the L1 error, which is a tenth of the segmentation's losses.
    """

    geometry: base.Geometry
    families: tuple[str, ...] = ("blend", "blob", "texture", "deform", "haze", "cutpaste", "mass")
    clean_share: float = 0.15
    radius_min: float = 0.06
    radius_max: float = 0.35
    max_defects: int = 3
    clean_weight: float = 5.0
    name: ClassVar[str] = "synthetic"
    use_position: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False
    view_names: ClassVar[tuple[str, ...]] = ("clean",)

    def __post_init__(self):
        unknown = [f for f in self.families if f not in FAMILIES]
        if unknown or not self.families:
            raise ValueError(f"tasks.synthetic.families: expected some of {sorted(FAMILIES)}, found {self.families}")

    @property
    def head(self) -> base.Head:
        return base.Head("pixels", 1 + self.geometry.channels)

    @property
    def reductions(self) -> Mapping[str, base.Reduction]:
        return {self.name: base.Reduction("top", "defect"), f"{self.name}_clean": base.Reduction("top", "error")}

    def corrupt(self, key: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> tuple[jax.Array, Any]:
        key_count, key_clean, key_paint = jax.random.split(key, 3)
        body = base.body_mask(images)
        count = jax.random.randint(key_count, (images.shape[0], 1, 1, 1), 1, self.max_defects + 1)
        count = count * (jax.random.uniform(key_clean, count.shape) >= self.clean_share)

        def turn(done: Any, step: Any) -> tuple[Any, None]:
            (corrupted, where), (i, k) = done, step
            painted, soft = self._paint(k, corrupted, body)
            corrupted = jnp.where(i < count, painted, corrupted)
            return (corrupted, jnp.where(i < count, jnp.maximum(where, soft), where)), None

        # One over the other, each of a family of its own; a loop, because the families take long to compile.
        steps = jnp.arange(self.max_defects), jax.random.split(key_paint, self.max_defects)
        (corrupted, where), _ = jax.lax.scan(turn, (images, jnp.zeros_like(body)), steps)
        # A defect that changes nothing visible is none: blending like with like must not be called an anomaly.
        change = base.box_filter(jnp.abs(corrupted - images).mean(-1, keepdims=True), 3)
        defect = ((where > 0.5) & (change > 0.02)).astype(images.dtype)
        return base.with_plane(corrupted), (images, defect)

    def _paint(self, key: jax.Array, images: jax.Array, body: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One defect in each image: the images with it, and how much it covers of each pixel [B, H, W, 1]."""
        key_blob, key_family, *keys = jax.random.split(key, 2 + len(self.families))
        soft, centre, radius = _blob(key_blob, body, self.radius_min, self.radius_max)
        every = jnp.stack(
            [FAMILIES[f](k, images, soft, centre, radius) for f, k in zip(self.families, keys, strict=True)]
        )
        batch = images.shape[0]
        chosen = every[jax.random.randint(key_family, (batch,), 0, len(self.families)), jnp.arange(batch)]
        soft = soft * body
        return jnp.clip(images + soft * (chosen - images), 0.0, 1.0), soft

    def loss(self, output: jax.Array, target: Any) -> jax.Array:
        images, defect = target
        output = output.astype(jnp.float32)
        logits, clean = output[..., :1], output[..., 1:]
        # Defects cover a few percent of the pixels: each side is averaged by itself, or "nowhere" would be learned.
        bce = jax.nn.softplus(logits) - logits * defect
        balanced = 0.5 * (base.mean_where(bce, defect) + base.mean_where(bce, 1 - defect))
        p = jax.nn.sigmoid(logits)
        overlap, total = (p * defect).sum((1, 2, 3)), (p + defect).sum((1, 2, 3))
        dice = defect.max((1, 2, 3)) * (1 - (2 * overlap + 1) / (total + 1))
        return balanced + 0.5 * dice + self.clean_weight * base.absolute_error(clean, images).mean((1, 2))

    def views(self, images: jax.Array) -> jax.Array:
        return base.with_plane(images)[None]

    def evidence(self, outputs: jax.Array, images: jax.Array, teacher: base.Teacher | None) -> Mapping[str, jax.Array]:
        output = outputs[0].astype(jnp.float32)
        return {
            self.name: jax.nn.sigmoid(output[..., 0]),
            f"{self.name}_clean": base.absolute_error(output[..., 1:], images),
        }


def _grid(size: int) -> jax.Array:
    """Pixel coordinates (row, column) in units of the image side, [size, size, 2]."""
    line = (jnp.arange(size) + 0.5) / size
    return jnp.stack(jnp.meshgrid(line, line, indexing="ij"), -1)


def _blob(key: jax.Array, body: jax.Array, low: float, high: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A soft irregular ellipse centred on the body: (mask [B, H, W, 1] in [0, 1], centre [B, 2], radius [B])."""
    key_centre, key_radius, key_shape, key_angle, key_noise = jax.random.split(key, 5)
    batch, size = body.shape[:2]
    noise = jax.random.uniform(key_centre, (batch, size * size)) * body.reshape(batch, -1)
    centre = _grid(size).reshape(-1, 2)[jnp.argmax(noise, axis=-1)]
    log_radius = jax.random.uniform(key_radius, (batch,), minval=jnp.log(low), maxval=jnp.log(high))
    radius = jnp.exp(log_radius)
    aspect = jnp.exp(jax.random.uniform(key_shape, (batch, 1, 1), minval=-0.6, maxval=0.6))
    angle = jax.random.uniform(key_angle, (batch, 1, 1), maxval=jnp.pi)
    away = (_grid(size)[None] - centre[:, None, None]) / radius[:, None, None, None]
    u = (away[..., 0] * jnp.cos(angle) + away[..., 1] * jnp.sin(angle)) * aspect
    v = (away[..., 1] * jnp.cos(angle) - away[..., 0] * jnp.sin(angle)) / aspect
    distance = jnp.sqrt(u**2 + v**2) + 0.2 * base.coarse_noise(key_noise, batch, size, 8)[..., 0]
    return jax.nn.sigmoid((1 - distance[..., None]) / 0.1), centre, radius


def _amplitude(key: jax.Array, batch: int, low: float, high: float) -> jax.Array:
    """Signed amplitudes [B, 1, 1, 1], magnitude uniform in [low, high]."""
    key_size, key_sign = jax.random.split(key)
    size = jax.random.uniform(key_size, (batch, 1, 1, 1), minval=low, maxval=high)
    return size * jax.random.rademacher(key_sign, (batch, 1, 1, 1), jnp.float32)


def _displaced(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image shifted round by a random offset of at least an eighth of its side."""
    size = images.shape[1]
    shifts = jax.random.randint(key, (images.shape[0], 2), size // 8, size - size // 8)
    return jax.vmap(lambda image, shift: jnp.roll(image, (shift[0], shift[1]), axis=(0, 1)))(images, shifts)


def _blend(key: jax.Array, images: jax.Array, soft: jax.Array, centre: jax.Array, radius: jax.Array) -> jax.Array:
    """Part of another image, brought to the same mean and mixed in (FPI; NSA without the Poisson solver)."""
    key_shift, key_alpha = jax.random.split(key)
    other = _displaced(key_shift, jnp.roll(images, 1, axis=0))
    other = other + base.mean_in(images, soft) - base.mean_in(other, soft)
    alpha = jax.random.uniform(key_alpha, (images.shape[0], 1, 1, 1), minval=0.3)
    return images + alpha * (other - images)


def _blob_family(key: jax.Array, images: jax.Array, soft: jax.Array, centre: jax.Array, radius: jax.Array) -> jax.Array:
    """Brighter or darker."""
    return images + _amplitude(key, images.shape[0], 0.1, 0.6)


def _texture(key: jax.Array, images: jax.Array, soft: jax.Array, centre: jax.Array, radius: jax.Array) -> jax.Array:
    """Smooth-noise texture of a random scale on top."""
    key_coarse, key_fine, key_mix, key_amplitude = jax.random.split(key, 4)
    batch, size = images.shape[:2]
    mix = jax.random.uniform(key_mix, (batch, 1, 1, 1))
    coarse = base.coarse_noise(key_coarse, batch, size, 8)
    fine = base.coarse_noise(key_fine, batch, size, max(size // 3, 4))
    return images + _amplitude(key_amplitude, batch, 0.05, 0.25) * (mix * coarse + (1 - mix) * fine)


def _deform(key: jax.Array, images: jax.Array, soft: jax.Array, centre: jax.Array, radius: jax.Array) -> jax.Array:
    """Tissue pushed away from, or drawn to, the centre: mass effect or atrophy."""
    strength = _amplitude(key, images.shape[0], 0.3, 0.7)
    size = images.shape[1]
    away = _grid(size)[None] - centre[:, None, None]
    distance = jnp.sqrt(jnp.square(away).sum(-1, keepdims=True)) / (1.5 * radius[:, None, None, None])
    pull = strength * jnp.clip(1 - distance, 0.0, 1.0)
    source = (centre[:, None, None] + away * (1 - pull)) * size - 0.5

    def sample(image: jax.Array, where: jax.Array) -> jax.Array:
        take = lambda plane: jax.scipy.ndimage.map_coordinates(plane, [where[..., 0], where[..., 1]], 1, mode="nearest")  # noqa: E731
        return jnp.stack([take(image[..., c]) for c in range(image.shape[-1])], -1)

    return jax.vmap(sample)(images, source)


def _haze(key: jax.Array, images: jax.Array, soft: jax.Array, centre: jax.Array, radius: jax.Array) -> jax.Array:
    """Structure smoothed away and veiled: consolidation, oedema, loss of texture."""
    key_level, key_veil = jax.random.split(key)
    window = max(3, images.shape[1] // 9 | 1)  # 7 of 64 pixels
    smooth = base.box_filter(base.box_filter(images, window), window)
    level = base.mean_in(images, soft) + _amplitude(key_level, images.shape[0], 0.0, 0.3)
    veil = jax.random.uniform(key_veil, (images.shape[0], 1, 1, 1), minval=0.1, maxval=0.8)
    return smooth + veil * (level - smooth)


def _cutpaste(key: jax.Array, images: jax.Array, soft: jax.Array, centre: jax.Array, radius: jax.Array) -> jax.Array:
    """Another part of the same image."""
    return _displaced(key, images)


def _mass(key: jax.Array, images: jax.Array, soft: jax.Array, centre: jax.Array, radius: jax.Array) -> jax.Array:
    """A growth: tissue pushed aside, in its place a smooth level of its own that is brighter or darker, and texture."""
    key_deform, key_level, key_own, key_texture = jax.random.split(key, 4)
    pushed = _deform(key_deform, images, soft, centre, radius)
    level = base.mean_in(images, soft) + _amplitude(key_level, images.shape[0], 0.1, 0.5)
    own = jax.random.uniform(key_own, (images.shape[0], 1, 1, 1), minval=0.3)
    return _texture(key_texture, pushed + own * (level - pushed), soft, centre, radius)


FAMILIES = {
    "blend": _blend,
    "blob": _blob_family,
    "texture": _texture,
    "deform": _deform,
    "haze": _haze,
    "cutpaste": _cutpaste,
    "mass": _mass,
}
