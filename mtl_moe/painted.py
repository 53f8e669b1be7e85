"""The criterion that sees no abnormal image: how well scores tell normal images from the same with one painted defect.

Defects are of the families that the task `synthetic` trains on, one at a time, and of families that nothing trains on
(UNSEEN): other shapes, most of them wide. An AUROC of 0.5 means that the defects are not noticed. What is painted
depends on the images, the family and the seed alone, so detectors of one image size are compared on the same defects.
Axes: n images, H W C image, B batch (all n at once).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from core.metrics import auroc_between
from core.sampling import even_rows
from input_pipeline.split import ArrayPixels, Split
from mtl_moe.tasks import base
from mtl_moe.tasks.synthetic import FAMILIES, Synthetic

CLEAN = "clean"  # the images as they are


def paint(images: np.ndarray, family: str, seed: int) -> np.ndarray:
    """uint8 images [n, H, W, C] with one defect each: the same shape and dtype.

    Raises:
      ValueError: for a family that is neither in TRAINED nor in UNSEEN.
    """
    if family not in KINDS[1:]:
        raise ValueError(f"family: expected one of {KINDS[1:]}, found {family!r}")
    key = jax.random.fold_in(jax.random.key(seed), KINDS.index(family))

    # The key is an argument: XLA would compute what it draws from a constant one while it compiles, many times slower.
    def trained(key: jax.Array, images: jax.Array) -> jax.Array:
        geometry = base.Geometry(images.shape[1], 1, images.shape[3], 1)  # only the channels matter here
        task = Synthetic(geometry, families=(family,), clean_share=0.0, max_defects=1)
        return task.corrupt(key, images, None)[0][..., :-1]

    def unseen(key: jax.Array, images: jax.Array) -> jax.Array:
        return jnp.clip(UNSEEN[family](key, images, base.body_mask(images)), 0.0, 1.0)

    painted = jax.jit(trained if family in TRAINED else unseen)(key, base.to_float(jnp.asarray(images)))
    return np.asarray(jnp.round(painted * 255.0)).astype(np.uint8)


def sources(num_normals: int, most: int) -> np.ndarray:
    """Which normals `painted_normals` paints, int [n]: its rows of each of KINDS are made of these, in their order."""
    return even_rows(num_normals, most)


def painted_normals(normals: Split, most: int) -> Split:
    """At most `most` of the normals, evenly spaced, once for each of KINDS in that order: n rows as they are, then n
    rows with a defect of the first family, and so on."""
    chosen = normals.take(sources(len(normals), most))
    images = chosen.images(np.arange(len(chosen)))
    kinds = np.concatenate([images if kind == CLEAN else paint(images, kind, seed=0) for kind in KINDS])
    names = [f"{kind}/{name}" for kind in KINDS for name in chosen.names]
    labels = np.tile(chosen.labels, len(KINDS))
    return Split(names, chosen.groups * len(KINDS), labels, False, ArrayPixels(kinds, None, images.shape[1]))


def by_kind(values: np.ndarray) -> dict[str, np.ndarray]:
    """Values of `painted_normals`' rows, [len(KINDS) * n, ...] -> by kind [n, ...]."""
    return dict(zip(KINDS, np.split(values, len(KINDS)), strict=True))


