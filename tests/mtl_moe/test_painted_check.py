"""What is said of painted defects comes from fits without the normals that they were painted on."""

import numpy as np

from mtl_moe.calibration_fit import fit_folds
from mtl_moe.floors import log_mean_gradient
from mtl_moe.infer import Scorer, calibrate, restore
from mtl_moe.painted import KINDS, paint, sources
from mtl_moe.painted_check import check_painted, unseen_scores


def test_each_painted_normal_is_scored_by_the_fit_without_it(tiny_run):
    scorer = Scorer(tiny_run.system, restore(tiny_run.system, tiny_run.workdir))
    normals = tiny_run.dataset.splits["calibration"]
    calibration = calibrate(tiny_run.system, scorer, normals)
    scored = scorer.split(normals, "normals")
    _, folds = fit_folds(calibration.evidences, calibration.fusion, scored.raw, scored.texture, normals.groups)
    # As they are, the normals get the very scores that calibrate.
    corrected, fused = unseen_scores(folds, scored, np.arange(len(normals)))
    np.testing.assert_array_equal(fused, calibration.fused)
    assert corrected.shape == (len(normals), len(calibration.names))
    found = check_painted(scorer, calibration, normals, scored, most=3)
    assert found.num_normals == 3
    assert list(found.aurocs) == list(found.examples) == list(KINDS[1:])
    rows = sources(len(normals), 3)
    image, finished = found.examples["bump"]
    np.testing.assert_array_equal(image, paint(normals.images(rows), "bump", seed=0)[0])
    assert finished.shape == image.shape[:2]
    # By hand: the images of one family, each with its fold.
    one = scorer.images(paint(normals.images(rows), "wide_darkening", seed=0))
    clean = fused[rows]
    texture = log_mean_gradient(paint(normals.images(rows), "wide_darkening", seed=0))
    scores = []
    for i, row in enumerate(rows):
        (others,) = (fit for fold, fit in folds if row in fold)
        scores.append(others.fuse(others.corrected(one["raw"][i : i + 1], texture[i : i + 1]))[0])
    wins = np.mean([[(a > b) + 0.5 * (a == b) for b in clean] for a in scores])
    np.testing.assert_allclose(found.aurocs["wide_darkening"], wins)
