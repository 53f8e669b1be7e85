"""What calibrating on the normals of the test images' own place is worth: stated and found rates of false positives.

  python -m benchmarks.site_calibration WORKDIR_OF_AN_ABLATION...

Reads the stored scores of the base's cells; nothing is trained or scored. Half of the groups of normal test images
calibrate, the other half and all abnormal images are measured; ten random halves a seed. Axes: N test images.
"""

import sys
from pathlib import Path

import numpy as np

from benchmarks.record import write_record
from configs.workdir import get_config
from core.metrics import auroc, matched_auroc
from mtl_moe.ablation_cell import Stored, load_trained
from mtl_moe.calibration import Calibration
from mtl_moe.calibration_fit import fit_calibration
from mtl_moe.results import MATCHED_TOLERANCE
from mtl_moe.system import build_system

RATE, HALVES = 0.1, 10


def measure(stored: Stored, calibration: Calibration, rows: np.ndarray) -> list[float]:
    """AUROC, AUROC of like contrast, and shares of normal and abnormal images flagged at RATE, of boolean rows [N]."""
    test, labels = stored.scored["test"], stored.labels[rows]
    fused = calibration.fuse(calibration.corrected(test.raw[rows], test.texture[rows]))
    flagged = calibration.p_values(fused) <= RATE
    matched = matched_auroc(fused, labels, test.texture[rows], MATCHED_TOLERANCE)[0]
    return [auroc(fused, labels), matched, *(float(flagged[labels == label].mean()) for label in (0, 1))]


def compare(cell: Path) -> list[tuple[int, list[float], list[float]]]:
    """For each half: normals that calibrated, and what the cell's own and the site's calibration give on the rest."""
    config = get_config(cell)
    tasks = build_system(config).tasks
    stored, own = load_trained(cell, tasks, config.score.fusion)
    test, groups = stored.scored["test"], np.array(stored.groups)
    normal = stored.labels == 0
    names, found = np.unique(groups[normal]), []
    for half in range(HALVES):
        chosen = np.isin(groups, np.random.default_rng(half).permutation(names)[: len(names) // 2])
        site, rest = chosen & normal, ~chosen
        calibration = fit_calibration(tasks, own.fusion, test.raw[site], test.texture[site], groups[site])
        found.append((int(site.sum()), measure(stored, own, rest), measure(stored, calibration, rest)))
    return found


def main() -> None:
    """Prints and records a row for each calibration of each set: means over halves and seeds."""
    rows = []
    for workdir in map(Path, sys.argv[1:]):
        cells = sorted(workdir.glob("cells/base_seed*"))
        counts, *both = zip(*(half for cell in cells for half in compare(cell)), strict=True)
        for name, values in zip(("training folder", "half of the test normals"), both, strict=True):
            means = dict(zip(("auroc", "matched_auroc", "false_positives", "found"), np.mean(values, 0), strict=True))
            row = {"set": get_config(cells[0]).data.name, "calibrated_on": name, "seeds": len(cells)}
            row |= {"site_normals": round(float(np.mean(counts))), "stated_rate": RATE}
            rows.append(row | {key: round(float(value), 4) for key, value in means.items()})
            print(rows[-1], flush=True)
    write_record("site_calibration_cpu", "python -m benchmarks.site_calibration WORKDIR...", rows, ("numpy", "scipy"))


if __name__ == "__main__":
    main()
