"""From head outputs to raw scores on the device, and from maps to the fused map.

`mtl_moe.calibration` makes the raw scores comparable and fuses them. The fused map is the mean over evidences of
(map - median) / (95th percentile - median), one scale for the whole data set, and 0 outside the body, smoothed.
Axes: B images, S evidences with a map (a task gives one or two), H W map, M side of the finished map.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from core.dense import DTYPES
from mtl_moe.calibration import Calibration
from mtl_moe.system import System
from mtl_moe.tasks.base import EPS, body_mask, mean_where, to_float
from mtl_moe.teacher import make_teacher, needs_teacher
from mtl_moe.tiling import map_by_tiles

TOP_SHARE = 0.05  # of the body's pixels
# One evidence may not outvote the others in the fused map: calibrated values are cut here, ten times the distance
# from the normals' median to their 95th percentile.
MAP_LIMIT = 10.0
SMOOTHING = 4.0 / 224  # standard deviation of the map's Gaussian as a share of its side: BMAD's 4 at 224


def make_score_fn(system: System, precision: str = "high") -> Callable[[Any, Any, jax.Array], dict[str, jax.Array]]:
    """Compiled (params, extra, uint8 images [B, H, W, C]) -> {raw [B, S], maps [B, S, H, W], body [B, H, W]}.

    All views of all tasks go through one forward, tile by tile where images are larger than what the network sees
    (`mtl_moe.tiling`). An image's result does not depend on the other images. With score.dtype "float32" products are
    float32 on a CPU, as good as that on a TPU, and TF32 on a GPU (10 bits of each operand), whose products of whole
    float32 are a seventh as fast: `precision` "highest" has these.
    """
    tasks, model = system.tasks, system.model.clone(dtype=DTYPES[system.config.score.dtype])

    def evidence_maps(params: Any, extra: Any, images: jax.Array) -> jax.Array:
        """What the network sees at a time, [B, H, W, C] -> [B, S, H, W]."""
        teacher = make_teacher(model.config, extra["teacher"], images, model.dtype) if needs_teacher(tasks) else None
        views = {task.name: task.views(images) for task in tasks}
        outputs, _ = model.apply({"params": params}, views, train=False, shared_views=True)
        maps = []
        for task in tasks:
            evidence = task.evidence(outputs[task.name], images, teacher)
            maps += [evidence[name].astype(jnp.float32) for name in task.reductions]
        return jnp.stack(maps, 1)

    def score(params: Any, extra: Any, images: jax.Array) -> dict[str, jax.Array]:
        images = to_float(images)
        body = body_mask(images)[..., 0]
        maps = map_by_tiles(lambda tiles: evidence_maps(params, extra, tiles), images, model.image_size)
        reductions = [reduction.how for task in tasks for reduction in task.reductions.values()]
        raw = [_reduce(maps[:, i], body, how) for i, how in enumerate(reductions)]
        return {"raw": jnp.stack(raw, 1), "maps": maps, "body": body}

    def score_in_float32(params: Any, extra: Any, images: jax.Array) -> dict[str, jax.Array]:
        # By default a TPU rounds operands of float32 products to bfloat16: no calibration made elsewhere would hold.
        with jax.default_matmul_precision(precision):
            return score(params, extra, images)

    return jax.jit(score_in_float32 if model.dtype == jnp.float32 else score)


def _reduce(maps: jax.Array, body: jax.Array, how: str) -> jax.Array:
    """Maps and body [B, H, W] -> raw scores [B]; see `mtl_moe.tasks.base.Reduction`."""
    if how == "mean":
        return mean_where(maps, body)
    smooth = jnp.asarray(_smoothing(np.eye(maps.shape[1])))
    maps = jnp.einsum("mh,bhw,nw->bmn", smooth, maps, smooth, precision="highest")
    flat, inside = maps.reshape(maps.shape[0], -1), body.reshape(maps.shape[0], -1)
    most = math.ceil(TOP_SHARE * flat.shape[1])
    ranked, _ = jax.lax.top_k(jnp.where(inside > 0, flat, 0.0), most)
    count = jnp.ceil(TOP_SHARE * inside.sum(-1, keepdims=True))
    chosen = (jnp.arange(ranked.shape[1])[None] < count).astype(jnp.float32)
    return jnp.log((ranked * chosen).sum(-1) / count[:, 0] + EPS)


def _smoothing(rows: np.ndarray) -> np.ndarray:
    """The matrix that smooths maps along one axis, times `rows` [M, H]: float32 [M, H]."""
    return ndimage.gaussian_filter1d(rows, SMOOTHING * len(rows), axis=0).astype(np.float32)


def make_map_fn(calibration: Calibration, size: int, map_size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Compiled (maps [B, S, H, W], body [B, H, W]) -> finished fused maps [B, M, M] in calibrated units.

    Nothing is found outside the body: no scale was fitted there, and what a task answers about an empty surround says
    nothing (tiles that are alike cannot be told apart).

    Bilinear resizing and Gaussian smoothing are both linear in rows and columns: one [M, H] matrix from each side.
    """
    bilinear = np.asarray(jax.image.resize(jnp.eye(size), (map_size, size), "bilinear"))
    smooth = jnp.asarray(_smoothing(bilinear))
    low, scale = (np.asarray(x, np.float32)[None, :, None, None] for x in (calibration.map_low, calibration.map_scale))
    fused_low, fused_scale = np.float32(calibration.fused_low), np.float32(calibration.fused_scale)
    return lambda maps, body: _finish(maps, body, smooth, low, scale, fused_low, fused_scale)


@jax.jit
def _finish(
    maps: jax.Array,
    body: jax.Array,
    smooth: jax.Array,
    low: jax.Array,
    scale: jax.Array,
    fused_low: jax.Array,
    fused_scale: jax.Array,
) -> jax.Array:
    """See `make_map_fn`; one program serves all calibrations."""
    fused = jnp.minimum((maps - low) / scale, MAP_LIMIT).mean(1) * body
    finished = jnp.einsum("mh,bhw,nw->bmn", smooth, fused, smooth, precision="highest")
    return (finished - fused_low) / fused_scale
