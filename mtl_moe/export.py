"""A trained detector as one StableHLO file: images in, raw scores and maps out, for any JAX or XLA without this code.

Axes: B batch (config.score.batch_size, fixed in the file), H W C image, S evidences. Input: uint8 images [B, H, W, C].
Output, float32: raw [B, S], maps [B, S, H, W] and body [B, H, W] as in `mtl_moe.scoring.make_score_fn`, and texture [B]
(`mtl_moe.floors.log_mean_gradient`): all that `mtl_moe.calibration` makes scores and p-values of, with the work
directory's calibration.npz. export.json beside the file names the evidences. Weights are constants of the program.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from core.files import replacing, write_json
from core.provenance import environment
from mtl_moe.calibration import evidence_names
from mtl_moe.floors import grey_log_mean_gradient
from mtl_moe.infer import Trained
from mtl_moe.scoring import make_score_fn
from mtl_moe.system import System
from mtl_moe.tasks.base import to_float

FILE = "detector.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")  # that the file can run on, whichever it is written on
TOLERANCE = 1e-4  # of an output's largest value: float32 sums in another order


def export(system: System, trained: Trained, images: np.ndarray, folder: Path) -> dict[str, Any]:
    """Writes FILE and export.json into `folder`, after the reloaded program was compared with the detector.

    Args:
      images: uint8 [n, H, W, C], n > 0, to compare on.

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

    with jax.default_matmul_precision("highest"):  # float32 products of a bfloat16 detector too
        expected = jax.device_get(jax.jit(outputs)(params, extra, batch))
        program = jax.export.export(jax.jit(lambda images: outputs(params, extra, images)), platforms=PLATFORMS)(
            jax.ShapeDtypeStruct(batch.shape, jnp.uint8)
        )
    content = program.serialize()
    found = jax.device_get(jax.export.deserialize(bytearray(content)).call(jnp.asarray(batch)))
    differences = {name: float(np.abs(found[name] - v).max() / np.abs(v).max()) for name, v in expected.items()}
    if not max(differences.values()) <= TOLERANCE:
        raise ValueError(
            f"the exported program differs from the detector by {differences} of the largest value, expected at most "
            f"{TOLERANCE:.0e}; nothing was written"
        )
    facts = {
        "input": {"dtype": "uint8", "shape": list(batch.shape)},
        "outputs": {name: list(value.shape) for name, value in expected.items()},
        "evidences": evidence_names(system.tasks),
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
