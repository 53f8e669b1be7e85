"""The ablation table from one command: every row with one target, the same images, updates and batch.

What differs is the row's method and its learning rate, which is chosen for each row by the feature loss on held-out
images. A cell is one student (row, few-shot ratio, reduction, seed); finished cells lie in workdir/cells and are not
run again.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.compilation import enable_compilation_cache
from core.files import write_json
from core.workdir import LOGGING, READING, check_config, save_config
from vit_distill.plan import make_plan
from vit_distill.table_bench import Bench, Trained, held_out_metrics, load_bench, probe_model, train_student
from vit_distill.table_summary import write_report, write_tables
from vit_distill.teacher import load_teacher_of
from vit_distill.tune import at_edge, check_rates, choose_rate

ENHANCED = {"student.method": "lora", "lora.preset": "enhanced"}
# Title of each row, and the config fields that make it. "teacher" and "copy" use no images and are run once.
ROWS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "teacher": ("teacher", {}),
    "copy": ("copy only", {"student.method": "copy"}),
    "scratch": ("scratch + KD", {"student.method": "scratch"}),
    "full": ("copy + full KD", {"student.method": "full"}),
    "plain": ("copy + plain LoRA (q, v)", {"student.method": "lora", "lora.preset": "plain"}),
    "enhanced": ("copy + enhanced LoRA", ENHANCED),
    "dora": ("copy + enhanced DoRA", ENHANCED | {"lora.dora": True}),
    "truncate": ("first blocks + enhanced LoRA", ENHANCED | {"student.blocks": "truncate"}),
    # What the paper leaves open or does not try; each changes one thing of "enhanced" or "full", "recipe" several.
    "last": ("last of each group + enhanced LoRA", ENHANCED | {"student.blocks": "last"}),
    "calibrated": ("calibrated blocks + enhanced LoRA", ENHANCED | {"student.blocks": "calibrated"}),
    "post": ("enhanced LoRA, target after the norm", ENHANCED | {"loss.target": "post_norm"}),
    "full_post": ("full KD, target after the norm", {"student.method": "full", "loss.target": "post_norm"}),
    "aligned": ("enhanced LoRA, every block aligned", ENHANCED | {"loss.blocks": "aligned"}),
    "warm": ("enhanced LoRA, warm start", ENHANCED | {"lora.warm_start": True}),
    "cls": ("enhanced LoRA, cls weight 0.5", ENHANCED | {"loss.cls_weight": 0.5}),
    "full_cls": ("full KD, cls weight 0.5", {"student.method": "full", "loss.cls_weight": 0.5}),
    "muon": ("enhanced LoRA, Muon", ENHANCED | {"optim.kind": "muon"}),
    "full_muon": ("full KD, Muon", {"student.method": "full", "optim.kind": "muon"}),
    "muon_post": (
        "enhanced LoRA, Muon, target after the norm",
        ENHANCED | {"optim.kind": "muon", "loss.target": "post_norm"},
    ),
    "full_muon_post": (
        "full KD, Muon, target after the norm",
        {"student.method": "full", "optim.kind": "muon", "loss.target": "post_norm"},
    ),
    "recipe": (
        "enhanced LoRA, cls weight 0.5, warm start, target after the norm",
        ENHANCED | {"loss.cls_weight": 0.5, "lora.warm_start": True, "loss.target": "post_norm"},
    ),
}
# Fields that may differ between a work directory's config and the one it is run with: the table may grow.
FREE_FIELDS = (
    *READING,
    *LOGGING,
    "teacher.checkpoint",
    "table.probe_data.root",
    "table.rows",
    "table.ratios",
    "table.reductions",
    "table.num_seeds",
    "table.learning_rates",
    # Did nothing in a table, and are no fields of it any more.
    "data.split",
    "few_shot.ratio",
    "few_shot.per_class",
    "few_shot.manifest",
    "lora.truncate_to",
)


@dataclasses.dataclass(frozen=True)
class Group:
    """The cells that differ in their seed alone; `ratio` is None for a row that uses no images."""

    row: str
    ratio: float | None
    reduction: int

    @property
    def name(self) -> str:
        ratio = "" if self.ratio is None else f"_ratio{self.ratio:g}"
        return f"{self.row}_r{self.reduction}{ratio}"

    @property
    def where(self) -> str:
        images = "" if self.ratio is None else f", {100 * self.ratio:g} %"
        return f"{ROWS[self.row][0]}, r={self.reduction}{images}"


def build_groups(section: Any) -> list[Group]:
    """The groups of config.table, ratio by ratio and reduction by reduction.

    Raises:
      ValueError: for an unknown row, or an empty or impossible list.
    """
    unknown = sorted(set(section.rows) - set(ROWS))
    if unknown or not section.rows:
        raise ValueError(f"table.rows: expected some of {tuple(ROWS)}, found {tuple(section.rows)}")
    check_rates(section, "table")
    if not section.ratios or not section.reductions or section.num_seeds < 1:
        raise ValueError("table: expected ratios, reductions and num_seeds of at least 1 each")
    groups = [Group("teacher", None, 1)] if "teacher" in section.rows else []
    if "copy" in section.rows:
        groups += [Group("copy", None, reduction) for reduction in section.reductions]
    trained = [row for row in section.rows if row not in ("teacher", "copy")]
    return groups + [
        Group(row, ratio, reduction) for ratio in section.ratios for reduction in section.reductions for row in trained
    ]


def cell_config(config: Any, group: Group, seed: int = 0, learning_rate: float | None = None) -> Any:
    """The distillation's config of one cell; `seed` counts from config.seed."""
    one = config.copy_and_resolve_references()
    one.student.reduction = group.reduction
    one.update_from_flattened_dict(dict(ROWS[group.row][1]))
    one.seed = config.seed + seed
    if learning_rate is not None:
        one.optim.learning_rate = learning_rate
    return one


