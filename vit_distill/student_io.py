"""A student on disk: student.json and checkpoints of a work directory, read back with its teacher."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from core.checkpoint import Checkpointer
from core.files import write_json
from core.optim import build_optimizer
from core.tree import num_params
from core.workdir import LOGGING, READING, read_config
from vit_distill.distill import Distiller, build_distiller, restore_target
from vit_distill.lora import truncate
from vit_distill.student import Student
from vit_distill.teacher import Teacher, function_facts, load_teacher_of
from vit_distill.train import check_base

FACTS = "student.json"
# Fields that may differ between a student's config and the one it is run with.
FREE_FIELDS = (*READING, *LOGGING, "train.num_steps", "teacher.checkpoint", "lora.truncate_to")


def student_facts(distiller: Distiller, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON for reports and model cards; `manifest` names the few-shot images' hash and count.

    "updates", how many of "num_steps" were made, comes after training.
    """
    config, teacher = distiller.config, distiller.teacher
    return {
        "teacher": {"name": teacher.name, "depth": teacher.config.depth, **teacher.source},
        "teacher_loading": teacher.report.facts(),
        "teacher_function": function_facts(teacher.config, teacher.preprocessing),
        "blocks": list(distiller.blocks),
        "choice": [dict(row) for row in distiller.choice],
        "method": config.student.method,
        "lora": lora_facts(distiller),
        "loss": config.loss.to_dict(),
        "few_shot": dict(manifest),
        "num_steps": int(config.train.num_steps) if config.student.method != "copy" else 0,
        "seed": int(config.seed),
        "num_params": {"teacher": num_params(teacher.params), "student": num_params(distiller.base)},
        "metrics": {},
    }


def lora_facts(distiller: Distiller) -> dict[str, Any]:
    """The adapters of `student_facts`, empty without."""
    lora = distiller.lora
    return dataclasses.asdict(lora) | {"ranks": dict(lora.ranks)} if lora else {}


def build_student(distiller: Distiller, trainable: Any, facts: Mapping[str, Any]) -> Student:
    """The student with everything merged, as float32 host arrays."""
    params = distiller.merged(trainable) if trainable is not None else distiller.base
    return Student(
        config=distiller.student_config,
        params=jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params),
        preprocessing=distiller.teacher.preprocessing,
        blocks=distiller.blocks,
        method=distiller.config.student.method,
        base=distiller.base,
        adapters=jax.device_get(trainable) if distiller.lora else None,
        lora=distiller.lora,
        facts=facts,
    )


def save_facts(workdir: Path, facts: Mapping[str, Any]) -> None:
    """Writes workdir/student.json."""
    write_json(workdir / FACTS, facts)


def read_facts(workdir: Path) -> dict[str, Any] | None:
    """workdir/student.json, None where there is none."""
    path = Path(workdir) / FACTS
    return json.loads(path.read_text()) if path.exists() else None


def check_teacher(workdir: Path, teacher: Teacher) -> None:
    """Raises ValueError if the student of `workdir` was distilled from other weights than the teacher's, or from what
    computes otherwise with them (students of earlier versions do not know)."""
    facts = read_facts(workdir) or {}
    expected = facts.get("teacher", {}).get("sha256")
    if expected and teacher.report.sha256 != expected:
        raise ValueError(
            f"teacher {teacher.name}: sha256 {teacher.report.sha256[:12]}..., the student of {workdir} was distilled "
            f"from {expected[:12]}...: put the same teacher file there, or use another --workdir"
        )
    found = function_facts(teacher.config, teacher.preprocessing)
    if other := {k: v for k, v in facts.get("teacher_function", {}).items() if found.get(k) != v}:
        differing = ", ".join(f"{name} {found.get(name)!r}, expected {value!r}" for name, value in other.items())
        raise ValueError(
            f"teacher {teacher.name}: found {differing}, as the student of {workdir} was distilled from: put the same "
            "config.json beside its weights, or use another --workdir"
        )


def load_student(workdir: Path, config: Any = None) -> Student:
    """Reads a distilled student back: its teacher's file, the copied blocks, the newest checkpoint.

    Args:
      config: instead of workdir/config.json; the teacher's file may have moved, for example.

    Raises:
      ValueError: if `workdir` holds no student, or its teacher's file is gone or another one.
      CheckpointError: if the checkpoint is missing, damaged or of another base.
    """
    return build_student(*load_distilled(workdir, config))


def load_distilled(workdir: Path, config: Any = None) -> tuple[Distiller, Any, dict[str, Any]]:
    """(distiller, what was trained, facts) of a work directory; arguments and errors as `load_student`.

    A student whose training was cut short is read with a warning.
    """
    workdir = Path(workdir)
    missing = [name for name in ("config.json", FACTS) if not (workdir / name).exists()]
    if missing:
        raise ValueError(
            f"{workdir} holds no distilled student ({', '.join(missing)} missing): expected the --workdir of "
            "configs/vit_distill/distill.py after training"
        )
    if config is None:
        config = ConfigDict(read_config(workdir))
    facts = read_facts(workdir)
    teacher = load_teacher_of(config)
    check_teacher(workdir, teacher)
    distiller = build_distiller(config, teacher, blocks=tuple(facts["blocks"]))
    if config.student.method == "copy":
        return distiller, None, facts
    state = restore_target(distiller, build_optimizer(config.optim, config.train.num_steps))
    with Checkpointer(workdir) as checkpointer:
        trainable, extra, updates = checkpointer.restore_model(state.ema_params, state.extra)
    check_base(distiller, extra, workdir)
    num_steps = int(config.train.num_steps)
    if updates < num_steps:
        print(
            f"WARNING: the student of {workdir} has had {updates} of {num_steps} updates: its training was stopped "
            "and goes on by the command that started it"
        )
    distiller, trainable = truncated(distiller, trainable)
    now = {"lora": lora_facts(distiller), "updates": updates, "num_steps": num_steps}
    # What was measured before further updates, or at another rank, is not this student's.
    if (facts.get("updates", updates), facts["lora"].get("ranks")) != (updates, now["lora"].get("ranks")):
        now["metrics"] = {}
    return distiller, trainable, facts | now


def truncated(distiller: Distiller, trainable: Any) -> tuple[Distiller, Any]:
    """Adapters cut to rank `config.lora.truncate_to`, the best of that rank; unchanged where it is 0."""
    rank = distiller.config.lora.truncate_to
    if not rank or not distiller.lora:
        return distiller, trainable
    adapters, lora = truncate(jax.device_get(trainable), rank, distiller.lora)
    return dataclasses.replace(distiller, lora=lora), adapters
