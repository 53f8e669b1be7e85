"""The model as an ONNX file, read back through onnxruntime. Both packages come with the extra [onnx]."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_distill.export.compare import Outputs
from vit_distill.export.onnx_graph import build_onnx
from vit_distill.export.stablehlo import check_size
from vit_distill.student import Student

FILE = "model.onnx"


def write(student: Student, folder: Path) -> None:
    """Writes FILE into `folder`, checked by ONNX's own checker.

    Raises:
      ValueError: without the packages of the extra [onnx], or for a student of more than 2 GiB.
    """
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--export=onnx needs {' and '.join(missing)}: install the extra with pip install '.[onnx]'")
    check_size(student, "ONNX")
    import onnx

    model = build_onnx(student.config, student.params, "student")
    onnx.save(model, folder / FILE)
    onnx.checker.check_model(str(folder / FILE), full_check=True)


def read(folder: Path) -> Callable[[np.ndarray], Outputs]:
    """The model of a written folder on the CPU: normalised images [B, H, W, C] -> outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def call(images: np.ndarray) -> Outputs:
        planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)
        return dict(zip(names, session.run(names, {"images": planes}), strict=True))

    return call
