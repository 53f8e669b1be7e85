"""Where compiled programs are kept between runs."""

import os
from pathlib import Path

import jax
import pytest

from core import compilation
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
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.1


def test_a_folder_of_the_users_own_is_kept(tmp_path):
    """JAX itself reads $JAX_COMPILATION_CACHE_DIR into this option."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_programs_read_longest_ago_are_removed_beyond_a_size(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compilation, "MAX_BYTES", 25)
    folder = tmp_path / "mtl-moe-vit-distill" / "jax"
    folder.mkdir(parents=True)
    for age, name in enumerate(("new", "middle", "old")):
        path = folder / f"jit_{name}-cache"
        path.write_bytes(b"x" * 10)
        os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(folder / "jit_old-cache", (1e9 + 1, 1e9 - 2))  # written first, but read since
    for cache_dir, left in ((str(folder), 3), (None, 2)):  # the user's own folder, even this one, is the user's
        jax.config.update("jax_compilation_cache_dir", cache_dir)
        enable_compilation_cache()
        assert len(list(folder.iterdir())) == left
    assert sorted(path.name for path in folder.iterdir()) == ["jit_new-cache", "jit_old-cache"]
