"""A detector on eight devices with a checkpoint, shared by the tests of inference and of evaluation."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from ml_collections import ConfigDict

from core.checkpoint import Checkpointer
from core.mesh import make_mesh
from core.optim import build_optimizer
from input_pipeline.dataset import Dataset, load_dataset
from mtl_moe.system import System, build_system, sample_images
from mtl_moe.teacher import make_refresh_fn, needs_teacher
from mtl_moe.tiling import random_tiles


class Run(NamedTuple):
    """What is in a work directory after training: here fresh parameters whose routers choose decidedly."""

    system: System
    dataset: Dataset
    workdir: Path


@pytest.fixture(scope="session")
def on_one_device() -> Callable[[System], System]:
    """The same system on the first device alone."""

    def move(system: System) -> System:
        mesh = make_mesh(devices=jax.devices()[:1])
        return dataclasses.replace(system, mesh=mesh, model=system.model.clone(mesh=None))

    return move


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ConfigDict], Run]:
    """Builds a `Run` of a config, with pseudo-labels refreshed."""

    def make(config: ConfigDict) -> Run:
        system, dataset = build_system(config), load_dataset(config.data)
        state = system.init_state(build_optimizer(config.optim, config.train.num_steps), dataset)
        extra = jax.device_get(state.extra)
        if needs_teacher(system.tasks):
            images = random_tiles(jax.random.key(0), sample_images(dataset, 0), system.model.image_size)
            refresh = make_refresh_fn(system.model.config, images, system.num_clusters, 0)
            extra["teacher"] = refresh(state.ema_params, extra["teacher"])
        params = jax.device_get(state.ema_params)
        for block in ("expert_00", "neck_00"):
            router = params[block]["mlp"]["router"]
            router["kernel"] = router["kernel"] * 300  # fresh logits are nearly equal: rounding would choose
        place: Callable[[Any], Any] = system.place
        state = state.replace(step=place(state.step + 3), ema_params=place(params), extra=place(extra))
        workdir = tmp_path_factory.mktemp("run")
        (workdir / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": 1.0, "loss/masked": 0.5}) + "\n")
        checkpointer = Checkpointer(workdir)
        checkpointer.save(state)
        checkpointer.close()
        return Run(system, dataset, workdir)

    return make


@pytest.fixture(scope="session")
def tiny_run(make_run: Callable[[ConfigDict], Run], tiny_config: Callable[[], ConfigDict]) -> Run:
    """All tasks; four experts of which each token takes two."""
    config = tiny_config()
    config.model.num_experts = 4
    return make_run(config)
