"""Large batches in parts: the forward of a frozen vision transformer, and how an update is cut.

A ViT-B's hidden activations of 32 images are 77 MB in float32 and leave every cache: in parts of 8 the same forward is
faster, and in parts of 4 the same update (benchmarks/NOTES.md). Axes: B batch, H W C image.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from core.vit import VisionTransformer, VitConfig, VitOutput

PART_BYTES = 24 * 2**20  # of a part's hidden activations [part * N, mlp_dim] in float32; 10 to 40 MB do as well
TRAINED_PART_BYTES = 10 * 2**20  # the same where a gradient is taken, which keeps them for every block


def part_size(config: VitConfig, batch: int, most_bytes: int | None = None) -> int:
    """Images of a part: the largest divisor of `batch` within `most_bytes` (default PART_BYTES); `batch` itself where
    none comes near."""
    most = (most_bytes or PART_BYTES) // (4 * config.num_tokens * config.mlp_dim)
    part = max((part for part in range(1, batch + 1) if batch % part == 0 and part <= most), default=1)
    return part if 2 * part > most else batch


def micro_batches(config: VitConfig, batch: int, num_devices: int, asked: int = 1) -> int:
    """Into how many micro-batches an update is cut: as many as were asked for; where that is one, and the device one
    CPU, as many as its caches want."""
    if asked > 1 or jax.default_backend() != "cpu" or num_devices > 1:
        return asked
    return batch // part_size(config, batch, TRAINED_PART_BYTES)


def forward_parts(config: VitConfig, batch: int, num_devices: int, asked: int = 1) -> int:
    """Into how many parts a forward without a gradient is cut: on one CPU as many as its caches want; elsewhere as many
    as were asked for, if the batch divides over them and the devices."""
    if jax.default_backend() == "cpu" and num_devices == 1:
        return batch // part_size(config, batch)
    return asked if batch % (asked * num_devices) == 0 else 1


def make_forward(
    config: VitConfig, dtype: Any, read: Callable[[VitOutput], Any], num_devices: int = 1, parts: int = 1
) -> Callable[[Any, jax.Array], Any]:
    """Function (parameters, normalised images [B, H, W, C]) -> read(VitOutput), to be compiled.

    Args:
      dtype: of the products, see `core.dense`.
      read: what of the output is kept; every array of it has the batch as its first axis.
      num_devices: that a batch is split over.
      parts: asked for, see `forward_parts`: of large batches the activations of one part are in memory at once.
    """
    model = VisionTransformer(config, dtype=dtype)

    def forward(params: Any, images: jax.Array) -> Any:
        def run(part: jax.Array) -> Any:
            return read(model.apply({"params": params}, part))

        batch = len(images)
        count = forward_parts(config, batch, num_devices, parts)
        if count == 1:
            return run(images)
        # Strided parts: with the batch split over devices, each device keeps its own rows.
        strided = jnp.moveaxis(images.reshape(-1, count, *images.shape[1:]), 1, 0)
        outputs = jax.lax.map(run, strided)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, *x.shape[2:]), outputs)

    return forward
