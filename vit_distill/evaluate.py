"""How far a student is from its teacher on images it was not trained on, block by block, before and after training.

Axes: n images, S stored image side, N tokens, D width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core.vit import VitConfig, VitOutput
from vit_distill.diagnostics import block_diagnostics
from vit_distill.distill import Distiller
from vit_distill.forward import make_forward
from vit_distill.losses import cosine

Rows = list[dict[str, Any]]


def run_blocks(
    config: VitConfig,
    params: Any,
    inputs: np.ndarray,
    batch_size: int,
    keep: tuple[int, ...],
    dtype: Any = jnp.float32,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Tokens [n, N, D] after the blocks `keep`, and pooled features [n, D], of normalised images [n, H, W, C]."""

    def read(output: VitOutput) -> tuple[list[jax.Array], jax.Array]:
        return [output.blocks[i] for i in keep], output.pooled

    forward = jax.jit(make_forward(config, dtype, read))

    tokens, pooled = [], []
    for start in range(0, len(inputs), batch_size):
        # Counted from the end in the last batch, so that one shape is compiled; what is repeated is dropped.
        first = max(min(start, len(inputs) - batch_size), 0)
        blocks, features = jax.device_get(forward(params, inputs[first : first + batch_size]))
        tokens.append([block[start - first :] for block in blocks])
        pooled.append(features[start - first :])
    return [np.concatenate(parts) for parts in zip(*tokens, strict=True)], np.concatenate(pooled)


def compare(distiller: Distiller, trainable: Any, images: np.ndarray) -> tuple[dict[str, float], Rows, Rows]:
    """Student against teacher on evaluation crops.

    Args:
      trainable: what was trained; None compares the untrained copy alone.
      images: uint8 [n, S, S, C] at the teacher's resize size.

    Returns:
      Metrics: "l1", "cls_l1", "patch_l1" after the last block and "cosine" of the pooled features, each also as
      "copy_..." before training; and the rows of `block_diagnostics` before and after.
    """
    config, size = distiller.student_config, min(32, len(images))
    inputs = np.asarray(distiller.teacher.preprocessing.evaluate(jnp.asarray(images)))
    own = tuple(range(config.depth))
    teacher_blocks, teacher_pooled = run_blocks(
        distiller.teacher.config, distiller.teacher.params, inputs, size, distiller.pairs
    )
    metrics, rows = {}, []
    merged = distiller.base if trainable is None else distiller.merged(trainable)
    for prefix, params in (("copy_", distiller.base), ("", merged)):
        blocks, pooled = run_blocks(config, params, inputs, size, own)
        rows.append(block_diagnostics(blocks, teacher_blocks, distiller.pairs))
        found = _distances(blocks[-1], teacher_blocks[-1], config)
        found["cosine"] = float(cosine(jnp.asarray(pooled), jnp.asarray(teacher_pooled)).mean())
        metrics |= {prefix + name: value for name, value in found.items()}
    return metrics, rows[0], rows[1]


def _distances(student: np.ndarray, teacher: np.ndarray, config: VitConfig) -> Mapping[str, float]:
    """Mean absolute differences of tokens [n, N, D]."""
    difference = np.abs(student - teacher).mean(-1)
    found = {"l1": float(difference.mean()), "patch_l1": float(difference[:, config.num_prefix :].mean())}
    return found | ({"cls_l1": float(difference[:, 0].mean())} if config.class_token else {})
