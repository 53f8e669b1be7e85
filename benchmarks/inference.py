"""Inference of a distilled student: ours merged and with adapters apart, PyTorch eager and compiled, ONNX Runtime.

  python -m benchmarks.inference [--model=vit_base_patch16_224] [--batches=1,8,32]

All sides run the same student (every second block, the same weights, adapters of rank 128 merged but for "adapters") on
the same normalised images to the same pooled feature, in float32 or (bf16) with operands rounded to bfloat16; outputs
are compared before anything is timed. One process; the sides take turns, and medians of their times are compared.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import import_timm
from benchmarks.record import write_record
from configs.common import distiller
from core.dense import DTYPES, rounded_kernels
from vit_distill.distill import build_distiller
from vit_distill.export import onnx_file
from vit_distill.formats.timm import to_timm
from vit_distill.forward import make_forward
from vit_distill.lora import merge
from vit_distill.student_io import build_student
from vit_distill.teacher import load_teacher


def build_sides(model: str) -> tuple[dict[str, Callable[[np.ndarray], np.ndarray]], int]:
    """Functions images [B, H, W, C] -> pooled [B, D] by name, and the image side."""
    config = distiller()
    teacher = load_teacher(f"random:{model}", overrides={"num_classes": 0})
    it = build_distiller(config, teacher)
    trained = it.init_trainable(jax.random.key(0))
    trained = jax.tree.map(lambda leaf: leaf + 0.001, trained)  # B is zero at the start
    merged = jax.device_put(it.merged(trained))
    forward, half = (make_forward(it.student_config, dtype, lambda out: out.pooled) for dtype in DTYPES.values())
    plain, plain_half = jax.jit(forward), jax.jit(half)
    apart = jax.jit(lambda base, adapters, x: forward(merge(base, adapters, it.lora), x))
    base, trained = jax.device_put(it.base), jax.device_put(trained)
    rounded = jax.device_put(rounded_kernels(merged, jnp.bfloat16))

    torch, timm = import_timm()
    peer = timm.create_model(model, num_classes=0, depth=it.student_config.depth).eval()
    peer.load_state_dict(
        {name: torch.from_numpy(np.array(x)) for name, x in to_timm(it.student_config, merged).items()}
    )

    compiled = torch.compile(peer, dynamic=False)

    def run_torch(x: np.ndarray, bf16: bool = False, call: Callable = peer) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return call(torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))).float().numpy()

    with tempfile.TemporaryDirectory() as folder:
        onnx_file.write(build_student(it, trained, {}), Path(folder))
        runtime = onnx_file.read(Path(folder))

    sides = {
        "merged": lambda x: np.asarray(plain(merged, x)),
        "merged_bf16": lambda x: np.asarray(plain_half(rounded, x)),
        "adapters": lambda x: np.asarray(apart(base, trained, x)),
        "torch": run_torch,
        "torch_bf16": lambda x: run_torch(x, bf16=True),
        "torch_compiled": lambda x: run_torch(x, call=compiled),
        "torch_bf16_compiled": lambda x: run_torch(x, bf16=True, call=compiled),
        "onnxruntime": lambda x: runtime(x)["pooled"],
    }
    return sides, it.student_config.image_size


def main() -> None:
    """Compares outputs, then times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    sides, side = build_sides(args.model)
    rows = []
    for batch in map(int, args.batches.split(",")):
        images = np.random.default_rng(0).normal(size=(batch, side, side, 3)).astype(np.float32)
        expected = sides["torch"](images)
        for name, run in sides.items():  # the first call compiles
            difference = float(np.abs(run(images) - expected).max() / np.abs(expected).max())
            if difference > (5e-2 if "bf16" in name else 1e-4):
                raise ValueError(f"{name}: pooled features differ from PyTorch's by {difference:.1e} of the largest")
        seconds = {name: [] for name in sides}
        for turn in range(args.rounds):
            for name in sides if turn % 2 == 0 else reversed(sides):
                start = time.perf_counter()
                sides[name](images)
                seconds[name].append(time.perf_counter() - start)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        for name, value in median.items():
            ratio = round(value / median["merged"], 2)
            row = {"batch": batch, "side": name, "images_per_second": round(batch / value, 2)}
            rows.append({"model": args.model, **row, "merged_times_faster": ratio})
            print(rows[-1], flush=True)
    command = " ".join(["python -m benchmarks.inference", *sys.argv[1:]])
    write_record(f"inference_{args.model}_cpu", command, rows, ("jax", "torch", "timm", "onnxruntime"))


if __name__ == "__main__":
    jnp.zeros(()).block_until_ready()
    main()
