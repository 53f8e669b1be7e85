"""Strict JSON, written whole or not at all."""

import json

import numpy as np
import pytest

from core.files import replacing, write_json


def test_json_is_strict_and_plain(tmp_path):
    content = {
        "nan": float("nan"),
        "inf": [np.float32("inf"), -np.inf],
        "number": np.float32(0.5),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "pair": (1, 2.5),
        3: "key",
    }
    write_json(tmp_path / "report.json", content)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    expected = {"nan": None, "inf": [None, None], "number": 0.5, "count": 3, "flag": True, "pair": [1, 2.5], "3": "key"}
    assert found == expected


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "maps.npz"

    def write(text, error=None):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent == tmp_path  # a rename within a disk
            assert temporary not in tmp_path.glob("*.npz")
            if error:
                raise error

    with pytest.raises(OSError, match="disk full"):
        write("half", OSError("disk full"))
    assert not list(tmp_path.iterdir())
    write("whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]
