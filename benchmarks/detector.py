"""The detector beside peers trained from scratch in PyTorch: a training step, inference, and a full evaluation.

  python -m benchmarks.detector [--preset=tiny] [--batch=8] [--sides=ours,denoising_unet] [--parts=step]

The peers of `benchmarks/peers/` are made as large as the detector (the width whose number of parameters is nearest).
Images are generated phantoms of the preset's size; every side sees the same number of them at once.
- step: training images/s. Ours solves all its tasks on every image, a peer one.
- inference: images/s to image scores and maps. Ours runs all views of all tasks, the masked autoencoder 16 masks.
- evaluation: images/s of the test split from PNG files to the written report, compilation included, imports not. Ours:
  calibration, test, the floors with the untrained network, intervals, predictions.csv, report.json, report.html. A
  peer: scores, metrics, intervals, report.json.
Every side of every part is a process of its own; rounds alternate the order, the medians are compared.
"""

import argparse
import dataclasses
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIDES = ("ours", "denoising_unet", "masked_autoencoder")
PARTS = ("step", "inference", "evaluation")
SECONDS = 3.0  # of calls that a round times, after the first
WIDTH_STEP = {"denoising_unet": 8, "masked_autoencoder": 32}  # group norm and heads divide the width


def smoke_config() -> Any:
    """The smallest useful detector, for trials: tasks of every kind of head, those with a teacher among them."""
    from configs import common

    config = common.detector("tiny")
    config.data.update(image_size=32, mask_size=48)  # files as large as the masks
    config.data.phantom.update(num_train=64, num_valid=0, num_test=8, anatomies=("head",))
    config.model.update(width=32, num_heads=2, num_dense_layers=1, num_moe_layers=1, mlp_dim=32, expert_dim=16)
    config.tasks.names = ("masked", "denoise", "jigsaw", "cluster", "self_distill")  # "synthetic" compiles slowly
    config.tasks.jigsaw.tiles = 2
    config.tasks.cluster.num_clusters = 4
    config.score.update(batch_size=8, gallery=1, bootstrap=20, untrained=False)
    config.train.tensorboard = False
    return config


def detector_state(config: Any, dispatch: str = "auto") -> tuple[Any, Any, Any]:
    """(system, state before the first update, optimiser); no data is read, cluster centres are random."""
    import jax

    from core.optim import build_optimizer
    from core.state import init_state
    from mtl_moe.system import build_system
    from mtl_moe.teacher import needs_teacher

    system = build_system(config)
    system = dataclasses.replace(system, model=system.model.clone(dispatch=dispatch))
    pixels = config.model.patch_size**2 * config.data.channels
    centers = np.random.default_rng(0).random((system.num_clusters, pixels), np.float32)
    init_fn = system.init_fn(centers if needs_teacher(system.tasks) else None)
    tx = build_optimizer(config.optim, config.train.num_steps)
    return system, init_state(init_fn, jax.random.key(0), tx, system.mesh), tx


def training_step(config: Any, dispatch: str = "auto") -> tuple[Callable[[], Any], Any, int]:
    """(one more update of `config.train.batch_size` random images: () -> loss on the device, system, parameters)."""
    import jax

    from core.mesh import shard_batch
    from core.tree import num_params
    from mtl_moe.train import make_update_fn

    system, state, tx = detector_state(config, dispatch)
    update = make_update_fn(system, tx)
    shape = (config.train.batch_size, config.data.image_size, config.data.image_size, config.data.channels)
    batch = shard_batch({"image": np.random.default_rng(0).integers(0, 256, shape, np.uint8)}, system.mesh)
    key, parameters = jax.random.key(1), num_params(state.params)

    def step() -> Any:
        nonlocal state
        state, metrics = update(state, batch, key)
        return metrics["loss"]

    return step, system, parameters


def matched_width(side: str, parameters: int, image_size: int) -> int:
    """The width with which a peer has the number of parameters nearest to `parameters`."""
    import torch

    build, step = importlib.import_module(f"benchmarks.peers.{side}").build, WIDTH_STEP[side]

    def size(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build(width=width, size=image_size).parameters())

    width = step
    while size(width + step) < parameters:
        width += step
    return min((width, width + step), key=lambda w: abs(size(w) - parameters))


def build_peer(side: str, config: Any) -> tuple[Any, Any]:
    """(module, model of matched size)."""
    from core.optim import build_optimizer
    from core.tree import num_params
    from mtl_moe.system import build_system

    state = build_system(config).abstract_state(build_optimizer(config.optim, 1))
    width = matched_width(side, num_params(state.params), config.data.image_size)
    module = importlib.import_module(f"benchmarks.peers.{side}")
    return module, module.build(width=width, channels=config.data.channels, size=config.data.image_size)


def time_calls(call: Callable[[], Any], images: int) -> dict[str, float]:
    """Images/s of the median call, and the first call's seconds."""
    start = time.perf_counter()
    call()
    first, seconds = time.perf_counter() - start, []
    while not seconds or sum(seconds) < SECONDS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"images_per_second": images / statistics.median(seconds), "first_call_seconds": first}


