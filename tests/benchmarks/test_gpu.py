"""The GPU run: its budget, what it derives, its stand-in for ml_collections, and one job in a process of its own."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from benchmarks import gpu, gpu_jobs, stand_in
from benchmarks.detector import detector_state, smoke_config, training_step
from benchmarks.gpu_jobs import JOBS, attempt, timed
from configs import common
from core.tree import paths
from mtl_moe.cost import train_macs
from mtl_moe.model import build_geometry
from mtl_moe.system import build_system
from vit_distill.flops import FLOPS_PER_MAC, step_cost
from vit_distill.formats.architectures import architecture_config
from vit_distill.lora import TARGETS, LoraConfig


def run_with(outcomes: dict[str, tuple[list, str]], budget: float) -> tuple[dict, list]:
    limits, writes = [], []

    def run(name: str, limit: float) -> tuple[list, str]:
        limits.append((name, limit))
        return outcomes[name]

    records = gpu.run_all(list(outcomes), budget, run, lambda part, record: writes.append(part))
    assert writes == [JOBS[name].part for name in outcomes]  # after every job, not at the end
    return records, limits


def test_a_failure_costs_its_own_rows_only_and_the_peak_is_used():
    update = {"model": gpu.BASE, "images_per_second": 5000.0}
    records, limits = run_with(
        {
            "matmul_jax": ([{"tflops": 800.0}], ""),
            "distill_jax": ([update, {"batch": 64, "failed": "no memory"}], "ended after 120 s"),
            "distill_eager": ([update], ""),
        },
        budget=540,
    )
    assert [row["job"] for row in records["distill"]["rows"]] == ["distill_jax", "distill_jax", "distill_eager"]
    assert records["distill"]["failed"] == ["distill_jax: ended after 120 s", "distill_jax: no memory"]
    # 82.7 GFLOP an image: 5000 images/s are 413.5 TFLOP/s.
    assert records["distill"]["rows"][0]["tflops"] == 413.5
    assert records["distill"]["rows"][0]["share_of_peak"] == pytest.approx(413.5 / 800, abs=1e-3)
    assert records["distill"]["rows"][0]["times_floor"] == pytest.approx(790 / 413.5, abs=0.01)
    assert [limit <= JOBS[name].limit for name, limit in limits] == [True] * 3


def test_what_no_longer_fits_is_skipped_and_said():
    records, limits = run_with({"matmul_jax": ([], ""), "detector_ragged": ([], "")}, budget=20)
    assert [name for name, _ in limits] == ["matmul_jax"]
    assert limits[0][1] <= 20
    assert "detector_ragged" in records["detector"]["skipped"][0]
    assert records["detector"]["rows"] == []


def test_the_floor_is_that_of_the_measured_plan():
    row = gpu.with_shares([{"model": gpu.BASE, "images_per_second": 256 / 26.8e-3}], None)[0]
    assert row["times_floor"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("model", [gpu.BASE, gpu.SMALL])
def test_constants_agree_with_the_cost_model(model: str):
    teacher = architecture_config(model)
    lora = LoraConfig(tuple((target, 128) for target in TARGETS))
    cost = step_cost(dataclasses.replace(teacher, depth=6), teacher, 1, "lora", lora)
    gflop = FLOPS_PER_MAC * (cost.teacher + cost.forward + cost.backward) / 1e9
    # That model merges kernels first, the constant is of layers apart.
    assert gpu.GFLOP_PER_IMAGE[model] == pytest.approx(gflop, rel=0.06)


@pytest.mark.parametrize(
    "control", [{}, {"mlp": "dense_params"}, {"router": "per_task"}, {"router": "fixed", "top_k": 1}]
)
def test_multiply_adds_of_a_detector_update_are_those_of_its_kernels(control: dict[str, Any]):
    options = smoke_config()
    options.model.update(control)
    system = build_system(options)
    params = jax.eval_shape(system.init_params, jax.random.key(0))
    config, tokens, tasks = system.model.config, system.tasks[0].geometry.grid ** 2, system.tasks
    macs = {"trunk": 0.0, "experts": 0.0, "heads": 0.0}
    for path, leaf in paths(params).items():
        part = "trunk" if path.startswith("trunk/") else "heads" if "head_" in path or "detail_" in path else "experts"
        share = config.top_k / config.num_experts if path.endswith(("w1", "w2")) else 1.0
        macs[part] += tokens * leaf.size * share * path.endswith(("/kernel", "w1", "w2"))
    attention = 2 * tokens**2 * config.width
    macs["trunk"] += config.num_dense_layers * attention
    macs["experts"] += (config.num_moe_layers + config.num_neck_layers) * attention
    expected = 3 * (len(tasks) * (macs["trunk"] + macs["experts"]) + macs["heads"]) + macs["trunk"]
    assert train_macs(config, tasks, build_geometry(options)) == expected


def test_the_dispatch_reaches_the_layer():
    with pytest.raises(ValueError, match="dispatch='nonsense'"):
        detector_state(smoke_config(), "nonsense")


def test_a_timed_update_has_the_micro_batches_of_training():
    config = smoke_config()
    config.train.update(batch_size=8, accumulation=3)
    step, _, _ = training_step(config)
    with pytest.raises(ValueError, match=r"batch size 8 does not divide by train\.accumulation 3"):
        step()


@pytest.fixture
def poor_common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """configs/common.py as it is where ml_collections is not installed."""
    package, part = ModuleType("ml_collections"), ModuleType("ml_collections.config_dict")
    package.ConfigDict, part.placeholder = stand_in.ConfigDict, lambda kind: None
    monkeypatch.setitem(sys.modules, "ml_collections", package)
    monkeypatch.setitem(sys.modules, "ml_collections.config_dict", part)
    spec = importlib.util.spec_from_file_location("poor_common", common.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(config: Any) -> Any:
    return {key: plain(value) for key, value in config.items()} if isinstance(config, dict) else config


def test_the_stand_in_gives_the_same_defaults(poor_common: ModuleType):
    for preset in common.PRESETS:
        assert plain(poor_common.detector(preset)) == common.detector(preset).to_dict()
    assert plain(poor_common.distiller()) == common.distiller().to_dict()


def test_the_stand_in_updates_as_ml_collections():
    for make in (stand_in.ConfigDict, ConfigDict):
        config = make({"a": {"b": 1, "c": 2}, "d": 3})
        config.update(a={"b": 5}, d=4)
        config.a.c = 6
        assert (config.a.b, config["a"]["c"], config.d, config.get("e", 7)) == (5, 6, 4, 7)
        with pytest.raises(AttributeError):
            _ = config.missing


def test_hidden_packages_are_not_found():
    finder = stand_in._Without(sys.meta_path)
    assert finder.find_spec("ml_collections") is None
    assert finder.find_spec("tensorflow.io") is None
    assert finder.find_spec("flax").name == "flax"


def test_timed_counts_compilation_apart():
    calls, waits = [], []
    row = timed(lambda: calls.append(0) or len(calls), waits.append, smoke=True)
    assert (row["calls"], len(calls), waits) == (1, 4, [1, 2, 3, 4])
    assert row["ms"] >= row["ms_min"] > 0


def test_an_attempt_reports_what_went_wrong():
    row = attempt({"batch": 3}, lambda: 1 / 0)
    assert row == {"batch": 3, "failed": "ZeroDivisionError: division by zero"}
    assert attempt({"batch": 3}, lambda: {"ms": 1.0}) == {"batch": 3, "ms": 1.0}


def test_a_job_in_a_process_of_its_own(tmp_path: Path):
    rows, problem = gpu.run_job("matmul_jax", 120, True, tmp_path)
    assert problem == ""
    assert rows[0]["side"] == "jax"
    assert rows[0]["device"] == jax.devices("cpu")[0].device_kind
    rows, problem = gpu.run_job("matmul_jax", 0.01, True, tmp_path)
    assert rows == []
    assert problem.startswith("ended after 0 s")


def test_without_a_gpu_a_job_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    rows, problem = gpu.run_job("matmul_jax", 120, False, tmp_path)
    assert rows == []
    assert problem.startswith("ended with status 1")
    assert "jax sees no GPU (" in problem
    with pytest.raises(SystemExit, match="jax sees no GPU: install it with CUDA, or try the jobs with --smoke"):
        gpu.check_gpu("jax")


def test_the_detector_grows_until_it_no_longer_fits(monkeypatch: pytest.MonkeyPatch):
    def step_of(config: ConfigDict, dispatch: str) -> tuple:
        if config.train.batch_size > 32:
            raise RuntimeError("no memory")
        return None, SimpleNamespace(tasks=(), model=SimpleNamespace(config=None)), 1

    monkeypatch.setattr("benchmarks.detector.training_step", step_of)
    monkeypatch.setattr("mtl_moe.cost.train_macs", lambda config, tasks, geometry: 10**9)
    monkeypatch.setattr(gpu_jobs, "_jax_timed", lambda step, smoke: {"ms": 1.0})
    rows = list(gpu_jobs.detector("batched", (16, 32, 64, 128), smoke=False))
    assert [(row["batch"], "failed" in row) for row in rows] == [(16, False), (32, False), (64, True)]


def test_parts_are_checked():
    assert gpu.chosen("moe") == ["matmul_jax", "moe_layer"]
    with pytest.raises(ValueError, match="--parts"):
        gpu.chosen("everything")
