"""Augmentation of normal images on the device; which kind belongs to the task (config `tasks.<name>.augment`).

Axes: B images, H W C. What it does to the losses on held-out normals: benchmarks/NOTES.md.
"""

import jax
import jax.numpy as jnp

# shift and zoom as shares of the side, rotation in radians, gain around 1.
KINDS = {
    "none": None,
    "light": {"shift": 0.03, "zoom": 0.04, "rotation": 0.05, "gain": 0.08},
    "strong": {"shift": 0.08, "zoom": 0.1, "rotation": 0.15, "gain": 0.2},
}


def augment(key: jax.Array, images: jax.Array, kind: str) -> jax.Array:
    """Random shift, zoom, rotation and gain of float images [B, H, W, C] in [0, 1]; same shape, clipped to [0, 1].

    Raises:
      ValueError: for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"augment: expected one of {sorted(KINDS)}, found {kind!r}")
    size = KINDS[kind]
    if size is None:
        return images
    batch, height, width = images.shape[:3]
    key_geometry, key_gain = jax.random.split(key)
    u = jax.random.uniform(key_geometry, (batch, 4), minval=-1.0)
    gain = 1 + size["gain"] * jax.random.uniform(key_gain, (batch, 1, 1, 1), minval=-1.0)

    def sample(image: jax.Array, u: jax.Array) -> jax.Array:
        rows, cols = jnp.meshgrid(jnp.arange(height) / height - 0.5, jnp.arange(width) / width - 0.5, indexing="ij")
        angle, zoom = size["rotation"] * u[2], 1 + size["zoom"] * u[3]
        y = (jnp.cos(angle) * rows - jnp.sin(angle) * cols) * zoom + size["shift"] * u[0] + 0.5
        x = (jnp.sin(angle) * rows + jnp.cos(angle) * cols) * zoom + size["shift"] * u[1] + 0.5
        where = [y * height, x * width]
        planes = [
            jax.scipy.ndimage.map_coordinates(image[..., c], where, order=1, mode="nearest")
            for c in range(image.shape[-1])
        ]
        return jnp.stack(planes, -1)

    return jnp.clip(jax.vmap(sample)(images, u) * gain, 0.0, 1.0)