def run_step(side: str, config: Any, batch: int) -> dict[str, float]:
    """One training update."""
    config.train.batch_size = batch
    if side == "ours":
        step, _, parameters = training_step(config)
        return time_calls(lambda: float(step()), batch) | {"parameters": parameters}
    from benchmarks.peers.training import make_step

    module, model = build_peer(side, config)
    size, channels = config.data.image_size, config.data.channels
    images = np.random.default_rng(0).integers(0, 256, (256, size, size, channels), np.uint8)
    step = make_step(model, images, module.loss, 0, batch, 1e-3)
    return time_calls(lambda: float(step(0.5)), batch) | {"parameters": sum(p.numel() for p in model.parameters())}


def run_inference(side: str, config: Any, batch: int) -> dict[str, float]:
    """Image scores and maps of one batch."""
    size, channels = config.data.image_size, config.data.channels
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, channels), np.uint8)
    if side == "ours":
        from mtl_moe.infer import Scorer, Trained

        config.score.batch_size = batch
        system, state, _ = detector_state(config)
        scorer = Scorer(system, Trained(state.params, state.extra, 0))
        return time_calls(lambda: scorer.images(images), batch)
    module, model = build_peer(side, config)
    return time_calls(lambda: module.score(model, images), batch)


def write_phantoms(config: Any, root: Path) -> None:
    """Phantoms as a folder of PNG files, images as large as masks; `config.data` is pointed at it."""
    from PIL import Image

    from input_pipeline.phantom import make_dataset

    data = config.data
    for split in make_dataset(image_size=data.mask_size, mask_size=data.mask_size, **data.phantom).values():
        for name, image, mask, label in zip(split["name"], split["image"], split["mask"], split["label"], strict=True):
            path = root / Path(name).parent / ("img" if label else "") / Path(name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
            if label:
                path = path.parents[1] / "anomaly_mask" / path.name
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(255 * mask[..., 0]).save(path)
    data.update(kind="folder", root=str(root), name="phantom")


def run_evaluation(side: str, config: Any, batch: int) -> dict[str, float]:
    """Files to report, once. `batch` is not needed: the evaluation has its own."""
    from input_pipeline.dataset import load_dataset

    with tempfile.TemporaryDirectory() as folder:
        write_phantoms(config, Path(folder) / "images")
        workdir = Path(folder) / "work"
        workdir.mkdir()
        if side == "ours":
            from mtl_moe.evaluate import evaluate
            from mtl_moe.system import build_system
            from mtl_moe.train import train

            config.train.update(num_steps=1, tensorboard=False)
            train(build_system(config), load_dataset(config.data), workdir)
            start = time.perf_counter()
            dataset = load_dataset(config.data)
            evaluate(build_system(config), dataset, workdir)
        else:
            from benchmarks.peer_quality import accuracy
            from core.files import write_json

            module, model = build_peer(side, config)
            start = time.perf_counter()
            dataset = load_dataset(config.data)
            test = dataset.splits["test"]
            scores, maps = module.score(model, test.images(np.arange(len(test))))
            write_json(workdir / "report.json", accuracy(test, scores, maps, dataset.mask_size, config.score.bootstrap))
        seconds = time.perf_counter() - start
    return {"images_per_second": len(dataset.splits["test"]) / seconds, "seconds": seconds}


RUN = {"step": run_step, "inference": run_inference, "evaluation": run_evaluation}


def run_here(part: str, side: str, preset: str, batch: int) -> dict[str, float]:
    """One side of one part in this process; preset "smoke" is `smoke_config`."""
    from configs import common

    config = smoke_config() if preset == "smoke" else common.detector(preset)
    if side != "ours":
        import torch

        torch.set_num_threads(os.cpu_count())
    row = RUN[part](side, config, batch)
    return row | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main() -> None:
    """Runs every side of every part in processes of their own, or one in this one (--side)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="tiny, small, base, or smoke: a trial that records nothing")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_here(args.parts, args.side, args.preset, args.batch)))
        return
    sides, rows = args.sides.split(","), []
    for part in args.parts.split(","):
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for turn in range(args.rounds):
            for side in sides if turn % 2 == 0 else reversed(sides):
                command = [sys.executable, "-m", "benchmarks.detector", f"--side={side}", f"--parts={part}"]
                command += [f"--preset={args.preset}", f"--batch={args.batch}"]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
        for side, runs in found.items():
            median = {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
            rows.append({"part": part, "preset": args.preset, "batch": args.batch, "side": side, **median})
            print(rows[-1], flush=True)
    if args.preset == "smoke":
        return
    from benchmarks.record import write_record

    command = " ".join(["python -m benchmarks.detector", *sys.argv[1:]])
    packages = ("jax", "flax", "torch") if set(sides) != {"ours"} else ("jax", "flax")
    write_record(f"detector_{args.preset}_cpu", command, rows, packages)


if __name__ == "__main__":
    main()
