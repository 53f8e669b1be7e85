"""Low-rank adapters as a parameter transform: merge(params, adapters) is what trains, is evaluated and is exported.

Axes: D width, K heads, R rank, L layers. The adapters of a layer lie under the layer's own path, beside where its
kernel lies in the parameters: block_00/attn/query/{a [in..., R], b [R, out...]}, and "magnitude" [out...] with DoRA.
Trained norms and biases are whole leaves that replace those of the parameters. After Hu et al. (LoRA, arXiv
2106.09685); A ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)) and B = 0 as in WeCoLoRA (arXiv 2404.09326).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core import tree
from core.dense import AdaptedKernel
from core.low_rank import init_factors, product

# Where each target lies in a block, and how many input axes its kernel has: q, k, v (D, K, Dh), out (K, Dh, D).
TARGETS: Mapping[str, tuple[str, int]] = {
    "query": ("attn", 1),
    "key": ("attn", 1),
    "value": ("attn", 1),
    "out": ("attn", 2),
    "fc1": ("mlp", 1),
    "fc2": ("mlp", 1),
}
PRESETS = {"enhanced": tuple(TARGETS), "plain": ("query", "value")}
SCALINGS = ("one", "alpha", "rank_stabilised")

Adapters = Any


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is trained beside the frozen copy.

    Attributes:
      ranks: (target, rank) pairs, targets of TARGETS.
      scaling: factor of the product AB: "one": 1; "alpha": alpha / R; "rank_stabilised": alpha / sqrt(R)
        (Kalajdzievski, arXiv 2312.03732).
      dora: magnitude and direction of every output apart (Liu et al., arXiv 2402.09353).
      train_norms: norm1 and norm2 of every block train too; the final norm stays the teacher's.
      train_biases: the biases of every dense layer of every block train too.
    """

    ranks: tuple[tuple[str, int], ...]
    scaling: str = "one"
    alpha: float = 1.0
    dora: bool = False
    train_norms: bool = False
    train_biases: bool = False

    def __post_init__(self):
        for target, rank in self.ranks:
            if target not in TARGETS:
                raise ValueError(f"lora.targets: expected some of {tuple(TARGETS)}, found {target!r}")
            if rank < 1:
                raise ValueError(f"lora rank of {target}: expected at least 1, found {rank}")
        if not self.ranks or len(dict(self.ranks)) != len(self.ranks):
            raise ValueError(f"lora.targets: expected each target once and at least one, found {self.ranks}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"lora.scaling: expected one of {SCALINGS}, found {self.scaling!r}")

    def scale(self, rank: int) -> float:
        """Factor of a product AB of this rank."""
        return {"one": 1.0, "alpha": self.alpha / rank, "rank_stabilised": self.alpha / math.sqrt(rank)}[self.scaling]


def build_lora_config(config: Any) -> LoraConfig:
    """From config.lora: `targets` goes before `preset`, a rank in `ranks` above 0 before `rank`.

    Raises:
      ValueError: for an unknown preset or target, a rank of a target that is not adapted, and an alpha that the scaling
        does not use.
    """
    if config.preset not in PRESETS:
        raise ValueError(f"lora.preset: expected one of {tuple(PRESETS)}, found {config.preset!r}")
    targets = tuple(config.targets) or PRESETS[config.preset]
    ranks = {target: rank for target, rank in config.ranks.items() if rank}
    if unused := sorted(set(ranks) - set(targets)):
        raise ValueError(f"lora.ranks: {unused} are not adapted (targets are {targets}): leave their ranks at 0")
    if config.scaling == "one" and config.alpha != 1:
        raise ValueError(
            f'lora.alpha: expected 1 with lora.scaling="one", which does not use it, found {config.alpha}: set '
            "lora.scaling to alpha or rank_stabilised"
        )
    return LoraConfig(
        ranks=tuple((target, ranks.get(target, config.rank)) for target in targets),
        scaling=config.scaling,
        alpha=config.alpha,
        dora=config.dora,
        train_norms=config.train_norms,
        train_biases=config.train_biases,
    )


def init_adapters(key: jax.Array, params: Mapping[str, Any], lora: LoraConfig) -> Adapters:
    """Adapters of every block in `params`, float32; merging them changes nothing yet.

    Raises:
      ValueError: naming the target whose rank is above what its kernel can have.
    """
    adapters: dict[str, Any] = {}
    for name in sorted(name for name in params if name.startswith("block_")):
        block = adapters[name] = {"attn": {}, "mlp": {}}
        for target, rank in lora.ranks:
            part, num_in = TARGETS[target]
            key, layer_key = jax.random.split(key)
            block[part][target] = _init_layer(layer_key, f"{name}/{part}/{target}", params, num_in, rank, lora.dora)
        if lora.train_biases:
            for part in ("attn", "mlp"):
                biases = {layer: leaves["bias"] for layer, leaves in params[name][part].items() if "bias" in leaves}
                for layer, bias in biases.items():
                    block[part].setdefault(layer, {})["bias"] = _own(bias)
        if lora.train_norms:
            block |= {norm: jax.tree.map(_own, params[name][norm]) for norm in ("norm1", "norm2")}
        adapters[name] = {part: leaves for part, leaves in block.items() if leaves}
    if not adapters:
        raise ValueError(f"adapters: expected parameters of a vision transformer's blocks, found {sorted(params)}")
    return adapters


def _own(leaf: jax.Array) -> jax.Array:
    """A copy: trained leaves are donated to the update, the base's must not be."""
    return jnp.array(leaf, jnp.float32, copy=True)


def _init_layer(key: jax.Array, path: str, params: Any, num_in: int, rank: int, dora: bool) -> dict[str, jax.Array]:
    name, part, target = path.split("/")
    kernel = params[name][part][target]["kernel"]
    layer = init_factors(key, kernel.shape, num_in, rank, f"{target} ({path}; lora.rank, lora.ranks.{target})")
    if dora:
        layer["magnitude"] = _norm(jnp.asarray(kernel, jnp.float32), num_in).reshape(kernel.shape[num_in:])
    return layer


def _norm(kernel: jax.Array, num_in: int) -> jax.Array:
    """Euclidean norm of each output's weights; input axes stay as 1."""
    return jnp.sqrt(jnp.square(kernel).sum(range(num_in), keepdims=True))


def merge(params: Mapping[str, Any], adapters: Adapters, lora: LoraConfig) -> dict[str, Any]:
    """Parameters with the adapters in: kernel + scale * AB, float32; the frozen leaves are passed on as they are.

    With DoRA: magnitude * (kernel + scale * AB) / norm, the norm of each output a constant in the gradient (section 4.3
    of the paper). Without training the kernels come back exactly (DoRA: within float32 rounding).

    Raises:
      ValueError: for adapters of layers that the parameters do not have.
    """
    return _replace(params, adapters, lambda *layer: _adapted(*layer, lora), "")


def attach(params: Mapping[str, Any], adapters: Adapters, lora: LoraConfig) -> dict[str, Any]:
    """As `merge`, for the loss: layers take kernel and factors apart and give gradients of the factors alone.

    The frozen kernels may be in another dtype than float32 (`core.dense.rounded_kernels`). With DoRA it is `merge`:
    magnitudes need every output's whole gradient.
    """

    def make(kernel: jax.Array, layer: Mapping[str, jax.Array], path: str) -> jax.Array | AdaptedKernel:
        if "magnitude" in layer:
            return _adapted(kernel, layer, path, lora)
        _check_fit(kernel, layer, path)
        return AdaptedKernel(kernel, layer["a"], layer["b"], lora.scale(layer["b"].shape[0]))

    return _replace(params, adapters, make, "")


def _replace(params: Any, adapters: Any, make_kernel: Callable[..., Any], path: str) -> dict[str, Any]:
    """Parameters with trained leaves in their places and make_kernel(kernel, layer's adapters, path) for kernels."""
    updated = dict(params)
    for name, update in adapters.items():
        if name in ("a", "b", "magnitude"):
            continue
        if name not in params:
            raise ValueError(f"adapters do not fit these parameters: {path}{name} expected, found {sorted(params)}")
        updated[name] = (
            _replace(params[name], update, make_kernel, f"{path}{name}/") if isinstance(update, Mapping) else update
        )
    if "a" in adapters:
        updated["kernel"] = make_kernel(params["kernel"], adapters, path)
    return updated


def _check_fit(kernel: jax.Array, layer: Mapping[str, jax.Array], path: str) -> None:
    a, b = layer["a"].shape, layer["b"].shape
    if (*a[:-1], *b[1:]) != kernel.shape:
        raise ValueError(f"adapters do not fit {path}kernel {kernel.shape}: found {a} and {b}")


def _adapted(kernel: jax.Array, layer: Mapping[str, jax.Array], path: str, lora: LoraConfig) -> jax.Array:
    _check_fit(kernel, layer, path)
    a, b = layer["a"], layer["b"]
    kernel = jnp.asarray(kernel, jnp.float32) + lora.scale(b.shape[0]) * product(a, b)
    if "magnitude" not in layer:
        return kernel
    norm = jax.lax.stop_gradient(_norm(kernel, a.ndim - 1))
    # An output whose weights are all 0 has no direction: it stays 0.
    gain = layer["magnitude"].reshape(norm.shape) / jnp.where(norm == 0, 1.0, norm)
    return kernel * gain


def truncate(adapters: Adapters, rank: int, lora: LoraConfig) -> tuple[Adapters, LoraConfig]:
    """Every product AB replaced by the closest one (Frobenius norm) of at most `rank`, its factors balanced.

    Returns:
      The adapters and the config with the new ranks; the products keep their scale whatever the scaling.
    """
    ranks = tuple((target, min(old, rank)) for target, old in lora.ranks)
    smaller = dataclasses.replace(lora, ranks=ranks)

    def shrink(layer: Any) -> Any:
        if not isinstance(layer, Mapping):
            return layer
        if "a" not in layer:
            return {name: shrink(value) for name, value in layer.items()}
        a, b = layer["a"], layer["b"]
        keep = min(a.shape[-1], rank)
        left, values, right = _svd(a, b)
        root = np.sqrt(values[:keep] * lora.scale(a.shape[-1]) / lora.scale(keep))
        return dict(layer) | {
            "a": jnp.asarray((left[:, :keep] * root[None]).reshape(*a.shape[:-1], keep), jnp.float32),
            "b": jnp.asarray((right[:keep] * root[:, None]).reshape(keep, *b.shape[1:]), jnp.float32),
        }

    return shrink(adapters), smaller


def singular_values(adapters: Adapters) -> dict[str, np.ndarray]:
    """Singular values of every product AB (without its scale), descending, R of them: {"block_00/attn/query": [R]}."""
    leaves = tree.paths(adapters)
    layers = [path.removesuffix("/a") for path in leaves if path.endswith("/a")]
    return {layer: _svd(leaves[f"{layer}/a"], leaves[f"{layer}/b"])[1] for layer in layers}


def suggested_rank(values: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Of `singular_values`: for each layer the smallest rank, 1 at least, that keeps 95 % of the squared sum."""
    ranks = {}
    for layer, singular in values.items():
        squares = np.square(singular)
        ranks[layer] = 1 + int((np.cumsum(squares) < 0.95 * squares.sum()).sum())
    return ranks


def _svd(a: jax.Array, b: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin SVD of the product of a [in..., R] and b [R, out...] in float64, without forming it."""
    rank = b.shape[0]
    left, upper = np.linalg.qr(np.asarray(a, np.float64).reshape(-1, rank))
    right, lower = np.linalg.qr(np.asarray(b, np.float64).reshape(rank, -1).T)
    u, values, vt = np.linalg.svd(upper @ lower.T)
    return left @ u, values, vt @ right.T
