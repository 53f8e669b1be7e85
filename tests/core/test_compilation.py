"""Where compiled programs are kept between runs."""

from pathlib import Path

import jax
import pytest

from core.compilation import enable_compilation_cache

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def options():
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    for base, expected in ((str(tmp_path), tmp_path), ("", Path.home() / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(expected / "mtl-moe-vit-distill" / "jax")
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0


def test_a_folder_of_the_users_own_is_kept(tmp_path):
    """JAX itself reads $JAX_COMPILATION_CACHE_DIR into this option."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
