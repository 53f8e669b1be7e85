"""Two hosts against one with as many devices: processes of their own that JAX joins, on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DETECTOR = (
    f"--config={ROOT / 'configs/mtl_moe/quickstart.py'}",
    "--config.tasks.names=('masked','cluster','self_distill')",  # the refresh of pseudo-labels is each host's own work
    "--config.train.num_steps=4",
    "--config.train.refresh_step=2",
    "--config.train.save_every=2",
    "--config.train.log_every=1",
    "--config.data.phantom.num_train=80",
    "--config.data.phantom.num_test=8",
)
DISTILLER = (
    f"--config={ROOT / 'configs/vit_distill/distill.py'}",
    "--config.teacher.checkpoint=random:vit_tiny_patch16_224",
    "--config.teacher.overrides.image_size=32",
    "--config.data.kind=digits",
    "--config.few_shot.per_class=4",
    "--config.few_shot.ratio=1",
    "--config.lora.rank=4",
    "--config.train.batch_size=8",
    "--config.train.num_steps=4",
    "--config.train.log_every=1",
)


def start(arguments: tuple[str, ...], workdir: Path, environment: dict[str, str]) -> subprocess.Popen:
    argv = [sys.executable, str(ROOT / "main.py"), *arguments, f"--workdir={workdir}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(argv, env=os.environ | {"XLA_FLAGS": ""} | environment, cwd=ROOT, **pipes)


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text


def hosts(count: int) -> list[dict[str, str]]:
    """What mpirun would tell each process; JAX finds its hosts by that."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "OMPI_MCA_orte_hnp_uri": f"1.0;tcp://127.0.0.1:{port}",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "OMPI_COMM_WORLD_SIZE": str(count),
    }
    rank = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    return [shared | dict.fromkeys(rank, str(host)) for host in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [DETECTOR, DISTILLER], ids=["mtl_moe", "vit_distill"])
def test_two_hosts_train_bit_for_bit_as_one_with_two_devices(arguments, tmp_path):
    finish([start((*arguments, "--distributed"), tmp_path / "two", host) for host in hosts(2)])
    finish([start(arguments, tmp_path / "one", {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})])
    two, one = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("two", "one"))
    assert len(two) == 4
    assert one[:4] == two
    assert not (tmp_path / "two" / "report.json").exists()
    finish([start(("--mode=evaluate",), tmp_path / "two", {})])
    assert (tmp_path / "two" / "report.json").exists()