def run_table(config: Any, workdir: Path) -> list[dict[str, Any]]:
    """Runs what is missing of the table; writes table.md, table.json, table.png and report.html; returns the rows.

    Raises:
      ValueError: for fields that do not fit, before anything is run; cells of another teacher, config or
        images in `workdir`.
    """
    enable_compilation_cache()
    groups = build_groups(config.table)
    check_config(config, workdir, FREE_FIELDS)
    teacher = load_teacher_of(config)
    plans = {group: make_plan(cell_config(config, group), teacher.config, rate=1.0) for group in groups}
    for group, plan in plans.items():
        depth, kept = teacher.config.depth, plan["models"]["student"]["depth"]
        if group.row != "teacher" and kept * group.reduction != depth:
            raise ValueError(
                f"{group.where}: student.blocks={config.student.blocks!r} keeps {kept} of {depth} blocks, which is not "
                f"r={group.reduction}: give a rule, or the table.reductions that the list is"
            )
    bench = load_bench(config, teacher, workdir)
    save_config(config, workdir)
    (workdir / "cells").mkdir(exist_ok=True)
    print(_announcement(groups, config))
    cells: list[dict[str, Any]] = []
    for number, group in enumerate(groups, 1):
        print(f"[{number}/{len(groups)}] {group.where}")
        cells += _run_group(bench, group, plans[group], workdir / "cells")
        write_tables(bench, cells, workdir)
    return write_report(bench, cells, workdir)


def _announcement(groups: Sequence[Group], config: Any) -> str:
    trained, section = sum(group.ratio is not None for group in groups), config.table
    seeds = section.num_seeds if section.tune_steps else section.num_seeds - 1
    return (
        f"at most {trained * seeds} runs of {config.train.num_steps} updates, and "
        f"{trained * len(section.learning_rates)} of {section.tune_steps or config.train.num_steps} to choose learning "
        "rates; what workdir/cells holds is not run again"
    )


