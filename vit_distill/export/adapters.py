"""Adapters alone: a small file that gives the student together with its teacher, and refuses any other.

adapters.safetensors holds the leaves by path ("block_00/attn/query/a"), adapters.json what they stand on: the teacher,
the copied blocks, the adapters' config, the sha256 of the weight copy, the student's architecture and preprocessing
(overrides may have changed the file's). Axes: L layers, R rank.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from core import tree
from core.files import write_json
from core.vit import VitConfig
from vit_distill.lora import LoraConfig, merge
from vit_distill.preprocessing import Preprocessing
from vit_distill.student import Student
from vit_distill.teacher import Teacher, function_facts
from vit_distill.weight_copy import copy_blocks

WEIGHTS, DESCRIPTION = "adapters.safetensors", "adapters.json"
FORMAT = "vit_distill adapters 1"


def write(student: Student, folder: Path) -> None:
    """Writes both files into `folder`.

    Raises:
      ValueError: for a student without adapters.
    """
    if student.adapters is None or student.lora is None:
        raise ValueError(
            f'this student has no adapters (student.method="{student.method}" trains or copies whole weights): '
            "export it as timm, huggingface, stablehlo or onnx"
        )
    leaves = flatten_dict(jax.device_get(student.adapters), sep="/")
    save_file({path: np.ascontiguousarray(leaf) for path, leaf in leaves.items()}, folder / WEIGHTS)
    content = {
        "format": FORMAT,
        "base_fingerprint": tree.fingerprint(student.base),
        "blocks": student.blocks,
        "lora": dataclasses.asdict(student.lora),
        "config": dataclasses.asdict(student.config),
        "preprocessing": dataclasses.asdict(student.preprocessing),
        "teacher": student.facts.get("teacher", {}),
    }
    write_json(folder / DESCRIPTION, content)


def read(folder: Path, base: Any) -> tuple[Any, LoraConfig]:
    """(adapters, their config) of a written folder.

    Args:
      base: the weight copy that they were trained on: parameters of a VisionTransformer of L kept blocks.

    Raises:
      ValueError: for another base, or a file that is missing or damaged.
    """
    return _read(folder, _description(folder), base)


def load_adapters(folder: str | Path, teacher: Teacher) -> Student:
    """The student: the teacher's blocks copied as `adapters.json` says, and the adapters merged into them.

    Raises:
      ValueError: as `read`, and for a teacher that computes something else with the same weights; the message names the
        teacher and the overrides that are needed.
    """
    folder = Path(folder)
    content = _description(folder)
    blocks = tuple(content["blocks"])
    if max(blocks) >= teacher.config.depth:
        raise ValueError(_other_base(folder, content, f"a model of only {teacher.config.depth} blocks"))
    config, base = copy_blocks(teacher.config, teacher.params, blocks)
    adapters, lora = _read(folder, content, base)
    _check_function(folder, content, config, teacher.preprocessing)
    return Student(
        config=config,
        params=merge(base, adapters, lora),
        preprocessing=teacher.preprocessing,
        blocks=blocks,
        method="lora",
        base=base,
        adapters=adapters,
        facts={"teacher": content["teacher"]},
        lora=lora,
    )


def _description(folder: Path) -> Mapping[str, Any]:
    path = folder / DESCRIPTION
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected the description of exported adapters, found {error}") from error
    found = content.get("format") if isinstance(content, dict) else content
    if found != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT!r}, found {found!r}")
    return content


def _read(folder: Path, content: Mapping[str, Any], base: Any) -> tuple[Any, LoraConfig]:
    fingerprint = tree.fingerprint(base)
    if content["base_fingerprint"] != fingerprint:
        raise ValueError(_other_base(folder, content, f"a base of sha256 {fingerprint[:12]}"))
    try:
        leaves = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS}: not a complete safetensors file ({error})") from error
    ranks = tuple((target, rank) for target, rank in content["lora"]["ranks"])
    return unflatten_dict(leaves, sep="/"), LoraConfig(**content["lora"] | {"ranks": ranks})


def _check_function(folder: Path, content: Mapping[str, Any], config: VitConfig, preprocessing: Preprocessing) -> None:
    """Raises ValueError unless config and preprocessing are the recorded ones: the sha256 tells the weights alone."""
    found = function_facts(config, preprocessing)
    recorded = content.get("config", {}) | content.get("preprocessing", {})  # an older file has neither
    if other := {name: value for name, value in recorded.items() if found.get(name) != value}:
        differing = ", ".join(f"{name} {found.get(name)!r}" for name in other)
        raise ValueError(f"{_other_base(folder, content, differing)}: load_teacher(..., overrides={other!r})")


def _other_base(folder: Path, content: Mapping[str, Any], found: str) -> str:
    teacher = content["teacher"]
    return (
        f"{folder}: these adapters stand on the blocks {list(content['blocks'])} of teacher "
        f"{teacher.get('name', 'unknown')} (file sha256 {str(teacher.get('sha256', 'unknown'))[:12]}; base sha256 "
        f"{content['base_fingerprint'][:12]}), found {found}: load that teacher, with the same overrides"
    )
