"""--mode=export: the student of a work directory, compared on the images it was distilled on."""

from pathlib import Path
from typing import Any

import numpy as np

from vit_distill.export.export import KINDS, export
from vit_distill.run import few_shot_images
from vit_distill.student_io import load_student

NUM_IMAGES = 16  # for the comparison: of different classes, as few-shot rows are ordered by class


def run_export(config: Any, workdir: Path, kind: str, output: str = "") -> None:
    """Exports to `output` (default WORKDIR/export/KIND) and prints the files and the largest difference.

    Raises:
      ValueError: as `export`, and if the work directory holds no student or its images are gone.
    """
    if kind not in KINDS:  # before minutes of loading
        raise ValueError(f"--export: expected one of {KINDS}, found {kind!r}")
    student = load_student(workdir)
    images, rows, _ = few_shot_images(config, student, workdir)
    chosen = rows[np.linspace(0, len(rows) - 1, min(NUM_IMAGES, len(rows))).astype(int)]
    folder = Path(output) if output else Path(workdir) / "export" / kind
    result = export(student, kind, folder, images.pixels.images(chosen))
    print(f"exported to {result['folder']}")
    for name, size in result["files"].items():
        print(f"  {name:<28} {size / 1e6:>9.2f} MB")
    for tool, difference in result["reloaded_by"].items():
        print(f"  reloaded by {tool}: differs by {difference:.1e} (tolerance {result['tolerance']:.0e})")
    for tool, reason in result["not_reloaded_by"].items():
        print(f"  not reloaded by {tool}: it {reason}")
