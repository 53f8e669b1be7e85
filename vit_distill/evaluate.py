"""How far a student is from its teacher on images it was not trained on, block by block, before and after training.

Axes: B batch, n images, S stored image side, N tokens, D width.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core.vit import VitConfig, VitOutput
from vit_distill.diagnostics import block_moments, block_rows, combine
from vit_distill.distill import Distiller
from vit_distill.forward import make_forward
from vit_distill.losses import cosine

BATCH = 8  # images of which the tokens of all blocks are held at once, of the teacher and two students
Rows = list[dict[str, Any]]


def blocks_in_batches(
    config: VitConfig,
    params: Any,
    inputs: np.ndarray,
    batch_size: int,
    keep: tuple[int, ...],
    dtype: Any = jnp.float32,
) -> Iterator[tuple[list[jax.Array], jax.Array]]:
    """Batch by batch of normalised images [n, H, W, C]: tokens [B, N, D] after the blocks `keep`, pooled [B, D].

    The last batch may be smaller.
    """

    def read(output: VitOutput) -> tuple[list[jax.Array], jax.Array]:
        return [output.blocks[i] for i in keep], output.pooled

    forward, params = jax.jit(make_forward(config, dtype, read)), jax.device_put(params)
    for start in range(0, len(inputs), batch_size):
        # Counted from the end in the last batch, so that one shape is compiled; what is repeated is dropped.
        first = max(min(start, len(inputs) - batch_size), 0)
        blocks, pooled = forward(params, inputs[first : first + batch_size])
        yield [block[start - first :] for block in blocks], pooled[start - first :]


def run_blocks(
    config: VitConfig,
    params: Any,
    inputs: np.ndarray,
    batch_size: int,
    keep: tuple[int, ...],
    dtype: Any = jnp.float32,
) -> list[np.ndarray]:
    """The tokens of `blocks_in_batches` of all images at once, on the host: [n, N, D] for each of `keep`."""
    found, start = None, 0
    for tokens, _ in blocks_in_batches(config, params, inputs, batch_size, keep, dtype):
        # Filled in place: joining the batches at the end would hold the tokens of all blocks twice.
        found = found or [np.empty((len(inputs), *part.shape[1:]), part.dtype) for part in tokens]
        stop = start + len(tokens[0])
        for whole, part in zip(found, tokens, strict=True):
            whole[start:stop] = part
        start = stop
    return found


def compare(distiller: Distiller, trainable: Any, images: np.ndarray) -> tuple[dict[str, float], Rows, Rows]:
    """Student against teacher on evaluation crops.

    Args:
      trainable: what was trained; None compares the untrained copy alone.
      images: uint8 [n, S, S, C] at the teacher's resize size.

    Returns:
      Metrics: "l1", "cls_l1", "patch_l1" after the last block, "cosine" of the pooled features, and of a teacher with a
      classifier "agreement", the share of images for which the student names the same class, each also as "copy_..."
      before training; and the rows of `diagnostics.block_rows` before and after.
    """
    config, teacher = distiller.student_config, distiller.teacher
    inputs = np.asarray(teacher.preprocessing.evaluate(jnp.asarray(images)))
    size, own = min(BATCH, len(inputs)), tuple(range(config.depth))
    merged = distiller.base if trainable is None else distiller.merged(trainable)
    students = {"copy_": distiller.base, "": merged}
    moments: dict[str, Any] = {}
    distances, cosines, named = ({prefix: [] for prefix in students} for _ in range(3))
    runs = [blocks_in_batches(teacher.config, teacher.params, inputs, size, distiller.pairs)]
    runs += [blocks_in_batches(config, params, inputs, size, own) for params in students.values()]
    # Tokens of all blocks of all images would be 17 GB for a ViT-L at 518 pixels: of a batch only sums are kept.
    for (expected, expected_pooled), *found in zip(*runs, strict=True):
        for prefix, (blocks, pooled) in zip(students, found, strict=True):
            batch = block_moments(blocks, expected)
            moments[prefix] = list(map(combine, moments[prefix], batch)) if prefix in moments else batch
            last, target = jax.device_get((blocks[-1], expected[-1]))
            distances[prefix].append(np.abs(last - target).mean(-1))
            cosines[prefix].append(cosine(pooled, expected_pooled))
            if config.num_classes > 1:
                named[prefix].append(_named(students[prefix], pooled) == _named(teacher.params, expected_pooled))
    metrics = {}
    for prefix in students:
        values = _distances(np.concatenate(distances[prefix]), config)
        values["cosine"] = float(np.concatenate(cosines[prefix]).mean())
        if named[prefix]:
            values["agreement"] = float(np.concatenate(named[prefix]).mean())
        metrics |= {prefix + name: value for name, value in values.items()}
    before, after = (block_rows(moments[prefix], distiller.pairs) for prefix in students)
    return metrics, before, after


def _named(params: Any, pooled: jax.Array) -> np.ndarray:
    """Classes int64 [B] that a model's head names, from pooled features [B, D]."""
    head = params["head"]
    return (np.asarray(pooled) @ np.asarray(head["kernel"]) + np.asarray(head.get("bias", 0.0))).argmax(1)


def _distances(difference: np.ndarray, config: VitConfig) -> dict[str, float]:
    """Means of the tokens' mean absolute differences [n, N]."""
    found = {"l1": float(difference.mean()), "patch_l1": float(difference[:, config.num_prefix :].mean())}
    return found | ({"cls_l1": float(difference[:, 0].mean())} if config.class_token else {})
