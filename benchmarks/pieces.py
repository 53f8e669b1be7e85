"""Where the time of a distillation update goes: the pieces of a transformer block by themselves, ours and PyTorch's.

  python -m benchmarks.pieces [--batch=8] [--rounds=3] [--sides=jax_bf16,torch_bf16]

Every piece is timed as `benchmarks.distill_step` runs it (ViT-B/16, r=2, R=128): frozen layers forward for the
teacher's 12 blocks, adapted layers forward and backward for the student's 6, with the dtypes that meet there
(PyTorch: torch.autocast, float32 residual stream). Milliseconds of one call are medians; times how often an update
calls it they add up to what an update would take if it were only these. Each side is a process of its own, in
alternate order. The table says which pieces are slower than PyTorch's, and how much of the difference they explain.
Axes: T = batch * 197 tokens, D 768, F 3072, K heads of Dh, R rank.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

TOKENS, WIDTH, HEADS, HIDDEN, RANK = 197, 768, 12, 3072, 128
TEACHER, STUDENT = 12, 6  # blocks
LAYERS = {"qkv": (WIDTH, WIDTH, 3), "out": (WIDTH, WIDTH, 1), "fc1": (WIDTH, HIDDEN, 1), "fc2": (HIDDEN, WIDTH, 1)}
ROUNDED_INPUT = ("out", "fc2")  # what attention and GELU give them is bfloat16 under torch.autocast
Piece = Callable[[], Any]


def normal(*shape: int) -> np.ndarray:
    """float32 numbers of a layer's size."""
    return (np.random.default_rng(0).normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)


