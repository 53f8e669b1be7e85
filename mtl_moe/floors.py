"""Floors: scores and maps that learn next to nothing, which every result table shows beside the detector.

On chest X-rays a contrast statistic alone reaches what published detectors report, on Br35h brightness does: a figure
means something only beside these. All of them see the channel mean in [0, 1].
Axes: N images, H W C image, S thumbnail side, R principal components.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from scipy import fft, linalg, ndimage

BAND_SIGMAS = (0.0, 1.0, 2.0, 4.0, 8.0)  # pixels; band i is the difference of the Gaussians i and i + 1
THUMBNAIL_SIZE = 32
NUM_COMPONENTS = 40
CHUNK = 128  # images in float32 at a time, to bound the memory
LOG_EPS = 1e-6  # keeps the logarithm of a blank image finite; far below one grey level (4e-3)


def _grey(images: np.ndarray) -> np.ndarray:
    return images.mean(axis=-1, dtype=np.float32) / 255.0


def _check_images(images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(f"expected uint8 images [N > 0, H, W, C], found {images.dtype} {images.shape}")


def grey_log_mean_gradient(grey: Any) -> Any:
    """`log_mean_gradient` of channel means in [0, 1], [N, H, W] -> [N], of NumPy or JAX."""
    xp = grey.__array_namespace__()
    down = grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    across = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]
    return xp.log(LOG_EPS + xp.hypot(down, across).mean(axis=(1, 2)) / 2.0)


def _log_band_amplitudes(grey: np.ndarray) -> np.ndarray:
    """Log mean absolute value of each difference of Gaussians, [N, 4].

    In the cosine basis a Gaussian blur with mirrored borders is a product, whatever its sigma. Mean absolute value and
    mean square were both tried on chest X-rays at 128 pixels; the higher was kept (test AUROC of sigma 4-8 0.881, not
    0.856). A choice in sight of the test labels: allowed to a floor, which it can only raise, never to a detector.
    """
    height, width = grey.shape[1:]
    frequency = (np.pi * np.arange(height) / height)[:, None] ** 2 + (np.pi * np.arange(width) / width)[None, :] ** 2
    blurs = [np.exp(-0.5 * sigma**2 * frequency).astype(np.float32) for sigma in BAND_SIGMAS]
    spectrum = fft.dctn(grey, axes=(1, 2))
    bands = (fft.idctn(spectrum * (fine - coarse), axes=(1, 2)) for fine, coarse in itertools.pairwise(blurs))
    return np.log(LOG_EPS + np.stack([np.abs(band).mean(axis=(1, 2)) for band in bands], axis=1))


def _cumulative_histogram(grey: np.ndarray) -> np.ndarray:
    """Fraction of pixels at or below each of the 256 grey levels, [N, 256]."""
    levels = np.rint(grey * 255.0).astype(np.int64).reshape(len(grey), -1)
    offset = 256 * np.arange(len(grey))[:, None]
    counts = np.bincount((levels + offset).ravel(), minlength=256 * len(grey)).reshape(-1, 256)
    return counts.cumsum(axis=1) / levels.shape[1]


def _area_weights(size: int) -> np.ndarray:
    """[S, size]: row s averages the pixels that lie in the s-th of S equal parts, fractions included."""
    pixels, edges = np.arange(size), np.linspace(0.0, size, THUMBNAIL_SIZE + 1)
    overlap = np.minimum(edges[1:, None], pixels + 1.0) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(overlap, 0.0, None) * THUMBNAIL_SIZE / size).astype(np.float32)


def _thumbnails(grey: np.ndarray) -> np.ndarray:
    """Area averages on S x S cells, flat, [N, S * S] float64."""
    small = _area_weights(grey.shape[1]) @ grey @ _area_weights(grey.shape[2]).T
    return small.reshape(len(grey), -1).astype(np.float64)


STATISTICS = {
    "intensity": lambda grey: grey.mean(axis=(1, 2)),
    "gradient": grey_log_mean_gradient,
    "bands": _log_band_amplitudes,
    "histogram": _cumulative_histogram,
    "thumbnail": _thumbnails,
}


def _statistics(batches: Iterable[np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    parts = []
    for images in batches:
        _check_images(images)
        for start in range(0, len(images), CHUNK):
            grey = _grey(images[start : start + CHUNK])
            parts.append({name: STATISTICS[name](grey) for name in names})
    if not parts:
        raise ValueError("expected at least one image, found none")
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def log_mean_gradient(images: np.ndarray) -> np.ndarray:
    """Log of each image's mean gradient magnitude + 1e-6.

    Called texture where it is an evidence, and contrast where pairs of images are matched by it.
    The gradient is the central difference per pixel of the channel mean in [0, 1], over the pixels that have all four
    neighbours: a difference of 0.07 between two images is 7 % more contrast. It depends on the resolution.

    Args:
        images: [N, H, W, C] uint8, H and W at least 3.

    Returns:
        [N] float32, from -13.8 (blank) to -0.3.
    """
    return _statistics([images], ("gradient",))["gradient"]


def statistics(batches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """What `floor_scores` and `make_floor_map_fn` read of uint8 images, given as batches [n, H, W, C] of one size.

    10 KB an image: a set is never in memory as a whole.

    Raises:
      ValueError: without images, or for images of another dtype or shape.
    """
    return _statistics(batches, STATISTICS)


def _distance(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Two-sided robust-centred z: |test - median(train)| / std(train), along the first axis."""
    return np.abs(test - np.median(train, axis=0)) / (train.std(axis=0) + LOG_EPS)


