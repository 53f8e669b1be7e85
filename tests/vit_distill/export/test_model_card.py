"""The model card says where a student comes from, what it expects and what was measured; and it renders as Markdown."""

import dataclasses
import re

import pytest

from vit_distill.model_card import model_card
from vit_distill.teacher import LoadReport


def _rows(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.MULTILINE))


def test_card_names_teacher_licence_blocks_rank_manifest_and_metrics(make_student):
    rows = _rows(model_card(make_student()))
    assert rows["Teacher"] == "tiny"
    assert rows["Teacher sha256"] == "ab" * 32
    assert rows["Teacher licence"] == "CC-BY-NC-4.0"
    assert rows["Kept blocks (from 0)"] == "0, 2"
    assert rows["Ranks"] == "query 2, out 3, fc2 4"
    assert rows["Updates"] == "2 of 300"
    assert rows["Few-shot images: hash"] == "cd" * 32
    assert rows["Few-shot images: num_images"] == "12"
    assert rows["test/top1"] == "0.5123"
    assert rows["Seed"] == "3"


def test_card_says_what_was_read_and_assumed_of_the_teacher(make_student):
    student = make_student()
    assert "Teacher's tensors" not in _rows(model_card(student))  # of an earlier version
    found = LoadReport(
        ("a", "b"), (), ("c (allowed)",), ("pos 5 -> 17",), "ab", "timm", ("epsilon 1e-6 assumed",)
    ).facts()
    rows = _rows(model_card(dataclasses.replace(student, facts=student.facts | {"teacher_loading": found})))
    assert rows["Teacher's tensors"] == "2 matched, 0 missing, 1 unused, 1 reshaped"
    assert rows["Assumed of the teacher"] == "pos 5 -> 17; epsilon 1e-6 assumed"


@pytest.mark.parametrize(
    ("scaling", "alpha", "row"),
    [("one", 1.0, "LoRA, scaling one"), ("alpha", 2.0, "LoRA, scaling alpha, alpha 2")],
)
def test_card_says_how_adapters_are_scaled(make_student, scaling, alpha, row):
    student = make_student()
    lora = dataclasses.replace(student.lora, scaling=scaling, alpha=alpha)
    assert _rows(model_card(dataclasses.replace(student, lora=lora)))["Adapters"] == row


def test_card_says_what_the_model_expects(make_student):
    card = model_card(make_student())
    rows = _rows(card)
    assert card.startswith("# tiny, 2 of 4 blocks\n")
    assert rows["Image"] == "16 x 16, 3 channels"
    assert rows["Resize"] == "short side to 20 (bilinear), then the centre 16"
    assert rows["Mean"] == "0.5, 0.4, 0.3"
    assert rows["Standard deviation"] == "0.2, 0.3, 0.4"


def test_what_was_not_recorded_is_said(make_student):
    student = dataclasses.replace(make_student(lora=None), facts={"teacher": {"name": "a|b", "licence": "unknown"}})
    card = model_card(student)
    rows = _rows(card)
    assert rows["Teacher"] == "a/b"
    assert rows["Teacher sha256"] == "not recorded"
    assert "Ranks" not in rows
    assert "Nothing was measured yet." in card
    assert "licence is not known" in card
    assert "nothing was trained" in card


def test_card_of_an_export_holds_its_check_and_code(make_student):
    check = {"reloaded_by": {"timm 1.0": 2.5e-7}, "tolerance": 1e-4}
    card = model_card(make_student(), "import timm\n", check)
    assert "| Reloaded by timm 1.0 | 2.5e-07 |" in card
    assert "```python\nimport timm\n```" in card


@pytest.mark.parametrize("method", ["lora", "full", "copy", "scratch"])
def test_every_method_has_its_sentence(make_student, method):
    card = model_card(dataclasses.replace(make_student(), method=method))
    assert "made from a larger teacher: " in card
    assert ("The method is WeCoLoRA" in card) == (method == "lora")
    assert ("a control for the method of WeCoLoRA" in card) == (method != "lora")
