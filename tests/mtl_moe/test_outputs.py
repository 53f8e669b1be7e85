"""predictions.csv."""

import csv

import numpy as np
import pytest

from input_pipeline.split import ArrayPixels, Split
from mtl_moe.outputs import write_predictions


def make_split(names, labels):
    pixels = ArrayPixels(np.zeros((len(names), 4, 4, 1), np.uint8), None, 4)
    return Split(list(names), list(names), np.array(labels, np.int32), False, pixels)


def test_predictions_hold_every_image_with_its_scores(tmp_path):
    names = ["a/plain.png", 'with, comma and "quote".png', "ünïcode.png"]
    path, scores = tmp_path / "predictions.csv", np.array([0.123456789, 2.0, 1e-9])
    evidence = {"masked": np.arange(3.0), "synthetic_clean": -np.arange(3.0)}
    write_predictions(path, make_split(names, [0, 1, -1]), scores, np.array([1.0, 0.25, 0.5]), evidence)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["name", "label", "score", "p_value", "masked", "synthetic_clean"]
    assert [row["name"] for row in rows] == names
    assert [row["label"] for row in rows] == ["0", "1", ""]
    for key, values in {"score": scores, **evidence}.items():
        np.testing.assert_allclose([float(row[key]) for row in rows], values, rtol=1e-5)  # six digits are written
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    predictions = tmp_path / "predictions.csv"
    predictions.write_text("old")
    with pytest.raises(IndexError):
        write_predictions(predictions, make_split(["a", "b"], [0, 0]), np.zeros(1), np.ones(2), {})
    assert predictions.read_text() == "old"
    assert list(tmp_path.iterdir()) == [predictions]
