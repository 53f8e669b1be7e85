"""The table's means, verdicts and Markdown, from cells written by hand."""

import math

import pytest

from vit_distill.table_summary import markdown, summarise, verdicts


def cell(row: str, accuracy: float, ratio: float | None = 0.01, reduction: int = 2, seed: int = 0, **fields) -> dict:
    defaults = dict(
        title=f"<{row}>", l1=2.0, cls_l1=None, loss=2.0, seconds=1.0, params=1e6, gflops=0.1, num_trained=1e5,
        step_gflops=3.0, blocks=[0, 2], learning_rate=0.01, at_grid_edge=False, metric="top1", num_test=1_000_000,
        num_effective=1e6, probe={"at_grid_edge": 0.0},
    )  # fmt: skip
    defaults["valid_accuracy"] = accuracy
    return dict(row=row, accuracy=accuracy, ratio=ratio, reduction=reduction, seed=seed) | defaults | fields


def test_means_and_deviations():
    cells = [cell("copy", 0.3, None), *(cell("full", a, seed=i, l1=a) for i, a in enumerate((0.40, 0.42, 0.47)))]
    copy, full = summarise(cells)
    assert (copy["n"], copy["accuracy"], copy["accuracy_std"]) == (1, 0.3, None)
    assert full["n"] == 3
    assert full["accuracy"] == full["l1"] == pytest.approx(0.43)
    assert full["accuracy_std"] == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))
    assert full["cls_l1"] is None
    assert full["title"] == "<full>"
    for edge in (0.0, 1.0):  # of one seed's probe
        (row,) = summarise([cell("full", 0.4), cell("full", 0.4, seed=1, probe={"at_grid_edge": edge})])
        assert row["probe_at_grid_edge"] is (edge == 1.0)


def test_verdicts_on_the_papers_ordering():
    cells = [cell("copy", 0.30, None), cell("scratch", 0.32), cell("enhanced", 0.40), cell("full", 0.405)]
    cells += [cell("plain", 0.25, 0.1), cell("enhanced", 0.5, 0.1)]
    found = {(v["claim"], v["where"]): v["verdict"] for v in verdicts(summarise(cells))}
    assert found == {
        ("enhanced > full", "1 %, r=2"): "tie",
        ("full > copy", "1 %, r=2"): "holds",
        ("copy > scratch", "1 %, r=2"): "reversed",
        ("enhanced > scratch", "1 %, r=2"): "holds",
        ("enhanced > plain", "10 %, r=2"): "holds",
    }
    # Widely scattered seeds: 5 points are no difference then (two standard errors are 0.11).
    means = (("enhanced", 0.45), ("plain", 0.4))
    cells = [cell(row, mean + d, seed=i) for row, mean in means for i, d in enumerate((-0.1, 0, 0.1))]
    (verdict,) = verdicts(summarise(cells))
    assert verdict["verdict"] == "tie"
    assert verdict["margin"] == pytest.approx(2 * math.sqrt(2 * 0.1**2 / 3 + (0.45 * 0.55 + 0.4 * 0.6) / 1e6))


@pytest.mark.parametrize(
    ("metric", "effective", "verdict", "said"),
    [
        ("top1", 133.0, "tie", "133 test images;"),
        ("auc", 13.0, "tie", "133 "),
        ("mean_auc", None, "holds", "a mean AUC"),
        ("miou", None, "holds", "a mean IoU"),
    ],
)
def test_few_test_images_decide_nothing(metric: str, effective: float | None, verdict: str, said: str):
    """At 133 images the difference of two accuracies has a standard error of four points."""
    fields = dict(num_test=133, num_effective=effective, metric=metric)
    rows = summarise([cell(row, a, **fields) for row, a in (("enhanced", 0.75), ("plain", 0.70))])
    (found,) = verdicts(rows)
    assert (found["verdict"], found["num_seeds"]) == (verdict, 1)
    if effective:
        assert found["margin"] == pytest.approx(2 * math.sqrt((0.75 * 0.25 + 0.7 * 0.3) / effective))
    text = markdown("Students", {}, rows, metric)
    assert said in text
    assert "with one seed what seeds change is unknown." in text


def test_markdown():
    rows = summarise([cell("copy", 0.3, None, learning_rate=None), cell("full", 0.42), cell("full", 0.44, seed=1)])
    text = markdown("Students", {"teacher": "nano"}, rows, "top1")
    assert "- teacher: nano\n" in text
    assert "| Row | Images | r | top1 | valid | L1 |" in text
    assert "| <full> | 1 % | 2 | 0.4300 ± 0.0141 | 0.4300 | 2.000 ± 0.000 | 0.10 M | 1.00 M | 0.1 | 0.01 | 2 |" in text
    assert "| full > copy | 1 %, r=2 | +0.1300 |" in text
    lengths = {line.count("|") for line in text.splitlines() if line.startswith(("| Row", "| <"))}
    assert lengths == {12}
