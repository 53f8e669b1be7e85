"""Whether detectors of several image sizes notice small defects: `python -m benchmarks.small_defects WORKDIR...`

For judging tiles on normal images only: the calibration normals at the first work directory's image size get one small
defect each; the other detectors, trained on the same set, see the same pictures shrunk to their own size. Two numbers a
family: AUROC of the images' scores, and the mean AUROC of the defect's pixels within an image's body, by the finished
map. Axes: n calibration normals, H W C image.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import write_record
from configs.workdir import get_config
from core.metrics import auroc, auroc_between
from input_pipeline.dataset import load_dataset
from input_pipeline.split import ArrayPixels, Split
from mtl_moe.calibration_fit import fit_calibration, fit_folds
from mtl_moe.infer import Scorer, restore
from mtl_moe.painted import disc
from mtl_moe.painted_check import unseen_scores
from mtl_moe.scoring import make_map_fn
from mtl_moe.system import build_system
from mtl_moe.tasks import base

EDGE = 0.2  # how soft a defect's rim is, as a share of its radius


def paint(images: np.ndarray, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """uint8 images [n, H, W, C] -> by family the images with one small defect, and where it is, boolean [n, H, W]."""
    clean = base.to_float(jnp.asarray(images))
    body = base.body_mask(clean)
    keys = jax.random.split(jax.random.key(seed), 4)
    spot, speckle = disc(keys[0], body, 0.012, 0.024, EDGE), disc(keys[1], body, 0.02, 0.035, EDGE)
    sign = jax.random.rademacher(keys[2], (len(images), 1, 1, 1), jnp.float32)
    painted = {
        "spot": (clean + 0.3 * sign * spot, spot),
        "speckle": (clean + 0.15 * speckle * jax.random.normal(keys[3], clean.shape), speckle),
    }
    found = {"clean": (images, None)}
    for name, (values, where) in painted.items():
        pixels = np.asarray(jnp.round(jnp.clip(values, 0, 1) * 255)).astype(np.uint8)
        found[name] = (pixels, np.asarray(where[..., 0] > 0.5))
    return found


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [n, H, W, C] -> [n, size, size, C], means over squares; H is a multiple of `size`."""
    n, height, _, channels = images.shape
    cells = images.reshape(n, size, height // size, size, height // size, channels)
    return np.round(cells.mean((2, 4))).astype(np.uint8)


def measure(workdir: Path, normals: Split, painted: Mapping[str, tuple[np.ndarray, np.ndarray | None]]) -> list[dict]:
    """One row a family for the detector of `workdir`."""
    config = get_config(workdir)
    size, full = config.data.image_size, painted["clean"][0].shape[1]
    system = build_system(config)
    scorer, scored = Scorer(system, restore(system, workdir)), {}
    for name, (images, _) in painted.items():
        pixels = ArrayPixels(shrink(images, size), None, size)
        part = Split(normals.names, normals.groups, normals.labels, False, pixels)
        scored[name] = scorer.split(part, name, keep=range(len(part)))
    clean, fusion, tasks = scored["clean"], config.score.fusion, system.tasks
    maps = clean.kept["maps"], clean.kept["body"]
    whole = fit_calibration(tasks, fusion, clean.raw, clean.texture, normals.groups, *maps)
    _, folds = fit_folds(whole.evidences, fusion, clean.raw, clean.texture, normals.groups)
    finish = make_map_fn(whole, size, full)
    body = np.asarray(base.body_mask(base.to_float(jnp.asarray(painted["clean"][0]))))[..., 0] > 0
    rows = []
    for name, (_, where) in list(painted.items())[1:]:
        _, fused = unseen_scores(folds, scored[name], np.arange(len(normals)))
        pixels = []
        for i, (mask, inside) in enumerate(zip(where, body, strict=True)):
            found = scored[name].kept
            finished = np.asarray(finish(found["maps"][i : i + 1], found["body"][i : i + 1]))[0]
            if mask[inside].any():
                pixels.append(auroc(finished[inside], mask[inside].astype(int)))
        row = {"dataset": config.data.name, "image_size": size, "tile_size": config.data.tile_size, "family": name}
        row |= {"normals": len(normals), "image_auroc": auroc_between(whole.fused, fused)}
        rows.append(row | {"pixel_auroc_within_image": float(np.mean(pixels))})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Prints and records a row for each detector and family."""
    workdirs = list(map(Path, sys.argv[1:]))
    normals = load_dataset(get_config(workdirs[0]).data).splits["calibration"]
    painted = paint(normals.images(np.arange(len(normals))))
    rows = [row for workdir in workdirs for row in measure(workdir, normals, painted)]
    write_record("small_defects_cpu", "python -m benchmarks.small_defects WORKDIR...", rows, ("jax", "numpy", "scipy"))


if __name__ == "__main__":
    main()
