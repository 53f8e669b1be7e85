"""Metrics to metrics.jsonl always, to TensorBoard where TensorFlow is installed; progress on the console."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

from core.files import replacing


class MetricLogger:
    """Appends one JSON line a logged step: {"step": 100, "loss": 1.2, ...}. A context manager.

    Resuming at step s keeps the lines up to s and drops later ones, so that the file reads as one uninterrupted run.
    """

    def __init__(self, workdir: Path, start_step: int = 0, tensorboard: bool = False):
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        kept = [record for record in read_history(workdir) if record["step"] <= start_step] if start_step else []
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", buffering=1)
        self._writer = None
        if tensorboard and importlib.util.find_spec("tensorflow") and importlib.util.find_spec("clu"):
            from clu import metric_writers  # imports TensorFlow: seconds, so only where it is asked for

            self._writer = metric_writers.SummaryWriter(str(workdir / "tensorboard"))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Writes one record; values are plain floats."""
        self._file.write(json.dumps({"step": step} | metrics) + "\n")
        if self._writer:
            self._writer.write_scalars(step, metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()


def read_history(workdir: Path) -> list[dict]:
    """Records of metrics.jsonl, oldest first; empty without the file. A half-written last line is left out.

    Raises:
      ValueError: if a line before the last is not JSON.
    """
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not JSON; remove the line or the file") from error
    return records


def progress_bar(total: int, initial: int = 0, scale: int = 1, description: str = "") -> tqdm:
    """Progress in images with rate and time left on standard error; a line a minute where that is no terminal.

    Args:
      total, initial: number of updates in all and done before.
      scale: images an update stands for.
    """
    interval = 0.5 if sys.stderr.isatty() else 60.0
    return tqdm(
        total=total,
        initial=initial,
        unit=" images",
        unit_scale=scale if scale > 1 else False,
        desc=description,
        mininterval=interval,
        dynamic_ncols=True,
    )


def all_finite(metrics: dict[str, float]) -> bool:
    """Whether no value is NaN or infinite."""
    return all(math.isfinite(value) for value in metrics.values())
