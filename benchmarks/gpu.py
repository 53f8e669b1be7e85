"""All figures of a GPU in one command: `python -m benchmarks.gpu [--budget=540] [--out=DIR] [--parts=distill,moe]`.

Runs the jobs of `benchmarks/gpu_jobs.py` one after the other, the most important first, each in a process of its own.
A job that no longer fits the budget is skipped, one that fails or runs out of time costs nothing but its own rows; both
are recorded. After every job its part's record, DIR/gpu_<part>.json, is written. Needs JAX with CUDA, flax, optax,
orbax, PyTorch and timm; TensorFlow and ml_collections are not needed. The product of two matrices is always measured:
`share_of_peak` is of its rate.

`--smoke` runs every kind of job on a CPU at tiny sizes, with what such a machine lacks hidden, and fails if one does.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu_jobs import BASE, JOBS, SMALL, Job, Row, device_name
from benchmarks.record import RESULTS, write_record

# A distillation update's matrix products, an image: teacher, student with rank-128 layers apart, gradients of the
# adapters. At 790 TFLOP/s a batch of 256 takes at least 26.8 ms.
GFLOP_PER_IMAGE = {BASE: 82.7, SMALL: 22.8}
FLOOR_TFLOPS = 790.0
MARK = "ROW "  # before a row on a job's output: libraries print there too
PARTS = tuple(dict.fromkeys(job.part for job in JOBS.values()))
PACKAGES = ("jax", "jaxlib", "flax", "torch", "timm", "triton", "numpy")


def run_job(name: str, limit: float, smoke: bool, cache: Path) -> tuple[list[Row], str]:
    """Runs a job in a process of its own, at most `limit` seconds: (rows measured, what went wrong or "")."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"  # three quarters of the memory by default
    # Only what two processes share (the initial weights) is read back: every program that is timed is compiled once.
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    environment["JAX_PLATFORMS"] = "cuda"  # JAX says why it finds none, instead of taking the CPU
    if smoke:
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    command = [sys.executable, "-m", "benchmarks.gpu", f"--job={name}", *(["--smoke"] if smoke else [])]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=out, stderr=errors, cwd=RESULTS.parents[1], env=environment, start_new_session=True
        )
        try:
            status = process.wait(limit)
            problem = "" if status == 0 else f"ended with status {status}"
        except subprocess.TimeoutExpired:
            problem = f"ended after {limit:.0f} s"
        finally:
            _end(process)  # compilers that it has started as well
        out.seek(0), errors.seek(0)
        rows = [json.loads(line.removeprefix(MARK)) for line in out if line.startswith(MARK) and line.endswith("\n")]
        tail = " | ".join(line.strip() for line in errors.read().splitlines()[-4:] if line.strip())
    return rows, f"{problem}: {tail[-600:]}" if problem else ""


def check_gpu(framework: str) -> None:
    """SystemExit where "jax" or "torch" sees no GPU: on a CPU the first update would take the whole budget."""
    reason = ""
    try:
        if device_name(framework) != "cpu":
            return
    except (RuntimeError, AssertionError) as error:  # of JAX, under JAX_PLATFORMS=cuda
        reason = f" ({' '.join(str(error).split()) or 'no CUDA plugin'})"
    raise SystemExit(f"{framework} sees no GPU{reason}: install it with CUDA, or try the jobs with --smoke")


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def with_shares(rows: list[Row], peak: float | None) -> list[Row]:
    """Rows with what follows from their times: GFLOPs reached, share of the measured peak, distance from the floor."""
    result = []
    for row in rows:
        gflop = row.get("gflop_per_image", GFLOP_PER_IMAGE.get(row.get("model", "")))
        if gflop and "images_per_second" in row:
            tflops = gflop * row["images_per_second"] / 1e3
            row = row | {
                "gflop_per_image": gflop,
                "tflops": round(tflops, 1),
                "times_floor": round(FLOOR_TFLOPS / tflops, 2),
            }
            if peak:
                row["share_of_peak"] = round(tflops / peak, 3)
        result.append(row)
    return result


