"""Segmentation probes: exact IoU, heads that learn what a token shows, ignored pixels without influence.

Axes: N images, P patch tokens, D width, M mask side, F pixel classes.
"""

import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from vit_distill import segment_probe as module
from vit_distill.segment_probe import (
    IGNORED,
    Segmented,
    SegmentOptions,
    TokenHead,
    confusion_matrix,
    iou_metrics,
    segment_probe,
)

GRID, WIDTH, SIDE, CLASSES = 4, 8, 16, 3
OPTIONS = SegmentOptions(
    num_steps=40, warmup_steps=5, batch_size=8, hidden_dim=16, learning_rates=(1e-4, 3e-2), weight_decay=0.0
)


def make_set(num: int, seed: int, nonlinear: bool = False) -> Segmented:
    """Tokens with an offset that show their patch's class; `nonlinear`: class 2 by the product of two channels."""
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, (num, GRID, GRID, 2)) * 2 - 1
    classes = (signs[..., 0] * signs[..., 1] > 0) * 2 if nonlinear else rng.integers(0, CLASSES, (num, GRID, GRID))
    tokens = 0.3 * rng.normal(size=(num, GRID, GRID, WIDTH))
    tokens[..., :2] += signs
    if not nonlinear:
        tokens[..., 2 : 2 + CLASSES] += 2 * np.eye(CLASSES)[classes]
    masks = classes.repeat(SIDE // GRID, 1).repeat(SIDE // GRID, 2).astype(np.uint8)
    return Segmented((7 + 5 * tokens).reshape(num, GRID**2, WIDTH).astype(np.float32), masks)


SETS = make_set(24, 0), make_set(9, 1), make_set(13, 2)


def test_confusion_and_iou_by_hand():
    masks = np.array([[0, 0, 1], [1, IGNORED, 2]], np.uint8)
    predicted = np.array([[0, 1, 1], [1, 0, 0]])
    confusion = confusion_matrix(predicted, masks, 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    found = iou_metrics(confusion, ["a", "b", "c", "d"])
    expected = {"iou/a": 1 / 3, "iou/b": 2 / 3, "iou/c": 0.0, "iou/d": np.nan, "miou": 1 / 3, "pixel_accuracy": 3 / 5}
    assert found == pytest.approx(expected | {"miou_present": 1 / 3}, nan_ok=True)
    confusion[0, 3] = 1  # one pixel is called a class that does not occur
    found = iou_metrics(confusion, ["a", "b", "c", "d"])
    expected = {"iou/d": 0.0, "miou": (1 / 4 + 2 / 3) / 4, "miou_present": (1 / 4 + 2 / 3) / 3}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    with pytest.raises(ValueError, match="no pixel has a label"):
        iou_metrics(np.zeros((2, 2), np.int64), ["a", "b"])


def test_iou_equals_scikit_learn_and_sums_are_exact():
    rng = np.random.default_rng(0)
    masks, predicted = (rng.integers(0, 5, (3, 40, 40)).astype(np.uint8) for _ in range(2))
    found = iou_metrics(confusion_matrix(predicted, masks, 5), list("abcde"))
    expected = jaccard_score(masks.ravel(), predicted.ravel(), average=None)
    np.testing.assert_allclose([found[f"iou/{name}"] for name in "abcde"], expected)
    one = np.zeros(1, np.uint8)
    large = np.array([[2**40, 1], [0, 2**40]]) + confusion_matrix(one, one, 2)  # beyond float32, as large sets are
    assert iou_metrics(large, ["a", "b"])["iou/a"] == (2**40 + 1) / (2**40 + 2)


def test_statistics_and_counts_take_little_memory_beside_their_input():
    """float64 tokens of all images and int64 pixels of all masks would be several times as large as both."""
    rng = np.random.default_rng(0)
    tokens = (5 + rng.normal(size=(200, 16, 64))).astype(np.float32)
    masks = rng.integers(0, 3, (200, 64, 64)).astype(np.uint8)
    tracemalloc.start()
    mean, std = module._statistics(tokens)
    confusion = confusion_matrix(masks, masks, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.25 * tokens.nbytes
    np.testing.assert_allclose(mean, tokens.mean((0, 1), np.float64, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(std, tokens.std((0, 1), np.float64, keepdims=True), rtol=1e-6)
    assert (confusion == np.diag(np.bincount(masks.ravel()))).all()


def test_head_resizes_as_align_corners_false():
    """Two tokens in a row to four pixels: 0, 1/4, 3/4, 1 of the way from one to the other."""
    head = TokenHead(num_classes=1, hidden_dim=0, mask_size=4)
    params = {"logits": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}}
    tokens = jnp.asarray([[[0.0], [1.0], [0.0], [1.0]]])
    out = head.apply({"params": params}, tokens)[0, :, :, 0]
    np.testing.assert_allclose(out, np.tile([0.0, 0.25, 0.75, 1.0], (4, 1)), atol=1e-6)


@pytest.mark.parametrize("head", module.HEADS)
def test_heads_learn_and_repeat(head: str):
    found = segment_probe(*SETS, head, classes=("sea", "land", "cloud"), seeds=(0, 1), options=OPTIONS)
    assert found["miou"] > 0.6  # the resize blurs the borders between patches
    assert found["learning_rate"] == 3e-2  # the other is too small to learn anything in 40 updates
    assert found["num_seeds"] == 2
    assert found["at_grid_edge"] == 1.0
    shares = np.bincount(SETS[2].masks.ravel()) / SETS[2].masks.size
    assert [found[f"pixels/{name}"] for name in ("sea", "land", "cloud")] == pytest.approx(shares)
    assert found["miou"] == pytest.approx(np.mean([found[f"iou/{name}"] for name in ("sea", "land", "cloud")]))
    again = segment_probe(*SETS, head, classes=("sea", "land", "cloud"), seeds=(0, 1), options=OPTIONS)
    assert found == again


def test_two_layers_learn_what_one_cannot():
    """The class is the product of two channels' signs: a linear head is at chance."""
    sets = make_set(48, 0, True), make_set(9, 1, True), make_set(13, 2, True)
    options = replace(OPTIONS, num_steps=100, batch_size=16, hidden_dim=32, learning_rates=(3e-2,))
    accuracy = {head: segment_probe(*sets, head, options=options)["pixel_accuracy"] for head in module.HEADS}
    assert accuracy["linear"] < 0.6 < 0.7 < accuracy["mlp"]


def test_tokens_are_standardised_where_the_head_is_run():
    """On the device, not by the host for every batch."""
    tokens, (mean, std) = SETS[1].tokens, module._statistics(SETS[0].tokens)
    head = TokenHead(CLASSES, 0, SIDE)
    params = head.init(jax.random.key(0), tokens)["params"]
    expected = head.apply({"params": params}, (tokens - mean) / std).argmax(-1)
    np.testing.assert_array_equal(module._classes(head, params, tokens, mean, std), expected)


def test_ignored_pixels_have_no_influence():
    """What lies under them changes neither the training nor the score."""
    train = SETS[0]
    hidden = np.zeros((SIDE, SIDE), bool)
    hidden[:8, :8] = True
    ignored = [Segmented(s.tokens, np.where(hidden, IGNORED, s.masks).astype(np.uint8)) for s in SETS]
    options = replace(OPTIONS, num_steps=10, batch_size=8, learning_rates=(3e-2,))
    params = module._train(TokenHead(CLASSES, 0, SIDE), ignored[0], 0.0, 1.0, options, 3e-2, 0)
    wrong = Segmented(train.tokens.copy(), ignored[0].masks)
    wrong.tokens.reshape(-1, GRID, GRID, WIDTH)[:, 0, 0] = 1e3  # seen by ignored pixels only, at the corner
    same = module._train(TokenHead(CLASSES, 0, SIDE), wrong, 0.0, 1.0, options, 3e-2, 0)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    found = segment_probe(*ignored, options=options)
    assert 0 < found["miou"] < 1
    predicted = np.zeros((1, SIDE, SIDE))
    assert confusion_matrix(predicted, ignored[1].masks[:1], CLASSES).sum() == SIDE**2 - 64


def test_a_class_that_test_lacks_is_said():
    train, valid, test = SETS
    fewer = Segmented(test.tokens, np.where(test.masks == 2, IGNORED, test.masks).astype(np.uint8))
    found = segment_probe(train, valid, fewer, options=replace(OPTIONS, learning_rates=(3e-2,)))
    assert (found["pixels/2"], found["iou/2"]) == (0.0, 0.0)
    assert found["miou_present"] == pytest.approx(1.5 * found["miou"])


def test_valid_chooses_and_test_does_not():
    train, valid, test = SETS
    first = segment_probe(train, valid, test, options=OPTIONS)
    wrong = Segmented(test.tokens, (test.masks + 1) % CLASSES)
    second = segment_probe(train, valid, wrong, options=OPTIONS)
    assert second["learning_rate"] == first["learning_rate"]
    assert second["valid_miou"] == first["valid_miou"]
    assert second["miou"] < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(head="unet"), "head: expected one of .*'mlp'.*found 'unet'"),
        (dict(valid=Segmented(SETS[0].tokens[:0], SETS[0].masks[:0])), "valid: no images"),
        (dict(test=Segmented(SETS[2].tokens, SETS[2].masks[:, :8])), r"test: .*masks \[N, 16, 16\], found"),
        (dict(classes=("sea", "land")), "train: mask value 2 is none of the 2 classes"),
        (dict(test=Segmented(SETS[2].tokens, np.full_like(SETS[2].masks, IGNORED))), "test: no pixel has a label"),
        (dict(train=Segmented(SETS[0].tokens[:, :5], SETS[0].masks)), r"valid: expected tokens \[N, 5, 8\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str):
    arguments = dict(zip(("train", "valid", "test"), SETS, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        segment_probe(**arguments, options=OPTIONS)


def test_tokens_of_an_oblong_image_are_refused():
    with pytest.raises(ValueError, match="square image, found 6"):
        TokenHead(2, 0, 8).init(jax.random.key(0), jnp.zeros((1, 6, 4)))
