"""Compiled programs are kept on disk between runs: the second start of a command skips most of the compilation."""

import contextlib
import os
from pathlib import Path

import jax

MAX_BYTES = 2 * 2**30  # a program takes 0.05 to 10 MB


def enable_compilation_cache() -> None:
    """Turns JAX's persistent cache on, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder.

    Of the latter the programs that were read longest ago are removed beyond MAX_BYTES.
    """
    if not jax.config.jax_compilation_cache_dir:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "mtl-moe-vit-distill" / "jax"
        _remove_oldest(folder, MAX_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _remove_oldest(folder: Path, max_bytes: int) -> None:
    """Keeps the files read or written last, up to `max_bytes` together.

    jax_compilation_cache_max_size would need the package filelock, and fails on entries from before it was set.
    """
    found = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another run removes as well
            facts = path.stat()
            found.append((max(facts.st_atime, facts.st_mtime), facts.st_size, path))
    kept = 0
    for _, size, path in sorted(found, reverse=True):
        kept += size
        if kept > max_bytes:
            with contextlib.suppress(OSError):  # a cache that stays too large stops no command
                path.unlink()
