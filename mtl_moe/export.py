"""A trained detector as one StableHLO file: images in, scores and maps out, for any JAX or XLA without this code.

Axes: B batch (config.score.batch_size, fixed in the file), H W C image, S evidences, M side of the finished map. Input:
uint8 images [B, H, W, C]. Output, float32: raw [B, S], maps [B, S, H, W] and body [B, H, W] as in
`mtl_moe.scoring.make_score_fn`, texture [B] (`mtl_moe.floors.log_mean_gradient`), and with a calibration score [B],
p_value [B] and map [B, M, M] as a prediction writes them. Weights and calibration are constants of the program;
export.json beside it says how a file becomes such an image, and the thresholds of the score.

The program calibrates in float32, the detector in float64. That rounds scores by some 1e-6. Ranks among the calibration
normals jump: an evidence, or the score, that comes as close as this to a normal's may count as on its other side.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from core.files import replacing, write_json
from core.metrics import threshold_at_fpr
from core.provenance import environment
from mtl_moe.calibration import Calibration, evidence_names
from mtl_moe.floors import grey_log_mean_gradient
from mtl_moe.infer import Trained
from mtl_moe.scoring import make_map_fn, make_score_fn
from mtl_moe.system import System
from mtl_moe.tasks.base import to_float

MapFn = Callable[[jax.Array, jax.Array], jax.Array]  # of `make_map_fn`

FILE = "detector.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")  # that the file can run on, whichever it is written on
TOLERANCE = 1e-4  # of an output's largest value: float32 sums in another order


def export(
    system: System,
    trained: Trained,
    calibration: Calibration | None,
    images: np.ndarray,
    preprocessing: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Writes FILE and export.json into `folder`, after the reloaded program was compared with the detector.

    Args:
      calibration: what the scores are made with; None: the program gives raw ones only.
      images: uint8 [n, H, W, C], n > 0, to compare on.
      preprocessing: how files become such images, for export.json.

    Returns:
      The content of export.json.

    Raises:
      ValueError: if the reloaded program's outputs differ by more than the tolerance; nothing is written then.
    """
    # One device, whatever was trained on.
    single = dataclasses.replace(system, model=system.model.clone(mesh=None))
    params, extra = jax.device_get((trained.params, trained.extra))
    # The precision becomes part of the program: in float32 it gives the same scores on every machine.
    score_fn = make_score_fn(single, precision="highest")
    batch = images[np.arange(system.config.score.batch_size) % len(images)]

    def outputs(params: Any, extra: Any, images: jax.Array) -> dict[str, jax.Array]:
        texture = grey_log_mean_gradient(to_float(images).mean(axis=-1))
        return score_fn(params, extra, images) | {"texture": texture}

    data = system.config.data
    map_fn = make_map_fn(calibration, data.image_size, data.mask_size) if calibration else None

    def program_of(images: jax.Array) -> dict[str, jax.Array]:
        found = outputs(params, extra, images)
        return found | (_calibrated(calibration, map_fn, found) if calibration else {})

    with jax.default_matmul_precision("highest"):  # float32 products of a bfloat16 detector too
        expected = jax.device_get(jax.jit(outputs)(params, extra, batch))
        program = jax.export.export(jax.jit(program_of), platforms=PLATFORMS)(
            jax.ShapeDtypeStruct(batch.shape, jnp.uint8)
        )
    content = program.serialize()
    found = jax.device_get(jax.export.deserialize(bytearray(content)).call(jnp.asarray(batch)))
    ranges = {name: (values, values) for name, values in expected.items()}
    ranges |= _ranges(calibration, map_fn, expected) if calibration else {}
    differences = {name: _distance(found[name], *ends) for name, ends in ranges.items()}
    if not all(difference <= TOLERANCE for difference in differences.values()):  # none is NaN
        raise ValueError(
            f"the exported program differs from the detector by {differences} of the largest value, expected at most "
            f"{TOLERANCE:.0e}; nothing was written"
        )
    facts = {
        "input": {"dtype": "uint8", "shape": list(batch.shape)},
        "preprocessing": preprocessing,
        "outputs": {name: list(found[name].shape) for name in ranges},
        "evidences": evidence_names(system.tasks),
        **_calibration_facts(system, calibration),
        "platforms": list(program.platforms),
        "checkpoint_step": trained.step,
        "max_difference": differences,
        "environment": environment(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE) as temporary:
        temporary.write_bytes(content)
    write_json(folder / "export.json", facts)
    return facts


def _calibration_facts(system: System, calibration: Calibration | None) -> dict[str, Any]:
    """What export.json says of the calibration (null: scores are raw) and of the score's thresholds."""
    if calibration is None:
        return {"calibration": None, "thresholds": []}
    rates = system.config.score.false_positive_rates
    return {
        "calibration": {
            "source": calibration.source,
            "manifest_hash": calibration.manifest_hash,
            "normals": len(calibration.fused),
            "patients": calibration.num_groups,
        },
        "thresholds": [{"fpr": float(rate), "threshold": threshold_at_fpr(calibration.fused, rate)} for rate in rates],
    }


def _calibrated(calibration: Calibration, map_fn: MapFn, found: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Score, p-value and finished map of the other outputs, in float32."""
    score = calibration.fuse(calibration.corrected(found["raw"], found["texture"]))
    n = len(calibration.fused)
    below = jnp.searchsorted(np.sort(calibration.fused), score, "left")
    finished = map_fn(found["maps"], found["body"])
    return {"score": score, "p_value": (1.0 + n - below) / (n + 1.0), "map": finished}


def _ranges(
    calibration: Calibration, map_fn: MapFn, expected: Mapping[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Lowest and highest score, p-value and map that the detector gives for raw scores within TOLERANCE.

    Higher corrected scores never give a lower score nor a higher p-value.
    """
    corrected = calibration.corrected(expected["raw"], expected["texture"])
    slack = TOLERANCE * np.abs(expected["raw"]).max()
    low, high = (calibration.fuse(corrected + side) for side in (-slack, slack))
    finished = np.asarray(map_fn(expected["maps"], expected["body"]))
    p_values = calibration.p_values(high), calibration.p_values(low)
    return {"score": (low, high), "p_value": p_values, "map": (finished, finished)}


def _distance(found: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """How far `found` lies outside of [low, high], as a share of the largest value."""
    return float(np.maximum(low - found, found - high).max(initial=0.0) / np.abs(high).max())