def jax_pieces(batch: int, bf16: bool) -> dict[str, Piece]:
    """Name of the piece -> a call of it, finished when it returns."""
    import jax
    import jax.numpy as jnp

    from core.attention import attend
    from core.dense import AdaptedKernel, matmul
    from core.transformer import ACTIVATIONS

    dtype, rows = (jnp.bfloat16 if bf16 else jnp.float32), batch * TOKENS

    def forward(function: Callable[..., Any], *args: Any) -> Piece:
        compiled = jax.jit(function)
        return lambda: jax.block_until_ready(compiled(*args))

    def both(function: Callable[..., Any], *args: Any, frozen: tuple[Any, ...] = ()) -> Piece:
        def run(g: Any, frozen: tuple[Any, ...], *args: Any) -> Any:
            out, pull = jax.vjp(lambda *args: function(*args, *frozen), *args)
            return out, pull(g)

        shapes = jax.eval_shape(function, *args, *frozen)
        return forward(run, jax.tree.map(lambda out: jnp.ones(out.shape, out.dtype), shapes), frozen, *args)

    pieces = {}
    for name, (inputs, outputs, parts) in LAYERS.items():
        x, kernels = jnp.asarray(normal(rows, inputs)), [jnp.asarray(normal(inputs, outputs), dtype)] * parts
        factors = [(jnp.asarray(normal(inputs, RANK)), jnp.asarray(normal(RANK, outputs)))] * parts

        def adapted(x, factors, kernels):
            pairs = zip(kernels, factors, strict=True)
            return [matmul(x, AdaptedKernel(w, *f, 1.0), dtype) for w, f in pairs]

        pieces[f"{name}, frozen"] = forward(lambda x, kernels: [matmul(x, w, dtype) for w in kernels], x, kernels)
        pieces[f"{name}, adapted"] = both(adapted, x, factors, frozen=(kernels,))
    heads = [jnp.asarray(normal(batch, TOKENS, HEADS, WIDTH // HEADS)) for _ in range(3)]
    attention = lambda q, k, v: attend(q, k, v, dtype)  # noqa: E731
    hidden, x = jnp.asarray(normal(rows, HIDDEN)), jnp.asarray(normal(rows, WIDTH))

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    for name, function, args in (
        ("attention", attention, heads),
        ("gelu", ACTIVATIONS["gelu"], [hidden]),
        ("norm", norm, [x]),
    ):
        pieces[f"{name}, frozen"], pieces[f"{name}, adapted"] = forward(function, *args), both(function, *args)
    return pieces


def torch_pieces(batch: int, bf16: bool) -> dict[str, Piece]:
    """The same in PyTorch."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(os.cpu_count())
    rows, low = batch * TOKENS, (torch.bfloat16 if bf16 else torch.float32)

    def tensor(*shape: int, dtype: Any = torch.float32, grad: bool = False) -> Any:
        return torch.from_numpy(normal(*shape)).to(dtype).requires_grad_(grad)

    def forward(function: Callable[..., Any], *args: Any) -> Piece:
        def run():
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return function(*args)

        return run

    def both(function: Callable[..., Any], *args: Any) -> Piece:
        def run():
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = function(*args)
            return torch.autograd.grad(out, [x for x in args if x.requires_grad], torch.ones_like(out))

        return run

    pieces = {}
    for name, (inputs, outputs, parts) in LAYERS.items():
        dtype = low if name in ROUNDED_INPUT else torch.float32
        w, bias = tensor(outputs * parts, inputs), tensor(outputs * parts)
        pieces[f"{name}, frozen"] = forward(functional.linear, tensor(rows, inputs, dtype=dtype), w, bias)
        factors = [tensor(*shape, grad=True) for _ in range(parts) for shape in ((RANK, inputs), (outputs, RANK))]

        def adapted(x, w, bias, *factors):
            pairs = zip(factors[::2], factors[1::2], strict=True)
            sums = [functional.linear(functional.linear(x, a), b) for a, b in pairs]
            return functional.linear(x, w, bias) + (torch.cat(sums, -1) if len(sums) > 1 else sums[0])

        pieces[f"{name}, adapted"] = both(adapted, tensor(rows, inputs, dtype=dtype, grad=True), w, bias, *factors)
    heads = [tensor(batch, HEADS, TOKENS, WIDTH // HEADS, dtype=low, grad=True) for _ in range(3)]
    hidden, x = tensor(rows, HIDDEN, dtype=low, grad=True), tensor(rows, WIDTH, grad=True)
    for name, function, args in (
        ("attention", functional.scaled_dot_product_attention, heads),
        ("gelu", functional.gelu, [hidden]),
        ("norm", lambda x: functional.layer_norm(x, (WIDTH,), eps=1e-6), [x]),
    ):
        pieces[f"{name}, frozen"], pieces[f"{name}, adapted"] = forward(function, *args), both(function, *args)
    return pieces


SIDES = {
    "jax": lambda batch: jax_pieces(batch, bf16=False),
    "jax_bf16": lambda batch: jax_pieces(batch, bf16=True),
    "torch": lambda batch: torch_pieces(batch, bf16=False),
    "torch_bf16": lambda batch: torch_pieces(batch, bf16=True),
}


def calls(piece: str) -> int:
    """How often an update runs a piece: "..., frozen" in the teacher's blocks, "..., adapted" in the student's."""
    name, kind = piece.split(", ")
    return (TEACHER if kind == "frozen" else STUDENT) * (2 if name == "norm" else 1)


def _median_ms(piece: Piece) -> float:
    for _ in range(3):
        piece()
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        piece()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    """Runs every side in processes of their own, or one side in this one (--side)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--side", choices=SIDES)
    args = parser.parse_args()
    if args.side:
        print(json.dumps({name: _median_ms(piece) for name, piece in SIDES[args.side](args.batch).items()}))
        return
    sides, rows = args.sides.split(","), []
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for turn in range(args.rounds):
        for side in sides if turn % 2 == 0 else reversed(sides):
            command = [sys.executable, "-m", "benchmarks.pieces", f"--batch={args.batch}", f"--side={side}"]
            environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # for every side alike
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    for piece in found[sides[0]][0]:
        row = {"piece": piece, "calls": calls(piece)}
        rows.append(row | {side: round(statistics.median(run[piece] for run in found[side]), 2) for side in sides})
        print(rows[-1], flush=True)
    total = {side: round(sum(row["calls"] * row[side] for row in rows), 1) for side in sides}
    rows.append({"piece": "all, times their calls", "batch": args.batch, **total})
    print(rows[-1])
    from benchmarks.record import write_record

    packages = ("jax", "flax", "torch") if any("torch" in side for side in sides) else ("jax", "flax")
    command = "python -m " + " ".join(["benchmarks.pieces", *sys.argv[1:]])
    write_record("pieces_vit_base_cpu", command, rows, packages)


if __name__ == "__main__":
    main()
