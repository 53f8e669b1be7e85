"""Time and memory of the pixel metrics against scikit-learn and a plain per-region PRO: `python -m benchmarks.metrics`.

Every measurement runs in a process of its own: the median wall time of its repeats, and the peak resident memory of
the whole process (ru_maxrss) beside the one before the call, with libraries, maps and masks loaded. Takes about three
minutes on one core; prints a table and writes benchmarks/results/metrics_cpu.json.
Axes: N images, H W map.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
from scipy import ndimage

from benchmarks.record import write_record
from core.metrics import AUPRO_FPR_LIMIT, EIGHT_CONNECTED, pixel_metrics

SIZE = 240
# (contender, images, regions per anomalous image, repeats). Brute PRO is measured on 20 images: one ROC a region.
RUNS = [
    ("ours", 640, 2, 5),
    ("sklearn", 640, 2, 3),
    ("ours", 20, 2, 5),
    ("sklearn", 20, 2, 5),
    ("brute_pro", 20, 2, 3),
    ("ours", 80, 2, 5),
    ("ours", 160, 2, 5),
    ("ours", 320, 2, 5),
    ("ours", 320, 8, 5),
    ("ours", 320, 32, 5),
]


def synthetic_maps(num_images: int, num_regions: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth noise, raised inside discs of radius 5 to 9 on every second image: (maps float32, masks bool)."""
    rng = np.random.default_rng(0)
    maps = np.empty((num_images, SIZE, SIZE), np.float32)
    masks = np.zeros(maps.shape, bool)
    # Centres on a jittered 6 x 6 grid of 40-pixel cells, so that discs never touch and regions can be counted.
    cells = np.stack(np.meshgrid(np.arange(20, SIZE, 40), np.arange(20, SIZE, 40)), axis=-1).reshape(-1, 2)
    rows, columns = np.ogrid[:SIZE, :SIZE]
    for index in range(num_images):
        maps[index] = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE), np.float32), 3) * 10
        if index % 2:
            for row, column in rng.permutation(cells)[:num_regions] + rng.integers(-8, 9, size=(num_regions, 2)):
                masks[index] |= (rows - row) ** 2 + (columns - column) ** 2 <= rng.integers(5, 10) ** 2
            maps[index] += rng.uniform(0.5, 2.5) * masks[index]
    return maps, masks


def run_ours(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    return pixel_metrics(maps, masks)


def run_sklearn(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    labels, scores = masks.ravel(), maps.ravel()
    return {"pixel_auroc": roc_auc_score(labels, scores), "pixel_ap": average_precision_score(labels, scores)}


def run_brute_pro(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """One scikit-learn ROC for every region against the whole background, cut at FPR 0.3; the mean of the areas."""
    from sklearn.metrics import roc_curve

    background = maps[~masks]
    areas = []
    for scores, mask in zip(maps, masks, strict=True):
        regions, count = ndimage.label(mask, EIGHT_CONNECTED)
        for region in range(1, count + 1):
            inside = scores[regions == region]
            labels = np.repeat([0, 1], [len(background), len(inside)])
            fpr, overlap, _ = roc_curve(labels, np.concatenate([background, inside]))
            kept = fpr < AUPRO_FPR_LIMIT
            x = np.append(fpr[kept], AUPRO_FPR_LIMIT)
            areas.append(np.trapezoid(np.append(overlap[kept], np.interp(AUPRO_FPR_LIMIT, fpr, overlap)), x))
    return {"aupro": float(np.mean(areas)) / AUPRO_FPR_LIMIT}


CONTENDERS = {"ours": run_ours, "sklearn": run_sklearn, "brute_pro": run_brute_pro}


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux


def measure(contender: str, num_images: int, num_regions: int, repeats: int) -> dict:
    """Seconds of a call, memory of the process before and at its peak in GB, and the values."""
    maps, masks = synthetic_maps(num_images, num_regions)
    if contender != "ours":
        import sklearn.metrics  # noqa: F401  (its import belongs to the memory before the call, not to the time)
    regions = sum(ndimage.label(mask, EIGHT_CONNECTED)[1] for mask in masks)
    before, seconds = peak_gb(), []
    for _ in range(repeats):
        start = time.perf_counter()
        values = CONTENDERS[contender](maps, masks)
        seconds.append(time.perf_counter() - start)
    return {
        "contender": contender,
        "images": num_images,
        "regions": regions,
        "repeats": repeats,
        "seconds_median": round(statistics.median(seconds), 3),
        "seconds_min": round(min(seconds), 3),
        "seconds_max": round(max(seconds), 3),
        "peak_gb": round(peak_gb(), 3),
        "before_gb": round(before, 3),
        "load_average": round(os.getloadavg()[0], 2),  # above 1: others were using the machine as well
        "values": {name: float(value) for name, value in values.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=4, help="contender, images, regions per image, repeats: one process's work")
    arguments = parser.parse_args()
    if arguments.measure:
        contender, *numbers = arguments.measure
        print(json.dumps(measure(contender, *map(int, numbers))))
        return
    rows = []
    print(f"{'contender':<10} {'images':>6} {'regions':>7} {'median s':>9} {'peak GB':>8} {'before GB':>9} {'load':>5}")
    for run in RUNS:
        command = [sys.executable, "-m", "benchmarks.metrics", "--measure", *map(str, run)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(row)
        print(
            f"{row['contender']:<10} {row['images']:>6} {row['regions']:>7} {row['seconds_median']:>9.2f}"
            f" {row['peak_gb']:>8.2f} {row['before_gb']:>9.2f} {row['load_average']:>5.2f}",
            flush=True,
        )
    write_record("metrics_cpu", "python -m benchmarks.metrics", rows, ("numpy", "scipy", "scikit-learn"))


if __name__ == "__main__":
    main()
