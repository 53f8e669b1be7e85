"""The commands of the distiller, as main.py calls them: train (what config.command says), evaluate, plan, export."""

import dataclasses
import importlib
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core.compilation import enable_compilation_cache
from core.files import write_json
from core.mesh import check_one_host
from core.provenance import environment, print_devices
from core.sampling import even_rows
from core.workdir import check_config, save_config
from input_pipeline.few_shot import write_manifest
from input_pipeline.sources import LabelledSet
from vit_distill.distill import Distiller, build_distiller
from vit_distill.evaluate import compare
from vit_distill.images import MANIFEST, decode, few_shot_images, held_out_images, own_manifest
from vit_distill.lora import singular_values, suggested_rank
from vit_distill.student_io import (
    FACTS,
    FREE_FIELDS,
    build_student,
    check_teacher,
    load_distilled,
    lora_facts,
    read_facts,
    save_facts,
    student_facts,
    truncated,
)
from vit_distill.table_bench import WHOLE, student_bench
from vit_distill.teacher import load_teacher_of
from vit_distill.train import check_trains, train
from vit_distill.tune import check_rates, choose_rate
from vit_distill.weight_copy import CRITERIA

# Numbers without which a run would fail later, and in other words.
LEAST = {"few_shot.seed": 0, "train.cached_views": 0, "calibration.num_images": 1}
# Where `config.command` is carried out when it is not the distillation itself: function(config, workdir).
COMMANDS = {
    "probe": "vit_distill.probe_command:run_probe",
    "segment": "vit_distill.segment_command:run_segment",
    "teacher": "vit_distill.supervised:run_teacher",
    "table": "vit_distill.table:run_table",
}


def train_and_evaluate(config: Any, workdir: Path, distributed: bool = False) -> None:
    """Carries out `config.command`; "distill" trains (or resumes), compares with the teacher and writes the report."""
    enable_compilation_cache()
    if distributed:
        jax.distributed.initialize()
    print_devices()
    _check_numbers(config)
    if config.command in COMMANDS:
        check_one_host(f"command {config.command!r}")
        module, name = COMMANDS[config.command].split(":")
        getattr(importlib.import_module(module), name)(config, workdir)
    elif config.command == "distill":
        _distill(config, workdir)
    else:
        raise ValueError(f"command: expected one of {['distill', *COMMANDS]}, found {config.command!r}")


def evaluate(config: Any, workdir: Path) -> None:
    """Restores the newest checkpoint and compares with the teacher again; the report is written anew."""
    enable_compilation_cache()
    print_devices()
    if config.command != "distill":
        raise ValueError(f"--mode=evaluate: nothing to restore for command {config.command!r}; run it again instead")
    check_config(config, workdir, FREE_FIELDS)
    _check_adapters(config, "truncate_to")
    if not (workdir / FACTS).exists():
        raise ValueError(f"{workdir} holds no distilled student: train first, or check --workdir")
    distiller, trainable, facts = load_distilled(workdir, config)
    images, few, rest = few_shot_images(config, distiller.teacher.preprocessing, workdir)
    held_out = held_out_images(config, distiller.teacher.preprocessing, images, rest)
    save_config(config, workdir)  # a rank to cut adapters to is from now on the student's
    _report(distiller, trainable, facts, images.take(few), held_out, workdir)


def plan(config: Any, workdir: Path | None) -> None:
    """Prints parameters, FLOPs, memory and estimated time, before anything is run."""
    from vit_distill.plan import run_plan

    if config.command not in ("distill", "table"):
        raise ValueError(f"--mode=plan: expected a config of command distill or table, found {config.command!r}")
    run_plan(config, workdir)


def export(config: Any, workdir: Path, kind: str, output: str) -> None:
    """Writes the merged student for other tools, after reloading and comparing what was written."""
    from vit_distill.export.command import run_export

    enable_compilation_cache()
    run_export(config, workdir, kind, output)


def _distill(config: Any, workdir: Path) -> None:
    check_config(config, workdir, FREE_FIELDS)
    _check_adapters(config, "truncate_to")
    tunes = bool(config.optim.learning_rates)
    if own_manifest(workdir) is None:
        _check_options(config)
    teacher = load_teacher_of(config)
    check_teacher(workdir, teacher)
    images, few, rest = few_shot_images(config, teacher.preprocessing, workdir)
    few_shot, held_out = images.take(few), held_out_images(config, teacher.preprocessing, images, rest)
    aside = "none held out" if held_out is None else f"{len(held_out)} held out"
    if held_out is not None and not len(rest):
        aside += " (of the validation split)"
    print(f"{images.name}: {images.layout}; {len(few)} images to distil on, {aside}")
    if tunes and held_out is None:
        raise ValueError("optim.learning_rates are chosen on held-out images, and none are: give one learning_rate")
    accepted = own_manifest(workdir) is not None
    known = read_facts(workdir) if accepted else None
    sample = few_shot.images(even_rows(len(few), config.calibration.num_images))
    distiller = build_distiller(config, teacher, sample, tuple(known["blocks"]) if known else None)
    if config.student.method != "copy":
        check_trains(distiller, workdir)
        decode(few_shot)
    if held_out is not None:
        decode(held_out)
    print(f"student: blocks {', '.join(map(str, distiller.blocks))} of {teacher.config.depth}")
    facts = student_facts(distiller, {"hash": few_shot.manifest_hash(), "num_images": len(few), "name": images.name})
    if known:  # how its calibrated blocks were chosen
        facts["choice"] = known.get("choice", [])
    # Nothing is written before all of this was accepted: a corrected command finds the folder empty.
    if jax.process_index() == 0:  # of several hosts one writes
        workdir.mkdir(parents=True, exist_ok=True)
        if not accepted:
            write_manifest(workdir / MANIFEST, images, few, **_selection(config.few_shot))
        save_config(config, workdir)
        if not known:  # what a student measured stays until there is a longer trained one
            save_facts(workdir, facts)
    trainable = None
    if config.student.method != "copy":
        if tunes:
            # As long as the run was begun: rates that runs of two lengths tried do not compare.
            num_steps = (known or facts)["num_steps"]
            distiller, facts["tuned"] = _tuned(distiller, few_shot, held_out, workdir, num_steps)
            save_facts(workdir, (known or facts) | {"tuned": facts["tuned"]})
        state = train(distiller, few_shot, workdir)
        facts["updates"] = int(state.step)
        if jax.process_count() == 1:
            distiller, trainable = truncated(distiller, state.ema_params)
            facts["lora"] = lora_facts(distiller)
    if jax.process_count() > 1:  # what was trained lies on all of them
        print(f"trained; now run on one host: python main.py --mode=evaluate --workdir={workdir}")
        return
    _report(distiller, trainable, facts, few_shot, held_out, workdir)
    if cached := sum(path.stat().st_size for path in (workdir / "teacher_features").glob("*")):
        print(
            f"{workdir / 'teacher_features'} ({cached / 2**30:.2f} GiB) serves longer training only: it may be deleted"
        )


