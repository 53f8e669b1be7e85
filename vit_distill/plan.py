"""What a distillation will cost, said before anything runs: parameters, FLOPs, memory and time.

Sizes and FLOPs are exact (flops.py); memory and time are estimates and are called so. Axes: B batch, H W C image,
D width, M the MLP's hidden width.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from core.compilation import enable_compilation_cache
from core.dense import named_dtype
from core.files import write_json
from core.provenance import environment
from core.tree import num_params
from core.vit import VitConfig, abstract_params
from vit_distill import flops
from vit_distill.forward import forward_parts, make_forward, micro_batches
from vit_distill.lora import LoraConfig, build_lora_config, init_adapters
from vit_distill.teacher import load_teacher_of
from vit_distill.tune import check_rates, most_tried
from vit_distill.weight_copy import choose_blocks

ESTIMATE = "a lower bound: all products at the measured speed of one large matrix product; real runs are slower"


def run_plan(config: Any, workdir: Path | None) -> dict[str, Any]:
    """Prints the plan of a distillation; writes workdir/plan.json where a work directory is given.

    Raises:
      ValueError: as the run itself would for this teacher and these fields.
    """
    enable_compilation_cache()
    teacher = load_teacher_of(config)
    plan = make_plan(config, teacher.config) | {"teacher_name": teacher.name, "provenance": environment()}
    print("\n".join(plan_lines(plan)))
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "plan.json", plan)
        print(f"plan: {workdir / 'plan.json'}")
    return plan


def make_plan(config: Any, teacher: VitConfig, rate: float | None = None) -> dict[str, Any]:
    """The plan as plain JSON.

    Args:
      config: the ConfigDict of configs/common.py `distiller`.
      rate: FLOP/s of a device; measured here by default.

    Raises:
      ValueError: for a reduction, rank, method or dtype that does not fit.
    """
    method, train = config.student.method, config.train
    # Which blocks calibration will choose is not known yet; how many is.
    rule = "first" if config.student.blocks == "calibrated" else config.student.blocks
    blocks = choose_blocks(teacher.depth, config.student.reduction, rule)
    student = dataclasses.replace(teacher, depth=len(blocks))
    lora = build_lora_config(config.lora) if method == "lora" else None
    num_trained = _num_trained(student, method, lora)
    cached = bool(train.cached_views)
    # JAX's devices of one CPU share its cores and memory.
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    accumulation = micro_batches(student, train.batch_size, devices, asked=train.accumulation)
    cost = flops.step_cost(student, teacher, train.batch_size, method, lora, accumulation=accumulation, cached=cached)
    dtype, teacher_dtype = (
        jnp.dtype(named_dtype(config[field].dtype, f"{field}.dtype")) for field in ("train", "teacher")
    )
    batch = -(-train.batch_size // devices)
    teacher_parts = forward_parts(teacher, train.batch_size, devices, train.accumulation)
    memory = flops.train_memory(
        student,
        teacher,
        -(-batch // teacher_parts),
        -(-batch // accumulation),
        method,
        num_trained,
        compute_bytes=dtype.itemsize,
        teacher_bytes=teacher_dtype.itemsize,
        ranks=dict(lora.ranks) if lora else None,
        cached=cached,
    )
    if rate is None:
        rate = matmul_rate(batch * student.num_tokens, student.width, student.mlp_dim, dtype)
    sizes = {"teacher": flops.model_size(teacher), "student": flops.model_size(student)}
    step_seconds = flops.FLOPS_PER_MAC * cost.total / (rate * devices)
    tuning = _tuning(config) if method != "copy" else {}
    return {
        "models": sizes,
        "reduction": {key: sizes["teacher"][key] / sizes["student"][key] for key in ("params", "gflops")},
        "training": {
            "method": method,
            "blocks": "calibrated" if rule != config.student.blocks else list(blocks),
            "num_trained": num_trained,
            "num_steps": train.num_steps if method != "copy" else 0,
            "batch_size": train.batch_size,
            "step_gflops": {
                name: flops.FLOPS_PER_MAC * macs / 1e9
                for name, macs in (dataclasses.asdict(cost) | {"total": cost.total}).items()
            },
            "cached_views": train.cached_views,
            "cached_bytes_an_image": train.cached_views * student.num_tokens * student.width * 4,  # one target
            "tuning": tuning,
        },
        "memory_bytes": memory,
        "device": {"count": devices, "memory_bytes": device_memory(), "gflops_per_second": rate / 1e9},
        "seconds": {
            "note": ESTIMATE,
            "update": step_seconds,
            "training": step_seconds * train.num_steps if method != "copy" else 0.0,
            "tuning": step_seconds * tuning["runs"] * tuning["num_steps"] if tuning else 0.0,
            "teacher_image": 1e9 * sizes["teacher"]["gflops"] / rate,
            "student_image": 1e9 * sizes["student"]["gflops"] / rate,
        },
    }


def _tuning(config: Any) -> dict[str, int]:
    """At most how many runs of how many updates optim.learning_rates add, {} without; tables plan a cell without."""
    optim = config.optim
    if not optim.get("learning_rates"):
        return {}
    check_rates(optim, "optim")
    return {"runs": most_tried(len(optim.learning_rates)), "num_steps": optim.tune_steps or config.train.num_steps}


def _num_trained(student: VitConfig, method: str, lora: LoraConfig | None) -> int:
    params = abstract_params(student)
    if lora is None:
        return 0 if method == "copy" else num_params(params)
    return num_params(jax.eval_shape(lambda key, params: init_adapters(key, params, lora), jax.random.key(0), params))


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """The plan as lines for the console."""
    training, seconds, memory = plan["training"], plan["seconds"], plan["memory_bytes"]
    lines = [f"{'':<10}{'blocks':>7}{'parameters':>14}{'float32':>11}{'GFLOPs/image':>14}{'s/image (est.)':>16}"]
    for name, size in plan["models"].items():
        lines.append(
            f"{name:<10}{size['depth']:>7}{size['params'] / 1e6:>12.2f} M{_gigabytes(size['bytes']):>11}"
            f"{size['gflops']:>14.3f}{seconds[f'{name}_image']:>16.4f}"
        )
    less = plan["reduction"]
    lines.append(f"student: {less['params']:.2f} x fewer parameters, {less['gflops']:.2f} x fewer FLOPs")
    if not training["num_steps"]:
        return [*lines, 'training: none (method "copy")']
    step = training["step_gflops"]
    parts = ", ".join(f"{name} {step[name]:.1f}" for name in ("teacher", "forward", "backward", "merge"))
    lines.append(
        f"training: {training['method']}, blocks {training['blocks']}, {training['num_trained'] / 1e6:.2f} M trained, "
        f"{training['num_steps']} updates of {training['batch_size']} images"
    )
    lines.append(f"  an update: {step['total']:.1f} GFLOPs ({parts})")
    if training["cached_views"]:
        views, size = training["cached_views"], training["cached_bytes_an_image"]
        saved_by = training["num_steps"] * training["batch_size"] // views
        lines.append(
            f"  once before: the teacher on {views} views of every image, {views * seconds['teacher_image']:.3g} s and "
            f"{size / 2**20:.2f} MiB on disk for each (with aligned blocks for each of them); it saves time with fewer "
            f"than {saved_by} images"
        )
    parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in memory.items() if size and name != "total")
    lines.append(f"  memory a device (estimate): {_gigabytes(memory['total'])} ({parts})")
    available = plan["device"]["memory_bytes"]
    if available and memory["total"] > available:
        lines.append(
            f"  WARNING: more than the {_gigabytes(available)} there are: raise train.accumulation, or lower "
            "train.batch_size"
        )
    rate = plan["device"]["gflops_per_second"]
    lines.append(f"  time (estimate): {duration(seconds['training'])}, {seconds['update']:.3f} s an update")
    if tuning := training["tuning"]:
        lines.append(
            f"  before it at most {tuning['runs']} runs of {tuning['num_steps']} updates choose one of "
            f"optim.learning_rates: {duration(seconds['tuning'])}"
        )
    lines.append(f"  ({seconds['note']}; {plan['device']['count']} device(s) at {rate:.0f} GFLOP/s)")
    return lines


def duration(seconds: float) -> str:
    """Seconds in words: 42 -> "42 s", 600 -> "10 min", 9000 -> "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def device_memory() -> int | None:
    """Bytes of the first device, of the machine for a CPU; None where it cannot be found out."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
        if "SC_PHYS_PAGES" not in names:
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (device.memory_stats() or {}).get("bytes_limit")


def matmul_rate(rows: int, inner: int, columns: int, dtype: Any, seconds: float = 0.3) -> float:
    """FLOP/s of one product [rows, inner] x [inner, columns] on the first device, the best of some `seconds`.

    Rows are cut so that one product is at most 20 GFLOPs on a CPU and 200 elsewhere. Products that take less than a
    tenth of `seconds` follow one another without a wait: on a fast GPU starting one takes longer than computing it.
    """
    macs = int(1e10 if jax.default_backend() == "cpu" else 1e11)
    rows = max(1, min(rows, macs // (inner * columns)))
    left, right = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
    product = jax.jit(jnp.matmul)
    (once,) = _timed(product, left, right, seconds=0.0, at_least=1)
    best = min(_timed(product, left, right, seconds=seconds, calls=max(1, int(seconds / 10 / once))))
    return flops.FLOPS_PER_MAC * rows * inner * columns / best


def measure_latency(
    config: VitConfig, params: Any, batch_sizes: Sequence[int] = (1, 32), dtype: Any = jnp.float32, seconds: float = 0.5
) -> dict[int, float]:
    """Median seconds of one batch from normalised images [B, H, W, C] to the pooled feature [B, D], by batch size."""
    forward = jax.jit(make_forward(dataclasses.replace(config, num_classes=0), dtype, lambda out: out.pooled))
    params = jax.device_put(params)
    shape = (config.image_size, config.image_size, config.in_channels)
    return {
        size: statistics.median(_timed(forward, params, jnp.zeros((size, *shape), dtype), seconds=seconds))
        for size in batch_sizes
    }


def _timed(fn: Callable[..., jax.Array], *args: Any, seconds: float, at_least: int = 3, calls: int = 1) -> list[float]:
    """Seconds a call of `fn`, compiled before, in rounds of `calls` with one wait at the end.

    Rounds go on for about `seconds`, and `at_least` times.
    """
    fn(*args).block_until_ready()
    times: list[float] = []
    while len(times) < at_least or calls * sum(times) < seconds:
        start = time.perf_counter()
        for _ in range(calls):
            result = fn(*args)
        result.block_until_ready()
        times.append((time.perf_counter() - start) / calls)
    return times
