"""How well a detector notices painted defects: what can be measured of it where no abnormal image is known.

Axes: n normals, P rows of `painted_normals`, S evidences with a map, K evidences, H W C image.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from input_pipeline.split import Split
from mtl_moe.calibration import Calibration
from mtl_moe.calibration_fit import fit_folds
from mtl_moe.infer import Scored, Scorer
from mtl_moe.painted import KINDS, by_kind, painted_auroc, painted_normals, sources
from mtl_moe.scoring import make_map_fn


@dataclasses.dataclass(frozen=True)
class PaintedCheck:
    """What `check_painted` found.

    Attributes:
      num_normals: how many normals were painted.
      aurocs: by family, of painted against the same normals as they are.
      examples: by family one painted image, uint8 [H, W, C], and its finished map [H, W] in calibrated units.
    """

    num_normals: int
    aurocs: Mapping[str, float]
    examples: Mapping[str, tuple[np.ndarray, np.ndarray]]


def unseen_scores(
    folds: Sequence[tuple[np.ndarray, Calibration]],
    scored: Scored,
    made_of: np.ndarray,
    leave_out: Sequence[str] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Corrected [P, K] and fused [P] scores of images that were made of the calibration normals `made_of` [P].

    Each is scored by that of `folds` (`fit_folds`) without the normal: the fit that a normal is part of finds it,
    painted or not, more normal than it finds a new image.
    """
    corrected, fused = np.empty((len(made_of), len(folds[0][1].names))), np.empty(len(made_of))
    for fold, others in folds:
        rows = np.isin(made_of, fold)
        corrected[rows] = others.corrected(scored.raw[rows], scored.texture[rows])
        fused[rows] = others.fuse(corrected[rows], leave_out)
    return corrected, fused


def check_painted(scorer: Scorer, calibration: Calibration, normals: Split, scored: Scored, most: int) -> PaintedCheck:
    """Paints at most `most` of the calibration normals, whose scores are `scored`, with one defect of each family."""
    painted = painted_normals(normals, most)
    _, folds = fit_folds(calibration.evidences, calibration.fusion, scored.raw, scored.texture, normals.groups)
    made_of = np.tile(sources(len(normals), most), len(KINDS))
    _, fused = unseen_scores(folds, scorer.split(painted, "painted defects"), made_of)
    count = len(painted) // len(KINDS)
    images = painted.images(np.arange(1, len(KINDS)) * count)  # the first row of each family
    found = scorer.images(images)
    maps = np.asarray(make_map_fn(calibration, *images.shape[1:3])(found["maps"], found["body"]))
    examples = dict(zip(KINDS[1:], zip(images, maps, strict=True), strict=True))
    return PaintedCheck(count, painted_auroc(by_kind(fused)), examples)
