"""The model card of a student: where it comes from, what it expects, what was measured, how to load it. Markdown."""

from collections.abc import Mapping
from typing import Any

from core.tree import num_params
from vit_distill.student import Student

UNKNOWN = "not recorded"
_POOLS = {"token": "cls token", "mean": "mean of the patch tokens", "attention": "attention pooling of the patches"}


def model_card(student: Student, usage: str = "", check: Mapping[str, Any] | None = None) -> str:
    """Markdown of a student.

    Args:
      usage: Python code that loads the export beside which the card lies.
      check: the result of `export.export`: how far the reloaded export is from the adapted model.
    """
    teacher = student.facts.get("teacher", {})
    parts = [
        f"# {teacher.get('name', 'Vision transformer')}, {student.config.depth} of {_depth(student)} blocks",
        _summary(student),
        "## Origin\n\n" + _table(_origin(student)),
        "## Input\n\n" + _table(_input(student)),
        "## Measured\n\n" + (_table(_flat(student.facts.get("metrics", {}))) or "Nothing was measured yet."),
    ]
    if check:
        parts.append("## Check of this export\n\n" + _check(check))
    if usage:
        parts.append(
            f"## How to load it\n\n```python\n{usage.strip()}\n```\n\n"
            "Libraries resize and crop each in their own way: of one file they make slightly different pixels, and so "
            "features that differ by more than the check of an export, which gives all the same pixels."
        )
    parts.append("## Licence\n\n" + _licence(teacher.get("licence")))
    return "\n\n".join(parts) + "\n"


def _summary(student: Student) -> str:
    how = {
        "lora": "some of its blocks are kept, and low-rank adapters were trained, without labels, to reproduce its "
        "features; they are merged into the weights",
        "full": "some of its blocks are kept, and all weights were trained, without labels, to reproduce its features",
        "copy": "some of its blocks are kept, and nothing was trained",
        "scratch": "only its architecture was taken, with fewer blocks: all weights were trained from random ones, "
        "without labels, to reproduce its features",
    }[student.method]
    size = num_params(student.params)
    role = "The method is" if student.method == "lora" else "It is a control for the method of"
    return (
        f"A vision transformer of {size:,} parameters made from a larger teacher: {how}. {role} WeCoLoRA "
        "([arXiv 2404.09326](https://arxiv.org/abs/2404.09326))."
    )


def _origin(student: Student) -> dict[str, Any]:
    facts, teacher = student.facts, student.facts.get("teacher", {})
    few_shot, loss = facts.get("few_shot", {}), facts.get("loss", {})
    rows = {
        "Teacher": teacher.get("name"),
        "Teacher file": teacher.get("file"),
        "Teacher sha256": teacher.get("sha256"),
        "Teacher licence": teacher.get("licence"),
        **_loading(facts.get("teacher_loading")),
        "Kept blocks (from 0)": ", ".join(map(str, student.blocks)),
        "Method": student.method,
    }
    if "updates" in facts:
        rows["Updates"] = f"{facts['updates']} of {facts['num_steps']}"
    if student.lora is not None:
        rows["Ranks"] = ", ".join(f"{target} {rank}" for target, rank in student.lora.ranks)
        alpha = f", alpha {student.lora.alpha:g}" * (student.lora.scaling != "one")  # which does not use it
        rows["Adapters"] = f"{'DoRA' if student.lora.dora else 'LoRA'}, scaling {student.lora.scaling}{alpha}"
    if loss:
        rows["Loss"] = ", ".join(f"{name} {value}" for name, value in loss.items())
    rows |= {
        f"Few-shot images: {name}": value for name, value in few_shot.items() if not isinstance(value, list | dict)
    }
    return rows | {"Seed": facts.get("seed")}


def _loading(found: Mapping[str, Any] | None) -> dict[str, str]:
    """What was read of the teacher's file, and what had to be assumed; nothing of students that do not know."""
    if not found:
        return {}
    counts = ", ".join(f"{len(found[name])} {name}" for name in ("missing", "unused", "reshaped"))
    rows = {"Teacher's tensors": f"{found['matched']} matched, {counts}"}
    if noted := [*found["reshaped"], *found["notes"]]:
        rows["Assumed of the teacher"] = "; ".join(noted)
    return rows


def _input(student: Student) -> dict[str, Any]:
    config, p = student.config, student.preprocessing
    return {
        "Image": f"{p.image_size} x {p.image_size}, {config.in_channels} channels",
        "Resize": f"short side to {p.resize_size} ({p.interpolation}), then the centre {p.image_size}",
        "Mean": ", ".join(f"{value:g}" for value in p.mean),
        "Standard deviation": ", ".join(f"{value:g}" for value in p.std),
        "Feature": f"{config.width} values ({_POOLS[config.pool]})",
        "Classes": config.num_classes or "none: features only",
    }


def _check(check: Mapping[str, Any]) -> str:
    rows = {f"Reloaded by {tool}": f"{difference:.1e}" for tool, difference in check["reloaded_by"].items()}
    return (
        "Largest difference of tokens, pooled features and logits from the adapted model on real images, as a share of "
        f"the largest value (tolerance {check['tolerance']:.0e}):\n\n{_table(rows)}"
    )


def _licence(licence: str | None) -> str:
    if not licence or licence == "unknown":
        return "The teacher's licence is not known. It applies to this student too: look it up before you share it."
    return f"Derived from weights under {licence}: its terms apply to this student too."


def _depth(student: Student) -> Any:
    return student.facts.get("teacher", {}).get("depth", "its teacher's")


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested metrics as {"set/metric": value}, with four digits."""
    rows: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            rows |= _flat(value, f"{prefix}{name}/")
        else:
            rows[f"{prefix}{name}"] = f"{value:.4g}" if isinstance(value, float) else value
    return rows


def _table(rows: Mapping[str, Any]) -> str:
    """Two columns; "" without rows. A bar inside a cell would end it."""
    if not rows:
        return ""
    cells = ((name, UNKNOWN if value in (None, "") else value) for name, value in rows.items())
    lines = [f"| {str(name).replace('|', '/')} | {str(value).replace('|', '/')} |" for name, value in cells]
    return "\n".join(["| | |", "|---|---|", *lines])
