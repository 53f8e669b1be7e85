"""Choice of blocks by hand-written tables, the copy by its arrays, calibrated choice by brute force."""

import functools
import itertools

import jax
import numpy as np
import pytest

from core.vit import VisionTransformer, VitConfig
from vit_distill import weight_copy

CONFIG = VitConfig(depth=4, width=16, num_heads=2, mlp_dim=24, patch_size=8, image_size=16)


@pytest.fixture(scope="module")
def teacher():
    """Parameters whose blocks matter to different degrees, and images."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(5, 16, 16, 3)).astype(np.float32)
    params = jax.device_get(jax.jit(VisionTransformer(CONFIG).init)(jax.random.key(0), images)["params"])
    strength = [0.1, 1.0, 3.0, 0.05]
    for i, factor in enumerate(strength):
        for part, layer in (("attn", "out"), ("mlp", "fc2")):
            kernel = params[f"block_{i:02d}"][part][layer]["kernel"]
            params[f"block_{i:02d}"][part][layer]["kernel"] = kernel * np.float32(factor)
    return params, images


@pytest.mark.parametrize(
    ("depth", "reduction", "rule", "blocks", "targets"),
    [
        (12, 2, "first", (0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 11)),
        (12, 3, "first", (0, 3, 6, 9), (2, 5, 8, 11)),
        (12, 4, "first", (0, 4, 8), (3, 7, 11)),
        (12, 2, "last", (1, 3, 5, 7, 9, 11), (1, 3, 5, 7, 9, 11)),
        (12, 3, "last", (2, 5, 8, 11), (2, 5, 8, 11)),
        (12, 3, "even", (0, 4, 7, 11), (3, 6, 10, 11)),
        (12, 12, "even", (0,), (11,)),
        (12, 3, "truncate", (0, 1, 2, 3), (0, 1, 2, 11)),
        (12, 1, "first", tuple(range(12)), tuple(range(12))),
        (6, 2, "0, 2,5", (0, 2, 5), (1, 4, 5)),
        (12, 2, "1,9", (1, 9), (8, 11)),
    ],
)
def test_blocks_and_their_targets(depth, reduction, rule, blocks, targets):
    assert weight_copy.choose_blocks(depth, reduction, rule) == blocks
    assert weight_copy.aligned_targets(blocks, depth) == targets


@pytest.mark.parametrize(
    ("reduction", "rule", "match"),
    [
        (5, "first", r"reduction 5 does not divide .* 12 blocks: use one of \[1, 2, 3, 4, 6, 12\]"),
        (0, "last", "reduction 0"),
        (2, "middle", "'middle'"),
        (2, "calibrated", "calibrated_blocks"),
        (2, "0,12", r"0 to 11, found \[0, 12\]"),
        (2, "-1,3", r"\[-1, 3\]"),
        (2, "3,1", r"ascending"),
        (2, "3,3", r"ascending"),
    ],
)
def test_bad_choices_are_named(reduction, rule, match):
    with pytest.raises(ValueError, match=match):
        weight_copy.choose_blocks(12, reduction, rule)


def test_the_copy_is_the_teachers_arrays_renumbered(teacher):
    params, images = teacher
    config, student = weight_copy.copy_blocks(CONFIG, params, (1, 3))
    assert config.depth == 2
    assert sorted(student) == ["block_00", "block_01", "cls_token", "embed", "norm", "pos_embedding"]
    for new, old in enumerate((1, 3)):
        assert student[f"block_{new:02d}"] is params[f"block_{old:02d}"]
    assert student["embed"] is params["embed"]
    # The student runs, and keeping everything is the teacher.
    assert _last(config, student, images).shape == (5, 5, 16)
    assert weight_copy.copy_blocks(CONFIG, params, range(4)) == (CONFIG, params)
    with pytest.raises(ValueError, match="0 to 3"):
        weight_copy.copy_blocks(CONFIG, params, (2, 4))
    with pytest.raises(ValueError, match="block_03"):
        weight_copy.copy_blocks(CONFIG, {name: params[name] for name in params if name != "block_03"}, (0,))


@functools.partial(jax.jit, static_argnums=0)
def _last(config, params, images):
    return VisionTransformer(config).apply({"params": params}, images).blocks[-1]


def _loss(params, images, blocks):
    """L1 of a really copied student, all images at once."""
    student = _last(*weight_copy.copy_blocks(CONFIG, params, blocks), images)
    return float(np.abs(student - _last(CONFIG, params, images)).mean())


def test_greedy_removal_drops_the_least_missed_block_each_time(teacher):
    params, images = teacher
    blocks, rows = weight_copy.calibrated_blocks(CONFIG, params, images, 2, batch_size=2)
    kept = list(range(4))
    while len(kept) > 2:
        kept = min((list(rest) for rest in itertools.combinations(kept, len(kept) - 1)),
                   key=lambda rest: _loss(params, images, rest))  # fmt: skip
    assert list(blocks) == kept == [1, 2]
    assert [row["rule"] for row in rows] == ["removal", "first", "even", "last"]
    assert [row["blocks"] for row in rows] == [kept, [0, 2], [0, 3], [1, 3]]
    for row in rows:
        # Batches of 2, 2 and 1 images weigh by their size.
        assert row["loss"] == pytest.approx(_loss(params, images, row["blocks"]), rel=1e-5)


def test_removal_weighs_batches_by_their_images():
    """A batch of four images misses block 0 less, a batch of one misses block 1 less: four outvote one."""
    missed = {"four": {0: 1.0, 1: 2.0, 2: 9.0}, "one": {0: 3.0, 1: 0.0, 2: 9.0}}  # unweighted, block 1 would go
    probe = object.__new__(weight_copy._Probe)
    probe.params, probe.num_images = [0, 1, 2], 5
    probe.batches = [(4, ("four", ()), None), (1, ("one", ()), None)]
    probe.apply = lambda block, tokens: (tokens[0], (*tokens[1], block))
    probe.l1 = lambda tokens, _: sum(missed[tokens[0]][block] for block in {0, 1, 2} - set(tokens[1]))
    assert probe.greedy(2) == (1, 2)
    assert probe.loss((1, 2)) == (4 * 1.0 + 3.0) / 5


def test_influence_keeps_the_blocks_that_turn_the_tokens_most(teacher):
    params, images = teacher
    out = VisionTransformer(CONFIG).apply({"params": params}, images)
    influence = []
    for before, after in itertools.pairwise([out.embedded, *out.blocks]):
        x, y = (np.asarray(v, np.float64).reshape(-1, 16) for v in (before, after))
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        influence.append(1 - ((x * y).sum(1) / norms).mean())
    blocks, rows = weight_copy.calibrated_blocks(CONFIG, params, images, 2, "influence", batch_size=3)
    assert blocks == tuple(sorted(np.argsort(influence)[-2:]))
    assert rows[0]["rule"] == "influence"


def test_calibration_rejects_what_it_cannot_use(teacher):
    params, images = teacher
    with pytest.raises(ValueError, match="criterion"):
        weight_copy.calibrated_blocks(CONFIG, params, images, 2, "magic")
    with pytest.raises(ValueError, match="at least one image"):
        weight_copy.calibrated_blocks(CONFIG, params, images[:0], 2)
    with pytest.raises(ValueError, match="reduction 3"):
        weight_copy.calibrated_blocks(CONFIG, params, images, 3)
