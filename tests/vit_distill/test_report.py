"""The distiller's report on synthetic results: its sections, its numbers, what it leaves out, what it refuses."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.vit import VisionTransformer, VitConfig
from vit_distill import report_figures
from vit_distill.preprocessing import Preprocessing
from vit_distill.report import write_report
from vit_distill.report_data import ReportData
from vit_distill.report_page import spread, table_cells, write_page
from vit_distill.student import Student


def block_rows(values) -> list[dict]:
    return [
        {"block": i, "teacher_block": 2 * i + 1, "l1": value, "cosine": 1 - value / 10, "cka": 1 - value / 20}
        for i, value in enumerate(values)
    ]


def table_row(row: str, accuracy: float, ratio: float | None = 0.01, reduction: int = 2, **fields) -> dict:
    defaults = dict(
        title=row, accuracy_std=0.01, l1=1.5, l1_std=0.1, params=1_000_000, gflops=0.5 / reduction, num_trained=50_000,
        learning_rate=0.01, at_grid_edge=False, probe_at_grid_edge=False, n=3,
    )  # fmt: skip
    return (
        dict(row=row, ratio=ratio, reduction=reduction, accuracy=accuracy, valid_accuracy=accuracy) | defaults | fields
    )


def results(**fields) -> ReportData:
    rng = np.random.default_rng(0)
    values = {
        f"block_{i:02d}/{layer}": np.sort(rng.random(8))[::-1] for i in range(3) for layer in ("attn/query", "mlp/fc1")
    }
    defaults = dict(
        title="Student of <teacher>",
        summary="3 of 6 blocks",
        models={
            "teacher": dict(depth=6, params=2_000_000, bytes=8_000_000, gflops=0.8),
            "student": dict(depth=3, params=1_000_000, bytes=4_000_000, gflops=0.4),
        },
        latency={"teacher": {1: 0.02, 32: 0.3}, "student": {1: 0.011, 32: 0.12}},
        device="a CPU",
        history=[{"step": i, "loss": 1 / i, "l1": 1 / i, "cls_l1": 0.5 / i, "patch_l1": 1 / i} for i in range(1, 9)],
        blocks=(0, 2, 4),
        blocks_before=block_rows([3.0, 4.0, 7.25]),
        blocks_after=block_rows([2.0, 2.5, 3.125]),
        num_images=31,
        choice=[
            {"rule": "removal", "blocks": [0, 1, 5], "loss": 2.0},
            {"rule": "first", "blocks": [0, 2, 4], "loss": 2.5},
        ],
        singular_values=values,
        suggested_ranks=dict.fromkeys(values, 5) | {"block_00/mlp/fc1": 7},
        table=[
            table_row(
                "teacher", 0.6, None, 1, l1=None, l1_std=None, accuracy_std=None, num_trained=0, learning_rate=None
            ),
            table_row("copy", 0.30, None, num_trained=0, learning_rate=None),
            table_row("enhanced", 0.42),
            table_row("full", 0.4111, at_grid_edge=True),
        ],
        verdicts=[{"claim": "enhanced > full", "where": "1 %, r=2", "difference": 0.0089, "verdict": "tie"}],
        shared={"budget": "300 updates"},
        facts={"teacher": {"name": "vit", "sha256": "abc"}, "few_shot": {"num_images": 17}, "seed": 4},
        load_report=["matched 100", "missing none"],
        provenance={"versions": {"jax": "0.10.2"}},
        config={"note": "<tag>"},
    )
    return ReportData(**(defaults | fields))


def written(tmp_path: Path, data: ReportData) -> str:
    write_page(tmp_path / "report.html", data)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def anchors(html: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)"', html)


def test_the_whole_page(tmp_path: Path):
    html = written(tmp_path, results())
    assert anchors(html) == [
        "result", "ablation", "size-and-speed", "training", "blocks", "choice-of-blocks", "adapters", "model-card",
        "weights-that-were-loaded", "provenance",
    ]  # fmt: skip
    texts = [
        "3 of 6", "2.50 x", "before training 7.25", "3.12", "11.00", "300.00", "Student of &lt;teacher&gt;",
        "Rank 7 would keep 95 %", "0.4200 ± 0.0100", "0.01*", "enhanced &gt; full", "tie", "missing none", "0, 2, 4",
        "300 updates", "&lt;tag&gt;",
    ]  # fmt: skip
    for text in texts:
        assert text in html, text
    assert "<tag>" not in html
    assert "http" not in re.sub(r"data:image/[^\"]+", "", html).replace("http-equiv", "")
    assert len(html) < 2_000_000


def test_rows_that_are_marked(tmp_path: Path):
    """The best of each ratio and r, and of the choices of blocks, no other."""
    html = written(tmp_path, results())
    marked = re.findall(r"<tr class='strong'>\s*<td class=''>([^<]*)", html)
    assert marked == ["enhanced", "removal"]


def test_the_images_that_were_measured_on_are_told(tmp_path: Path):
    html = written(tmp_path, results())
    assert html.count("on 31 images that were not trained on") == 2  # the card and the blocks
    assert "callout warn" not in html.split("</style>")[-1]
    chosen = dict(results().facts) | {"tuned": {"learning_rate": 0.01}}
    assert written(tmp_path, results(facts=chosen)).count("not trained on, but chose the learning rate") == 2
    html = written(tmp_path, results(on_training_images=True))
    assert html.count("on 31 images that were trained on") == 2
    assert "measured on training images, as none were held out" in html


def test_what_is_not_there_is_left_out(tmp_path: Path):
    html = written(tmp_path, ReportData(title="Empty"))
    assert anchors(html) == ["result", "provenance"]
    html = written(tmp_path, results(latency={}, blocks_before=(), blocks_after=(), history=[{"step": 1}]))
    assert "Measured speed" not in html
    assert "training" not in anchors(html)
    only_after = results(blocks_before=())
    assert "3.125" in written(tmp_path, only_after)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(blocks_after=block_rows([1.0, 2.0])), "the same blocks, found 3 and 2"),
        (dict(blocks_after=[{"block": 0}]), "blocks_after: expected rows with"),
        (dict(table=[{"row": "copy"}]), "table: expected rows with"),
        (dict(suggested_ranks={}), "the same adapters in both"),
        (dict(models={"peer": {}}), 'expected "teacher" and "student", found .\'peer\'.'),
    ],
)
def test_data_that_do_not_fit(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        results(**fields)


def test_cells_of_the_table():
    teacher, copy, enhanced, full = table_cells(results().table, "top1")
    assert teacher == ["teacher", "", "1", "0.6000", "0.6000", "", "", "1.00 M", "0.5", "", "3"]
    assert copy[1] == copy[9] == ""
    assert enhanced == [
        "enhanced", "1 %", "2", "0.4200 ± 0.0100", "0.4200", "1.500 ± 0.100", "0.05 M", "1.00 M", "0.25", "0.01", "3",
    ]  # fmt: skip
    assert full[9] == "0.01*"
    assert spread(0.5, None, 2) == "0.50"


def test_figures_show_what_they_are_given():
    data = results()
    fig = report_figures.blocks_figure(data.blocks_before, data.blocks_after)
    lines = fig.axes[0].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[3.0, 4.0, 7.25], [2.0, 2.5, 3.125]]
    fig = report_figures.spectra_figure(data.singular_values)
    assert [ax.get_title() for ax in fig.axes] == ["attn/query", "mlp/fc1"]
    assert len(fig.axes[0].get_lines()) == 3
    report_figures.spectra_figure({"block_00/attn/query": np.zeros(4)})
    rows = [*data.table, table_row("enhanced", 0.5, 0.1), table_row("enhanced", 0.2, 0.1, 3)]
    fig = report_figures.cost_figure(rows, "top1")
    assert [ax.get_title() for ax in fig.axes] == ["1 % of the images", "10 % of the images"]
    second = {c.get_label(): c for c in fig.axes[1].containers}
    assert list(second["enhanced"][0].get_xdata()) == pytest.approx([0.5 / 3, 0.25])
    assert list(second["copy"][0].get_ydata()) == [0.30]
    report_figures.cost_figure(data.table[:2], "top1")  # nothing trained: one panel without a ratio


@pytest.mark.parametrize("method", ["lora", "copy"])
def test_report_of_a_distillation(tmp_path: Path, method: str):
    """Latencies are measured, the curve and the config come from the work directory."""
    config = VitConfig(depth=2, width=16, num_heads=2, mlp_dim=32, patch_size=8, image_size=16)
    init = lambda config: VisionTransformer(config).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]  # noqa: E731
    report = SimpleNamespace(lines=lambda: ["format timm", "matched 30"])
    teacher = SimpleNamespace(name="vit_nano", config=config, params=init(config), report=report)
    small = dataclasses.replace(config, depth=1)
    student = Student(
        config=small,
        params=init(small),
        preprocessing=Preprocessing(16, (0.5,) * 3, (0.5,) * 3),
        blocks=(0,),
        method=method,
        base=None,
        adapters={"block_00": {"attn": {"query": {"a": np.ones((16, 2)), "b": np.ones((2, 2, 8))}}}}
        if method == "lora"
        else None,
        lora=None,
        facts={"teacher": {"name": "vit_nano"}},
    )
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (tmp_path / "config.json").write_text(json.dumps({"seed": 12345}))
    values = {"block_00/attn/query": np.array([2.0, 0.1])} if method == "lora" else {}
    rows = block_rows([1.0])
    write_report(
        tmp_path,
        teacher,
        student,
        before=rows,
        after=rows,
        singular_values=values,
        metrics={"l1": 0.5},
        provenance={},
        num_images=8,
        held_out=False,
        batch_sizes=(1, 2),
    )
    html = (tmp_path / "report.html").read_text()
    assert "Student of vit_nano" in html
    assert "ms at batch 2" in html
    assert "matched 30" in html
    assert "12345" in html
    assert ("adapters" in anchors(html)) == (method == "lora")
    assert ("measured on training images" in html) == (method == "lora")  # of a copy no image was trained on
    assert "training" in anchors(html)