def painted_auroc(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """AUROC of each family against CLEAN, from scores by kind, [n] each."""
    return {family: auroc_between(scores[CLEAN], scores[family]) for family in KINDS if family != CLEAN}


def criteria(aurocs: Mapping[str, float]) -> dict[str, float]:
    """Means over families: {"trained", "unseen"}; the second is the one to choose by."""
    return {
        "trained": float(np.mean([aurocs[family] for family in TRAINED])),
        "unseen": float(np.mean([aurocs[family] for family in UNSEEN])),
    }


def disc(key: jax.Array, body: jax.Array, low: float, high: float, edge: float) -> jax.Array:
    """A soft disc about a random pixel of the body, [B, H, W, 1] in [0, 1] and 0 off the body.

    The radius is uniform in [low, high] of the image side; `edge` is how soft the rim is, as a share of the radius.
    """
    key_centre, key_radius = jax.random.split(key)
    batch, size = body.shape[:2]
    noise = jax.random.uniform(key_centre, (batch, size * size)) * body.reshape(batch, -1)
    row, column = jnp.divmod(jnp.argmax(noise, axis=-1), size)
    line = jnp.arange(size)
    away = jnp.hypot(line[None, :, None] - row[:, None, None], line[None, None, :] - column[:, None, None]) / size
    radius = jax.random.uniform(key_radius, (batch, 1, 1), minval=low, maxval=high)
    return jax.nn.sigmoid((1 - away / radius) / edge)[..., None] * body


def _wide(key: jax.Array, body: jax.Array) -> jax.Array:
    return disc(key, body, 0.35, 0.6, edge=0.2)


def _uniform(key: jax.Array, images: jax.Array, low: float, high: float) -> jax.Array:
    return jax.random.uniform(key, (images.shape[0], 1, 1, 1), minval=low, maxval=high)


def _bump(key: jax.Array, images: jax.Array, body: jax.Array) -> jax.Array:
    """A small spot without an edge, brighter or darker."""
    key_area, key_size, key_sign = jax.random.split(key, 3)
    sign = jax.random.rademacher(key_sign, (images.shape[0], 1, 1, 1), jnp.float32)
    return images + sign * _uniform(key_size, images, 0.15, 0.4) * disc(key_area, body, 0.05, 0.15, edge=0.25)


def _inverted(key: jax.Array, images: jax.Array, body: jax.Array) -> jax.Array:
    """Contrast turned round its own mean."""
    area = disc(key, body, 0.1, 0.25, edge=0.1)
    return images + 2 * area * (base.mean_in(images, area) - images)


def _wide_veil(key: jax.Array, images: jax.Array, body: jax.Array) -> jax.Array:
    """Contrast lowered towards a level a little brighter than the tissue."""
    key_area, key_level, key_veil = jax.random.split(key, 3)
    area = _wide(key_area, body)
    level = base.mean_in(images, area) + _uniform(key_level, images, 0.0, 0.2)
    return images + area * _uniform(key_veil, images, 0.2, 0.6) * (level - images)


def _wide_blur(key: jax.Array, images: jax.Array, body: jax.Array) -> jax.Array:
    """Detail gone, brightness kept."""
    size = max(3, images.shape[1] // 16 | 1)
    return images + _wide(key, body) * (base.box_filter(base.box_filter(images, size), size) - images)


def _wide_brightening(key: jax.Array, images: jax.Array, body: jax.Array) -> jax.Array:
    key_area, key_size = jax.random.split(key)
    return images + _wide(key_area, body) * _uniform(key_size, images, 0.1, 0.3)


def _wide_darkening(key: jax.Array, images: jax.Array, body: jax.Array) -> jax.Array:
    key_area, key_size = jax.random.split(key)
    return images * (1 - _wide(key_area, body) * _uniform(key_size, images, 0.3, 0.7))


def _wide_texture(key: jax.Array, images: jax.Array, body: jax.Array) -> jax.Array:
    """Coarse clouds on top."""
    key_area, key_size, key_noise = jax.random.split(key, 3)
    clouds = base.coarse_noise(key_noise, images.shape[0], images.shape[1], 6)
    return images + _wide(key_area, body) * _uniform(key_size, images, 0.05, 0.15) * clouds


TRAINED = tuple(FAMILIES)
# Each: (key, images [B, H, W, C] in [0, 1], body [B, H, W, 1]) -> images with a defect, not yet clipped.
UNSEEN = {
    "bump": _bump,
    "inverted": _inverted,
    "wide_veil": _wide_veil,
    "wide_blur": _wide_blur,
    "wide_brightening": _wide_brightening,
    "wide_darkening": _wide_darkening,
    "wide_texture": _wide_texture,
}
KINDS = (CLEAN, *TRAINED, *UNSEEN)
