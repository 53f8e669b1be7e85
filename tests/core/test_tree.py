"""Paths, masks, specs and fingerprints on small trees written by hand."""

import json

import flax.struct
import jax.numpy as jnp
import numpy as np
import pytest

from core import tree

TREE = {"b": {"kernel": np.zeros((2, 3), np.float32)}, "a": [np.ones(4, np.int32), jnp.zeros((), jnp.bfloat16)]}


@flax.struct.dataclass
class Node:
    params: dict


def test_paths_of_dicts_lists_and_dataclasses():
    assert list(tree.paths(TREE)) == ["a/0", "a/1", "b/kernel"]
    assert list(tree.paths(Node({"x": 1}))) == ["params/x"]


def test_map_with_path_keeps_the_structure():
    assert tree.map_with_path(lambda path, leaf: f"{path}:{leaf.ndim}", TREE) == {
        "a": ["a/0:1", "a/1:0"],
        "b": {"kernel": "b/kernel:2"},
    }


def test_mask_matches_whole_paths_only():
    assert tree.mask(TREE, r"b/.*") == {"a": [False, False], "b": {"kernel": True}}
    assert tree.mask(TREE, r"kernel") == {"a": [False, False], "b": {"kernel": False}}


def test_spec_is_json_and_counts():
    spec = tree.spec(TREE)
    assert json.loads(json.dumps(spec)) == {
        "a/0": [[4], "int32"],
        "a/1": [[], "bfloat16"],
        "b/kernel": [[2, 3], "float32"],
    }
    assert tree.num_params(TREE) == 4 + 1 + 6


def test_spec_difference_names_each_kind():
    one, two = [[2, 3], "float32"], [[2, 4], "float32"]
    assert tree.spec_difference({"x": one}, {"x": one}) == ""
    assert tree.spec_difference({"x": one}, {"x": json.loads(json.dumps(one))}) == ""
    text = tree.spec_difference({"x": one, "y": one, "z": one}, {"x": two, "w": one, "z": [[2, 3], "bfloat16"]})
    assert text.splitlines() == [
        "missing: y [[2, 3], 'float32']",
        "unexpected: w [[2, 3], 'float32']",
        "different: x expected [[2, 3], 'float32'], found [[2, 4], 'float32']",
        "different: z expected [[2, 3], 'float32'], found [[2, 3], 'bfloat16']",
    ]


def test_spec_difference_of_everything_is_short():
    lines = tree.spec_difference({str(i): [[1], "float32"] for i in range(100)}, {}).splitlines()
    assert len(lines) == 6
    assert lines[-1] == "... and 95 more"


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.array([[1.0], [2.0]], np.float32)},
        {"x": np.array([1.0, np.nextafter(np.float32(2), np.float32(3))], np.float32)},
        {"x": np.array([1.0, 2.0], np.float32).view(np.int32)},
        {"y": np.array([1.0, 2.0], np.float32)},
    ],
    ids=["shape", "one_bit", "dtype", "path"],
)
def test_fingerprint_tells_trees_apart(other):
    own = {"x": np.array([1.0, 2.0], np.float32)}
    assert tree.fingerprint(own) != tree.fingerprint(other)
    assert tree.fingerprint(own) == tree.fingerprint({"x": jnp.array([1.0, 2.0])})
    assert tree.fingerprint(own) == tree.fingerprint({"x": np.array([1.0, 9.0, 2.0], np.float32)[::2]})