def _run_group(bench: Bench, group: Group, plan: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The cells of a group, each read from its file or run."""
    trains = group.ratio is not None
    rate, first = None, None
    if trains:
        path = folder / f"{group.name}_learning_rates.json"
        rate, _, first = choose_rate(bench, cell_config(bench.config, group), group.ratio, "table", path)
    edge = at_edge(rate, bench.config.table.learning_rates)
    cells = []
    for seed in range(bench.config.table.num_seeds if trains else 1):
        config = cell_config(bench.config, group, seed, rate)
        path = folder / f"{group.name}_seed{config.seed}.json"
        cell = _read(path, bench, group, rate)
        if cell is None:
            cell = _identity(bench, group, plan, config) | {"learning_rate": rate}
            if group.row == "teacher":
                cell |= _measured(bench, bench.teacher.config, bench.teacher.params, None)
            else:
                student = first if seed == 0 and first else train_student(bench, config, group.ratio)
                cell |= _measured(bench, student.distiller.student_config, student.params, student)
            write_json(path, cell)
        cells.append(cell | {"at_grid_edge": edge})
        figures = {bench.metric: cell["accuracy"], "L1": cell["l1"]}
        found = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if value is not None)
        print(f"  {group.where}, seed {config.seed}: {found or 'nothing to compare it with'}")
    return cells


def _identity(bench: Bench, group: Group, plan: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """What a cell is, before it is run."""
    teacher = group.row == "teacher"
    images = None if group.ratio is None else bench.few_shot[group.ratio]
    return {
        "row": group.row,
        "title": ROWS[group.row][0],
        "ratio": group.ratio,
        "reduction": group.reduction,
        "seed": int(config.seed),
        "metric": bench.metric,
        "num_test": bench.num_test,
        "num_effective": bench.num_effective,
        **{key: plan["models"]["teacher" if teacher else "student"][key] for key in ("params", "gflops")},
        "num_trained": 0 if teacher else plan["training"]["num_trained"],
        "step_gflops": 0.0 if teacher else plan["training"]["step_gflops"]["total"],
        "num_images": 0 if images is None else len(images),
        "manifest_hash": None if images is None else images.manifest_hash(),
        "teacher_sha256": bench.teacher.report.sha256,
        "data": bench.data_hashes(group.ratio),
    }


def _measured(bench: Bench, config: Any, params: Any, student: Trained | None) -> dict[str, Any]:
    """Probe (None without one) and feature distances; the teacher has none to itself."""
    missing = ("accuracy", "valid_accuracy", "probe", "blocks", "seconds", "loss", "l1", "patch_l1", "cls_l1")
    measured = dict.fromkeys(missing)
    if bench.metric:
        found = probe_model(bench, config, params)
        measured |= {"accuracy": found[bench.metric], "valid_accuracy": found[f"valid_{bench.metric}"], "probe": found}
    if student is not None:
        measured |= held_out_metrics(bench, student)
        measured |= {"blocks": list(student.distiller.blocks), "seconds": student.seconds}
    return measured


def _read(path: Path, bench: Bench, group: Group, rate: float | None) -> dict[str, Any] | None:
    """A finished cell; None if there is none or it was trained with another learning rate (the grid has changed).

    Raises:
      ValueError: for a cell of another teacher, or made of other images (older cells do not say of which).
    """
    if not path.exists():
        return None
    cell = json.loads(path.read_text())
    if cell["teacher_sha256"] != bench.teacher.report.sha256:
        raise ValueError(
            f"{path} is of another teacher (sha256 {cell['teacher_sha256'][:12]}..., now "
            f"{bench.teacher.report.sha256[:12]}...): use another --workdir"
        )
    now = bench.data_hashes(group.ratio)
    if changed := [name for name, found in cell.get("data", now).items() if found != now.get(name)]:
        raise ValueError(
            f"{path} was made of other images ({', '.join(changed)}): use the data it was made of, or another --workdir"
        )
    known_since = {"num_test": bench.num_test, "num_effective": bench.num_effective}
    return known_since | cell if cell["learning_rate"] == rate else None
