"""What the distiller's report is made from: plain data that commands have computed. Axis alphabet: R rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_BLOCK_KEYS = {"block", "teacher_block", "l1", "cosine", "cka"}
_ROW_KEYS = {
    "row", "title", "ratio", "reduction", "n", "accuracy", "accuracy_std", "valid_accuracy", "l1", "l1_std", "params",
    "gflops", "num_trained", "learning_rate", "at_grid_edge",
    "probe_at_grid_edge",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything but the title is shown where it is there and left out where it is empty.

    Attributes:
      title, summary: of the page; the summary is one sentence.
      models: "teacher" and "student" -> depth, params, bytes, gflops (`flops.model_size`).
      latency: "teacher" and "student" -> batch size -> median seconds (`plan.measure_latency`).
      device: what latencies were measured on.
      history: records of metrics.jsonl: step, loss, l1, cls_l1, patch_l1.
      blocks_before, blocks_after: rows of `diagnostics.block_rows`, of the copy and of the trained student.
      num_images, on_training_images: how many images the blocks were compared on; whether the student saw them in
        training.
      choice: rows {rule, blocks, loss} of `weight_copy.calibrated_blocks`; `blocks` are those copied.
      singular_values, suggested_ranks: by adapter path, of `lora.singular_values` and `lora.suggested_rank`.
      table: rows of `table_summary.summarise`; `metric`: what "accuracy" is there, "" without a probe;
        `verdicts`, `verdict_note`: of `table_summary`; `shared`: what all rows have in common.
      facts: of the Student: teacher, few_shot, lora, loss and so on.
      load_report: lines of the teacher's LoadReport.
      provenance, config: plain JSON.
    """

    title: str
    summary: str = ""
    models: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    latency: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    device: str = ""
    history: Sequence[Mapping[str, float]] = ()
    blocks: Sequence[int] = ()
    blocks_before: Sequence[Mapping[str, float]] = ()
    blocks_after: Sequence[Mapping[str, float]] = ()
    num_images: int = 0
    on_training_images: bool = False
    choice: Sequence[Mapping[str, Any]] = ()
    singular_values: Mapping[str, np.ndarray] = field(default_factory=dict)
    suggested_ranks: Mapping[str, int] = field(default_factory=dict)
    table: Sequence[Mapping[str, Any]] = ()
    metric: str = "top1"
    shared: Mapping[str, str] = field(default_factory=dict)
    verdicts: Sequence[Mapping[str, Any]] = ()
    verdict_note: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    load_report: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rows, keys in (
            ("blocks_before", self.blocks_before, _BLOCK_KEYS),
            ("blocks_after", self.blocks_after, _BLOCK_KEYS),
            ("table", self.table, _ROW_KEYS),
        ):
            for row in rows:
                if keys - set(row):
                    raise ValueError(f"{name}: expected rows with {sorted(keys)}, found one with {sorted(row)}")
        if len(self.blocks_before) and len(self.blocks_after) and len(self.blocks_before) != len(self.blocks_after):
            raise ValueError(
                f"blocks_before and blocks_after: expected the same blocks, found {len(self.blocks_before)} and "
                f"{len(self.blocks_after)}"
            )
        if set(self.singular_values) != set(self.suggested_ranks):
            raise ValueError("singular_values and suggested_ranks: expected the same adapters in both")
        for name in ("models", "latency"):
            if unknown := set(getattr(self, name)) - {"teacher", "student"}:
                raise ValueError(f'{name}: expected "teacher" and "student", found {sorted(unknown)}')
