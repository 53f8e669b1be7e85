"""Learning rates by the feature loss on held-out images, for the rows of a table and for a single distillation."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.files import write_json
from core.loop import NonFiniteLossError
from vit_distill.table_bench import Bench, Trained, held_out_metrics, train_student


def check_rates(section: Any, name: str) -> None:
    """Raises ValueError unless `section`, called `name`, has ascending learning_rates and tune_steps that are none or
    some."""
    rates = tuple(section.learning_rates)
    if not rates or min(rates) <= 0 or list(rates) != sorted(set(rates)):
        raise ValueError(f"{name}.learning_rates: expected ascending rates above 0, found {rates}")
    if section.tune_steps < 0:
        raise ValueError(
            f"{name}.tune_steps: expected updates, or 0 for as many as of the training, found {section.tune_steps}"
        )


def choose_rate(
    bench: Bench, config: Any, ratio: float, section: str, path: Path
) -> tuple[float, dict[float, float], Trained | None]:
    """Walks over `section`.learning_rates, in runs of `section`.tune_steps updates (0: all), by held-out loss.

    Args:
      config: of the student, but for its rate.
      path: JSON of the losses so far: what stands there is not run again.

    Returns:
      (learning rate, the losses, the student where it was trained in full just now)

    Raises:
      ValueError: if no rate trains.
    """
    grid, tune_steps = tuple(config[section].learning_rates), config[section].tune_steps
    stored = json.loads(path.read_text()) if path.exists() else {}
    losses = {float(rate): math.inf if loss is None else loss for rate, loss in stored.items()}
    kept: dict[float, Trained] = {}

    def loss_of(rate: float) -> float:
        if rate not in losses:
            one = config.copy_and_resolve_references()
            one.optim.learning_rate = rate
            if tune_steps:
                one.train.num_steps = tune_steps
            try:
                student = train_student(bench, one, ratio)
                loss = held_out_metrics(bench, student)["loss"]
                losses[rate] = loss if math.isfinite(loss) else math.inf
            except NonFiniteLossError as error:
                print(f"  learning rate {rate:g} does not train: {error}")
                losses[rate] = math.inf
            write_json(path, losses)
            if losses[rate] == min(losses.values()) < math.inf and not tune_steps:
                kept.clear()
                kept[rate] = student
        return losses[rate]

    rate = walk(grid, loss_of)
    if not losses[rate] < math.inf:
        elsewhere = ", in another --workdir" * (section == "optim")  # where the table's may change
        raise ValueError(f"{path}: no rate of {section}.learning_rates={grid} trains; lower them{elsewhere}")
    tried = ", ".join(f"{r:g}: {losses[r]:.4f}" for r in sorted(losses))
    note = f"; at the edge of {section}.learning_rates: widen it" if at_edge(rate, grid) else ""
    print(f"  learning rate {rate:g} by held-out loss ({tried}){note}")
    return rate, losses, kept.get(rate)


def at_edge(rate: float | None, grid: Sequence[float]) -> bool:
    """Whether a wider grid might hold a better rate."""
    return len(grid) > 1 and rate in (grid[0], grid[-1])


def most_tried(num_rates: int) -> int:
    """How many of a grid's rates `walk` tries at most: three in the middle, then one after the other on one side."""
    return min(num_rates, num_rates // 2 + 2)


def walk(grid: Sequence[float], loss_of: Callable[[float], float]) -> float:
    """The grid's value of the smallest loss, from the middle downhill; with one valley the same as trying all."""
    position = len(grid) // 2
    while True:
        near = range(max(position - 1, 0), min(position + 2, len(grid)))
        best = min(near, key=lambda i: loss_of(grid[i]))
        if best == position:
            return grid[position]
        position = best