def _check_options(config: Any) -> None:
    """Raises ValueError for options of a new distillation that are unknown or would do nothing."""
    criterion = config.calibration.criterion
    if criterion not in CRITERIA:
        raise ValueError(f"calibration.criterion: expected one of {CRITERIA}, found {criterion!r}")
    _check_adapters(config, "warm_start")
    if config.optim.learning_rates:
        check_rates(config.optim, "optim")
        check_one_host("optim.learning_rates")
        if config.student.method == "copy":
            raise ValueError('optim.learning_rates: student.method="copy" trains nothing')


def _check_adapters(config: Any, field: str) -> None:
    """Raises ValueError for an option of adapters, lora.`field`, with a student that has none."""
    value, method = config.lora[field], config.student.method
    if value and method != "lora":
        raise ValueError(
            f"lora.{field}={value} is of adapters, and student.method={method!r} has none: set it to {type(value)()}, "
            'or take student.method="lora"'
        )


def _check_numbers(config: Any) -> None:
    """Raises ValueError for a field of LEAST that the command has, and that is less."""
    for name, least in LEAST.items():
        section, _, field = name.rpartition(".")
        found = (config.get(section, {}) if section else config).get(field, least)
        if found < least:
            raise ValueError(f"{name}: expected a number of at least {least}, found {found}")


def _tuned(
    distiller: Distiller, few_shot: LabelledSet, held_out: LabelledSet, workdir: Path, num_steps: int
) -> tuple[Distiller, dict[str, Any]]:
    """The distiller with the best of optim.learning_rates, tried in runs of tune_steps or `num_steps` updates, and what
    was found, for the report."""
    config = distiller.config.copy_and_resolve_references()
    config.optim.tune_steps = config.optim.tune_steps or num_steps
    bench = student_bench(distiller, few_shot, held_out, workdir)
    rate, losses, _ = choose_rate(bench, config, WHOLE, "optim", workdir / "learning_rates.json")
    config.optim.learning_rate = rate
    found = {"learning_rate": rate, "held_out_losses": {f"{r:g}": losses[r] for r in sorted(losses)}}
    return dataclasses.replace(distiller, config=config), found


def _selection(section: Any) -> dict[str, Any]:
    """How the images were chosen, for the manifest's record."""
    if section.manifest:
        return dict(manifest=section.manifest)
    return dict(ratio=section.ratio, per_class=section.per_class, seed=section.seed)


def _report(
    distiller: Distiller,
    trainable: Any,
    facts: dict[str, Any],
    few_shot: LabelledSet,
    held_out: LabelledSet | None,
    workdir: Path,
) -> None:
    """report.json, report.html, and the metrics in student.json; on the few-shot images where none are held out."""
    from vit_distill.report import write_report

    started = time.monotonic()
    rows = even_rows(len(few_shot), distiller.config.calibration.num_images)
    split, shown = ("train", few_shot.take(rows)) if held_out is None else ("held_out", held_out)
    metrics, before, after = compare(distiller, trainable, shown.images(np.arange(len(shown))))
    metrics = {f"{split}/{few_shot.name}/{name}": value for name, value in metrics.items()}
    save_facts(workdir, facts | {"metrics": metrics})
    values = singular_values(trainable) if distiller.lora else {}
    ranks = suggested_rank(values) if values else {}
    provenance = environment() | {"seed": int(distiller.config.seed), "manifest_hash": facts["few_shot"]["hash"]}
    provenance["evaluation_seconds"] = round(time.monotonic() - started, 1)
    report = {"metrics": metrics, "blocks": {"before": before, "after": after}, "suggested_rank": ranks}
    write_json(workdir / "report.json", report | {"student": facts, "provenance": provenance})
    student = build_student(distiller, trainable, facts | {"metrics": metrics})
    write_report(
        workdir,
        distiller.teacher,
        student,
        before=before,
        after=after,
        singular_values=values,
        metrics=metrics,
        provenance=provenance,
        num_images=len(shown),
        held_out=held_out is not None,
    )
    for name, value in metrics.items():
        print(f"  {name:<48} {value:.4f}")
    print(f"report: {workdir / 'report.html'}")
