"""Compiles both systems' programs with a GPU's or TPU's own compiler, on a machine that has neither.

  pip install 'jax[tpu]'           # or 'jax[cuda12]': the compilers come with the packages
  python -m benchmarks.compile_for --target=v5e-8 [--programs=distill_update,distill_targets]

Nothing is run: a row says that a program compiles for the device, what memory of a chip it takes (arguments, results
that do not reuse them, intermediates, code) and what the chips exchange. Neither speed nor results follow from it.
Without the device XLA cannot try kernels: on a GPU it may choose others there. Writes each row as it comes to
benchmarks/results/compile_<target>.json, whose rows of other programs stay. Programs that split experts over more chips
than the target has are left out.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.record import RESULTS, write_record
from configs import common
from configs.mtl_moe import bmad
from core import attention
from core.optim import build_optimizer
from mtl_moe.scoring import make_score_fn
from mtl_moe.system import System, build_system
from mtl_moe.train import make_update_fn as make_detector_update_fn
from vit_distill.distill import build_distiller, frozen_params, make_targets_fn, make_update_fn, restore_target
from vit_distill.teacher import load_teacher

# What XLA would ask the driver of an H200, as its GpuTargetConfigProto.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 cuda_compute_capability { major: 9 }
  memory_bandwidth: 4800000000000 device_memory_size: 149000000000 l2_cache_size: 52428800
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 }
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips to compile for: what JAX calls their backend, and how many of which."""

    backend: str
    topology: str

    def devices(self) -> list[jax.Device]:
        """Descriptions of the chips; they cannot run anything."""
        if self.backend == "tpu":
            return list(topologies.get_topology_desc(self.topology, "tpu").devices)
        options = dict(target_config=H200, topology=self.topology)
        return list(topologies.get_topology_desc("h200", "cuda", **options).devices)


TARGETS = {"h200": Target("gpu", "1x1x1"), "2xh200": Target("gpu", "1x1x2"), "v5e-8": Target("tpu", "v5e:2x4")}


@contextlib.contextmanager
def on(backend: str, devices: list[jax.Device]) -> Iterator[None]:
    """While building and tracing: the code takes the paths of `backend`, meshes are made of `devices`."""
    with (
        mock.patch.object(jax, "devices", return_value=devices),
        mock.patch.object(jax, "default_backend", return_value=backend),
        # It asks by compiling for the default device, which is the CPU here.
        mock.patch.object(attention, "_cudnn_compiles", return_value=True),
    ):
        yield


def placed(shapes: Any, mesh: Mesh, axis: str | None = None) -> Any:
    """Arrays or shapes as ShapeDtypeStructs, their first axis split over `axis`; replicated without."""
    sharding = NamedSharding(mesh, P(axis) if axis else P())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def run_key(mesh: Mesh) -> Any:
    """Shape of the key that an update draws from."""
    return placed(jax.eval_shape(lambda: jax.random.key(0)), mesh)


def _detector(preset: str, expert: int = 1) -> System:
    config = bmad.get_config(f"brain,preset={preset}")
    config.mesh.expert = expert
    return build_system(config)


def _uint8_images(system: System, batch: int) -> Any:
    side, channels = system.config.data.image_size, system.config.data.channels
    return placed(jax.ShapeDtypeStruct((batch, side, side, channels), jnp.uint8), system.mesh, "data")


def detector_update(preset: str, batch: int, accumulation: int, expert: int = 1) -> jax.stages.Lowered:
    """One update of the detector, as `--config=configs/mtl_moe/bmad.py:brain,preset=...` trains it."""
    system = _detector(preset, expert)
    config = system.config
    tx = build_optimizer(config.optim, config.train.num_steps)
    config.train.accumulation = accumulation
    step, images = make_detector_update_fn(system, tx), _uint8_images(system, batch)
    return step.lower(system.abstract_state(tx), {"image": images}, run_key(system.mesh))


def detector_scores(preset: str, batch: int) -> jax.stages.Lowered:
    """All views of all tasks of a batch."""
    system = _detector(preset)
    state = system.abstract_state(build_optimizer(system.config.optim, system.config.train.num_steps))
    return make_score_fn(system).lower(state.ema_params, state.extra, _uint8_images(system, batch))


