"""One distillation update, ours against PyTorch doing the same: images/s, peak memory, time to the first update.

  python -m benchmarks.distill_step [--model=vit_small_patch16_224] [--batches=8,16] [--sides=jax,jax_bf16,torch_bf16]

Both sides run the teacher, the student with enhanced adapters (r=2, R=128), L1 before the final norm, backward, AdamW,
on the same fixed images of 224 pixels (no augmentation). Each side is a process of its own; the order alternates, and
the median of the rounds' medians is compared. PyTorch: timm blocks with separate low-rank layers, written here from the
method's description; bf16 is torch.autocast, ours `train.dtype` and `teacher.dtype`; compiled is torch.compile of both
forward passes (it needs a C++ compiler).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

RANK, REDUCTION, LEARNING_RATE = 128, 2, 1e-3


def jax_step(model: str, batch: int, bf16: bool, overrides: Mapping[str, Any] | None = None) -> Callable[[], Any]:
    """Our update, each call one more: () -> loss, still on the device. `overrides`: of the teacher's architecture."""
    import jax

    from configs.common import distiller
    from core.optim import build_optimizer
    from vit_distill.distill import build_distiller, build_state, frozen_params, make_targets_fn, make_update_fn
    from vit_distill.teacher import load_teacher

    config = distiller()
    config.student.reduction, config.lora.rank, config.train.batch_size = REDUCTION, RANK, batch
    config.train.dtype = config.teacher.dtype = "bfloat16" if bf16 else "float32"
    config.optim.learning_rate = LEARNING_RATE
    it = build_distiller(config, load_teacher(f"random:{model}", overrides=overrides))
    tx = build_optimizer(config.optim, 1000)
    state = build_state(it, tx)
    update, targets_fn = make_update_fn(it, tx), make_targets_fn(it)
    base, teacher = jax.device_put(frozen_params(it))
    side = it.student_config.image_size
    views = jax.device_put(np.random.default_rng(0).normal(size=(batch, side, side, 3)).astype(np.float32))
    key = jax.random.key(0)

    def step():
        nonlocal state
        state, metrics = update(state, {"views": views, "targets": targets_fn(teacher, views)}, key, base)
        return metrics["loss"]

    return step


def torch_step(
    model: str,
    batch: int,
    bf16: bool,
    compiler: Callable[[Any], Any] | None = None,
    rank: int = RANK,
    reduction: int = REDUCTION,
    **options: Any,
) -> Callable[[], Any]:
    """The same update in PyTorch. `compiler`: applied to both forward passes; `options`: of `timm.create_model`."""
    from benchmarks.peers import import_timm

    torch, timm = import_timm()
    nn = torch.nn

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    device = "cuda" if torch.cuda.is_available() else "cpu"

    class Adapted(nn.Module):
        """Frozen linear layer with low-rank pairs on equal slices of its outputs (three on qkv)."""

        def __init__(self, linear: nn.Linear, parts: int):
            super().__init__()
            self.linear = linear
            width = linear.out_features // parts
            bound = linear.in_features**-0.5
            shape = (rank, linear.in_features)
            self.a = nn.ParameterList([torch.empty(shape).uniform_(-bound, bound) for _ in range(parts)])
            self.b = nn.ParameterList([torch.zeros(width, rank) for _ in range(parts)])

        def forward(self, x):
            low = [nn.functional.linear(nn.functional.linear(x, a), b) for a, b in zip(self.a, self.b, strict=True)]
            return self.linear(x) + (torch.cat(low, -1) if len(low) > 1 else low[0])

    teacher = timm.create_model(model, num_classes=0, **options).eval()
    student = timm.create_model(model, num_classes=0, **options)
    student.load_state_dict(teacher.state_dict())
    student.blocks = student.blocks[::reduction]
    for parameter in [*teacher.parameters(), *student.parameters()]:
        parameter.requires_grad_(False)
    for block in student.blocks:
        block.attn.qkv, block.attn.proj = Adapted(block.attn.qkv, 3), Adapted(block.attn.proj, 1)
        block.mlp.fc1, block.mlp.fc2 = Adapted(block.mlp.fc1, 1), Adapted(block.mlp.fc2, 1)
    teacher.norm, student.norm = nn.Identity(), nn.Identity()
    teacher.to(device), student.to(device)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    side = teacher.patch_embed.img_size[0]
    images = np.random.default_rng(0).normal(size=(batch, 3, side, side)).astype(np.float32)
    views = torch.from_numpy(images).to(device)
    forward = [teacher.forward_features, student.forward_features]
    teacher_forward, student_forward = map(compiler, forward) if compiler else forward

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                target = teacher_forward(views)
            loss = (student_forward(views) - target).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.detach()

    return step


def _timed(step, batch: int, steps: int) -> dict:
    start = time.perf_counter()
    first = float(step())
    first_seconds = time.perf_counter() - start
    float(step())
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        last = float(step())
        seconds.append(time.perf_counter() - start)
    assert last < first, f"it does not train: loss {first} at first, {last} at last"
    return {
        "images_per_second": batch / statistics.median(seconds),
        "first_update_seconds": first_seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    return torch.compile(function, dynamic=False)


SIDES = {
    "jax": lambda model, batch: jax_step(model, batch, bf16=False),
    "jax_bf16": lambda model, batch: jax_step(model, batch, bf16=True),
    "torch": lambda model, batch: torch_step(model, batch, bf16=False),
    "torch_bf16": lambda model, batch: torch_step(model, batch, bf16=True),
    "torch_compiled": lambda model, batch: torch_step(model, batch, bf16=False, compiler=_compiled),
    "torch_bf16_compiled": lambda model, batch: torch_step(model, batch, bf16=True, compiler=_compiled),
}


def main() -> None:
    """Runs every side in processes of their own, or one side in this one (--side)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batches", default="8")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES)
    args = parser.parse_args()
    if args.side:
        step = SIDES[args.side](args.model, int(args.batches))
        print(json.dumps(_timed(step, int(args.batches), args.steps)))
        return
    sides, rows = args.sides.split(","), []
    for batch in map(int, args.batches.split(",")):
        found = {side: [] for side in sides}
        for turn in range(args.rounds):
            for side in sides if turn % 2 == 0 else reversed(sides):
                command = [sys.executable, "-m", "benchmarks.distill_step", f"--model={args.model}"]
                command += [f"--batches={batch}", f"--steps={args.steps}", f"--side={side}"]
                environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # for every side alike
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
        for side, runs in found.items():
            median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            rate = statistics.median(run["images_per_second"] for run in found[sides[0]])
            row = {"model": args.model, "batch": batch, "side": side, **{k: round(v, 3) for k, v in median.items()}}
            rows.append(row | {f"{sides[0]}_times_faster": round(rate / median["images_per_second"], 2)})
            print(rows[-1], flush=True)
    from benchmarks.record import write_record

    packages = ("jax", "flax", "torch", "timm") if any("torch" in side for side in sides) else ("jax", "flax")
    write_record(
        f"distill_step_{args.model}_cpu",
        "python -m " + " ".join(["benchmarks.distill_step", *sys.argv[1:]]),
        rows,
        packages,
    )


if __name__ == "__main__":
    main()
