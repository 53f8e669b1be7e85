"""Compiled programs are kept on disk between runs: the second start of a command skips most of the compilation."""

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
    """Turns JAX's persistent cache on, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    if not jax.config.jax_compilation_cache_dir:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "mtl-moe-vit-distill" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