def distill_program(which: str, model: str, batch: int) -> jax.stages.Lowered:
    """In bfloat16, r=2, R=128: the "targets" of a batch by the teacher, or an "update" of the student."""
    config = common.distiller()
    config.update(dict(lora=dict(rank=128), train=dict(batch_size=batch, dtype="bfloat16")))
    config.teacher.dtype = "bfloat16"
    with mock.patch.object(jax, "default_backend", return_value="cpu"):
        teacher = load_teacher(f"random:{model}")
    distiller = build_distiller(config, teacher)
    mesh, side = distiller.mesh, teacher.config.image_size
    base, weights = (placed(params, mesh) for params in frozen_params(distiller))
    views = placed(jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32), mesh, "data")
    targets_fn = make_targets_fn(distiller)
    if which == "targets":
        return targets_fn.lower(weights, views)
    targets = placed(jax.eval_shape(targets_fn, weights, views), mesh, "data")
    tx = build_optimizer(config.optim, config.train.num_steps)
    state = restore_target(distiller, tx)
    return make_update_fn(distiller, tx).lower(state, {"views": views, "targets": targets}, run_key(mesh), base)


# (program, its options); what docs/bmad.md and benchmarks/gpu.py run.
PROGRAMS: dict[str, tuple[Callable[..., jax.stages.Lowered], dict[str, Any]]] = {
    "detector_update": (detector_update, dict(preset="base", batch=64, accumulation=4)),
    "detector_update_in_16": (detector_update, dict(preset="base", batch=64, accumulation=16)),
    "detector_update_small": (detector_update, dict(preset="small", batch=64, accumulation=4)),
    "detector_update_experts_split": (detector_update, dict(preset="small", batch=64, accumulation=4, expert=2)),
    "detector_scores": (detector_scores, dict(preset="base", batch=64)),
    "distill_update": (distill_program, dict(which="update", model="vit_base_patch16_224", batch=256)),
    "distill_targets": (distill_program, dict(which="targets", model="vit_base_patch16_224", batch=256)),
}


def facts(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """GiB of a chip's memory and the numbers of exchanges between chips and of calls of libraries and kernels."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "intermediates": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    gib = {name: round(size / 2**30, 3) for name, size in sizes.items()}
    exchanges = re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    return {
        "gib": gib | {"sum": round(sum(sizes.values()) / 2**30, 3)},
        "exchanges": dict(collections.Counter(exchanges)),
        "calls": dict(collections.Counter(calls)),
    }


def compiled_row(name: str) -> dict[str, Any]:
    """One program compiled; to be called under `on`."""
    program, options = PROGRAMS[name]
    start = time.perf_counter()
    lowered = program(**options)
    traced = time.perf_counter()
    compiled = lowered.compile()
    seconds = {"trace_seconds": traced - start, "compile_seconds": time.perf_counter() - traced}
    row = {"program": name, "date": datetime.date.today().isoformat(), **options}
    return row | {name: round(value, 1) for name, value in seconds.items()} | facts(compiled)


def main() -> None:
    """Prints a row for each program as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--programs", default="", help=f"some of {','.join(PROGRAMS)}; all by default")
    args = parser.parse_args()
    names = args.programs.split(",") if args.programs else list(PROGRAMS)
    if unknown := sorted(set(names) - set(PROGRAMS)):
        parser.error(f"--programs: expected some of {', '.join(PROGRAMS)}, found {', '.join(unknown)}")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it counts the GPUs of this machine
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # the same of TPUs
    target, path = TARGETS[args.target], RESULTS / f"compile_{args.target}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    try:
        devices = target.devices()
    except (NotImplementedError, RuntimeError) as error:
        extra = {"gpu": "cuda12", "tpu": "tpu"}[target.backend]
        raise SystemExit(f"no compiler for {args.target}: pip install 'jax[{extra}]' ({error})") from error
    with on(target.backend, devices):
        for name in names:
            if PROGRAMS[name][1].get("expert", 1) > len(devices):
                continue
            row = compiled_row(name)
            print(", ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            rows = [other for other in rows if other["program"] != name] + [row]
            command = f"python -m benchmarks.compile_for --target={args.target}"
            write_record(path.stem, command, rows, ("jax", "jaxlib", "flax", "optax"))


if __name__ == "__main__":
    main()
