"""Updates and seconds until a student's held-out feature error is what the plain recipe ends with.

  python -m benchmarks.time_to_quality --teacher=FOLDER --root=IMAGES [--ratio=0.1] [--reduction=2] [--steps=300]

Plain: fresh crops, the teacher in the loop, adapters from zero, AdamW, float32. Fast: cached teacher views, then with
the closed-form warm start, with Muon and with products in bfloat16 as well, each on shorter schedules too. Seconds hold
everything but reading the images: compilation, caching the teacher's features, the warm start. The error (mean
absolute, all tokens, before the final norm) is taken on held-out images of the same split every few updates, outside
the clock. PyTorch (--torch): the seconds that its updates of the plain recipe take at the least, from
their median on fixed images, without crops and start-up; that it gets as near is taken from the parity of one update.
"""

import argparse
import itertools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.distill_step import torch_step
from benchmarks.record import write_record
from configs.vit_distill import distill as recipe
from core.mesh import shard_batch
from core.optim import build_optimizer
from core.vit import VisionTransformer, VitConfig
from input_pipeline.sources import LabelledSet
from vit_distill.distill import build_distiller, build_state, make_step_fn
from vit_distill.images import few_shot_images
from vit_distill.lora import merge
from vit_distill.teacher import Teacher, load_teacher
from vit_distill.train import start_values, training_batches

WARM = {"lora.warm_start": True}
HALF = {"train.dtype": "bfloat16", "teacher.dtype": "bfloat16"}
MUON = {"optim.kind": "muon"}
# Fields of the config, and the schedules tried: the plain recipe's updates divided by each.
RECIPES = {
    "cached": ({}, (1, 2, 4)),
    "cached + warm start": (WARM, (1, 2, 4)),
    "cached + warm start + Muon": (WARM | MUON, (1, 2, 3, 4)),
    "cached + warm start; bfloat16": (WARM | HALF, (1, 2)),
    "cached + warm start + Muon; bfloat16": (WARM | MUON | HALF, (1, 2, 3, 4)),
}


def follow(
    config: ConfigDict,
    teacher: Teacher,
    images: LabelledSet,
    held_out: tuple[jax.Array, jax.Array],
    target: float,
    every: int,
) -> list[tuple[int, float, float]]:
    """(update, seconds, held-out error) every few updates of a run; stops when the error reaches `target`.

    `held_out`: normalised images [n, H, W, C] and the tokens [n, N, D] of the teacher's last block.
    """
    start = time.perf_counter()
    it = build_distiller(config, teacher)
    tx = build_optimizer(config.optim, config.train.num_steps)
    state = build_state(it, tx, start_values(it, images))
    step_fn, key = make_step_fn(it, tx), jax.random.key(config.seed + 1)
    network = VisionTransformer(it.student_config)
    error_fn = jax.jit(
        lambda p, base: jnp.abs(
            network.apply({"params": merge(base, p, it.lora)}, held_out[0]).blocks[-1] - held_out[1]
        ).mean()
    )
    paused, curve = 0.0, []
    batches = itertools.chain([None], training_batches(it, images, 0, None))
    for update, batch in enumerate(batches):
        if batch is not None:
            state, _ = step_fn(state, shard_batch(batch, it.mesh), key)
        if update % every == 0 or update == config.train.num_steps:
            jax.block_until_ready(state.params)
            now = time.perf_counter()
            error = float(error_fn(state.params, it.base))
            curve.append((update, now - start - paused, error))
            paused += time.perf_counter() - now
            if error <= target:
                break
    return curve


def torch_update_seconds(architecture: VitConfig, config: ConfigDict, bf16: bool) -> float:
    """Median seconds of PyTorch's update of a model of the teacher's sizes on one fixed batch."""
    options = {
        "img_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "embed_dim": architecture.width,
        "depth": architecture.depth,
        "num_heads": architecture.num_heads,
        "mlp_ratio": architecture.mlp_dim / architecture.width,
    }
    step = torch_step(
        "vit_tiny_patch16_224", config.train.batch_size, bf16, rank=config.lora.rank,
        reduction=config.student.reduction, **options,
    )  # fmt: skip
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        float(step())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def main() -> None:
    """Runs the plain recipe, then the fast ones until they are as good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--reduction", type=int, default=2)
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--muon_rate", type=float, default=3e-2)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--held_out", type=int, default=256, help="images that the error is taken on")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--name", default="time_to_quality", help="of the record")
    parser.add_argument("--torch", action="store_true", help="time PyTorch's updates as well")
    args = parser.parse_args()
    config = recipe.get_config()
    config.data.root, config.few_shot.ratio, config.student.reduction = args.root, args.ratio, args.reduction
    config.lora.rank, config.optim.learning_rate, config.calibration.num_images = args.rank, args.learning_rate, 500
    config.train.batch_size, config.optim.warmup_steps = args.batch, min(config.optim.warmup_steps, args.steps // 5)
    teacher = load_teacher(args.teacher)
    images, few, rest = few_shot_images(config, teacher.preprocessing, None)
    few = images.take(few)
    few.pixels.images(np.arange(2))  # reads the files
    rest = teacher.preprocessing.evaluate(jnp.asarray(images.pixels.images(rest[: args.held_out])))
    network = VisionTransformer(teacher.config)
    held_out = (rest, jax.jit(lambda p: network.apply({"params": p}, rest).blocks[-1])(teacher.params))

    config.train.num_steps = args.steps
    every = max(args.steps // 15, 1)
    plain = follow(config, teacher, few, held_out, 0.0, every)
    (_, seconds, target), rows = plain[-1], []
    rows.append({"recipe": "plain", "steps": args.steps, "updates": args.steps, "seconds": round(seconds, 1)})
    rows[-1] |= {"error": round(target, 4), "start_error": round(plain[0][2], 4), "times_faster": 1.0}
    print(rows[-1], flush=True)
    for name in args.recipes.split(","):
        fields, shares = RECIPES[name]
        for share in shares:
            one = config.copy_and_resolve_references()
            one.train.update(num_steps=args.steps // share, cached_views=args.views)
            one.update_from_flattened_dict(fields)
            if one.optim.kind == "muon":
                one.optim.learning_rate = args.muon_rate
            curve = follow(one, teacher, few, held_out, target, every)
            updates, spent, error = curve[-1]
            row = {"recipe": name, "steps": args.steps // share, "updates": updates}
            row |= {"seconds": round(spent, 1), "error": round(error, 4), "start_error": round(curve[0][2], 4)}
            rows.append(row | {"times_faster": round(seconds / spent, 2) if error <= target else "not reached"})
            print(rows[-1], flush=True)
            if updates == 0:
                break  # no schedule can be shorter
    for bf16 in (False, True) if args.torch else ():
        spent = args.steps * torch_update_seconds(teacher.config, config, bf16)
        row = {"recipe": "PyTorch, updates alone" + ", bfloat16 autocast" * bf16, "steps": args.steps}
        rows.append(row | {"seconds": round(spent, 1), "times_faster": round(seconds / spent, 2)})
        print(rows[-1], flush=True)
    command = " ".join(["python -m benchmarks.time_to_quality", *sys.argv[1:]])
    command = command.replace(args.root, "IMAGES").replace(args.teacher, "TEACHER")
    packages = ("jax", "flax", "torch", "timm") if args.torch else ("jax", "flax")
    write_record(f"{args.name}_cpu", command, rows, packages)


if __name__ == "__main__":
    main()
