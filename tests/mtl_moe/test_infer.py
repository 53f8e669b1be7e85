"""Inference: an image's score is its own, on any number of devices; one training step on eight devices as on one, in
bfloat16 nearly as in float32.

Axes: N images, S evidences, H W map.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from core.checkpoint import CheckpointError
from core.mesh import shard_batch
from core.optim import build_optimizer
from input_pipeline.dataset import load_dataset
from mtl_moe import model
from mtl_moe.calibration import evidence_names
from mtl_moe.floors import log_mean_gradient
from mtl_moe.infer import Scorer, calibrate, evidence_maps, restore, restore_networks, router_use
from mtl_moe.scoring import SMOOTHING, TOP_SHARE, make_map_fn, make_score_fn
from mtl_moe.system import build_system
from mtl_moe.train import make_update_fn

# Float32 sums in another order: rows of an image lie in other tiles of the expert matmul in another batch.
TOLERANCE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trained(tiny_run):
    return restore(tiny_run.system, tiny_run.workdir)


@pytest.fixture(scope="module")
def scorer(tiny_run, trained):
    return Scorer(tiny_run.system, trained)


@pytest.fixture(scope="module")
def images(tiny_run):
    test, train = tiny_run.dataset.splits["test"], tiny_run.dataset.splits["train"]
    return np.concatenate([test.images(np.arange(8)), train.images(np.arange(5))])


@pytest.fixture(scope="module")
def together(scorer, images):
    """All 13 images in two batches of eight, the second padded."""
    return scorer.images(images)


def test_results_have_the_shapes_described(tiny_run, together):
    num = len(evidence_names(tiny_run.system.tasks))
    assert num == len(tiny_run.system.tasks) + 1
    assert {k: v.shape for k, v in together.items()} == {
        "raw": (13, num), "maps": (13, num, 32, 32), "body": (13, 32, 32)
    }  # fmt: skip
    for values in together.values():
        assert np.isfinite(values).all()
    assert np.all(together["raw"].std(axis=0) > 0), "an evidence says the same of every image"


@pytest.mark.parametrize("row", [0, 3, 12])
def test_score_of_an_image_alone_is_its_score_in_any_batch(scorer, images, together, row):
    alone = scorer.images(images[row : row + 1])
    strangers = np.random.default_rng(row).integers(0, 256, images.shape, np.uint8)
    strangers[6] = images[row]  # another place, other mates
    moved = {name: values[6:7] for name, values in scorer.images(strangers).items()}
    for name, values in together.items():
        np.testing.assert_allclose(alone[name], values[row : row + 1], **TOLERANCE)
        np.testing.assert_allclose(moved[name], values[row : row + 1], **TOLERANCE)


def test_one_device_scores_as_eight_do(tiny_run, trained, together, images, on_one_device):
    single = on_one_device(tiny_run.system)
    values = jax.device_get((trained.params, trained.extra))
    params, extra = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), values)
    found = Scorer(single, dataclasses.replace(trained, params=params, extra=extra)).images(images)
    assert tiny_run.system.mesh.size == 8
    for name, expected in together.items():
        np.testing.assert_allclose(found[name], expected, **TOLERANCE)


def test_scores_are_those_of_a_trunk_that_runs_for_every_view(tiny_run, trained, images, together, monkeypatch):
    """Calibrations of before the trunk ran once for equal views hold."""
    num_views = sum(len(task.view_names) for task in tiny_run.system.tasks)
    assert len(model.distinct_views(tiny_run.system.tasks)[0]) < num_views
    monkeypatch.setattr(model, "distinct_views", lambda tasks: (np.arange(num_views), np.arange(num_views)))
    found = Scorer(tiny_run.system, trained).images(images)
    for name, expected in together.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)


def test_raw_scores_are_what_the_reductions_say(tiny_run, together):
    reductions = [r.how for task in tiny_run.system.tasks for r in task.reductions.values()]
    assert set(reductions) == {"mean", "top"}
    smooth = ndimage.gaussian_filter(together["maps"], (0, 0, SMOOTHING * 32, SMOOTHING * 32))
    for n, body in enumerate(together["body"] > 0):
        for s, reduction in enumerate(reductions):
            inside = np.sort(smooth[n, s][body])
            top = inside[-int(np.ceil(TOP_SHARE * len(inside))) :]
            wanted = together["maps"][n, s][body].mean() if reduction == "mean" else np.log(top.mean() + 1e-6)
            np.testing.assert_allclose(together["raw"][n, s], wanted, rtol=1e-4, atol=1e-5)


def test_a_split_is_scored_once_in_order(tiny_run, scorer):
    split = tiny_run.dataset.splits["train"]  # 18 images: the last batch is padded
    scored = scorer.split(split, "test", lambda maps, body: maps.mean(axis=1))
    wanted = scorer.images(split.images(np.arange(len(split))))
    np.testing.assert_allclose(scored.raw, wanted["raw"], **TOLERANCE)
    np.testing.assert_allclose(scored.maps, wanted["maps"].mean(axis=1), **TOLERANCE)
    np.testing.assert_allclose(scored.texture, log_mean_gradient(split.images(np.arange(18))), rtol=1e-6)
    assert scorer.split(split.take(np.arange(3)), "test").maps is None


def test_the_devices_have_the_next_batch_when_one_is_read(tiny_run, trained, monkeypatch):
    """Texture, maps on disk and the decoding of the next images would else find them idle."""
    scorer, done = Scorer(tiny_run.system, trained), []
    batch = scorer.batch
    monkeypatch.setattr(scorer, "batch", lambda images: done.append("given") or batch(images))
    map_fn = lambda maps, body: maps.mean(axis=1)  # noqa: E731
    scorer.split(tiny_run.dataset.splits["train"], "test", map_fn, write=lambda *_: done.append("read"))
    assert done == ["given", "given", "read", "given", "read", "read"]


def test_scoring_reads_no_masks(tiny_run, scorer, monkeypatch):
    split = tiny_run.dataset.splits["test"]
    assert split.has_masks
    monkeypatch.setattr(type(split.pixels), "masks", lambda *_: pytest.fail("a mask was read"))
    assert len(scorer.split(split, "test").raw) == len(split)


def test_maps_are_handed_out_batch_by_batch(tiny_run, scorer):
    """What is asked for every image of a set of tens of thousands need not lie in memory, nor be decoded again."""
    split, written = tiny_run.dataset.splits["train"], []

    def map_fn(maps, body):
        return maps.mean(axis=1)

    kept = scorer.split(split, "test", map_fn, write=lambda *batch: written.append(batch))
    names, images, maps = zip(*written, strict=True)
    assert [len(part) for part in names] == [8, 8, 2]
    assert [name for part in names for name in part] == split.names
    np.testing.assert_array_equal(np.concatenate(images), split.images(np.arange(18)))
    np.testing.assert_array_equal(np.concatenate(maps), kept.maps)
    found = scorer.split(split.take(np.arange(3)), "test", map_fn, write=lambda *batch: None, keep_maps=False)
    assert found.maps is None


def test_scores_in_float32_are_not_bfloat16_on_a_tpu(tiny_run, trained, images):
    """It would round the operands of products; what it is to do stands in the program, HIGH or HIGHEST."""
    lowered = make_score_fn(tiny_run.system).lower(trained.params, trained.extra, images[:8]).as_text()
    products = [line for line in lowered.splitlines() if "stablehlo.dot_general" in line or "convolution" in line]
    assert len(products) > 20
    assert [line for line in products if line.count("HIGH") != 2] == []


def test_scores_in_bfloat16_are_close(tiny_config, tiny_run, trained, images, together):
    config = tiny_config()
    config.score.dtype = "bfloat16"
    found = Scorer(dataclasses.replace(tiny_run.system, config=config), trained).images(images[:8])
    for name in ("raw", "maps"):
        full = together[name][:8]
        assert 0 < np.linalg.norm(found[name] - full) / np.linalg.norm(full) < 0.05, name


def test_maps_of_chosen_rows_are_kept(tiny_run, scorer):
    split, rows = tiny_run.dataset.splits["train"], [0, 7, 8, 17]  # of every batch, the padded one too
    kept = scorer.split(split, "test", keep=rows).kept
    wanted = scorer.images(split.images(np.array(rows)))
    assert set(kept) == {"maps", "body"}
    for name, values in kept.items():
        np.testing.assert_allclose(values, wanted[name], **TOLERANCE)
    assert scorer.split(split.take(np.arange(3)), "test").kept == {}


def test_a_scorer_of_other_parameters_scores_with_those(tiny_run, trained, scorer, images):
    params = jax.tree.map(lambda x: 0.5 * x, trained.params)
    wanted = Scorer(tiny_run.system, dataclasses.replace(trained, params=params)).images(images)
    found = scorer.trained_as(dataclasses.replace(trained, params=params)).images(images)
    np.testing.assert_array_equal(found["raw"], wanted["raw"])
    assert not np.allclose(found["raw"], scorer.images(images)["raw"])


@pytest.fixture(scope="module")
def calibration(tiny_run, scorer):
    return calibrate(tiny_run.system, scorer, tiny_run.dataset.splits["calibration"])


def test_calibrated_maps_have_the_normals_median_at_zero_and_their_tail_at_one(tiny_run, scorer, calibration):
    normals = scorer.images(tiny_run.dataset.splits["calibration"].images(np.arange(6)))
    finished = np.asarray(make_map_fn(calibration, 32, 32)(normals["maps"], normals["body"]))
    np.testing.assert_allclose(np.quantile(finished[normals["body"] > 0], (0.5, 0.95)), (0, 1), atol=1e-4)
    by_name = evidence_maps(tiny_run.system, calibration, normals["maps"], normals["body"])
    names = evidence_names(tiny_run.system.tasks)
    assert [list(maps) for maps in by_name] == [names] * 6
    for name in names:
        inside = np.stack([maps[name] for maps in by_name])[normals["body"] > 0]
        np.testing.assert_allclose(np.quantile(inside, (0.5, 0.95)), (0, 1), atol=1e-3)


def test_networks_together_score_as_the_mean_of_their_scores(tiny_run, trained, scorer, calibration, images):
    other = dataclasses.replace(trained, params=jax.tree.map(lambda x: 0.8 * x, trained.params))
    normals, texture = tiny_run.dataset.splits["calibration"], np.linspace(-3, -2, len(images))
    both, scorers = Scorer(tiny_run.system, trained, other), (scorer, scorer.trained_as(other))
    alone = [calibrate(tiny_run.system, one, normals) for one in scorers]
    together = calibrate(tiny_run.system, both, normals)
    assert together.names == (*calibration.names[:-1], *calibration.names)  # the texture is the images', and once there

    def corrected(calibration, scorer):
        return calibration.corrected(scorer.images(images)["raw"], texture)

    parts = [corrected(*pair) for pair in zip(alone, scorers, strict=True)]
    whole = corrected(together, both)
    fused = [one.fuse(scores) for one, scores in zip(alone, parts, strict=True)]
    assert not np.allclose(*fused)
    np.testing.assert_allclose(together.fuse(whole), np.mean(fused, axis=0), rtol=1e-6)
    np.testing.assert_allclose(together.fused, np.mean([one.fused for one in alone], axis=0), rtol=1e-6)
    for name, scores in together.by_name(together.tail_scores(whole)).items():
        each = [one.by_name(one.tail_scores(part))[name] for one, part in zip(alone, parts, strict=True)]
        np.testing.assert_allclose(scores, np.mean(each, axis=0), rtol=1e-6)


def test_a_network_twice_is_that_network(tiny_run, trained, scorer, calibration, images):
    """Maps too: the fused one, and those by evidence."""
    twice = Scorer(tiny_run.system, trained, trained)
    again = calibrate(tiny_run.system, twice, tiny_run.dataset.splits["calibration"])
    found, wanted = twice.images(images), scorer.images(images)
    maps = [
        np.asarray(make_map_fn(fit, 32, 16)(scores["maps"], scores["body"]))
        for fit, scores in ((again, found), (calibration, wanted))
    ]
    np.testing.assert_allclose(*maps, atol=1e-4)
    by_name = [
        evidence_maps(tiny_run.system, fit, scores["maps"], scores["body"])[0]
        for fit, scores in ((again, found), (calibration, wanted))
    ]
    assert list(by_name[0]) == evidence_names(tiny_run.system.tasks)
    for name in by_name[0]:
        np.testing.assert_allclose(by_name[0][name], by_name[1][name], atol=1e-4, err_msg=name)


def test_calibration_sees_normals_only(tiny_run, scorer):
    with pytest.raises(ValueError, match="calibration split holds abnormal images"):
        calibrate(tiny_run.system, scorer, tiny_run.dataset.splits["test"])


@pytest.mark.parametrize("count", [8, 7])
def test_router_use_is_a_share_for_any_number_of_images(tiny_run, trained, images, count):
    use = router_use(tiny_run.system, trained, images[:count])
    assert set(use) == {"expert_00", "neck_00"}
    for shares in use.values():
        assert shares.shape == (len(tiny_run.system.tasks), 4)
        np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)


def test_batch_size_is_rounded_up_to_the_devices(tiny_config, tiny_run, trained):
    config = tiny_config()
    config.score.batch_size = 9
    system = dataclasses.replace(tiny_run.system, config=config)
    assert Scorer(system, trained).batch_size == 16


def test_no_checkpoint_is_an_error(tiny_run, tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        restore(tiny_run.system, tmp_path)


def test_seeds_of_different_lengths_do_not_score_together(tiny_config, tiny_run, trained, tmp_path, monkeypatch):
    config = tiny_config()
    config.num_seeds = 2
    steps = {"seed_0": 6000, "seed_1": 500}
    monkeypatch.setattr(
        "mtl_moe.infer.restore", lambda _, folder: dataclasses.replace(trained, step=steps[folder.name])
    )
    system = dataclasses.replace(tiny_run.system, config=config)
    with pytest.raises(ValueError, match=r"different steps \(seed_0 6000, seed_1 500\)"):
        restore_networks(system, tmp_path / "ensemble")


@pytest.fixture(scope="module")
def updates(tiny_config, on_one_device):
    """(state, metrics) after one and after two updates, by how: on eight devices that divide images by four and experts
    by two, on one, and on one in bfloat16."""
    config = tiny_config()
    config.tasks.names = ("masked", "cluster")
    config.model.num_experts = 4
    config.tasks.cluster.augment = "light"
    config.mesh.expert = 2
    dataset, eight = load_dataset(config.data), build_system(config)
    batch = {"image": dataset.splits["train"].images(np.arange(16))}
    one = on_one_device(eight)
    half = dataclasses.replace(one, model=one.model.clone(dtype=jnp.bfloat16))
    found = {}
    for name, system in {"eight": eight, "one": one, "bfloat16": half}.items():
        tx = build_optimizer(config.optim, config.train.num_steps)
        state = system.init_state(tx, dataset)
        step_fn = make_update_fn(system, tx)
        results, placed = [], shard_batch(batch, system.mesh)
        for _ in range(2):
            state, metrics = step_fn(state, placed, jax.random.key(1))
            results.append(jax.device_get((state, metrics)))
        found[name] = results
    return found


def moments(state):
    """AdamW's first moments: sums of gradients. Its first step is lr * sign(gradient): where a gradient is rounding
    noise (keys' biases), so is what the step does to the parameters."""
    return state.opt_state[1][0].mu


def test_one_training_step_on_eight_devices_is_one_on_one(updates):
    """Loss, every gradient and statistics; parameters follow from them."""
    (state, metrics), (state_1, metrics_1) = (updates[name][0] for name in ("eight", "one"))
    assert metrics.keys() == metrics_1.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], metrics_1[name], rtol=1e-4, err_msg=name)
    found, wanted = moments(state), moments(state_1)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    assert largest > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest), found, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.extra, state_1.extra)


def test_updates_in_bfloat16_are_close(updates):
    """The detector's default."""
    (half, metrics), (full, wanted) = (updates[name][1] for name in ("bfloat16", "one"))
    assert metrics["loss"] == pytest.approx(wanted["loss"], rel=0.02)
    assert metrics["loss"] != wanted["loss"]
    found, wanted = (np.concatenate([x.ravel() for x in jax.tree.leaves(moments(state))]) for state in (half, full))
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.05
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {np.dtype("float32")}
