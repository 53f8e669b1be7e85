"""Strict flags for every test: eight CPU devices, no silent rank promotion, no key used twice."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
# Two test processes on two cores: BLAS threads of both would only fight for them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests compile much and compute little: unoptimised machine code halves their time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

from collections.abc import Callable

import jax
import pytest
from ml_collections import ConfigDict

from configs import common

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one test has compiled, another of the same session reads from disk."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[[], ConfigDict]:
    """Factory of the smallest useful detector config on phantoms: `tiny_config()` is a fresh ConfigDict each time."""

    def make() -> ConfigDict:
        config = common.detector("tiny")
        config.data.update(image_size=32, mask_size=32, calibration_fraction=0.25)
        config.data.phantom.update(num_train=24, num_valid=0, num_test=8)
        config.model.update(
            width=16, num_heads=2, patch_size=8, num_dense_layers=1, num_moe_layers=1, num_neck_layers=1, mlp_dim=32,
            num_experts=2, expert_dim=16,
        )  # fmt: skip
        config.tasks.names = common.TASKS
        config.tasks.jigsaw.tiles = 2
        config.tasks.cluster.num_clusters = 4
        config.train.update(
            batch_size=8, num_steps=4, refresh_step=2, log_every=1, save_every=2, tensorboard=False,
            dtype="float32",  # what the tests' tolerances are for
        )  # fmt: skip
        config.optim.kind = "adamw"  # compiles much faster; Muon is trained by test_end_to_end and tested by itself
        config.score.update(batch_size=8, gallery=1, bootstrap=20, painted=2, untrained=False)
        return config

    return make
