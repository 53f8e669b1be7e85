"""Position embeddings of another resolution: bicubic resizing exactly as the tools that teachers come from do it.

The tools differ (facebookresearch/dinov2#378), so the variant is an explicit option. Axes: G grid side, N tokens (N =
prefix + G*G), D width.
"""

import math

import numpy as np

VARIANTS = ("timm", "bicubic", "dinov2")


def resize_positions(positions: np.ndarray, num_prefix: int, grid: int, variant: str = "timm") -> np.ndarray:
    """[1, num_prefix + G*G, D] -> [1, num_prefix + grid*grid, D] float32; the prefix stays as it is.

    Args:
      variant: "timm": bicubic with antialias, a = -0.5 (timm's resample_abs_pos_embed; DINOv2 with registers);
        "bicubic": without antialias, a = -0.75 (torch's default: DINO, Hugging Face); "dinov2": the same with the
        scale (grid + 0.1) / G of DINOv2 without registers.

    Raises:
      ValueError: for an unknown variant or tokens that are not a square grid.
    """
    if variant not in VARIANTS:
        raise ValueError(f"position_resize: expected one of {VARIANTS}, found {variant!r}")
    count = positions.shape[1] - num_prefix
    side = math.isqrt(max(count, 0))
    if side < 1 or side * side != count:
        raise ValueError(
            f"position embedding: expected {num_prefix} + G*G tokens of a square grid, found {positions.shape[1]}"
        )
    if side == grid:
        return positions
    matrix = resize_matrix(side, grid, variant)
    patches = positions[0, num_prefix:].astype(np.float64).reshape(side, side, -1)
    resized = np.einsum("ap,bq,pqd->abd", matrix, matrix, patches, optimize=True).reshape(grid * grid, -1)
    return np.concatenate([positions[0, :num_prefix], resized], axis=0)[None].astype(np.float32)


def resize_matrix(size: int, new_size: int, variant: str) -> np.ndarray:
    """[new_size, size] weights of one-dimensional bicubic resizing; every row sums to 1."""
    scale = size / (new_size + 0.1) if variant == "dinov2" else size / new_size
    matrix = np.zeros((new_size, size))
    for row in range(new_size):
        centre = (row + 0.5) * scale
        if variant == "timm":
            # torch's antialias (after Pillow): the kernel is stretched when shrinking, cut and renormalised at edges.
            stretch = max(scale, 1.0)
            first, last = max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), size)
            weights = _cubic((np.arange(first, last) - centre + 0.5) / stretch, -0.5)
            matrix[row, first:last] = weights / weights.sum()
        else:
            # torch's plain bicubic: four taps, the edge value repeated.
            left = math.floor(centre - 0.5)
            for tap in range(left - 1, left + 3):
                matrix[row, min(max(tap, 0), size - 1)] += _cubic(np.asarray(tap - centre + 0.5), -0.75)
    return matrix


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with free parameter `a`, support [-2, 2]."""
    x = np.abs(x)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))
