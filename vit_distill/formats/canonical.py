"""The exchange form of all formats and its strict two-sided mapping to the parameters of core.vit.

Canonical state: timm's names and torch's layouts (Linear [out, in], convolution [D, C, P, P]), except that query, key
and value stand apart ("blocks.0.attn.q.weight"). A format's reader translates into it, a writer out of it.

Axes: D width, K heads, P patch side, C channels, L layers.
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import einops
import jax
import numpy as np

from core import tree
from core.vit import VitConfig, abstract_params, init_params

State = Mapping[str, np.ndarray]


class Entry(NamedTuple):
    """A tensor: canonical name, path of the parameter, how its layout changes (a key of _LAYOUTS)."""

    name: str
    path: str
    layout: str = "same"


# Each: (canonical -> parameter, parameter -> canonical), both given the VitConfig.
_LAYOUTS: Mapping[str, tuple[Callable, Callable]] = {
    "same": (lambda a, c: a, lambda a, c: a),
    "linear": (lambda a, c: a.T, lambda a, c: a.T),
    "patch": (
        lambda a, c: einops.rearrange(a, "d c p q -> (p q c) d"),
        lambda a, c: einops.rearrange(a, "(p q c) d -> d c p q", p=c.patch_size, q=c.patch_size),
    ),
    "heads": (
        lambda a, c: einops.rearrange(a, "(k h) d -> d k h", k=c.num_heads),
        lambda a, c: einops.rearrange(a, "d k h -> (k h) d"),
    ),
    "heads_bias": (
        lambda a, c: einops.rearrange(a, "(k h) -> k h", k=c.num_heads),
        lambda a, c: einops.rearrange(a, "k h -> (k h)"),
    ),
    "out": (
        lambda a, c: einops.rearrange(a, "d (k h) -> k h d", k=c.num_heads),
        lambda a, c: einops.rearrange(a, "k h d -> d (k h)"),
    ),
    "gamma": (lambda a, c: einops.rearrange(a, "d -> 1 1 d"), lambda a, c: einops.rearrange(a, "1 1 d -> d")),
}


def entries(config: VitConfig) -> list[Entry]:
    """Every tensor of the architecture, in order."""
    found = [Entry("patch_embed.proj.weight", "embed/proj/kernel", "patch")]
    if config.patch_bias:
        found.append(Entry("patch_embed.proj.bias", "embed/proj/bias"))
    if config.class_token:
        found.append(Entry("cls_token", "cls_token"))
    if config.num_registers:
        found.append(Entry("reg_token", "reg_tokens"))
    if config.position == "learned":
        found.append(Entry("pos_embed", "pos_embedding"))
    if config.pre_norm:
        found += _norm("norm_pre", "norm_pre")
    for i in range(config.depth):
        found += _block(config, f"blocks.{i}", f"block_{i:02d}")
    found += _norm("norm" if config.final_norm == "tokens" else "fc_norm", "norm")
    if config.pool == "attention":
        found += _pool()
    if config.num_classes:
        found += _linear("head", "head", config.head_bias)
    return found


def _norm(name: str, path: str) -> list[Entry]:
    return [Entry(f"{name}.weight", f"{path}/scale"), Entry(f"{name}.bias", f"{path}/bias")]


def _linear(name: str, path: str, bias: bool = True, layout: str = "linear") -> list[Entry]:
    weight = Entry(f"{name}.weight", f"{path}/kernel", layout)
    return [weight, Entry(f"{name}.bias", f"{path}/bias", "heads_bias" if layout == "heads" else "same")][: 1 + bias]


def _block(config: VitConfig, name: str, path: str) -> list[Entry]:
    found = _norm(f"{name}.norm1", f"{path}/norm1")
    for short, long in (("q", "query"), ("k", "key"), ("v", "value")):
        bias = config.qkv_bias and (config.key_bias or short != "k")
        found += _linear(f"{name}.attn.{short}", f"{path}/attn/{long}", bias, "heads")
    found += _linear(f"{name}.attn.proj", f"{path}/attn/out", layout="out")
    found += _norm(f"{name}.norm2", f"{path}/norm2")
    for layer in ("fc1", "fc2"):
        found += _linear(f"{name}.mlp.{layer}", f"{path}/mlp/{layer}")
    if config.layer_scale:
        found += [Entry(f"{name}.{scale}.gamma", f"{path}/{scale}", "gamma") for scale in ("ls1", "ls2")]
    return found


def _pool() -> list[Entry]:
    found = [Entry("attn_pool.latent", "pool/query_token")]
    for short, long in (("q", "query"), ("k", "key"), ("v", "value")):
        found += _linear(f"attn_pool.{short}", f"pool/attn/{long}", layout="heads")
    found += _linear("attn_pool.proj", "pool/attn/out", layout="out") + _norm("attn_pool.norm", "pool/norm")
    return found + _linear("attn_pool.mlp.fc1", "pool/mlp/fc1") + _linear("attn_pool.mlp.fc2", "pool/mlp/fc2")


def expected_shapes(config: VitConfig) -> dict[str, tuple[int, ...]]:
    """Shape by path of every parameter of the architecture."""
    return {path: leaf.shape for path, leaf in tree.paths(abstract_params(config)).items()}


def to_params(
    config: VitConfig, state: State, source_name: Callable[[str], str], allow_missing: Sequence[str] = ()
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """Canonical state -> (params, matched names, missing names); missing ones get the model's seeded initial value.

    Args:
      allow_missing: patterns (fnmatch) of names in the file, or of parameter paths, that may be absent.

    Raises:
      ValueError: for a tensor that is absent or has another shape.
    """
    shapes = expected_shapes(config)
    flat: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for entry in entries(config):
        if entry.name in state:
            flat[entry.path] = _convert(entry, state[entry.name], config, shapes[entry.path], source_name)
        else:
            missing[entry.path] = source_name(entry.name)
    refused = [
        name for path, name in missing.items() if not (matches(name, allow_missing) or matches(path, allow_missing))
    ]
    if refused:
        raise ValueError(
            f"{len(refused)} of {len(shapes)} tensors are missing: {shorten(refused)}. Expected a whole ViT of depth "
            f"{config.depth}; name in allow_missing what may keep its initial value"
        )
    if missing:
        initial = tree.paths(jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)))
        flat |= {path: np.asarray(initial[path]) for path in missing}
    matched = dict.fromkeys(source_name(entry.name) for entry in entries(config) if entry.name in state)
    return _nest(flat), tuple(matched), tuple(dict.fromkeys(missing.values()))


def from_params(config: VitConfig, params: Any) -> dict[str, np.ndarray]:
    """Parameters -> canonical state, contiguous float32.

    Raises:
      ValueError: if the parameters are not those of the architecture.
    """
    flat = tree.paths(params)
    found, shapes = {path: leaf.shape for path, leaf in flat.items()}, expected_shapes(config)
    difference = tree.spec_difference({k: list(v) for k, v in shapes.items()}, {k: list(v) for k, v in found.items()})
    if difference:
        raise ValueError(f"parameters are not those of the architecture:\n{difference}")
    return {
        entry.name: np.ascontiguousarray(_LAYOUTS[entry.layout][1](np.asarray(flat[entry.path], np.float32), config))
        for entry in entries(config)
    }


def _convert(
    entry: Entry, array: np.ndarray, config: VitConfig, shape: tuple[int, ...], source_name: Callable[[str], str]
) -> np.ndarray:
    back = _LAYOUTS[entry.layout][1]
    expected = back(np.broadcast_to(np.float32(0), shape), config).shape
    if array.shape != expected:
        raise ValueError(
            f"tensor {source_name(entry.name)!r}: expected shape {list(expected)} for {entry.path}, found "
            f"{list(array.shape)}"
        )
    return np.ascontiguousarray(_LAYOUTS[entry.layout][0](array, config), dtype=np.float32)


def join_gates(state: State) -> dict[str, np.ndarray]:
    """With one fc1 for the gate and value of SwiGLU where they stand apart ("mlp.fc1_g", "mlp.fc1_x")."""
    joined = dict(state)
    for name in [name for name in state if ".mlp.fc1_g." in name]:
        other = name.replace("fc1_g", "fc1_x")
        if other in state:
            joined[name.replace("fc1_g", "fc1")] = np.concatenate([joined.pop(name), joined.pop(other)])
    return joined


def split_gates(state: State) -> dict[str, np.ndarray]:
    """Inverse of `join_gates`, of a state with SwiGLU."""
    parted: dict[str, np.ndarray] = {}
    for name, array in state.items():
        if ".mlp.fc1." in name:
            parted[name.replace("fc1", "fc1_g")], parted[name.replace("fc1", "fc1_x")] = np.split(array, 2)
        else:
            parted[name] = array
    return parted


def with_key_bias(config: VitConfig, state: State) -> dict[str, np.ndarray]:
    """With zeros for the bias of keys where queries and values alone have one: the same function, other tools have all
    three or none."""
    found: dict[str, np.ndarray] = {}
    for name, array in state.items():
        found[name] = array
        if config.qkv_bias and not config.key_bias and name.endswith(".attn.k.weight"):
            found[name.replace("weight", "bias")] = np.zeros(config.width, np.float32)
    return found


def fold_prefix_positions(state: dict[str, np.ndarray], num_prefix: int) -> None:
    """Adds the positions of the prefix to its tokens and leaves those of the patches; changes `state`."""
    position = state["pos_embed"]
    state["cls_token"] = state["cls_token"] + position[:, :1]
    if "reg_token" in state and num_prefix > 1:
        state["reg_token"] = state["reg_token"] + position[:, 1:num_prefix]
    state["pos_embed"] = position[:, num_prefix:]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name equals or fits (fnmatch: * and ?) one of the patterns."""
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def shorten(names: Sequence[str]) -> str:
    """Names for a message, six of them at the most."""
    more = f", ... and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(repr(name) for name in names[:6]) + more


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested
