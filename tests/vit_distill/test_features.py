"""Features equal the model's, each image once on any number of devices; cached ones are never stale.

Axes: N images, S side of the stored images, C channels, D width.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.dense import DTYPES
from core.mesh import make_mesh
from core.vit import VisionTransformer, VitConfig
from vit_distill import features as module
from vit_distill.features import cached_features, extract_features, make_feature_fn, model_fingerprint
from vit_distill.preprocessing import Preprocessing

CONFIG = VitConfig(depth=2, width=16, num_heads=2, mlp_dim=32, patch_size=8, image_size=16, num_registers=1)
PREPROCESSING = Preprocessing(16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), crop_fraction=0.8)
ONE = make_mesh(devices=jax.devices()[:1])


@dataclasses.dataclass
class Images:
    """The part of a labelled set that features are made of."""

    pixels: np.ndarray
    names: str = "some names"

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, rows: np.ndarray) -> np.ndarray:
        return self.pixels[rows]

    def manifest_hash(self) -> str:
        return self.names


@pytest.fixture(scope="module")
def params() -> Any:
    """Seeded weights, none at its special initial value."""
    tree = VisionTransformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), tree)


@pytest.fixture(scope="module")
def images() -> Images:
    """Seven images of 20 pixels a side."""
    return Images(np.random.default_rng(1).integers(0, 256, (7, 20, 20, 3), np.uint8))


@pytest.mark.parametrize("output", module.OUTPUTS)
def test_features_are_the_models(output: str, params: Any, images: Images):
    """Against the model called on images cropped and normalised here."""
    inputs = (images.pixels[:, 2:18, 2:18] / 255.0 - [[[[0.4, 0.5, 0.6]]]]) / [[[[0.2, 0.25, 0.3]]]]
    expected = VisionTransformer(CONFIG).apply({"params": params}, jnp.asarray(inputs, jnp.float32))
    expected = expected.pooled if output == "pooled" else expected.tokens[:, 2:]
    apply = make_feature_fn(CONFIG, params, PREPROCESSING, ONE, output=output)
    found = extract_features(apply, images, 3)
    assert found.shape == ((7, 16) if output == "pooled" else (7, 4, 16))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_eight_devices_give_the_same(params: Any, images: Images):
    one = extract_features(make_feature_fn(CONFIG, params, PREPROCESSING, ONE), images, 8)
    eight = extract_features(make_feature_fn(CONFIG, params, PREPROCESSING, make_mesh()), images, 8)
    np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-6)


def test_half_width_is_close_and_stays_float32(params: Any, images: Images):
    full, half = (
        extract_features(make_feature_fn(CONFIG, params, PREPROCESSING, ONE, dtype=dtype), images, 7)
        for dtype in DTYPES
    )
    assert half.dtype == np.float32
    assert np.linalg.norm(full - half) / np.linalg.norm(full) < 0.02
    assert not np.array_equal(full, half)


def test_each_image_once_in_order():
    """A feature that is the image's own number; the last batch is filled up."""
    numbers = Images(np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1))
    shapes = []

    def apply(batch: np.ndarray) -> jax.Array:
        shapes.append(batch.shape)
        return jnp.asarray(batch.reshape(len(batch), 1), jnp.float32)

    for batch_size in (1, 3, 7, 20):
        found = extract_features(apply, numbers, batch_size)
        assert found.ravel().tolist() == list(range(7))
        assert {shape[0] for shape in shapes} == {batch_size}
        shapes.clear()


def test_cached_features_are_never_stale(tmp_path: Path, params: Any, images: Images):
    """Another weight, preprocessing, dtype, name or pixel computes anew; the same of everything does not."""
    calls = []

    def cached(what: Images, params: Any = params, preprocessing: Any = PREPROCESSING, dtype: str = "float32") -> Any:
        apply = make_feature_fn(CONFIG, params, preprocessing, ONE, dtype=dtype)

        def counted(batch: np.ndarray) -> jax.Array:
            calls.append(1)
            return apply(batch)

        fingerprint = model_fingerprint(CONFIG, params, preprocessing, dtype)
        found = cached_features(tmp_path, fingerprint, counted, what, 4)
        np.testing.assert_array_equal(found, extract_features(apply, what, 4))
        fresh, calls[:] = len(calls), []
        return fresh

    other_weight = jax.tree.map(lambda leaf: leaf, params)
    other_weight["norm"]["bias"] = other_weight["norm"]["bias"].at[3].add(1e-3)
    other_pixel = images.pixels.copy()
    other_pixel[6, 10, 10, 1] ^= 1
    assert cached(images) == 2
    assert cached(images) == 0
    assert cached(images, params=other_weight) == 2
    assert cached(images, preprocessing=dataclasses.replace(PREPROCESSING, mean=(0.5, 0.5, 0.6))) == 2
    assert cached(images, dtype="bfloat16") == 2
    assert cached(Images(images.pixels, "other names")) == 2
    assert cached(images) == 0  # the others lie beside it
    assert cached(Images(other_pixel)) == 2  # same names, another picture
    assert cached(Images(other_pixel)) == 0
    assert cached(images) == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_architecture_is_in_the_fingerprint(params: Any):
    """The same weights with another activation are another model."""
    other = dataclasses.replace(CONFIG, activation="quick_gelu")
    assert model_fingerprint(CONFIG, params, PREPROCESSING) != model_fingerprint(other, params, PREPROCESSING)


def test_a_damaged_cache_file_is_named(tmp_path: Path, images: Images):
    apply = lambda batch: jnp.zeros((len(batch), 2))  # noqa: E731
    cached_features(tmp_path, "model", apply, images, 4)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path}.*delete it"):
        cached_features(tmp_path, "model", apply, images, 4)


def test_bad_input_is_named(params: Any, images: Images):
    with pytest.raises(ValueError, match=r"features of image 5 .*not finite"):
        extract_features(lambda b: jnp.where(b[:, :1, 0, 0] == images.pixels[5, 0, 0, 0], jnp.nan, 0), images, 3)
    with pytest.raises(ValueError, match="empty"):
        extract_features(lambda b: b, Images(images.pixels[:0]), 3)
    with pytest.raises(ValueError, match=r"output: expected one of.*found 'cls'"):
        make_feature_fn(CONFIG, params, PREPROCESSING, ONE, output="cls")
    with pytest.raises(ValueError, match=r"dtype.*float16"):
        make_feature_fn(CONFIG, params, PREPROCESSING, ONE, dtype="float16")
