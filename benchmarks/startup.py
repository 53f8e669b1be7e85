"""Start-up: seconds to --help, to import each system, and from the command to the first update, cache cold and warm.

  python -m benchmarks.startup [--rounds=5]

Whole processes, wall time, medians. "First update" is the detector's quickstart config stopped after one update, with
an empty and with a filled compilation cache on disk.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import write_record

ROOT = Path(__file__).parents[1]


def seconds_of(command: list[str], environment: dict[str, str], rounds: int) -> float:
    """Median wall seconds of a process that must succeed."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    """Times and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    commands = {
        "--help": [sys.executable, "main.py", "--help"],
        "import mtl_moe.run": [sys.executable, "-c", "import mtl_moe.run"],
        "import vit_distill.run": [sys.executable, "-c", "import vit_distill.run"],
        "import torch, timm (for comparison)": [
            sys.executable,
            "-c",
            "from benchmarks.peers import import_timm; import_timm()",
        ],
    }
    rows = []
    for name, command in commands.items():
        # absl ends --help with status 1.
        allowed = [*command] if name != "--help" else ["sh", "-c", f"{sys.executable} main.py --help; true"]
        rows.append({"what": name, "seconds": round(seconds_of(allowed, environment, args.rounds), 2)})
        print(rows[-1], flush=True)
    with tempfile.TemporaryDirectory() as cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
        for state in ("cold", "warm"):
            with tempfile.TemporaryDirectory() as workdir:
                command = [sys.executable, "-c", FIRST_UPDATE, workdir]
                spent = seconds_of(command, environment, 1)
            rows.append({"what": f"command to first update, compilation cache {state}", "seconds": round(spent, 1)})
            print(rows[-1], flush=True)
    write_record("startup_cpu", " ".join(["python -m benchmarks.startup", *sys.argv[1:]]), rows, ("jax", "flax"))


# The quickstart's training, which always evaluates at its end, cut after the first update.
FIRST_UPDATE = """
import sys
from pathlib import Path
from configs.mtl_moe import quickstart
from core.compilation import enable_compilation_cache
from input_pipeline.dataset import load_dataset
from mtl_moe.system import build_system
from mtl_moe.train import train
config = quickstart.get_config()
config.train.num_steps, config.data.phantom.num_train, config.data.phantom.num_test = 1, 64, 8
enable_compilation_cache()
train(build_system(config), load_dataset(config.data), Path(sys.argv[1]))
"""

if __name__ == "__main__":
    main()
