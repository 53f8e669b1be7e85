"""The commands of the distiller, as main.py calls them: train (what config.command says), evaluate, plan, export."""

import importlib
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core.compilation import enable_compilation_cache
from core.files import write_json
from core.provenance import environment
from core.workdir import check_config, save_config
from input_pipeline.classification import LabelledSet, load_labelled
from input_pipeline.few_shot import read_manifest, select_few_shot, write_manifest
from vit_distill.distill import Distiller, build_distiller
from vit_distill.evaluate import compare
from vit_distill.lora import singular_values, suggested_rank
from vit_distill.student_io import build_student, load_distilled, load_teacher_of, save_facts, student_facts, truncated
from vit_distill.train import train

# Fields that may differ between a work directory's config and the one it is run with.
FREE_FIELDS = (
    "train.num_steps",
    "train.tensorboard",
    "data.root",
    "data.memory_limit_gb",
    "teacher.checkpoint",
    "lora.truncate_to",
)
# Where `config.command` is carried out when it is not the distillation itself: function(config, workdir).
COMMANDS = {
    "probe": "vit_distill.probe_command:run_probe",
    "segment": "vit_distill.segment:run_segment",
    "teacher": "vit_distill.supervised:run_teacher",
    "table": "vit_distill.table:run_table",
}


def train_and_evaluate(config: Any, workdir: Path, distributed: bool = False) -> None:
    """Carries out `config.command`; "distill" trains (or resumes), compares with the teacher and writes the report."""
    enable_compilation_cache()
    if distributed:
        jax.distributed.initialize()
    if config.command in COMMANDS:
        module, name = COMMANDS[config.command].split(":")
        getattr(importlib.import_module(module), name)(config, workdir)
    elif config.command == "distill":
        _distill(config, workdir)
    else:
        raise ValueError(f"command: expected one of {['distill', *COMMANDS]}, found {config.command!r}")


def evaluate(config: Any, workdir: Path) -> None:
    """Restores the newest checkpoint and compares with the teacher again; the report is written anew."""
    enable_compilation_cache()
    if config.command != "distill":
        raise ValueError(f"--mode=evaluate: nothing to restore for command {config.command!r}; run it again instead")
    check_config(config, workdir, FREE_FIELDS)
    if not (workdir / "student.json").exists():
        raise ValueError(f"{workdir} holds no distilled student: train first, or check --workdir")
    save_config(config, workdir)  # a rank to cut adapters to is from now on the student's
    distiller, trainable, facts = load_distilled(workdir)
    images, few, rest = few_shot_images(config, distiller.teacher, workdir)
    _report(distiller, trainable, facts, images, few, rest, workdir)


def plan(config: Any, workdir: Path | None) -> None:
    """Prints parameters, FLOPs, memory and estimated time, before anything is run."""
    from vit_distill.plan import run_plan

    run_plan(config, workdir)


def export(config: Any, workdir: Path, kind: str, output: str) -> None:
    """Writes the merged student for other tools, after reloading and comparing what was written."""
    from vit_distill.export.command import run_export

    enable_compilation_cache()
    run_export(config, workdir, kind, output)


def few_shot_images(config: Any, teacher: Any, workdir: Path | None) -> tuple[LabelledSet, np.ndarray, np.ndarray]:
    """(all images at the teacher's resize size, rows to train on, rows held out); the manifest is kept in `workdir`."""
    size = teacher.preprocessing.resize_size
    images = load_labelled(config.data, config.data.split, size, teacher.preprocessing.interpolation)
    own = workdir / "manifest.json" if workdir else None
    if own and own.exists():
        few = read_manifest(own, images)
    elif config.few_shot.manifest:
        few = read_manifest(Path(config.few_shot.manifest), images)
    else:
        section = config.few_shot
        few = select_few_shot(images, ratio=section.ratio, per_class=section.per_class, seed=section.seed)
    if own and not own.exists():
        section = config.few_shot
        write_manifest(own, images, few, ratio=section.ratio, per_class=section.per_class, seed=section.seed)
    rest = np.setdiff1d(np.arange(len(images)), few)
    # A random part of them: the first ones of a sorted listing are of one class.
    rest = np.random.default_rng((config.few_shot.seed, 3)).permutation(rest)[: config.calibration.num_images]
    return images, few, np.sort(rest)


def _distill(config: Any, workdir: Path) -> None:
    check_config(config, workdir, FREE_FIELDS)
    teacher = load_teacher_of(config)
    workdir.mkdir(parents=True, exist_ok=True)
    images, few, rest = few_shot_images(config, teacher, workdir)
    few_shot = images.take(few)
    print(f"{images.name}: {images.layout}; {len(few)} images to distil on, {len(rest)} held out")
    sample = few_shot.pixels.images(np.arange(min(len(few), config.calibration.num_images)))
    distiller = build_distiller(config, teacher, sample)
    print(f"student: blocks {', '.join(map(str, distiller.blocks))} of {teacher.config.depth}")
    save_config(config, workdir)
    facts = student_facts(distiller, {"hash": few_shot.manifest_hash(), "num_images": len(few), "name": images.name})
    save_facts(workdir, facts)
    trainable = None
    if config.student.method != "copy":
        state = train(distiller, few_shot, workdir)
        distiller, trainable = truncated(distiller, state.ema_params)
    if jax.process_index() == 0:
        _report(distiller, trainable, facts, images, few, rest, workdir)


def _report(
    distiller: Distiller,
    trainable: Any,
    facts: dict[str, Any],
    images: LabelledSet,
    few: np.ndarray,
    rest: np.ndarray,
    workdir: Path,
) -> None:
    """report.json, report.html, and the metrics in student.json."""
    from vit_distill.report import DistillReport, write_report

    started = time.monotonic()
    held_out = len(rest) > 0
    rows = rest if held_out else few[: distiller.config.calibration.num_images]
    split = "held_out" if held_out else "train"
    metrics, before, after = compare(distiller, trainable, images.pixels.images(rows))
    metrics = {f"{split}/{images.name}/{name}": value for name, value in metrics.items()}
    save_facts(workdir, facts | {"metrics": metrics})
    values = singular_values(trainable) if distiller.lora else {}
    ranks = suggested_rank(values) if values else {}
    provenance = environment() | {"seed": int(distiller.config.seed), "manifest_hash": facts["few_shot"]["hash"]}
    provenance["evaluation_seconds"] = round(time.monotonic() - started, 1)
    report = {"metrics": metrics, "blocks": {"before": before, "after": after}, "suggested_rank": ranks}
    write_json(workdir / "report.json", report | {"student": facts, "provenance": provenance})
    student = build_student(distiller, trainable, facts | {"metrics": metrics})
    write_report(workdir, DistillReport(distiller.teacher, student, before, after, values, metrics, provenance))
    for name, value in metrics.items():
        print(f"  {name:<48} {value:.4f}")
    print(f"report: {workdir / 'report.html'}")
