"""Features of a frozen model for every image of a set, and their cache on disk.

Axes: B batch, N images, S side of the stored images, C channels, D width, P patch tokens.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from core import tree
from core.dense import named_dtype
from core.files import replacing
from core.logs import progress_bar
from core.mesh import replicate, shard_batch
from core.vit import VitConfig, VitOutput
from vit_distill.forward import make_forward
from vit_distill.preprocessing import Preprocessing

OUTPUTS = ("pooled", "patches")
FeatureFn = Callable[[np.ndarray], jax.Array]


class ImageSet(Protocol):
    """What is read of a labelled set (input_pipeline/sources.py)."""

    def __len__(self) -> int:
        """Number of images N."""

    def images(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [n, S, S, C] of the given rows."""

    def manifest_hash(self) -> str:
        """sha256 over names and labels."""


def make_feature_fn(
    config: VitConfig,
    params: Any,
    preprocessing: Preprocessing,
    mesh: Mesh,
    *,
    output: str = "pooled",
    dtype: str = "float32",
) -> FeatureFn:
    """Compiled: uint8 images [B, S, S, C] -> float32 features; B must divide by the mesh's data axis.

    Args:
      output: "pooled": [B, D], what the model's own head sees; "patches": [B, P, D], patch tokens after the final norm
        (of a model that normalises after pooling, final_norm="pooled": before it).
      dtype: of the computation, one of core.dense.DTYPES.

    Raises:
      ValueError: for another output or dtype.
    """
    if output not in OUTPUTS:
        raise ValueError(f"output: expected one of {OUTPUTS}, found {output!r}")
    operands = named_dtype(dtype, "dtype of the features")
    params = replicate(params, mesh)

    def read(out: VitOutput) -> jax.Array:
        return (out.pooled if output == "pooled" else out.tokens[:, config.num_prefix :]).astype(jnp.float32)

    forward = make_forward(config, operands, read, mesh.size)

    @jax.jit
    def features(params: Any, images: jax.Array) -> jax.Array:
        return forward(params, preprocessing.evaluate(images).astype(dtype))

    return lambda images: features(params, shard_batch({"image": images}, mesh)["image"])


def model_fingerprint(config: VitConfig, params: Any, preprocessing: Preprocessing, dtype: str = "float32") -> str:
    """sha256 over everything but the image that a feature depends on: weights, architecture, preprocessing, dtype."""
    text = f"{tree.fingerprint(params)} {config} {preprocessing} {dtype}"
    return hashlib.sha256(text.encode()).hexdigest()


def extract_features(
    apply: FeatureFn, labelled: ImageSet, batch_size: int, *, description: str = "features"
) -> np.ndarray:
    """float32 [N, ...]: the features of every image, once, in the set's order.

    The last batch is filled up with its last image, so one shape is compiled; what fills it is cut off.

    Raises:
      ValueError: for an empty set, or a feature that is not finite (naming the row).
    """
    return _extract(apply, _batches(labelled, batch_size), len(labelled), batch_size, description)


def cached_features(
    folder: Path,
    model_hash: str,
    apply: FeatureFn,
    labelled: ImageSet,
    batch_size: int,
    *,
    description: str = "features",
) -> np.ndarray:
    """As `extract_features` of pooled features, through files in `folder`.

    A file is used only for the same model (`model_fingerprint`), the same names and labels, and the same pixels: the
    images are read and hashed each time, the model is not run. Other models' features lie beside it.

    Raises:
      ValueError: as `extract_features`, and for a file that cannot be read.
    """
    key = hashlib.sha256(f"pooled {model_hash} {labelled.manifest_hash()}".encode()).hexdigest()
    path = folder / f"pooled_{key[:24]}.npz"
    if path.exists():
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                features, pixels, found = stored["pooled"], str(stored["pixels"]), str(stored["key"])
        except Exception as error:  # numpy and zipfile raise half a dozen kinds on a damaged file
            raise ValueError(f"{path} is no cache of features that can be read: delete it ({error})") from error
        if found == key and pixels == pixels_hash(labelled, batch_size):
            return features
    digest = hashlib.sha256()
    features = _extract(apply, _hashed(_batches(labelled, batch_size), digest), len(labelled), batch_size, description)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, pooled=features, key=key, pixels=digest.hexdigest())
    return features


def pixels_hash(labelled: ImageSet, batch_size: int) -> str:
    """sha256 over every image's shape and pixels, read batch by batch."""
    digest = hashlib.sha256()
    for _ in _hashed(_batches(labelled, batch_size), digest):
        pass
    return digest.hexdigest()


def _batches(labelled: ImageSet, batch_size: int) -> Iterator[np.ndarray]:
    """uint8 [<= B, S, S, C], every image once and in order."""
    if len(labelled) == 0:
        raise ValueError("the set of images is empty: expected at least one image")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    starts = range(0, len(labelled), batch_size)
    return (labelled.images(np.arange(start, min(start + batch_size, len(labelled)))) for start in starts)


def _hashed(batches: Iterable[np.ndarray], digest: Any) -> Iterator[np.ndarray]:
    """The batches, their shapes and bytes added to the digest on the way."""
    for images in batches:
        digest.update(f"{images.shape[1:]} {images.dtype}".encode())
        digest.update(np.ascontiguousarray(images).data)
        yield images


def _extract(
    apply: FeatureFn, batches: Iterable[np.ndarray], num_images: int, batch_size: int, description: str
) -> np.ndarray:
    """float32 [N, ...]. The next batch is read while the devices compute this one."""
    features: np.ndarray | None = None
    done, waiting = 0, None

    def store(output: jax.Array, size: int) -> None:
        nonlocal features, done
        values = np.asarray(output)[:size]
        if not np.isfinite(values).all():
            bad = done + int(np.flatnonzero(~np.isfinite(values.reshape(size, -1)).all(1))[0])
            raise ValueError(f"the features of image {bad} (in the set's order) are not finite: check the weights")
        if features is None:
            features = np.empty((num_images, *values.shape[1:]), np.float32)
        features[done : done + size] = values
        done += size

    with progress_bar(num_images, description=description) as bar:
        for images in batches:
            size = len(images)
            fill = np.repeat(images[-1:], batch_size - size, axis=0)
            output = apply(np.concatenate([images, fill]) if len(fill) else images)
            if waiting is not None:
                store(*waiting)
            waiting = (output, size)
            bar.update(size)
        store(*waiting)
    if done != num_images:
        raise ValueError(f"the set ended after {done} of {num_images} images")
    return features
