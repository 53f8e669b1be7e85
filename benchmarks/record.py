"""How a measurement is recorded: benchmarks/results/<name>.json with hardware, versions, date, command and rows."""

import datetime
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def write_record(name: str, command: str, rows: Sequence[dict], packages: Sequence[str]) -> None:
    """Writes the record and says where."""
    record = {
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "date": datetime.date.today().isoformat(),
        "command": command,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote benchmarks/results/{path.name}")


def hardware() -> dict:
    """Processor, number of cores and system."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "system": platform.system()}
