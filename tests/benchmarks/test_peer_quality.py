"""The evaluation of the peers: the detector's metrics on the detector's splits."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import peer_quality
from input_pipeline.dataset import load_dataset

with warnings.catch_warnings():  # torch's at import are not ours
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")

from benchmarks.peers.training import Budget


def test_perfect_maps_are_perfect():
    masks = np.zeros((6, 64, 64, 1), np.uint8)
    masks[3:, 20:40, 20:40] = 1
    labels = np.array([0, 0, 0, 1, 1, 1])
    images = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None], (6, 64, 64, 1))  # of one contrast
    split = SimpleNamespace(
        groups=list("aabccd"),
        labels=labels,
        has_masks=True,
        masks=lambda rows: masks[rows],
        images=lambda rows: images[rows],
    )
    maps = masks[:, ::2, ::2, 0].astype(np.float32)
    found = peer_quality.accuracy(split, labels + 0.5, maps, 64, 20)
    assert found["image_auroc"] == found["matched_auroc"] == 1.0
    assert found["pixel_auroc"] > 0.99
    assert found["image_auroc_95"] == (1.0, 1.0)
    assert peer_quality.accuracy(split, -labels, 1 - maps, 64, 20)["pixel_auroc"] < 0.01


def test_a_peer_is_measured_on_the_training_normals_and_the_test_split(tiny_config):
    dataset = load_dataset(tiny_config().data)
    row = peer_quality.measure("synthetic_segmenter", dataset, Budget(updates=1), 0, 20)
    assert row["train_images"] == len(dataset.splits["train"])
    assert row["test_images"] == len(dataset.splits["test"]) == 8
    assert row["updates"] == 1
    low, high = row["image_auroc_95"]
    assert low <= row["image_auroc"] <= high
    assert f"{row['image_auroc']:.3f} ({low:.3f} to {high:.3f})" in peer_quality.table([row])


def test_a_row_without_masks_says_so():
    row = {
        "dataset": "d",
        "peer": "p",
        "seed": 0,
        "updates": 3,
        "image_auroc": 0.5,
        "matched_auroc": 0.5,
        "image_ap": 0.25,
    }
    lines = peer_quality.table([row]).splitlines()
    assert lines[2] == "| d | p | 0 | 3 | 0.500 | 0.500 | 0.250 | no masks | no masks |"
    assert all(line.count("|") == lines[0].count("|") for line in lines)
