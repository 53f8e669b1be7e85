"""Rehearsal of BMAD without BMAD: the commands of docs/bmad.md on synthetic copies of its sets.

  python -m benchmarks.bmad_rehearsal [--sets=brain,rsna] [--layout=released|repacked] [--scale=1] [--dir=DIR]
      [--config.FIELD=VALUE ...]

For each set: writes the tree (folders, names, native sizes, modes, masks and counts of the real one), runs
`--mode=prepare` to a cache, then trains the tiny preset for a few updates from the files and evaluates all test images.
Each command is a process of its own; what it prints and writes is checked (counts, layout, the report's metrics, a row
for every test image), and its wall seconds and peak resident memory are recorded. `--config.*` goes on to both
commands. At a scale below 1 nothing is recorded. Sets that are not asked for keep their earlier rows. Accuracy means
nothing here: pixels are random. These files compress better and decode faster than real ones of their size.
"""

import argparse
import csv
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.bmad_layouts import LAYOUTS, File, write_tree
from benchmarks.record import RESULTS, write_record
from input_pipeline.bmad import BMAD

ROOT = Path(__file__).parents[1]
RECORD = "bmad_rehearsal_cpu"
UPDATES = 8
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "aupro")
COUNT_LINE = re.compile(r"^(train|calibration|valid|test) +(\d+) normal, (\d+) abnormal, (\d+) masks$", re.MULTILINE)


class RehearsalError(Exception):
    """A command did not do what docs/bmad.md says."""


