"""The ablation from one command: rows that differ from the base in a few fields, with several seeds, in one table.

A row is trained (a cell for each seed, in workdir/cells/<row>_seed<n>) or, where it differs in scoring alone, measured
from the base's cells, or fused from other rows' cells. Finished cells are not run again, and a stopped one goes on from
its checkpoint.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from core.compilation import enable_compilation_cache
from core.mesh import check_one_host
from core.workdir import check_config, save_config
from input_pipeline.dataset import Dataset, Split, load_dataset
from mtl_moe.ablation_cell import FREE_FIELDS as CELL_FREE_FIELDS
from mtl_moe.ablation_cell import Stored, joined, load_trained, measure, run_cell, uncorrected
from mtl_moe.ablation_rows import BASE, Row, build_rows, cell_config
from mtl_moe.ablation_summary import Outcome, write_summary
from mtl_moe.calibration import Calibration
from mtl_moe.evaluate import check_score
from mtl_moe.painted import TRAINED, UNSEEN, painted_normals
from mtl_moe.system import build_system

# The table may grow: rows and seeds can be added later.
FREE_FIELDS = (*CELL_FREE_FIELDS, "ablation.rows", "ablation.num_seeds")


# What a row that is read from other rows' scores has not.
UNMEASURED = {"pixels": {}, "train_seconds": None, "score_images_per_second": None}


class Cell(NamedTuple):
    """A row that was trained with one seed: its config, the content of its cell.json and its folder."""

    config: Any
    facts: Mapping[str, Any]
    folder: Path

    def load(self) -> tuple[Stored, Calibration]:
        """Its stored scores and their calibration."""
        return load_trained(self.folder, build_system(self.config).tasks, self.config.score.fusion)


class _Data:
    """Data set and painted normals of a config, kept until another is asked for."""

    def __init__(self, painted_images: int):
        self._painted_images = painted_images
        self._key: str = ""
        self._value: tuple[Dataset, Split] | None = None

    def load(self, config: Any) -> tuple[Dataset, Split]:
        key = json.dumps([config.data.to_dict(), config.model.patch_size])
        if key != self._key:
            self._key, self._value = "", None  # the last one's memory is free before the next is read
            dataset = load_dataset(config.data, min_size=config.model.patch_size)
            _check_data(config, dataset)
            self._value = dataset, painted_normals(dataset.splits["calibration"], self._painted_images)
            self._key = key
        return self._value


def run_ablation(config: Any, workdir: Path) -> list[dict[str, Any]]:
    """Runs the cells that are missing; writes table.md, table.json, table.png and report.html; returns the rows.

    All rows are trained with the first seed, then all with the next: a whole table is there after each.

    Raises:
      ValueError: for fields that do not fit and data without labelled test images, before anything is run; for a
        `workdir` of another config.
    """
    enable_compilation_cache()
    check_one_host("the ablation")
    tasks = build_system(config).tasks
    rows = build_rows(config, tasks)
    check_config(config, workdir, FREE_FIELDS)
    _check_rows(config, rows)
    data = _Data(config.ablation.painted_images)
    dataset, _ = data.load(config)
    save_config(config, workdir)
    trained = {name: row for name, row in rows.items() if row.trained}
    print(
        f"{dataset.name}: {len(trained)} rows to train with {config.ablation.num_seeds} seeds each, "
        f"{len(rows) - len(trained)} more from the base's scores; finished ones are not run again"
    )
    outcomes: list[Outcome] = []
    for seed in range(config.ablation.num_seeds):
        cells: dict[str, Cell] = {}
        for number, (name, row) in enumerate(trained.items(), 1):
            one = cell_config(config, row, seed)
            print(f"[seed {one.seed}: {number}/{len(trained)}] {name}: {row.title}")
            folder = workdir / "cells" / f"{name}_seed{one.seed}"
            cells[name] = Cell(one, run_cell(one, data.load, folder), folder)
            read = {n: r for n, r in rows.items() if name == BASE and not r.trained and not r.parts}
            found = _read_cell({name: row} | read, cells[name])
            print(f"  {_in_words(found[0])}")
            outcomes += found
            jax.clear_caches()  # a hundred compiled trainings would stay in memory
        outcomes += [_fused_cells(name, [cells[part] for part in row.parts]) for name, row in rows.items() if row.parts]
        table = write_summary(config, _shared_facts(config, dataset), rows, outcomes, workdir)
    print((workdir / "table.md").read_text(encoding="utf-8"))
    print(f"table: {workdir / 'table.md'}, table.json, table.png; report: {workdir / 'report.html'}")
    return table


def _in_words(outcome: Outcome) -> str:
    if outcome.measured is None:
        return f"does not train: {outcome.facts['error']}"
    found = outcome.measured.criteria
    return (
        f"image AUROC {outcome.measured.test['image_auroc']:.3f}; painted defects: {found['unseen']:.3f} unseen, "
        f"{found['trained']:.3f} trained families"
    )


def _read_cell(rows: Mapping[str, Row], cell: Cell) -> list[Outcome]:
    """What one trained cell says about each of `rows`: about its own, and about those that read its scores."""
    facts = cell.facts
    if "error" in facts:
        return [Outcome(name, facts) for name in rows]
    stored, calibration = cell.load()
    outcomes = []
    for name, row in rows.items():
        used = calibration if row.texture else uncorrected(stored, calibration)
        used = dataclasses.replace(used, fusion=row.fusion or used.fusion)
        # Maps are fused in one way only, and nothing was timed.
        own = facts if row.trained else {**facts, **UNMEASURED}
        outcomes.append(Outcome(name, own, measure(stored, used, row.leave_out), stored))
    return outcomes


def _fused_cells(row: str, cells: Sequence[Cell]) -> Outcome:
    """The detectors of several cells of one seed as one, which costs what all of them cost."""
    facts = dict(cells[0].facts) | UNMEASURED
    facts |= {key: sum(cell.facts[key] for cell in cells) for key in ("num_params", "gflops", "num_tasks")}
    errors = [cell.facts["error"] for cell in cells if "error" in cell.facts]
    if errors:
        return Outcome(row, facts | {"error": errors[0]})
    stored, calibration = joined([cell.load() for cell in cells])
    return Outcome(row, facts, measure(stored, calibration), stored)


def _check_rows(config: Any, rows: Mapping[str, Row]) -> None:
    for name, row in rows.items():
        if not row.trained:
            continue
        one = cell_config(config, row, 0)
        try:
            jax.eval_shape(build_system(one).init_params, jax.random.key(0))  # experts are checked when it is traced
        except ValueError as error:
            raise ValueError(f"ablation row {name} ({row.title}) cannot be built: {error}") from error
        if one.data.image_size != config.data.image_size and (one.data.cache or one.data.kind == "npz"):
            raise ValueError(
                f"ablation row {name} needs images of {one.data.image_size} pixels, and the decoded cache holds one "
                "size: use the files (data.cache='' and data.root), or leave the row out"
            )


def _check_data(config: Any, dataset: Dataset) -> None:
    check_score(config.score, dataset)
    if config.score.bootstrap < 1:
        raise ValueError("score.bootstrap=0: the ablation's differences are intervals, expected at least 1 resample")
    test = dataset.splits.get("test")
    if test is None or len(np.unique(test.labels)) != 2:
        raise ValueError(
            f"{dataset.name}: the ablation compares rows on a test split with normal and abnormal images; found "
            f"{', '.join(f'{name} {len(split)}' for name, split in dataset.splits.items())}"
        )


def _shared_facts(config: Any, dataset: Dataset) -> dict[str, str]:
    """What all rows share, for readers."""
    counts = ", ".join(f"{len(split)} {name}" for name, split in dataset.splits.items())
    seeds = f"{config.seed} to {config.seed + config.ablation.num_seeds - 1}"
    return {
        "data": f"{dataset.name}, {dataset.image_size} pixels, {counts}",
        "base": f"tasks {', '.join(config.tasks.names)}; {config.train.num_steps} updates of {config.train.batch_size}",
        "seeds": seeds,
        "painted families": f"trained {', '.join(TRAINED)}; unseen {', '.join(UNSEEN)}; at most "
        f"{config.ablation.painted_images} calibration normals",
    }
