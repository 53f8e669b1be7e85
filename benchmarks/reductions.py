"""Which reduction of a map to an image score finds painted defects best: `python -m benchmarks.reductions WORKDIR ...`.

For choosing on normal images only: each trained detector scores its calibration normals as they are and with one defect
of each synthetic family, and the table gives the AUROC between the two, mean over families. The family "synthetic"
itself has been trained on these families, the other tasks have not seen any. No test image is read.
Axes: n calibration normals, S evidences, H W map.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from benchmarks.record import write_record
from configs.workdir import get_config
from core.metrics import auroc
from input_pipeline.dataset import load_dataset
from mtl_moe.infer import Scorer, restore
from mtl_moe.scoring import SMOOTHING, evidence_names
from mtl_moe.system import System, build_system
from mtl_moe.tasks.synthetic import FAMILIES, Synthetic

SHARES = {"mean": 1.0, "top 5 %": 0.05, "top 1 %": 0.01}


def painted(system: System, images: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """uint8 images [n, H, W, C] with one defect each, by family."""
    result = {}
    for i, family in enumerate(FAMILIES):
        task = Synthetic(geometry=system.tasks[0].geometry, families=(family,), clean_share=0.0, max_defects=1)
        key = jax.random.fold_in(jax.random.key(seed), i)
        view, _ = jax.jit(lambda k, x, task=task: task.corrupt(k, x, None))(
            key, jnp.asarray(images / 255.0, jnp.float32)
        )
        result[family] = np.asarray(jnp.round(view[..., :-1] * 255)).astype(np.uint8)
    return result


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
    """One row an evidence: its AUROC by reduction."""
    config = get_config(workdir)
    system = build_system(config)
    normals = load_dataset(config.data).splits["calibration"]
    images = normals.images(np.arange(len(normals)))
    scorer = Scorer(system, restore(system, workdir))

    def score(images: np.ndarray) -> dict[str, np.ndarray]:
        result = scorer.images(images)
        return reduced(result["maps"], result["body"])

    clean, defects = score(images), [score(x) for x in painted(system, images, config.seed).values()]
    labels = np.repeat([0, 1], len(images))
    rows = []
    for s, evidence in enumerate(evidence_names(system.tasks)):
        by_reduction = {
            name: float(np.mean([auroc(np.concatenate([clean[name][:, s], d[name][:, s]]), labels) for d in defects]))
            for name in clean
        }
        rows.append({"dataset": config.data.name, "evidence": evidence, "normals": len(images), "auroc": by_reduction})
    return rows


def main() -> None:
    rows = [row for workdir in sys.argv[1:] for row in measure(Path(workdir))]
    names = list(rows[0]["auroc"])
    print(f"{'set':<12} {'evidence':<16} " + " ".join(f"{name:>17}" for name in names))
    for row in rows:
        values = " ".join(f"{row['auroc'][name]:>17.3f}" for name in names)
        print(f"{row['dataset']:<12} {row['evidence']:<16} {values}")
    write_record("reductions_cpu", "python -m benchmarks.reductions WORKDIR ...", rows, ("jax", "numpy", "scipy"))


if __name__ == "__main__":
    main()
