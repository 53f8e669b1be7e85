"""--mode=export: the student of a work directory, compared on the images it was distilled on."""

from pathlib import Path
from typing import Any

from core.sampling import even_rows
from core.workdir import check_config
from vit_distill.export.export import KINDS, export
from vit_distill.images import few_shot_images
from vit_distill.student_io import FREE_FIELDS, load_student

NUM_IMAGES = 16  # for the comparison


def run_export(config: Any, workdir: Path, kind: str, output: str = "") -> None:
    """Exports to `output` (default WORKDIR/export/KIND) and prints the files and the largest difference.

    Raises:
      ValueError: as `export`, and if the work directory holds no student, one of another config, or its images are
        gone.
    """
    if kind not in KINDS:  # before minutes of loading
        raise ValueError(f"--export: expected one of {KINDS}, found {kind!r}")
    # Adapters are cut by --mode=evaluate, which measures what is left.
    check_config(config, workdir, [field for field in FREE_FIELDS if field != "lora.truncate_to"])
    student = load_student(workdir, config)
    images, rows, _ = few_shot_images(config, student.preprocessing, workdir)
    chosen = rows[even_rows(len(rows), NUM_IMAGES)]
    folder = Path(output) if output else Path(workdir) / "export" / kind
    result = export(student, kind, folder, images.pixels.images(chosen))
    print(f"exported to {result['folder']}")
    for name, size in result["files"].items():
        print(f"  {name:<28} {size / 1e6:>9.2f} MB")
    for tool, difference in result["reloaded_by"].items():
        print(f"  reloaded by {tool}: differs by {difference:.1e} (tolerance {result['tolerance']:.0e})")
    for tool, reason in result["not_reloaded_by"].items():
        print(f"  not reloaded by {tool}: it {reason}")