def run_all(
    names: list[str],
    budget: float,
    run: Callable[[str, float], tuple[list[Row], str]],
    write: Callable[[str, Any], None],
) -> dict[str, dict[str, list]]:
    """Runs jobs while they fit `budget` seconds and writes each part's record after each of its jobs.

    Args:
      run: (name, seconds it may take) -> (rows, problem or "").
      write: (part, its {rows, failed, skipped}).

    Returns:
      The records by part.
    """
    end, records, peak = time.monotonic() + budget, {}, None
    for name in names:
        job: Job = JOBS[name]
        record = records.setdefault(job.part, {"rows": [], "failed": [], "skipped": []})
        start = time.monotonic()
        if end - start < job.needs:
            record["skipped"].append(f"{name}: {end - start:.0f} s were left, it needs about {job.needs}")
        else:
            rows, problem = run(name, min(job.limit, end - start))
            record["failed"] += [f"{name}: {problem}"] * bool(problem)
            record["failed"] += [f"{name}: {row['failed']}" for row in rows if "failed" in row]
            if name == "matmul_jax":
                peak = max((row["tflops"] for row in rows), default=None)
            record["rows"] += [{"job": name, **row} for row in with_shares(rows, peak)]
        write(job.part, record)
        print(f"{name}: {time.monotonic() - start:.0f} s, {max(end - time.monotonic(), 0):.0f} s left", flush=True)
        for row in record["rows"]:
            if row["job"] == name:
                print("  " + ", ".join(f"{k}={v}" for k, v in row.items() if k != "job"), flush=True)
        print("".join(f"  {line}\n" for kind in ("failed", "skipped") for line in record[kind] if name in line), end="")
    return records


def installed(packages: tuple[str, ...]) -> tuple[str, ...]:
    """Those that are there."""
    found = []
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            continue
        found.append(package)
    return tuple(found)


def chosen(parts: str, smoke: bool = False) -> list[str]:
    """Names of the jobs of comma-separated parts, and the matrix product; with `smoke` those of the trial."""
    wanted = parts.split(",") if parts else list(PARTS)
    if unknown := sorted(set(wanted) - set(PARTS)):
        raise ValueError(f"--parts: expected some of {PARTS}, found {unknown}")
    names = [name for name, job in JOBS.items() if job.part in wanted or name == "matmul_jax"]
    return [name for name in names if JOBS[name].trial or not smoke]


def main() -> None:
    """All jobs in processes of their own, or one in this one (--job)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--parts", default="", help=f"some of {','.join(PARTS)}; all by default")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--job", choices=JOBS)
    args = parser.parse_args()
    if args.job:
        from benchmarks.stand_in import provide

        provide(hide=args.smoke)
        job = JOBS[args.job]
        if not args.smoke:
            check_gpu(job.framework)
        for row in job.rows(args.smoke):
            print(MARK + json.dumps(row | {"device": device_name(job.framework)}), flush=True)
        return
    command = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]).replace(str(args.out), "DIR")

    def write(part: str, record: Mapping[str, Any]) -> None:
        if args.smoke and args.out == RESULTS:
            return
        notes = {name: record[name] for name in ("failed", "skipped")}
        write_record(f"gpu_{part}", command, record["rows"], installed(PACKAGES), args.out, **notes)

    with tempfile.TemporaryDirectory() as cache:
        records = run_all(
            chosen(args.parts, args.smoke),
            args.budget,
            lambda n, limit: run_job(n, limit, args.smoke, Path(cache)),
            write,
        )
    if args.smoke and any(record["failed"] for record in records.values()):
        raise SystemExit("a job of the trial failed, see above")
    if not any(record["rows"] for record in records.values()):
        raise SystemExit("no job measured anything, see above")


if __name__ == "__main__":
    main()
