"""How well peers trained from scratch find anomalies, with the splits, resolution and evaluation of our detector.

  python -m benchmarks.peer_quality --root=DIR --name=NAME --minutes=M [--seeds=0,1,2] [--peers=denoising_unet]

Every peer of `benchmarks/peers/` trains for M minutes of wall clock on the cores that the process may use, with the
training normals that the detector sees (without its calibration normals), then scores the test split. Image AUROC and
AP with intervals by patient, AUROC over pairs of like contrast; with masks, the pixel metrics of maps enlarged and
smoothed as the detector's. Test images choose nothing. Without --root the phantoms of the quickstart are used. Writes
benchmarks/results/peers_<name>_cpu.json.
"""

import argparse
import importlib
import os
import sys
import time
from typing import Any

import numpy as np
from scipy import ndimage

from benchmarks.peers import DETECTORS
from benchmarks.record import write_record
from configs import common
from core.bootstrap import bootstrap_interval, pixel_intervals
from core.metrics import auroc, average_precision, matched_auroc, pixel_metrics
from input_pipeline.dataset import Dataset, Split, load_dataset
from mtl_moe.floors import log_mean_gradient
from mtl_moe.results import MATCHED_TOLERANCE

COLUMNS = ("image_auroc", "matched_auroc", "image_ap", "pixel_auroc", "aupro")


def load(root: str, name: str, image_size: int) -> Dataset:
    """The grey data set of a folder, or the phantoms of the quickstart where `root` is empty."""
    config = common.detector("tiny")
    config.data.update(kind="folder" if root else "phantom", root=root, name=name, image_size=image_size)
    if not root:
        config.data.mask_size = image_size
        config.data.phantom.anatomies = ("head",)
    return load_dataset(config.data)


def finished(maps: np.ndarray, side: int) -> np.ndarray:
    """Maps [N, H, W] -> [N, side, side]: bilinear, then the smoothing of our detector's maps."""
    import torch

    from benchmarks.peers.training import SMOOTHING

    sigma = SMOOTHING * side
    enlarged = torch.nn.functional.interpolate(torch.from_numpy(maps)[:, None], (side, side), mode="bilinear")[:, 0]
    return ndimage.gaussian_filter(enlarged.numpy(), (0, sigma, sigma))


def accuracy(split: Split, scores: np.ndarray, maps: np.ndarray, mask_size: int, resamples: int) -> dict[str, Any]:
    """Metrics of a test split and their intervals (name + "_95"), as mtl_moe/results.py computes them.

    Args:
      scores, maps: [N] and [N, H, W], higher is odder.
    """
    groups, labels = np.array(split.groups), split.labels
    found: dict[str, Any] = {"image_auroc": auroc(scores, labels), "image_ap": average_precision(scores, labels)}
    for name, metric in (("image_auroc", "auroc"), ("image_ap", "average_precision")):
        found[f"{name}_95"] = bootstrap_interval(metric, scores, labels, groups, resamples)
    texture = log_mean_gradient(split.images(np.arange(len(labels))))
    found["matched_auroc"] = matched_auroc(scores, labels, texture, MATCHED_TOLERANCE)[0]
    if split.has_masks:
        masks, maps = split.masks(np.arange(len(labels)))[..., 0] > 0, finished(maps, mask_size)
        found |= pixel_metrics(maps, masks)
        intervals = pixel_intervals(maps, masks, groups, resamples)
        found |= {f"{name}_95": interval for name, interval in intervals.items()}
    return found


def measure(peer: str, dataset: Dataset, budget: Any, seed: int, resamples: int = 1000) -> dict[str, Any]:
    """Trains and evaluates one peer: a row of the record. `budget`: `benchmarks.peers.training.Budget`."""
    module = importlib.import_module(f"benchmarks.peers.{peer}")
    train, test = dataset.splits["train"], dataset.splits["test"]
    images = train.images(np.arange(len(train)))
    start = time.perf_counter()
    model, updates = module.train(images, budget, seed)
    seconds = time.perf_counter() - start
    scores, maps = module.score(model, test.images(np.arange(len(test))))
    row = {
        "dataset": dataset.name,
        "peer": peer,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_images": len(images),
        "test_images": len(test),
        "updates": updates,
        "train_seconds": round(seconds, 1),
    }
    return row | accuracy(test, scores, maps, dataset.mask_size, resamples)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a row."""
    lines = ["| data set | peer | seed | updates | " + " | ".join(COLUMNS) + " |", "|---" * (4 + len(COLUMNS)) + "|"]
    for row in rows:
        cells = [row["dataset"], row["peer"], str(row["seed"]), str(row["updates"])]
        for name in COLUMNS:
            low, high = row.get(f"{name}_95", (None, None))
            interval = "" if low is None else f" ({low:.3f} to {high:.3f})"
            cells.append(f"{row[name]:.3f}{interval}" if name in row else "no masks")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Trains every peer with every seed, one after the other; the record is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="")
    parser.add_argument("--name", default="phantom")
    parser.add_argument("--minutes", type=float, default=0.0, help="wall clock of each training")
    parser.add_argument("--updates", type=int, default=0, help="so many updates instead: for trials")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--peers", default=",".join(DETECTORS))
    parser.add_argument("--image_size", type=int, default=64)
    args = parser.parse_args()
    if (args.minutes > 0) == (args.updates > 0):
        parser.error("give either --minutes or --updates")
    import torch

    from benchmarks.peers.training import Budget

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    budget = Budget(updates=args.updates) if args.updates else Budget(seconds=60 * args.minutes)
    dataset, rows = load(args.root, args.name, args.image_size), []
    command = " ".join(["python -m benchmarks.peer_quality", *sys.argv[1:]])
    command = command.replace(args.root, "DIR") if args.root else command
    for seed in map(int, args.seeds.split(",")):
        for peer in args.peers.split(","):
            rows.append(measure(peer, dataset, budget, seed))
            if not args.updates:
                write_record(f"peers_{args.name}_cpu", command, rows, ("torch", "numpy", "scipy"))
            print(table(rows[-1:]), flush=True)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
