"""Which reduction of a map to an image score finds painted defects best: `python -m benchmarks.reductions WORKDIR ...`.

For choosing on normal images only: each trained detector scores its calibration normals as they are and with one defect
of each family of `mtl_moe.painted`, and the table gives the AUROC between the two, mean over the families that the task
`synthetic` trains on and mean over those that nothing trains on. No test image is read.
Axes: n calibration normals, S evidences, H W map.
"""

import sys
from pathlib import Path

import numpy as np
from scipy import ndimage

from benchmarks.record import write_record
from configs.workdir import get_config
from input_pipeline.dataset import load_dataset
from mtl_moe.calibration import evidence_names
from mtl_moe.infer import Scorer, restore
from mtl_moe.painted import by_kind, criteria, painted_auroc, painted_normals
from mtl_moe.scoring import SMOOTHING
from mtl_moe.system import build_system

SHARES = {"mean": 1.0, "top 5 %": 0.05, "top 1 %": 0.01}


def reduced(maps: np.ndarray, body: np.ndarray) -> dict[str, np.ndarray]:
    """Image scores [n, S] by reduction, of maps [n, S, H, W] inside body [n, H, W]."""
    sigma = SMOOTHING * maps.shape[-1]
    scores = {}
    for prefix, values in (("", maps), ("smoothed ", ndimage.gaussian_filter(maps, (0, 0, sigma, sigma)))):
        inside = [np.sort(m[:, b > 0], axis=-1)[:, ::-1] for m, b in zip(values, body, strict=True)]
        for name, share in SHARES.items():
            top = [v[:, : int(np.ceil(share * v.shape[1]))].mean(1) for v in inside]
            scores[prefix + name] = np.stack(top)
    return scores


def measure(workdir: Path) -> list[dict]:
    """One row an evidence: its AUROC by reduction, for trained and unseen families."""
    config = get_config(workdir)
    system = build_system(config)
    normals = load_dataset(config.data).splits["calibration"]
    painted = painted_normals(normals, len(normals))
    scorer = Scorer(system, restore(system, workdir))

    def score(rows: np.ndarray) -> dict[str, np.ndarray]:
        result = scorer.images(painted.images(rows))
        return reduced(result["maps"], result["body"])

    scores = {kind: score(rows) for kind, rows in by_kind(np.arange(len(painted))).items()}
    rows = []
    for s, evidence in enumerate(evidence_names(system.tasks)):
        found = {
            name: criteria(painted_auroc({kind: by_name[name][:, s] for kind, by_name in scores.items()}))
            for name in next(iter(scores.values()))
        }
        rows.append({"dataset": config.data.name, "evidence": evidence, "normals": len(normals), "auroc": found})
    return rows


def main() -> None:
    rows = [row for workdir in sys.argv[1:] for row in measure(Path(workdir))]
    names = list(rows[0]["auroc"])
    print("AUROC, trained families / unseen families")
    print(f"{'set':<12} {'evidence':<16} " + " ".join(f"{name:>17}" for name in names))
    for row in rows:
        cells = [f"{found['trained']:.3f} / {found['unseen']:.3f}" for found in row["auroc"].values()]
        print(f"{row['dataset']:<12} {row['evidence']:<16} " + " ".join(f"{cell:>17}" for cell in cells))
    write_record("reductions_cpu", "python -m benchmarks.reductions WORKDIR ...", rows, ("jax", "numpy", "scipy"))


if __name__ == "__main__":
    main()
