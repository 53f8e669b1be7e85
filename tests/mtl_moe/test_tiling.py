"""Large images in tiles: every pixel is seen, maps are joined as a loop joins them, all commands of a detector run.

Axes: B images, H W C image, P side of a tile, S evidences.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from input_pipeline.dataset import load_dataset
from mtl_moe import run
from mtl_moe.infer import Scorer, restore
from mtl_moe.scoring import make_score_fn
from mtl_moe.system import build_system
from mtl_moe.tasks.base import body_mask, to_float
from mtl_moe.tiling import OVERLAP, map_by_tiles, num_tiles, random_tiles, tile_starts


@pytest.mark.parametrize(("size", "side"), [(32, 32), (33, 32), (64, 32), (80, 32), (256, 32)])
def test_tiles_cover_the_image_and_overlap(size, side):
    starts = tile_starts(size, side)
    assert starts[0] == 0
    assert starts[-1] == size - side
    assert (np.diff(starts) <= np.ceil(side * (1 - OVERLAP))).all()
    assert num_tiles(size, side) == len(starts) ** 2


@pytest.mark.parametrize(("size", "side"), [(16, 16), (20, 8), (32, 8)])
def test_tiles_joined_are_the_image(size, side):
    images = jax.random.uniform(jax.random.key(0), (3, size, size, 2))
    joined = map_by_tiles(lambda tiles: jnp.moveaxis(tiles, -1, 1), images, side)
    np.testing.assert_allclose(joined, np.moveaxis(images, -1, 1), rtol=1e-6)


def test_random_tiles_are_cut_from_the_body():
    images = np.zeros((64, 32, 32, 1), np.uint8)
    images[:, 20:, 2:10] = np.random.default_rng(0).integers(100, 255, (64, 12, 8, 1))
    tiles = np.asarray(random_tiles(jax.random.key(0), jnp.asarray(images), 8))
    assert tiles.shape == (64, 8, 8, 1)
    corners = []
    for image, tile in zip(images, tiles, strict=True):
        places = [
            (y, x) for y in range(25) for x in range(25) if (image[y : y + 8, x : x + 8] == tile).all()
        ]  # fmt: skip
        assert places, "a tile is no part of its image"
        corners.append(places[0])
    body = np.asarray(body_mask(to_float(jnp.asarray(images))))[0, ..., 0]
    assert all(body[y : y + 8, x : x + 8].any() for y, x in corners)
    assert len(set(corners)) > 20
    assert random_tiles(jax.random.key(0), images, 32) is images


@pytest.fixture(scope="module")
def tiled_run(tiny_config, make_run):
    """Images of 48 pixels, all tasks, seen in four tiles of 32."""
    config = tiny_config()
    config.data.update(image_size=48, tile_size=32)
    return make_run(config)


def test_maps_are_those_of_a_detector_of_tiles_averaged_where_they_overlap(tiled_run):
    system, trained = tiled_run.system, restore(tiled_run.system, tiled_run.workdir)
    images = tiled_run.dataset.splits["test"].images(np.arange(8))
    assert images.shape[1:3] == (48, 48)
    found = Scorer(system, trained).images(images)

    config = system.config.copy_and_resolve_references()
    config.data.update(image_size=32, tile_size=0)
    small_fn = make_score_fn(build_system(config))
    total, weight = np.zeros((8, found["maps"].shape[1], 48, 48)), np.zeros((48, 48))
    edge = np.minimum(np.arange(32) + 0.5, 31.5 - np.arange(32))
    for y in (0, 16):
        for x in (0, 16):
            part = small_fn(trained.params, trained.extra, jnp.asarray(images[:, y : y + 32, x : x + 32]))["maps"]
            total[:, :, y : y + 32, x : x + 32] += np.asarray(part) * np.outer(edge, edge)
            weight[y : y + 32, x : x + 32] += np.outer(edge, edge)
    # Tiles pass in other batches of rows: float32 sums in another order.
    np.testing.assert_allclose(found["maps"], total / weight, rtol=1e-3, atol=1e-4)
    alone = Scorer(system, trained).images(images[3:4])
    np.testing.assert_allclose(alone["raw"][0], found["raw"][3], rtol=1e-4, atol=1e-4)


def test_all_commands_of_a_detector_of_tiles(tiny_config, tmp_path):
    config = tiny_config()
    config.data.update(image_size=48, tile_size=32)
    config.tasks.names = ("masked", "cluster")
    config.model.num_dense_layers = 2
    config.train.update(num_steps=2, refresh_step=1)
    config.compress.update(num_steps=1, rank=2)
    folder, half, images = tmp_path / "run", tmp_path / "half", tmp_path / "images"
    run.train_and_evaluate(config, folder)
    report = json.loads((folder / "report.json").read_text())
    assert 0 <= report["metrics"]["test/phantom/image_auroc"] <= 1
    assert 0 <= report["metrics"]["test/phantom/pixel_auroc"] <= 1

    images.mkdir()
    for i, image in enumerate(load_dataset(config.data).splits["test"].images(np.arange(3))):
        Image.fromarray(image[..., 0]).save(images / f"{i}.png")
    run.predict(config, folder, str(images), str(tmp_path / "predicted"))
    assert len((tmp_path / "predicted" / "predictions.csv").read_text().splitlines()) == 4
    run.compress(config, folder, str(half), 2)
    facts = json.loads((half / "compress.json").read_text())
    assert facts["gflops_per_image"]["full"] > facts["gflops_per_image"]["small"] > 0
    run.export(config, folder, "stablehlo", str(tmp_path / "exported"))
    assert json.loads((tmp_path / "exported" / "export.json").read_text())["input"]["shape"] == [8, 48, 48, 1]


@pytest.mark.parametrize(
    ("tile_size", "message"),
    [(20, "data.tile_size=20 is not a multiple of model.patch_size=8"), (40, "data.tile_size=40 is larger than")],
)
def test_tiles_that_do_not_fit_are_refused(tiny_config, tile_size, message):
    config = tiny_config()
    config.data.tile_size = tile_size
    with pytest.raises(ValueError, match=message):
        build_system(config)