def run_stage(arguments: list[str], log: Path) -> tuple[float, float]:
    """(wall seconds, peak resident GB) of `main.py arguments`, whose output goes to `log`."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    with log.open("w") as file:
        command = [sys.executable, "main.py", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        # Not Popen.wait: the usage of this child alone.
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text()[-3000:]
        raise RehearsalError(f"main.py {' '.join(arguments)} ended with {process.returncode}:\n{tail}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def expected_counts(files: list[File]) -> Counter[tuple[str, str]]:
    """Images by (split, normal | abnormal), and masks of abnormal images by (split, masks)."""
    counts = Counter((file.split, "abnormal" if file.abnormal else "normal") for file in files)
    return counts + Counter((file.split, "masks") for file in files if file.mask and file.abnormal)


def check_prepare(printed: str, name: str, files: list[File], whole: bool) -> None:
    """Raises RehearsalError unless prepare counted what was written, found nothing wrong, and knew the layout."""
    found = Counter()
    for split, *numbers in COUNT_LINE.findall(printed):
        part = "train" if split == "calibration" else split
        found += Counter({(part, k): int(n) for k, n in zip(("normal", "abnormal", "masks"), numbers, strict=True)})
    height, width = BMAD[name].native_size
    counts = "equal" if whole else "differ from"
    wanted = [f"{name}: BMAD {name}, counts {counts} the table: ", f"\n  {height}x{width}: {len(files)}\n"]
    wanted += ["\ncorrupt files: 0\n", "\nduplicate images: 0 sets\n", "\nwritten: "]
    missing = [text for text in wanted if text not in printed]
    if found != expected_counts(files) or missing:
        raise RehearsalError(
            f"prepare of {name}: expected {dict(expected_counts(files))} and {missing or 'nothing more'}, found "
            f"{dict(found)} in\n{printed[-3000:]}"
        )


def expected_metrics(name: str) -> list[str]:
    """Keys that the report of a set must hold."""
    prefixes = ["", "task/masked/", "task/synthetic_clean/", "best_single/", "leave_out/jigsaw/", "floor/untrained/"]
    prefixes += [f"floor/{floor}/" for floor in ("mean_intensity", "band_2_low", "pca_error", "nearest_neighbour")]
    keys = [f"{prefix}image_auroc" for prefix in prefixes] + ["image_ap"]
    if BMAD[name].has_masks:
        prefixes = ("", "floor/smoothed_intensity/", "floor/pca_error/", "floor/untrained/")
        keys += [prefix + metric for prefix in prefixes for metric in PIXEL_METRICS]
    return [f"test/{name}/{key}" for key in keys]


def check_report(workdir: Path, name: str, files: list[File], folder: str) -> dict:
    """report.json of a run; RehearsalError unless it is complete and every test image was scored once.

    `folder`: what `files` have in front of the names in predictions.csv.
    """
    report = json.loads((workdir / "report.json").read_text())
    values = report["metrics"]
    absent = [key for key in expected_metrics(name) if not isinstance(values.get(key), float)]
    test = Counter(file.image for file in files if file.split == "test")
    with (workdir / "predictions.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    scored = Counter(f"{folder}/{row['name']}" for row in rows)
    finite = all(math.isfinite(float(row["score"])) for row in rows)
    counted = sum(report["provenance"]["counts"].values())
    if absent or scored != test or not finite or counted != len(files) or not (workdir / "report.html").exists():
        raise RehearsalError(
            f"evaluation of {name}: metrics absent {absent}; test images {sum(test.values())}, scored "
            f"{sum(scored.values())}, all finite {finite}; images {len(files)}, counted {counted}"
        )
    return report


def rehearse(name: str, layout: str, scale: float, folder: Path, extra: list[str]) -> list[dict]:
    """Writes one set below `folder`, runs and checks its commands; one row a stage."""
    data, workdir, log = folder / "bmad", folder / "run", folder / "log.txt"
    start = time.perf_counter()
    files, num_bytes = write_tree(data, name, layout, scale)
    fixed = {"set": name, "layout": layout, "scale": scale}
    rows = [row(fixed, "write the tree", len(files), time.perf_counter() - start, mb_on_disk=round(num_bytes / 1e6, 1))]

    common = [f"--config=configs/mtl_moe/bmad.py:{name},preset=tiny", f"--config.data.root={data}", *extra]
    spent, peak = run_stage(["--mode=prepare", *common, f"--output={folder / 'cache.npz'}"], log)
    check_prepare(log.read_text(), name, files, whole=scale == 1)
    size = (folder / "cache.npz").stat().st_size
    rows.append(row(fixed, "prepare", len(files), spent, peak_gb=round(peak, 2), mb_on_disk=round(size / 1e6, 1)))

    training = [f"--workdir={workdir}", f"--config.train.num_steps={UPDATES}", "--config.train.tensorboard=False"]
    spent, peak = run_stage([*common, *training], log)
    report = check_report(workdir, name, files, LAYOUTS[layout][name].folder)
    seconds, test = report["provenance"]["evaluation_seconds"], sum(file.split == "test" for file in files)
    rows.append(row(fixed, "read files and train", len(files), spent - seconds, updates=UPDATES))
    rows.append(row(fixed, "evaluate", test, seconds, peak_gb=round(peak, 2)))
    return rows


def row(fixed: dict, stage: str, images: int, seconds: float, **more: float) -> dict:
    """One row of the record, printed."""
    values = fixed | {"stage": stage, "images": images, "seconds": round(seconds, 1)}
    values |= {"images_per_second": round(images / seconds, 1), "load_average": round(os.getloadavg()[0], 2)} | more
    print(values, flush=True)
    return values


def earlier_rows(without: list[str]) -> list[dict]:
    """Rows of the record on disk, but for these sets."""
    path = RESULTS / f"{RECORD}.json"
    return [r for r in json.loads(path.read_text())["rows"] if r["set"] not in without] if path.exists() else []


def main() -> None:
    """Rehearses and records after each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(BMAD))
    parser.add_argument("--layout", choices=list(LAYOUTS), default="released")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument(
        "--dir", default=None, help="where the trees are written, one at a time (default: the system's)"
    )
    args, extra = parser.parse_known_args()
    if unknown := [argument for argument in extra if not argument.startswith("--config.")]:
        parser.error(f"unknown arguments {unknown}")
    for name in args.sets.split(","):
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            rows = rehearse(name, args.layout, args.scale, Path(folder), extra)
        if args.scale == 1:
            rows = sorted(earlier_rows([name]) + rows, key=lambda r: list(BMAD).index(r["set"]))
            command = f"python -m benchmarks.bmad_rehearsal --layout={args.layout}"
            write_record(RECORD, " ".join([command, *extra]), rows, ("jax", "numpy", "pillow"))
    print("nothing but the download is missing for", args.sets)


if __name__ == "__main__":
    main()