def _make_residual_fn(train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The function of test [M, D] that gives what the first R principal components of train [N, D] leave of it."""
    mean = train.mean(axis=0)
    rank = min(NUM_COMPONENTS, len(train) - 1)
    basis = np.zeros((train.shape[1], 0))
    if rank:  # the D x D covariance rather than the N x D data: its cost does not grow with the training set
        largest = [train.shape[1] - rank, train.shape[1] - 1]
        _, basis = linalg.eigh((train - mean).T @ (train - mean), subset_by_index=largest)

    def residuals(test: np.ndarray) -> np.ndarray:
        centred = test - mean
        return centred - (centred @ basis) @ basis.T

    return residuals


def _nearest_distance(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Euclidean distance of each test row [M, D] to its nearest train row [N, D]."""
    train_norm = (train**2).sum(axis=1)
    nearest = [
        ((row**2).sum(axis=1)[:, None] + train_norm - 2.0 * row @ train.T).min(axis=1)
        for row in np.array_split(test, -(-len(test) // CHUNK))
    ]
    return np.sqrt(np.maximum(np.concatenate(nearest), 0.0))


def floor_scores(fit: Mapping[str, np.ndarray] | None, new: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Trivial anomaly scores of each test image; higher is called more anomalous.

    One-sided scores come with one sign only: the other sign's AUROC is 1 minus it.

    - `mean_intensity`; `intensity_distance` from the training median.
    - `low_gradient`: minus `log_mean_gradient`; `gradient_distance`: its two-sided z.
    - `band_<i>_low`: minus the log mean absolute difference of the Gaussian blurs of sigma 0-1, 1-2, 2-4, 4-8 pixels;
      `band_<i>_distance`: its two-sided z.
    - `histogram_distance`: mean absolute difference (over 256 grey levels) of the cumulative histogram to the mean one
      of the training images, in [0, 1].
    - `pca_error`: mean squared error after projection on the first 40 principal components of the training images at
      32 x 32; `nearest_neighbour`: Euclidean distance to the nearest training image at 32 x 32.

    Args:
        fit: `statistics` of the normal images that the floors are fitted on; None: only those that need no fit,
            `mean_intensity`, `low_gradient` and `band_<i>_low`.
        new: `statistics` of the M test images.

    Returns:
        name -> [M] floats.
    """
    scores = {"mean_intensity": new["intensity"], "low_gradient": -new["gradient"]}
    scores |= {f"band_{i}_low": -band for i, band in enumerate(new["bands"].T)}
    if fit is None:
        return scores
    scores["intensity_distance"] = _distance(fit["intensity"], new["intensity"])
    scores["gradient_distance"] = _distance(fit["gradient"], new["gradient"])
    scores |= {f"band_{i}_distance": far for i, far in enumerate(_distance(fit["bands"], new["bands"]).T)}
    scores["histogram_distance"] = np.abs(new["histogram"] - fit["histogram"].mean(axis=0)).mean(axis=1)
    scores["pca_error"] = (_make_residual_fn(fit["thumbnail"])(new["thumbnail"]) ** 2).mean(axis=1)
    scores["nearest_neighbour"] = _nearest_distance(fit["thumbnail"], new["thumbnail"])
    return scores


def make_floor_map_fn(fit: Mapping[str, np.ndarray] | None) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The function of uint8 images [M, H, W, C] that gives name -> [M, H, W] float32: trivial anomaly maps.

    Higher is called more anomalous.

    - `smoothed_intensity`: the channel mean in [0, 1] after a Gaussian of sigma 4 at 224 pixels, scaled with the
      geometric mean of height and width.
    - `pca_error`: squared residual of the 32 x 32 image, as in `floor_scores`, interpolated linearly to the image size.

    Args:
        fit: `statistics` of normal images; None: only `smoothed_intensity`, which needs no fit.
    """
    residuals = _make_residual_fn(fit["thumbnail"]) if fit else None

    def floor_maps(images: np.ndarray) -> dict[str, np.ndarray]:
        height, width = images.shape[1:3]
        sigma = 4.0 * np.sqrt(height * width) / 224.0
        maps = {"smoothed_intensity": ndimage.gaussian_filter(_grey(images), (0.0, sigma, sigma))}
        if residuals:
            thumbnails = _statistics([images], ("thumbnail",))["thumbnail"]
            errors = (residuals(thumbnails) ** 2).astype(np.float32).reshape(-1, THUMBNAIL_SIZE, THUMBNAIL_SIZE)
            zoom = (1.0, height / THUMBNAIL_SIZE, width / THUMBNAIL_SIZE)
            maps["pca_error"] = ndimage.zoom(errors, zoom, order=1, mode="nearest", grid_mode=True)
        return maps

    return floor_maps
