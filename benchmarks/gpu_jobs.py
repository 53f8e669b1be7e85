"""The single measurements of `benchmarks/gpu.py`, each a generator of rows that runs in a process of its own.

Times are medians of five rounds; a round is as many calls in a row as take a third of a second, with one wait for the
device at its end. `compile_seconds` is what the first call takes longer than the later ones; what XLA's autotuner finds
is shared by all jobs, so that the first job of a kind has the cold time. Memory is what the framework's allocator had
handed out at its peak; where JAX has run something larger before in the process, none is given. On a CPU (`--smoke`)
sizes are tiny and the numbers mean nothing.
"""

import dataclasses
import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

Row = dict[str, Any]
ROUND_SECONDS, ROUNDS = 0.3, 5
# Shapes of the trial on a CPU: of ours, and the same for timm.
SMOKE_MODEL, SMOKE_OURS, SMOKE_TIMM = "vit_tiny_patch16_224", dict(image_size=32, depth=2), dict(img_size=32, depth=2)
STUDENT_DEPTH = 6  # of the ViT-B's 12 blocks


def timed(step: Callable[[], Any], wait: Callable[[Any], Any], smoke: bool) -> Row:
    """Milliseconds of a call and seconds of compilation; see the module's docstring."""
    start = time.perf_counter()
    wait(step())
    first = time.perf_counter() - start
    wait(step())  # what is only allocated or tuned at the second call
    start = time.perf_counter()
    wait(step())
    calls = 1 if smoke else min(max(math.ceil(ROUND_SECONDS / (time.perf_counter() - start)), 1), 1000)
    seconds = []
    for _ in range(1 if smoke else ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            result = step()
        wait(result)
        seconds.append((time.perf_counter() - start) / calls)
    median = statistics.median(seconds)
    return {
        "ms": round(median * 1e3, 4),
        "ms_min": round(min(seconds) * 1e3, 4),
        "calls": calls * len(seconds),
        "compile_seconds": round(first - median, 2),
    }


def attempt(spec: Row, measure: Callable[[], Row]) -> Row:
    """The row of `measure`, or one that says why there is none: the rows after it are still worth having."""
    try:
        return spec | measure()
    except Exception as error:  # whatever a framework raises (no memory, no compiler): it is recorded, not hidden
        return spec | {"failed": f"{type(error).__name__}: {str(error).strip()[:400]}"}
    finally:
        gc.collect()


def _torch() -> tuple[Any, str]:
    import torch

    return torch, "cuda" if torch.cuda.is_available() else "cpu"


def _torch_timed(step: Callable[[], Any], smoke: bool) -> Row:
    """`timed`, with the peak of CUDA's memory since the model was built."""
    torch, device = _torch()
    row = timed(step, (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None), smoke)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return row | {"peak_gib": _gib(peak)}


def _jax_timed(step: Callable[[], Any], smoke: bool) -> Row:
    import jax

    def peak() -> int | None:
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    before = peak()
    row = timed(step, jax.block_until_ready, smoke)
    # JAX cannot forget a peak: where it has not risen it is that of an earlier, larger row.
    return row | {"peak_gib": None if before is not None and peak() == before else _gib(peak())}


def _gib(num_bytes: int | None) -> float:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return round((host if num_bytes is None else num_bytes) / 2**30, 3)


def _fresh() -> None:
    """Forgets compiled graphs and the peak of memory of the row before."""
    torch, device = _torch()
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _compiler(kind: str, smoke: bool) -> Callable[[Any], Any] | None:
    """Of "eager", "compile" (torch.compile as it comes) or "graphs" (with CUDA graphs)."""
    torch, _ = _torch()
    if kind == "eager":
        return None
    # The trial checks that the graph can be captured; compiling it takes a minute on a CPU.
    options = dict(backend="eager") if smoke else dict(mode="reduce-overhead" if kind == "graphs" else "default")
    return lambda function: torch.compile(function, dynamic=False, **options)


def device_name(framework: str) -> str:
    """What the device calls itself."""
    if framework == "torch":
        torch, device = _torch()
        return torch.cuda.get_device_name() if device == "cuda" else "cpu"
    import jax

    return jax.devices()[0].device_kind


def matmul(framework: str, smoke: bool) -> Iterator[Row]:
    """TFLOP/s of one bfloat16 product of square matrices."""
    size = 256 if smoke else 8192
    matrices = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
    if framework == "torch":
        torch, device = _torch()
        x, y = torch.from_numpy(matrices).to(device, torch.bfloat16)
        row = _torch_timed(lambda: x @ y, smoke)
    else:
        import jax
        import jax.numpy as jnp

        x, y = jnp.asarray(matrices, jnp.bfloat16)
        product = jax.jit(jnp.matmul)
        row = _jax_timed(lambda: product(x, y), smoke)
    yield {"side": framework, "size": size, **row, "tflops": round(2 * size**3 / row["ms"] / 1e9, 1)}


def distill(side: str, model: str, batches: Sequence[int], smoke: bool) -> Iterator[Row]:
    """One distillation update in bfloat16; side: "jax" or a kind of `_compiler`. JAX wants ascending batches."""
    from benchmarks import distill_step

    for batch in [2] if smoke else batches:

        def measure(batch: int = batch) -> Row:
            name = SMOKE_MODEL if smoke else model
            if side == "jax":
                step = distill_step.jax_step(name, batch, True, SMOKE_OURS if smoke else None)
                row = _jax_timed(step, smoke)
            else:
                _fresh()
                compiler, options = _compiler(side, smoke), SMOKE_TIMM if smoke else {}
                step = distill_step.torch_step(name, batch, True, compiler, **options)
                row = _torch_timed(step, smoke)
            return row | {"images_per_second": round(batch / row["ms"] * 1e3, 1), "last_loss": float(step())}

        yield attempt({"side": side, "model": model, "batch": batch}, measure)


def inference_jax(batches: Sequence[int], smoke: bool) -> Iterator[Row]:
    """Pooled features of the student, adapters merged beforehand and in every call; weights of "merged" in bfloat16."""
    import jax
    import jax.numpy as jnp

    from benchmarks.distill_step import RANK
    from configs.common import distiller
    from core.vit import VisionTransformer
    from vit_distill.distill import build_distiller
    from vit_distill.lora import merge
    from vit_distill.teacher import load_teacher

    config, name = distiller(), SMOKE_MODEL if smoke else "vit_base_patch16_224"
    config.lora.rank = RANK
    it = build_distiller(config, load_teacher(f"random:{name}", overrides=SMOKE_OURS if smoke else None))
    base, adapters = jax.device_put(it.base), it.init_trainable(jax.random.key(0))
    network = VisionTransformer(it.student_config, dtype=jnp.bfloat16)
    merged = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), it.merged(adapters))
    plain = jax.jit(lambda params, x: network.apply({"params": params}, x).pooled)
    apart = jax.jit(lambda base, adapters, x: network.apply({"params": merge(base, adapters, it.lora)}, x).pooled)
    side = it.student_config.image_size
    for batch in [1, 2] if smoke else batches:
        x = jnp.asarray(np.random.default_rng(0).standard_normal((batch, side, side, 3), np.float32), jnp.bfloat16)
        for kind, call in (("merged", lambda x: plain(merged, x)), ("adapters", lambda x: apart(base, adapters, x))):

            def measure(x: Any = x, call: Callable[[Any], Any] = call) -> Row:
                return _rate(_jax_timed(lambda: call(x), smoke), x)

            yield attempt({"side": kind, "batch": batch}, measure)


