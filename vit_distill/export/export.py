"""Export of a student: written beside, reloaded, compared with the adapted model on real images, moved into place.

Axes: B batch, H W C image, S stored image side.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.files import write_json
from core.provenance import environment
from vit_distill.export import adapters, onnx_file, other_tools, stablehlo
from vit_distill.export.compare import TOLERANCE, Outputs, largest_difference, model_outputs
from vit_distill.export.usage import usage
from vit_distill.formats.hugging_face import write_hugging_face_folder
from vit_distill.formats.timm import write_timm_folder
from vit_distill.lora import attach, merge
from vit_distill.model_card import model_card
from vit_distill.student import Student
from vit_distill.teacher import load_teacher

RECORD = "export.json"


class _Kind(NamedTuple):
    """write(student, folder) and, for each tool that reads it back, read(student, folder)(uint8 images) -> outputs."""

    write: Callable[[Student, Path], None]
    read: Callable[[Student, Path], Callable[[np.ndarray], Outputs]]
    tool: str = "vit_distill"
    other_tool: str = ""
    other_read: Callable[[Path], Callable[[np.ndarray], Outputs]] | None = None


def export(student: Student, kind: str, folder: str | Path, images: np.ndarray) -> dict[str, Any]:
    """Writes the merged student (or its adapters) to `folder`, with a model card (README.md).

    Args:
      kind: one of KINDS.
      folder: must not exist yet, or be empty, or hold an earlier export, which is replaced.
      images: uint8 [n, S, S, C], n > 0, S = student.preprocessing.resize_size: what the comparison is made on.

    Returns:
      kind, folder, files {name: bytes}, max_difference (share of an output's largest value), tolerance, reloaded_by
      {tool and version: its difference}: our own reader always, timm or transformers where they can be imported; and
      not_reloaded_by {tool: why it could not be asked}.

    Raises:
      ValueError: for an unknown kind, a student the format cannot hold, a folder of something else, or a reloaded
        model that differs by more than the tolerance. Nothing is left then, and an earlier export stays as it was.
    """
    if kind not in KINDS:
        raise ValueError(f"export: expected one of {KINDS}, found {kind!r}")
    if not len(images):
        raise ValueError("export: expected at least one image to compare the reloaded model on, found none")
    folder, entry = Path(folder).absolute(), _KINDS[kind]
    with _replaced(folder) as partial:
        entry.write(student, partial)
        differences, skipped = _compare(student, kind, entry, partial, images)
        result = {"kind": kind, "max_difference": max(differences.values()), "tolerance": TOLERANCE}
        result |= {"reloaded_by": differences, "not_reloaded_by": skipped}
        (partial / "README.md").write_text(model_card(student, usage(student, kind, partial), result))
        write_json(partial / RECORD, result | {"num_images": len(images), "environment": environment()})
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return result | {"folder": str(folder), "files": files}


def _compare(
    student: Student, kind: str, entry: _Kind, folder: Path, images: np.ndarray
) -> tuple[dict[str, float], dict[str, str]]:
    """Largest difference by tool, and why a tool was not asked.

    The expected values come from base and adapters, not from the merged weights that were written.
    """
    params = student.params if student.adapters is None else attach(student.base, student.adapters, student.lora)
    expected = model_outputs(student.config, params, np.asarray(student.preprocessing.evaluate(images)))
    readers, skipped = {entry.tool: lambda: entry.read(student, folder)}, {}
    if entry.other_tool:
        if reason := other_tools.unavailable(entry.other_tool):
            skipped[entry.other_tool] = reason
        else:
            readers[other_tools.with_version(entry.other_tool)] = lambda: entry.other_read(folder)
    differences = {}
    for tool, make_reader in readers.items():
        try:
            reader = make_reader()
            found = reader(images)
            # One image alone too: the batch size must be free.
            alone = {name: values[:1] for name, values in expected.items()}
            difference = max(largest_difference(expected, found), largest_difference(alone, reader(images[:1])))
        except Exception as error:  # whatever another tool raises, this export does not load there
            raise ValueError(f"the {kind} export could not be reloaded by {tool}, nothing is left: {error}") from error
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the {kind} export reloaded by {tool} differs from the adapted model by {difference:.1e} of the "
                f"largest value, expected at most {TOLERANCE:.0e}; nothing is left"
            )
        differences[tool] = difference
    return differences, skipped


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """An empty folder beside, which takes the place of `folder` at the end and disappears after an error."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not _is_export(folder):
        raise ValueError(f"{folder} exists and is no earlier export: choose another --output")
    partial, old = (folder.with_name(f".{folder.name}.{word}.{os.getpid()}") for word in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def _is_export(folder: Path) -> bool:
    try:
        return json.loads((folder / RECORD).read_text())["kind"] in KINDS
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_folder(write: Callable[..., None]) -> Callable[[Student, Path], None]:
    """For the two folder formats: facts with a name and licence of the student's own, as a teacher read back has."""

    def adapted(student: Student, folder: Path) -> None:
        teacher = student.facts.get("teacher", {})
        name = f"{teacher.get('name', 'student')}_blocks_{'_'.join(map(str, student.blocks))}"
        kept = {"licence": teacher.get("licence", "unknown"), "class_names": teacher.get("class_names")}
        facts = {"name": name, **kept, **student.facts}
        write(folder, student.config, student.params, student.preprocessing, facts)

    return adapted


def _read_folder(_: Student, folder: Path) -> Callable[[np.ndarray], Outputs]:
    """Our own strict loader, with the preprocessing it finds in the folder."""
    teacher = load_teacher(str(folder))
    return lambda images: model_outputs(
        teacher.config, teacher.params, np.asarray(teacher.preprocessing.evaluate(images))
    )


def _read_adapters(student: Student, folder: Path) -> Callable[[np.ndarray], Outputs]:
    params = merge(student.base, *adapters.read(folder, student.base))
    return lambda images: model_outputs(student.config, params, np.asarray(student.preprocessing.evaluate(images)))


def _normalised(read: Callable[[Path], Callable[[np.ndarray], Outputs]]) -> Callable[..., Any]:
    """For programs that take normalised images."""

    def make(student: Student, folder: Path) -> Callable[[np.ndarray], Outputs]:
        call = read(folder)
        return lambda images: call(np.asarray(student.preprocessing.evaluate(images)))

    return make


_KINDS: Mapping[str, _Kind] = {
    "timm": _Kind(_write_folder(write_timm_folder), _read_folder, "vit_distill", "timm", other_tools.read_timm),
    "huggingface": _Kind(
        _write_folder(write_hugging_face_folder),
        _read_folder,
        "vit_distill",
        "transformers",
        other_tools.read_transformers,
    ),
    "adapters": _Kind(adapters.write, _read_adapters),
    "stablehlo": _Kind(stablehlo.write, _normalised(stablehlo.read), "jax.export"),
    "onnx": _Kind(onnx_file.write, _normalised(onnx_file.read), "onnxruntime"),
}
KINDS = tuple(_KINDS)
