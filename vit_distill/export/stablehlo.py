"""The model as one StableHLO file with a free batch size, for any JAX, XLA or IREE without this code.

Input: normalised float32 images [b, H, W, C]; outputs as in `compare.named_outputs`. Weights are constants of the
program. Axes: B batch, H W C image.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from core.tree import num_params
from core.vit import VisionTransformer
from vit_distill.export.compare import Outputs, named_outputs
from vit_distill.student import Student

FILE = "model.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
MAX_BYTES = 2**31 - 2**20  # both containers, flatbuffers here and protobuf for ONNX, end at 2 GiB


def check_size(student: Student, format_name: str) -> None:
    """Raises ValueError where the weights do not fit into one file of 2 GiB."""
    size = 4 * num_params(student.params)
    if size > MAX_BYTES:
        raise ValueError(
            f"{format_name} files hold at most 2 GiB, this student's weights are {size / 2**30:.1f} GiB: "
            "use --export=timm or huggingface"
        )


def write(student: Student, folder: Path) -> None:
    """Writes FILE into `folder`.

    Raises:
      ValueError: for a student of more than 2 GiB.
    """
    check_size(student, "StableHLO")
    config = student.config
    params = jax.tree.map(jnp.asarray, student.params)

    def model(images: jax.Array) -> dict[str, jax.Array]:
        return named_outputs(VisionTransformer(config).apply({"params": params}, images))

    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, config.image_size, config.image_size, config.in_channels), jnp.float32)
    # The precision becomes part of the program: it gives the same features on every platform.
    with jax.default_matmul_precision("highest"):
        exported = jax.export.export(jax.jit(model), platforms=PLATFORMS)(images)
    (folder / FILE).write_bytes(exported.serialize())


def read(folder: Path) -> Callable[[np.ndarray], Outputs]:
    """The function of a written folder: normalised images [B, H, W, C] -> outputs."""
    exported = jax.export.deserialize(bytearray((folder / FILE).read_bytes()))
    return lambda images: jax.device_get(exported.call(jnp.asarray(images, jnp.float32)))
