"""Parameter trees by path: the one address system for decay, freezing, sharding, comparison and fingerprints."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

MAX_LINES = 5  # of a difference, as errors tell it


def paths(tree: Any) -> dict[str, Any]:
    """Leaves by path, for example {"block_00/attn/query/kernel": leaf}, in a fixed order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def map_with_path(fn: Any, tree: Any) -> Any:
    """`jax.tree.map` whose function also takes the leaf's path: fn(path, leaf)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), tree
    )


def mask(tree: Any, pattern: str) -> Any:
    """Tree of booleans: whether the whole path of a leaf matches the regular expression."""
    regex = re.compile(pattern)
    return map_with_path(lambda path, _: regex.fullmatch(path) is not None, tree)


def spec(tree: Any) -> dict[str, list]:
    """Shape and dtype by path, as plain JSON: {"path": [[2, 3], "float32"]}."""
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in paths(tree).items()}


def spec_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Empty if two specs are equal; otherwise one line a difference, MAX_LINES at the most."""
    lines = [f"missing: {path} {expected[path]}" for path in expected if path not in found]
    lines += [f"unexpected: {path} {found[path]}" for path in found if path not in expected]
    lines += [
        f"different: {path} expected {expected[path]}, found {found[path]}"
        for path in expected
        if path in found and list(expected[path]) != list(found[path])
    ]
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], f"... and {len(lines) - MAX_LINES} more"]
    return "\n".join(lines)


def num_params(tree: Any) -> int:
    """Number of scalars in all leaves."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def fingerprint(tree: Any) -> str:
    """sha256 over paths, shapes, dtypes and bytes of all leaves, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path, leaf in paths(tree).items():
        array = np.asarray(leaf)
        digest.update(f"{path} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
