"""What a result came from: versions, devices, git revision, date."""

import importlib.metadata
import platform
import subprocess
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "ml-collections")


def environment() -> dict[str, Any]:
    """Date, git revision, devices and versions as plain JSON."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "devices": [f"{device.platform}:{device.device_kind}" for device in jax.devices()],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def print_devices() -> None:
    """Says what JAX runs on, as "devices: 8 gpu (NVIDIA H200)": where no plugin works it takes the CPU quietly."""
    kinds = Counter(f"{device.platform} ({device.device_kind})" for device in jax.devices())
    print("devices: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()), flush=True)


def git_revision() -> str:
    """Revision of this code with "-dirty" if files differ from it; "unknown" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"
