"""The commands of the distiller, as main.py calls them: train (what config.command says), evaluate, plan, export."""

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
from core.workdir import LOGGING, READING, check_config, save_config
from input_pipeline.classification import LabelledSet, corrupt_rows, load_labelled
from input_pipeline.few_shot import read_manifest, select_few_shot, write_manifest
from input_pipeline.index import DataError
from vit_distill.distill import Distiller, build_distiller
from vit_distill.evaluate import compare
from vit_distill.lora import singular_values, suggested_rank
from vit_distill.sampling import even_rows
from vit_distill.student_io import (
    build_student,
    check_teacher,
    load_distilled,
    load_teacher_of,
    lora_facts,
    read_facts,
    save_facts,
    student_facts,
    truncated,
)
from vit_distill.train import check_trains, train

# Fields that may differ between a work directory's config and the one it is run with.
FREE_FIELDS = (*READING, *LOGGING, "train.num_steps", "teacher.checkpoint", "lora.truncate_to")
DECODED = 1024  # images at once, where all are read before training
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
    print_devices()
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
    if not (workdir / "student.json").exists():
        raise ValueError(f"{workdir} holds no distilled student: train first, or check --workdir")
    distiller, trainable, facts = load_distilled(workdir, config)
    images, few, rest = few_shot_images(config, distiller.teacher, workdir)
    held_out = held_out_images(config, distiller.teacher, images, rest)
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


def few_shot_images(config: Any, teacher: Any, workdir: Path | None) -> tuple[LabelledSet, np.ndarray, np.ndarray]:
    """(all images at the teacher's resize size, rows to train on, `calibration.num_images` rows of other groups).

    Raises:
      ValueError: as `load_labelled`, `read_manifest` and `select_few_shot`; for a manifest beside a ratio or number.
    """
    section, own = config.few_shot, workdir and _own_manifest(workdir)
    if section.manifest and not own and (section.per_class or section.ratio != 1):
        raise ValueError(
            "few_shot.manifest names the images: leave few_shot.ratio at 1 and few_shot.per_class at 0, found "
            f"ratio={section.ratio} and per_class={section.per_class}"
        )
    images = _load(config, teacher, config.data.split)
    if manifest := own or section.manifest:
        few = read_manifest(Path(manifest), images)
    else:
        chosen = dict(ratio=section.ratio, per_class=section.per_class, seed=section.seed)
        few = select_few_shot(images, **chosen, skip_corrupt=config.data.skip_corrupt)
    trained_on = {images.groups[row] for row in few}  # patients whose other images are not held out either
    rest = np.flatnonzero([group not in trained_on for group in images.groups])
    return images, few, _some(config, images, rest)


def held_out_images(config: Any, teacher: Any, images: LabelledSet, rest: np.ndarray) -> LabelledSet | None:
    """Images to measure on that were not trained on: `rest` of `images`, else some of the validation split, if any.

    Where that split is the user's own, those of its patients (groups) that stand in `images` too are left out.
    """
    if len(rest):
        return images.take(rest)
    if config.data.split != "train":
        return None
    try:
        valid = _load(config, teacher, "valid")
    except DataError:  # the training split was read: there is just no validation split
        return None
    trained_on = set(images.groups)
    rows = _some(config, valid, np.flatnonzero([group not in trained_on for group in valid.groups]))
    return valid.take(rows) if len(rows) else None


def _load(config: Any, teacher: Any, split: str) -> LabelledSet:
    """A split in which corrupt files are still to be looked for, among those that are used."""
    preprocessing = teacher.preprocessing
    return load_labelled(config.data, split, preprocessing.resize_size, preprocessing.interpolation, check=False)


def _some(config: Any, images: LabelledSet, rows: np.ndarray) -> np.ndarray:
    """`calibration.num_images` of the rows, drawn by the seed of the few-shot images, ascending.

    With data.skip_corrupt those of them that can be decoded.
    """
    rng = np.random.default_rng((config.few_shot.seed, 3))
    drawn = np.sort(rng.permutation(rows)[: config.calibration.num_images])
    return np.setdiff1d(drawn, corrupt_rows(images, drawn)) if config.data.skip_corrupt else drawn


def _decode(images: LabelledSet) -> None:
    """Reads what stays in memory anyway: a damaged image is an error before the run has written anything."""
    if images.pixels.in_memory:
        for start in range(0, len(images), DECODED):
            images.images(np.arange(start, min(start + DECODED, len(images))))


def _own_manifest(workdir: Path) -> Path | None:
    """The manifest of a run that was accepted: it was written before config.json; None where there is none yet."""
    path = workdir / "manifest.json"
    return path if path.exists() and (workdir / "config.json").exists() else None


def _distill(config: Any, workdir: Path) -> None:
    check_config(config, workdir, FREE_FIELDS)
    teacher = load_teacher_of(config)
    check_teacher(workdir, teacher)
    images, few, rest = few_shot_images(config, teacher, workdir)
    few_shot, held_out = images.take(few), held_out_images(config, teacher, images, rest)
    aside = "none held out" if held_out is None else f"{len(held_out)} held out"
    if held_out is not None and not len(rest):
        aside += " (of the validation split)"
    print(f"{images.name}: {images.layout}; {len(few)} images to distil on, {aside}")
    accepted = _own_manifest(workdir) is not None
    known = read_facts(workdir) if accepted else None
    sample = few_shot.images(even_rows(len(few), config.calibration.num_images))
    distiller = build_distiller(config, teacher, sample, tuple(known["blocks"]) if known else None)
    if config.student.method != "copy":
        check_trains(distiller)
        _decode(few_shot)
    if held_out is not None:
        _decode(held_out)
    print(f"student: blocks {', '.join(map(str, distiller.blocks))} of {teacher.config.depth}")
    facts = student_facts(distiller, {"hash": few_shot.manifest_hash(), "num_images": len(few), "name": images.name})
    if known:  # how its calibrated blocks were chosen
        facts["choice"] = known.get("choice", [])
    # Nothing is written before all of this was accepted: a corrected command finds the folder empty.
    if jax.process_index() == 0:  # of several hosts one writes
        workdir.mkdir(parents=True, exist_ok=True)
        if not accepted:
            write_manifest(workdir / "manifest.json", images, few, **_selection(config.few_shot))
        save_config(config, workdir)
        save_facts(workdir, facts)
    trainable = None
    if config.student.method != "copy":
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
    from vit_distill.report import DistillReport, write_report

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
    results = DistillReport(
        distiller.teacher, student, before, after, values, metrics, provenance, len(shown), held_out is not None
    )
    write_report(workdir, results)
    for name, value in metrics.items():
        print(f"  {name:<48} {value:.4f}")
    print(f"report: {workdir / 'report.html'}")
