"""Forward and backward of the MoE layer and of a dense MLP of equal active FLOPs: `python -m benchmarks.moe [--quick]`.

Top-2 of E experts of hidden width F against a dense MLP of hidden width 2F on the same tokens, float32; gradients with
respect to tokens, router logits and all weights. The contenders of a row take turns, so that what else the machine
does falls on all of them; the ratio is the result (that of the minima where the load average says the machine was
busy). Takes about three minutes on two idle cores, writes benchmarks/results/moe_cpu.json.
Axes: N tokens, D width, F hidden width of one expert, E experts.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import write_record
from mtl_moe import moe, routing

TOP_K = 2
# (N, D, F, E, contenders besides dense). F = 2D: two active experts are the usual MLP of 4D.
QUICK = [(1024, 192, 384, 8, ("tiles", "ragged"))]
RUNS = [
    *QUICK,
    (4096, 192, 384, 8, ("tiles",)),
    (16384, 192, 384, 8, ("tiles",)),
    (65536, 192, 384, 8, ("tiles",)),
    (8192, 192, 384, 2, ("tiles",)),
    (8192, 192, 384, 8, ("tiles", "ragged")),
    (8192, 192, 384, 32, ("tiles",)),
    (8192, 192, 384, 64, ("tiles",)),
    (1024, 384, 768, 8, ("tiles",)),
    (8192, 384, 768, 8, ("tiles",)),
    (8192, 384, 768, 64, ("tiles",)),
    (65536, 384, 768, 8, ("tiles",)),
    (8192, 384, 1536, 8, ("tiles",)),
]


def _weights(rng: np.random.Generator, experts: int, width: int, hidden: int) -> dict[str, jax.Array]:
    """Parameters of `apply_experts`; the dense MLP is one expert of them."""
    shapes = {"w1": (experts, width, hidden), "w2": (experts, hidden, width)}
    matrices = {name: rng.normal(size=s).astype(np.float32) / s[1] ** 0.5 for name, s in shapes.items()}
    return jax.tree.map(jnp.asarray, matrices) | {"b1": jnp.zeros((experts, hidden)), "b2": jnp.zeros((experts, width))}


def _dense(x: jax.Array, logits: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    w1, b1, w2, b2 = (params[name].astype(x.dtype) for name in ("w1", "b1", "w2", "b2"))
    return jax.nn.gelu(x @ w1[0] + b1, approximate=True) @ w2[0] + b2


def _moe(dispatch: str) -> Callable[..., jax.Array]:
    return lambda x, logits, params: moe.apply_experts(x, routing.gate(logits, TOP_K), params, dispatch, dtype=x.dtype)


def _seconds(function: Callable[..., object], arguments: tuple, calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def measure(
    tokens: int,
    width: int,
    hidden: int,
    experts: int,
    dispatches: tuple[str, ...],
    budget: float,
    dtype: Any = jnp.float32,
    calls: int = 1,
) -> dict:
    """Milliseconds of one forward and backward of each contender, median of 3 to 9 repeats within `budget` seconds.

    Args:
      dtype: of tokens and operands.
      calls: in a row for one repeat; on an accelerator one call is too short to be timed.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(tokens, width)), dtype)
    logits = jnp.asarray(rng.normal(size=(tokens, experts)), jnp.float32)
    weights = _weights(rng, experts, width, hidden)
    contenders = {"dense": (_dense, _weights(rng, 1, width, TOP_K * hidden))}
    contenders |= {name: (_moe(name), weights) for name in dispatches}
    steps = {}
    for name, (function, params) in contenders.items():

        def loss(x: jax.Array, logits: jax.Array, params: dict, function: Callable = function) -> jax.Array:
            return (function(x, logits, params).astype(jnp.float32) ** 2).sum()

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        steps[name] = (step, (x, logits, params))
        _seconds(*steps[name])  # compiles
    seconds = {name: [_seconds(*step, calls)] for name, step in steps.items()}
    repeats = int(min(max(budget / calls / sum(sum(values) for values in seconds.values()), 3), 9))
    for _ in range(repeats - 1):
        for name, step in steps.items():
            seconds[name].append(_seconds(*step, calls))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "tokens": tokens,
        "width": width,
        "hidden": hidden,
        "experts": experts,
        "top_k": TOP_K,
        "repeats": repeats,
        "ms_median": {name: round(value * 1e3, 3) for name, value in median.items()},
        "ms_min": {name: round(min(values) * 1e3, 3) for name, values in seconds.items()},
        "ratio_to_dense": {name: round(median[name] / median["dense"], 2) for name in dispatches},
        "ratio_of_minima": {name: round(min(seconds[name]) / min(seconds["dense"]), 2) for name in dispatches},
        "load_average": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small row, nothing written")
    quick = parser.parse_args().quick
    if jax.default_backend() != "cpu":
        raise SystemExit(f"the recorded rows are CPU rows, found {jax.default_backend()}: set JAX_PLATFORMS=cpu")
    rows = []
    for run in QUICK if quick else RUNS:
        row = measure(*run, budget=2.0 if quick else 6.0)
        rows.append(row)
        print(
            {
                name: row[name]
                for name in ("tokens", "width", "hidden", "experts", "ms_median", "ratio_to_dense", "ratio_of_minima")
            }
        )
    if quick:
        return
    write_record("moe_cpu", "python -m benchmarks.moe", rows, ("jax", "jaxlib", "numpy"))


if __name__ == "__main__":
    main()
