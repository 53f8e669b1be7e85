"""Low-rank updates of chosen kernels as a parameter transform: merge(params, adapters) has kernel + A B for kernel.

Axes: R rank. The factors of a layer lie under the layer's own path, where its kernel lies in the parameters:
block_00/attn/query/{a [in..., R], b [R, out...]}. After Hu et al. (LoRA, arXiv 2106.09685): A ~ U(-1/sqrt(fan_in),
1/sqrt(fan_in)), B = 0, so that merging changes nothing before the first update.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from core import tree

Adapters = Any


def init_low_rank(key: jax.Array, params: Any, targets: Mapping[str, int], rank: int) -> Adapters:
    """Fresh factors, float32, for every kernel that is a target; only the shapes of `params` are read.

    Args:
      targets: regular expression of a kernel's whole path -> how many of its leading axes are inputs.

    Raises:
      ValueError: if no path matches, or the rank is not in [1, the smaller side of every kernel].
    """
    adapters: dict[str, Any] = {}
    for path, kernel in tree.paths(params).items():
        num_in = next((count for pattern, count in targets.items() if re.fullmatch(pattern, path)), None)
        if num_in is None:
            continue
        layer = adapters
        for name in path.split("/")[:-1]:
            layer = layer.setdefault(name, {})
        key, key_a = jax.random.split(key)
        layer |= init_factors(key_a, kernel.shape, num_in, rank, path)
    if not adapters:
        raise ValueError(f"low-rank targets: no kernel matches any of {sorted(targets)}")
    return adapters


def init_factors(key: jax.Array, shape: Sequence[int], num_in: int, rank: int, name: str) -> dict[str, jax.Array]:
    """Fresh factors {a, b} of a kernel of this shape whose first `num_in` axes are inputs; `name` is for the error.

    Raises:
      ValueError: if the rank is not in [1, the kernel's smaller side].
    """
    inputs, outputs = shape[:num_in], shape[num_in:]
    fan_in, fan_out = math.prod(inputs), math.prod(outputs)
    if not 1 <= rank <= min(fan_in, fan_out):
        raise ValueError(
            f"rank of {name}: expected 1 to {min(fan_in, fan_out)} (it is {fan_in} x {fan_out}), found {rank}"
        )
    bound = 1 / math.sqrt(fan_in)
    return {
        "a": jax.random.uniform(key, (*inputs, rank), minval=-bound, maxval=bound),
        "b": jnp.zeros((rank, *outputs)),
    }


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A B in the kernel's shape, float32 at full precision."""
    return jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)


def merge(params: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
    """Parameters with kernel + A B where there are factors; all other leaves are passed on as they are.

    Raises:
      ValueError: for factors of a layer that the parameters do not have.
    """
    unknown = sorted(set(adapters) - set(params))
    if unknown:
        raise ValueError(f"adapters do not fit these parameters: {unknown} expected, found {sorted(params)}")
    merged = dict(params)
    for name, update in adapters.items():
        if "a" in update:
            kernel = params[name]["kernel"] + product(update["a"], update["b"])
            merged[name] = dict(params[name]) | {"kernel": kernel}
        else:
            merged[name] = merge(params[name], update)
    return merged