def inference_torch(kind: str, batches: Sequence[int], smoke: bool) -> Iterator[Row]:
    """The same of timm's model with bfloat16 weights, adapters merged."""
    from benchmarks.peers import import_timm

    torch, timm = import_timm()
    device = _torch()[1]
    options = SMOKE_TIMM if smoke else dict(depth=STUDENT_DEPTH)
    name = SMOKE_MODEL if smoke else "vit_base_patch16_224"
    model = timm.create_model(name, num_classes=0, **options).eval().to(device, torch.bfloat16)
    size = model.patch_embed.img_size[0]
    for batch in [1, 2] if smoke else batches:

        def measure(batch: int = batch) -> Row:
            _fresh()
            compiler = _compiler(kind, smoke)
            call = compiler(model) if compiler else model
            x = torch.randn(batch, 3, size, size, device=device, dtype=torch.bfloat16)
            with torch.inference_mode():
                return _rate(_torch_timed(lambda: call(x), smoke), x)

        yield attempt({"side": f"torch_{kind}", "batch": batch}, measure)


def _rate(row: Row, x: Any) -> Row:
    return row | {"images_per_second": round(len(x) / row["ms"] * 1e3, 1)}


def detector(dispatch: str, batches: Sequence[int], smoke: bool) -> Iterator[Row]:
    """One update of the base preset, eight tasks, 224 pixels, bfloat16; `batches` ascend to the first that fails.

    A row is there before a larger batch is tried, which may take all memory or be ended by its time.
    """
    from benchmarks.detector import smoke_config, training_step
    from configs import common
    from mtl_moe.cost import train_macs
    from mtl_moe.model import build_geometry

    for batch in [2] if smoke else batches:

        def measure(batch: int = batch) -> Row:
            config = smoke_config() if smoke else common.detector("base")
            config.train.batch_size = batch
            step, system, parameters = training_step(config, dispatch)
            row = _jax_timed(step, smoke)
            row |= {"images_per_second": round(batch / row["ms"] * 1e3, 1), "parameters": parameters}
            gflop = 2e-9 * train_macs(system.model.config, system.tasks, build_geometry(config))
            return row | {"tasks": len(system.tasks), "gflop_per_image": round(gflop, 2)}

        row = attempt({"side": dispatch, "batch": batch}, measure)
        yield row
        if "failed" in row:
            return


