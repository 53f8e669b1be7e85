"""How a measurement is recorded: benchmarks/results/<name>.json with hardware, versions, revision, command and rows."""

import datetime
import functools
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from core.files import write_json

RESULTS = Path(__file__).parent / "results"


def write_record(
    name: str, command: str, rows: Sequence[dict], packages: Sequence[str], folder: Path = RESULTS, **more: Any
) -> None:
    """Writes the record into `folder` and says where; `more` is added to it (an accelerator, what failed)."""
    record = {
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "date": datetime.date.today().isoformat(),
        "revision": revision(),
        "command": command,
        **more,
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_json(path, record)
    print(f"wrote {path.relative_to(RESULTS.parents[1]) if folder == RESULTS else path.name}")


@functools.cache  # a record written again after every row would make its own checkout "-dirty"
def revision() -> str:
    """The code's git revision, as in reports."""
    from core.provenance import git_revision  # imports JAX, which jobs of PyTorch in benchmarks.gpu do without

    return git_revision()


def hardware() -> dict:
    """Processor, number of cores and system."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "system": platform.system()}
