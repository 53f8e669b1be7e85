"""Floors against plain loops, scipy and scikit-learn, and on images made to be found by exactly one of them."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from core.metrics import auroc
from mtl_moe import floors


def _images(seed: int, num: int, size: tuple[int, int] = (48, 40), contrast: float = 1.0, shift: float = 0.0):
    """Smooth random texture, [N, H, W, 1] uint8, of natural variation in brightness and contrast."""
    rng = np.random.default_rng(seed)
    texture = ndimage.gaussian_filter(rng.normal(size=(num, *size)), (0, 2, 2)) * 7.0
    contrasts = contrast * rng.uniform(0.9, 1.1, size=(num, 1, 1))
    values = 128 + shift + 20 * contrasts * texture + rng.normal(0, 3, size=(num, 1, 1))
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)[..., None]


def scores_of(train: np.ndarray, test: np.ndarray):
    """Floor scores of test images [M, H, W, C], which come in batches of four."""
    batches = [test[start : start + 4] for start in range(0, len(test), 4)]
    return floors.floor_scores(floors.statistics([train]), floors.statistics(batches))


def test_log_mean_gradient_by_hand():
    ramp = np.broadcast_to(3 * np.arange(20, dtype=np.uint8)[None, :, None, None], (1, 20, 16, 1))
    blank = np.full((1, 20, 16, 1), 77, np.uint8)
    diagonal = (3 * np.arange(20)[:, None] + 4 * np.arange(16)[None, :]).astype(np.uint8)[None, :, :, None]
    values = floors.log_mean_gradient(np.concatenate([ramp, blank, diagonal]))
    # float32 rounding of the values themselves
    np.testing.assert_allclose(values, np.log(1e-6 + np.array([3.0, 0.0, 5.0]) / 255), rtol=1e-5)
    assert values.dtype == np.float32


def test_log_mean_gradient_equals_numpy_gradient_in_any_chunk(monkeypatch):
    monkeypatch.setattr(floors, "CHUNK", 3)
    images = np.repeat(_images(0, 7), 3, axis=-1)
    images[..., 1] = 255 - images[..., 1] // 2
    expected = []
    for image in images.mean(axis=-1) / 255.0:
        down, across = np.gradient(image)
        expected.append(np.log(1e-6 + np.hypot(down, across)[1:-1, 1:-1].mean()))
    np.testing.assert_allclose(floors.log_mean_gradient(images), expected, rtol=1e-5)  # float32 against float64


def test_band_amplitudes_equal_gaussian_filters():
    grey = floors._grey(_images(0, 4, (64, 80)))
    blurs = [ndimage.gaussian_filter(grey, (0, sigma, sigma), mode="reflect") for sigma in (1, 2, 4, 8)]
    blurs = [grey, *blurs]
    expected = np.stack([np.log(np.abs(blurs[i] - blurs[i + 1]).mean(axis=(1, 2))) for i in range(4)], axis=1)
    # scipy samples the Gaussian on the pixel grid, which at sigma 1 differs from the exact one by under 1 %.
    np.testing.assert_allclose(floors._log_band_amplitudes(grey), expected, atol=0.01)


def test_cumulative_histogram_equals_a_loop():
    images = _images(1, 3)
    expected = [[np.mean(image <= level) for level in range(256)] for image in images]
    np.testing.assert_allclose(floors._cumulative_histogram(floors._grey(images)), expected, atol=1e-12)


@pytest.mark.parametrize("size", [(128, 128), (100, 50), (20, 47)])
def test_thumbnails_are_area_averages(size):
    grey = floors._grey(_images(2, 2, size))
    ours = floors._thumbnails(grey).reshape(2, 32, 32)
    # Repeating every pixel 32 times along both axes makes each cell a whole number of repeated pixels.
    fine = grey.repeat(32, axis=1).repeat(32, axis=2)
    expected = fine.reshape(2, 32, size[0], 32, size[1]).mean(axis=(2, 4), dtype=np.float64)
    np.testing.assert_allclose(ours, expected, atol=1e-6)  # float32 sums
    if size == (128, 128):
        np.testing.assert_allclose(ours[0], np.asarray(Image.fromarray(grey[0]).reduce(4)), atol=1e-6)


def test_pca_and_nearest_neighbour_equal_sklearn():
    train, test = _images(3, 150), _images(4, 20)
    scores = scores_of(train, test)
    x, y = (floors._thumbnails(floors._grey(images)) for images in (train, test))
    model = PCA(40, svd_solver="full").fit(x)
    residual = y - model.inverse_transform(model.transform(y))
    np.testing.assert_allclose(scores["pca_error"], (residual**2).mean(axis=1), rtol=1e-8)
    distance = NearestNeighbors(n_neighbors=1).fit(x).kneighbors(y)[0][:, 0]
    np.testing.assert_allclose(scores["nearest_neighbour"], distance, rtol=1e-8)


def test_a_training_image_is_its_own_neighbour_and_few_images_span_themselves():
    train = _images(5, 6)
    scores = scores_of(train, train[:2])
    # Root of the cancellation error of float64 sums of 1024 squares.
    np.testing.assert_allclose(scores["nearest_neighbour"], 0.0, atol=1e-5)
    np.testing.assert_allclose(scores["pca_error"], 0.0, atol=1e-20)
    assert (scores_of(train, _images(6, 3))["pca_error"] > 1e-4).all()
    alone = scores_of(train[:1], train[:2])["pca_error"]  # no component: the distance from the one image
    assert alone[0] == 0.0 < alone[1]


def test_histogram_distance_by_hand():
    train = np.zeros((2, 8, 8, 1), np.uint8)
    train[1] = 2  # mean cumulative histogram: 1/2 at levels 0 and 1, then 1
    test = np.full((1, 8, 8, 1), 4, np.uint8)  # 0 below level 4, then 1
    expected = (0.5 + 0.5 + 1.0 + 1.0) / 256
    assert scores_of(train, test)["histogram_distance"] == pytest.approx([expected], abs=1e-12)


@pytest.mark.parametrize(
    ("change", "found_by", "blind"),
    [
        ({"shift": 30.0}, "mean_intensity", "low_gradient"),
        ({"shift": -30.0}, "intensity_distance", "gradient_distance"),
        ({"contrast": 0.6}, "low_gradient", "mean_intensity"),
        ({"contrast": 0.6}, "band_2_low", "mean_intensity"),
        ({"contrast": 1.8}, "gradient_distance", "mean_intensity"),
        ({"contrast": 1.8}, "band_1_distance", "mean_intensity"),
    ],
)
def test_each_floor_finds_its_own_change(change, found_by, blind):
    train, test = _images(7, 60), np.concatenate([_images(8, 40), _images(9, 40, **change)])
    scores, labels = scores_of(train, test), np.repeat([0, 1], 40)
    assert auroc(scores[found_by], labels) > 0.99
    # 0.5 for a statistic that does not move; its standard error on 40 against 40 is 0.065.
    assert 0.25 < auroc(scores[blind], labels) < 0.75


def test_scores_of_an_image_do_not_depend_on_the_others():
    train, test = _images(10, 50), _images(11, 9)
    together = scores_of(train, test)
    alone = scores_of(train, test[4:5])
    assert list(together) == list(alone)
    assert len(together) == 15
    for name, values in together.items():
        assert values.shape == (9,), name
        assert np.isfinite(values).all(), name
        # float32 statistics; a distance near 0 is a difference of nearly equal numbers
        np.testing.assert_allclose(alone[name], values[4:5], rtol=1e-4, atol=1e-6, err_msg=name)


def test_floor_maps():
    train, test = _images(12, 50, (112, 96)), _images(13, 3, (112, 96))
    test[1, 40:56, 24:36] = 255
    maps = floors.make_floor_map_fn(floors.statistics([train]))(test)
    sigma = 4 * np.sqrt(112 * 96) / 224
    expected = np.stack([ndimage.gaussian_filter(image[..., 0] / 255.0, sigma) for image in test])
    np.testing.assert_allclose(maps["smoothed_intensity"], expected, atol=1e-5)
    for name, values in maps.items():
        assert (values.shape, values.dtype) == (test.shape[:3], np.float32), name
        row, column = np.unravel_index(values[1].argmax(), values[1].shape)
        assert 40 <= row < 56, name
        assert 24 <= column < 36, name
    x, y = (floors._thumbnails(floors._grey(images)) for images in (train, test))
    model = PCA(40, svd_solver="full").fit(x)
    errors = (y - model.inverse_transform(model.transform(y))).reshape(-1, 32, 32).astype(np.float32) ** 2
    # Pillow puts the cells of both grids on the same area, as the maps must.
    expected = np.stack([Image.fromarray(error).resize((96, 112), Image.Resampling.BILINEAR) for error in errors])
    np.testing.assert_allclose(maps["pca_error"], expected, atol=1e-6 * expected.max())


def test_without_training_images_there_are_those_floors_that_need_no_fit():
    train, test = _images(14, 50), _images(15, 3)
    fit, new = floors.statistics([train]), floors.statistics([test])
    fitted, found = floors.floor_scores(fit, new), floors.floor_scores(None, new)
    assert set(found) == {"mean_intensity", "low_gradient", *(f"band_{i}_low" for i in range(4))}
    for name, values in found.items():
        np.testing.assert_array_equal(values, fitted[name], err_msg=name)
    maps = floors.make_floor_map_fn(None)(test)
    assert list(maps) == ["smoothed_intensity"]
    np.testing.assert_array_equal(maps["smoothed_intensity"], floors.make_floor_map_fn(fit)(test)["smoothed_intensity"])


def test_floors_refuse():
    images = _images(0, 3)
    with pytest.raises(ValueError, match="found float32"):
        floors.log_mean_gradient(images.astype(np.float32))
    with pytest.raises(ValueError, match=r"found uint8 \(0, 48, 40, 1\)"):
        floors.statistics([images[:0]])
    with pytest.raises(ValueError, match="at least one image, found none"):
        floors.statistics([])