def moe_layer(smoke: bool) -> Iterator[Row]:
    """The MoE layer against a dense MLP of equal active FLOPs, forward and backward, bfloat16, D=768, F=1536, top 2."""
    import jax.numpy as jnp

    from benchmarks.moe import measure

    both, ours = ("batched", "ragged"), ("batched",)
    runs = [(8192, 8, both), (65536, 8, ours), (1024, 8, ours), (8192, 64, ours), (8192, 2, ours)]
    runs += [(8192, 32, ours), (4096, 8, ours), (16384, 8, ours), (65536, 64, ours)]
    width, hidden = (16, 32) if smoke else (768, 1536)
    for tokens, experts, dispatches in [(64, 4, both)] if smoke else runs:
        spec = {"tokens": tokens, "width": width, "hidden": hidden, "experts": experts}

        def one(tokens: int = tokens, experts: int = experts, dispatches: tuple[str, ...] = dispatches) -> Row:
            calls = 1 if smoke else 20
            return measure(tokens, width, hidden, experts, dispatches, 1.0, jnp.bfloat16, calls)

        yield attempt(spec, one)


@dataclasses.dataclass(frozen=True)
class Job:
    """One process of `benchmarks/gpu.py`.

    Attributes:
      part: the record its rows go to, gpu_<part>.json.
      framework: "jax" or "torch".
      needs: seconds that must be left to start it (an estimate, most of it imports and compilation).
      limit: seconds after which it is ended; rows measured by then are kept.
      rows: smoke -> rows.
      trial: whether `--smoke` runs it; others differ from one that does in sizes only.
    """

    part: str
    framework: str
    needs: int
    limit: int
    rows: Callable[[bool], Iterator[Row]]
    trial: bool = True


BASE, SMALL = "vit_base_patch16_224", "vit_small_patch16_224"
ALL, SIZES = (1, 8, 32, 256), (16, 32, 64)
# In the order of importance: what no longer fits is skipped (`--parts` runs it in a second call).
JOBS = {
    "matmul_jax": Job("matmul", "jax", 10, 60, partial(matmul, "jax")),
    "distill_jax": Job("distill", "jax", 30, 120, partial(distill, "jax", BASE, (256,))),
    "distill_eager": Job("distill", "torch", 15, 70, partial(distill, "eager", BASE, (256, 128, 64, 32))),
    "distill_compile": Job("distill", "torch", 25, 80, partial(distill, "compile", BASE, (256,))),
    "detector_batched": Job("detector", "jax", 60, 180, partial(detector, "batched", SIZES)),
    "inference_jax": Job("inference", "jax", 25, 80, partial(inference_jax, ALL)),
    "inference_eager": Job("inference", "torch", 15, 40, partial(inference_torch, "eager", ALL)),
    "distill_jax_rest": Job("distill", "jax", 30, 130, partial(distill, "jax", BASE, (32, 64, 128)), trial=False),
    "moe_layer": Job("moe", "jax", 25, 90, moe_layer),
    "inference_compile": Job("inference", "torch", 25, 80, partial(inference_torch, "compile", ALL)),
    "detector_ragged": Job("detector", "jax", 60, 150, partial(detector, "ragged", (16,)), trial=False),
    "inference_graphs": Job("inference", "torch", 25, 80, partial(inference_torch, "graphs", ALL), trial=False),
    "compile_rest": Job("distill", "torch", 25, 90, partial(distill, "compile", BASE, (32, 64, 128)), trial=False),
    "small_jax": Job("distill", "jax", 30, 100, partial(distill, "jax", SMALL, (256,)), trial=False),
    "small_eager": Job("distill", "torch", 15, 40, partial(distill, "eager", SMALL, (256,)), trial=False),
    "small_compile": Job("distill", "torch", 25, 60, partial(distill, "compile", SMALL, (256,)), trial=False),
    "matmul_torch": Job("matmul", "torch", 10, 40, partial(matmul, "torch")),
}
