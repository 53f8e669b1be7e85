"""report.html of a distillation: gathers sizes, latencies, the loss curve and what was measured, then writes the page.

Axes: R rank.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core.logs import read_history
from core.tree import num_params
from vit_distill.flops import model_size
from vit_distill.lora import suggested_rank
from vit_distill.plan import measure_latency
from vit_distill.report_data import ReportData
from vit_distill.report_page import write_page
from vit_distill.student import Student
from vit_distill.teacher import Teacher


def write_report(
    workdir: Path,
    teacher: Teacher,
    student: Student,
    *,
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    singular_values: Mapping[str, np.ndarray],
    metrics: Mapping[str, float],
    provenance: Mapping[str, Any],
    num_images: int,
    held_out: bool,
    batch_sizes: Sequence[int] = (1, 32),
) -> None:
    """Measures latencies and writes workdir/report.html; the loss curve and the config are read from `workdir`.

    Args:
      before, after: rows of `diagnostics.block_rows`, of the untrained copy and of the student.
      singular_values: of `lora.singular_values`, [R] by adapter; empty without adapters.
      metrics: flat, plain numbers: feature distances.
      num_images, held_out: how many images they were measured on, and whether these are not the few-shot images.
    """
    models = {"teacher": (teacher.config, teacher.params), "student": (student.config, student.params)}
    latency = {name: measure_latency(*model, batch_sizes) for name, model in models.items()}
    trained = num_params(student.adapters) if student.adapters is not None else 0
    summary = f"{student.config.depth} of {teacher.config.depth} blocks, {_METHODS[student.method]}"
    config = workdir / "config.json"
    write_page(
        workdir / "report.html",
        ReportData(
            title=f"Student of {teacher.name}",
            summary=summary + (f" ({trained / 1e6:.2f} M parameters, merged)" if trained else ""),
            models={name: model_size(architecture) for name, (architecture, _) in models.items()},
            latency=latency,
            device=jax.devices()[0].device_kind,
            history=read_history(workdir),
            blocks=student.blocks,
            blocks_before=before,
            blocks_after=after,
            num_images=num_images,
            on_training_images=not held_out and student.method != "copy",
            choice=student.facts.get("choice", ()),
            singular_values=singular_values,
            suggested_ranks=suggested_rank(singular_values),
            facts=dict(student.facts) | {"metrics": dict(metrics)},
            load_report=teacher.report.lines(),
            provenance=provenance,
            config=json.loads(config.read_text()) if config.exists() else {},
        ),
    )


_METHODS = {
    "lora": "low-rank adapters",
    "full": "all weights trained",
    "scratch": "trained from random weights",
    "copy": "copied, not trained",
}
