"""The plan of a distillation: its numbers against flops.py's and hand-made ones, its words, its file."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from configs.common import distiller
from configs.vit_distill.distill import get_config
from core.vit import VisionTransformer, VitConfig
from vit_distill import flops, plan
from vit_distill.lora import build_lora_config

TEACHER = VitConfig(depth=4, width=32, num_heads=2, mlp_dim=64, patch_size=8, image_size=32, num_classes=5)
RATE = 1e9


def tiny_config(**student):
    config = distiller()
    config.student.update(student)
    config.lora.rank = 4
    config.train.update(batch_size=16, num_steps=10)
    return config


def test_numbers_of_the_plan():
    config = tiny_config()
    found = plan.make_plan(config, TEACHER, rate=RATE)
    params = VisionTransformer(TEACHER).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    num = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert found["models"]["teacher"]["params"] == num(params)
    assert found["models"]["student"]["params"] == num(params) - num([params["block_00"], params["block_01"]])
    # Six adapters of rank 4 in each of two blocks: q, k, v, out 32 + 32; fc1 and fc2 32 + 64.
    assert found["training"]["num_trained"] == 2 * 4 * (4 * 64 + 2 * 96)
    assert found["training"]["blocks"] == [0, 2]
    student = flops.VitConfig(**vars(TEACHER) | {"depth": 2})
    cost = flops.step_cost(student, TEACHER, 16, "lora", build_lora_config(config.lora))
    assert found["training"]["step_gflops"]["total"] == pytest.approx(2e-9 * cost.total)
    assert found["seconds"]["training"] == pytest.approx(
        10 * 2 * cost.total / RATE
    )  # a CPU's 8 devices are one machine
    assert found["seconds"]["student_image"] == pytest.approx(1e9 * found["models"]["student"]["gflops"] / RATE)
    json.dumps(found)


def test_methods_and_options():
    full = plan.make_plan(tiny_config(method="full"), TEACHER, rate=RATE)
    assert full["training"]["num_trained"] == full["models"]["student"]["params"]
    copy = plan.make_plan(tiny_config(method="copy"), TEACHER, rate=RATE)
    assert copy["training"]["num_trained"] == copy["seconds"]["training"] == 0
    assert "none" in plan.plan_lines(copy)[-1]
    calibrated = plan.make_plan(tiny_config(blocks="calibrated", reduction=4), TEACHER, rate=RATE)
    assert calibrated["training"]["blocks"] == "calibrated"
    assert calibrated["models"]["student"]["depth"] == 1
    config = tiny_config()
    config.train.cached_views = 3
    cached = plan.make_plan(config, TEACHER, rate=RATE)
    assert cached["memory_bytes"]["teacher"] == cached["training"]["step_gflops"]["teacher"] == 0
    most = config.train.num_steps * config.train.batch_size // 3  # the loop's own passes of the teacher
    assert any(
        "3 views of every image" in line and f"fewer than {most} images" in line for line in plan.plan_lines(cached)
    )


def test_runs_that_choose_the_learning_rate_are_counted():
    config = get_config()
    config.lora.rank = 4
    config.optim.update(learning_rates=(1e-4, 1e-3, 1e-2, 1e-1, 1.0), tune_steps=30)
    found = plan.make_plan(config, TEACHER, rate=RATE)
    assert found["training"]["tuning"] == {"runs": 4, "num_steps": 30}
    assert found["seconds"]["tuning"] == pytest.approx(4 * 30 * found["seconds"]["update"])
    line = "before it at most 4 runs of 30 updates choose one of optim.learning_rates: "
    assert line + plan.duration(found["seconds"]["tuning"]) in plan.plan_lines(found)[-2].strip()
    config.optim.tune_steps = 0
    assert plan.make_plan(config, TEACHER, rate=RATE)["training"]["tuning"]["num_steps"] == config.train.num_steps
    config.optim.tune_steps = -1
    with pytest.raises(ValueError, match=r"optim\.tune_steps: expected"):
        plan.make_plan(config, TEACHER, rate=RATE)
    config.student.method = "copy"
    assert plan.make_plan(config, TEACHER, rate=RATE)["seconds"]["tuning"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.student.update(reduction=3), "3.*4|4.*3"),
        (lambda c: c.lora.update(rank=33), "rank of query.*33"),
        (lambda c: c.student.update(method="half"), "student.method.*'half'"),
        (lambda c: c.train.update(dtype="float16"), "train.dtype: expected one of.*'float16'"),
        (lambda c: c.teacher.update(dtype="float64"), "teacher.dtype: expected one of.*'float64'"),
    ],
)
def test_what_the_run_would_refuse_the_plan_refuses(change, message: str):
    config = tiny_config()
    change(config)
    with pytest.raises(ValueError, match=message):
        plan.make_plan(config, TEACHER, rate=RATE)


def test_accumulation_cuts_the_teachers_activations_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    config = tiny_config()
    whole = plan.make_plan(config, TEACHER, rate=RATE)["memory_bytes"]
    config.train.accumulation = 4
    parts = plan.make_plan(config, TEACHER, rate=RATE)["memory_bytes"]
    for name in ("activations", "teacher activations"):
        assert whole[name] == 4 * parts[name] > 0


def test_too_little_memory_is_said():
    found = plan.make_plan(tiny_config(), TEACHER, rate=RATE)
    assert not any("WARNING" in line for line in plan.plan_lines(found))
    assert found["device"]["memory_bytes"] == plan.device_memory() > 2**28  # of this machine
    found["device"]["memory_bytes"] = 1000
    assert any("WARNING" in line and "train.accumulation" in line for line in plan.plan_lines(found))


def test_run_plan_prints_and_writes(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    vit_tiny = VitConfig(depth=12, width=192, num_heads=3, mlp_dim=768, patch_size=16, image_size=224, num_classes=1000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "load_teacher_of", lambda config: SimpleNamespace(config=vit_tiny, name="tiny"))
    monkeypatch.setattr(plan, "matmul_rate", lambda *shape: RATE)
    plan.run_plan(tiny_config(), None)
    assert not list(tmp_path.iterdir())
    plan.run_plan(tiny_config(), tmp_path / "run")
    text = capsys.readouterr().out
    assert "5.72 M" in text  # timm's figure for this model
    assert "estimate" in text
    stored = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert stored["models"]["teacher"]["params"] == 5_717_416
    assert stored["teacher_name"] == "tiny"
    assert "jax" in stored["provenance"]["versions"]


def test_matmul_rate_counts_two_flops_a_mac(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "_timed", lambda *args, at_least=3, **rest: [0.5, 0.25][-at_least:])
    assert plan.matmul_rate(10, 20, 30, jnp.float32) == 2 * 10 * 20 * 30 / 0.25


def test_short_products_follow_one_another_without_a_wait(monkeypatch: pytest.MonkeyPatch):
    """A device that takes 1 ms to start and wait for, and 1 us a call."""
    clock, waits = [0.0], []

    class Result:
        def block_until_ready(self) -> None:
            clock[0] += 1e-3
            waits.append(clock[0])

    def call(*_: Any) -> Result:
        clock[0] += 1e-6
        return Result()

    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(plan.jax, "jit", lambda fn: call)
    rate = plan.matmul_rate(100, 100, 100, jnp.float32, seconds=1.0)
    # By the first, 1001 us, there are 99 calls a round.
    assert rate == pytest.approx(2 * 100**3 / (1e-3 / 99 + 1e-6))
    assert len(waits) > 100


def test_latency_by_batch_size():
    params = VisionTransformer(TEACHER).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    found = plan.measure_latency(TEACHER, params, (1, 4), seconds=0.01)
    assert list(found) == [1, 4]
    assert all(value > 0 for value in found.values())


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str):
    assert plan.duration(seconds) == text
