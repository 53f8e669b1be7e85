"""Outputs of the adapted model and of a reloaded export, and how far they are apart.

Axes: B batch, H W C image, N tokens, D width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from core.vit import VisionTransformer, VitConfig, VitOutput

Outputs = Mapping[str, np.ndarray]

# Share of an output's largest value. Two float32 implementations of a 12-layer ViT differ by about 1e-5; a wrong
# epsilon, GELU kind or one transposed kernel by more than 1e-3.
TOLERANCE = 1e-4


def named_outputs(output: VitOutput) -> dict[str, Any]:
    """{"tokens": [B, N, D], "pooled": [B, D]} and, with a head, "logits": [B, classes]."""
    named = {"tokens": output.tokens, "pooled": output.pooled}
    return named if output.logits is None else named | {"logits": output.logits}


def model_outputs(config: VitConfig, params: Any, images: np.ndarray) -> Outputs:
    """`named_outputs` of normalised images [B, H, W, C], in full float32 (GPUs and TPUs round products by default)."""
    with jax.default_matmul_precision("highest"):
        output = jax.jit(VisionTransformer(config).apply)({"params": params}, images)
    return jax.device_get(named_outputs(output))


def largest_difference(expected: Outputs, found: Outputs) -> float:
    """Largest |expected - found| as a share of the largest |expected|, over the outputs in `found`.

    Raises:
      ValueError: for an output of another name, another shape, or with values that are not finite.
    """
    if not found or not set(found) <= set(expected):
        raise ValueError(f"outputs: expected some of {sorted(expected)}, found {sorted(found)}")
    differences = []
    for name, values in found.items():
        reference = np.asarray(expected[name], np.float64)
        if np.shape(values) != reference.shape:
            raise ValueError(f"{name}: expected shape {reference.shape}, found {np.shape(values)}")
        if not (np.isfinite(reference).all() and np.isfinite(values).all()):
            raise ValueError(f"{name} holds values that are not finite: check the student's weights for NaN")
        scale = np.abs(reference).max() or 1.0  # a head of zeros gives nothing but zeros
        differences.append(np.abs(reference - values).max() / scale)
    return float(max(differences))
