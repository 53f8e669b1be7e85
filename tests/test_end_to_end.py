"""Through main.py as a user would: train, be killed, resume, evaluate, read the report, predict.

Every command is a process of its own on one CPU device. The killed and resumed run must equal the uninterrupted one
bit for bit. TensorFlow is out of reach of all of them: phantoms and image folders need none.
"""

import csv
import html.parser
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from core.checkpoint import Checkpointer
from core.optim import build_optimizer
from core.tree import fingerprint
from mtl_moe.system import build_system

ROOT = Path(__file__).parents[1]
# Runs a script as on a machine without TensorFlow: its packages cannot be found.
NO_TENSORFLOW = """
import importlib.machinery, runpy, sys
finder, absent = importlib.machinery.PathFinder, ("tensorflow", "tensorflow_datasets", "clu")
find_spec = finder.find_spec
finder.find_spec = lambda name, *args: None if name in absent else find_spec(name, *args)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NUM_STEPS, SAVE_EVERY = 16, 2


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[str], dict[str, Any]]]:
    """Function arguments -> (argv, options of subprocess) of `main.py` on one CPU device."""
    cache = tmp_path_factory.mktemp("compiled")
    env = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "GLIBC_TUNABLES")}
    # Unoptimised code compiles in half the time; what is compared is compiled alike on both sides.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": flags}

    def make(*arguments: str) -> tuple[list[str], dict[str, Any]]:
        return [sys.executable, "-c", NO_TENSORFLOW, str(ROOT / "main.py"), *arguments], {"env": env, "text": True}

    return make


@pytest.fixture(scope="module")
def launch(command: Any) -> Callable[..., subprocess.CompletedProcess]:
    """Runs main.py to its end; it must succeed."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        argv, options = command(*arguments)
        done = subprocess.run(argv, **options, capture_output=True, timeout=1200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def config(tiny_config: Any) -> ConfigDict:
    """A task with and one without a teacher, one expert block; the labels are refreshed halfway."""
    config = tiny_config()
    config.tasks.names = ("masked", "cluster")
    config.model.num_neck_layers = 0
    config.optim.kind = "muon"  # the default of every detector
    config.train.update(num_steps=NUM_STEPS, save_every=SAVE_EVERY, refresh_step=NUM_STEPS // 2)
    return config


@pytest.fixture(scope="module")
def config_flag(config: ConfigDict, tmp_path_factory: pytest.TempPathFactory) -> str:
    """--config=... of that config, by way of a saved one."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return f"--config={ROOT / 'configs' / 'workdir.py'}:{folder}"


@pytest.fixture(scope="module")
def straight(launch: Any, config_flag: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work directory of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    launch(config_flag, f"--workdir={workdir}")
    return workdir


@pytest.fixture(scope="module")
def resumed(command: Any, launch: Any, config_flag: str, straight: Path) -> Path:
    """Work directory of a run killed after its first checkpoint and started again."""
    workdir = straight.with_name("resumed")
    argv, options = command(config_flag, f"--workdir={workdir}")
    process = subprocess.Popen(argv, **options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 1200
        while not (workdir / "checkpoints" / str(SAVE_EVERY)).is_dir():
            assert process.poll() is None, "ended before its first checkpoint"
            assert time.monotonic() < deadline, "no checkpoint in 20 minutes"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (workdir / "checkpoints" / str(NUM_STEPS)).is_dir(), "killed too late: nothing was left to resume"
    assert not (workdir / "report.json").exists()
    done = launch(f"--workdir={workdir}")  # the config is the saved one
    assert "resuming after step" in done.stdout
    return workdir


def report_of(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "report.json").read_text())


def fingerprint_of(config: ConfigDict, workdir: Path) -> str:
    """Hash over every byte of the newest checkpoint: both parameter sets, optimizer, teacher, step."""
    system = build_system(config)
    state = system.abstract_state(build_optimizer(config.optim, config.train.num_steps))
    checkpointer = Checkpointer(workdir)
    try:
        assert checkpointer.latest_step() == NUM_STEPS
        return fingerprint(checkpointer.restore_train(state))
    finally:
        checkpointer.close()


def test_resumed_equals_uninterrupted_bit_for_bit(config: ConfigDict, straight: Path, resumed: Path):
    assert fingerprint_of(config, resumed) == fingerprint_of(config, straight)
    for name in ("predictions.csv", "metrics.jsonl"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes()
    assert report_of(resumed)["metrics"] == report_of(straight)["metrics"]
    records = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1))


TRAIN_QUICKSTART = """
import sys
from pathlib import Path
from configs.mtl_moe import quickstart
from core.tree import fingerprint
from input_pipeline.dataset import load_dataset
from mtl_moe.system import build_system
from mtl_moe.train import train

config = quickstart.get_config()
config.data.phantom.update(num_train=48, num_test=4)
config.tasks.names = ("masked", "jigsaw")  # the others take long to compile
config.train.update(num_steps=4, save_every=2, log_every=1, tensorboard=False)
print(fingerprint(train(build_system(config), load_dataset(config.data), Path(sys.argv[1]))))
"""


def test_the_quickstart_resumes_bit_for_bit(command: Any, tmp_path: Path):
    """As users train: in bfloat16, by optimised code. What a kill after the second update leaves is resumed."""
    _, options = command()
    env = {key: value for key, value in options["env"].items() if key != "XLA_FLAGS"}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    printed = []
    for folder in (straight, resumed):
        if folder == resumed:
            shutil.copytree(straight, resumed)
            shutil.rmtree(resumed / "checkpoints" / "4")
        argv = [sys.executable, "-c", TRAIN_QUICKSTART, str(folder)]
        done = subprocess.run(argv, env=env, cwd=ROOT, text=True, capture_output=True, timeout=1200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        printed.append(done.stdout.splitlines())
    assert "resuming after step 2" in printed[1]
    assert printed[0][-1] == printed[1][-1]
    assert (resumed / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_evaluate_needs_only_the_work_directory(launch: Any, straight: Path):
    before, predictions = report_of(straight), (straight / "predictions.csv").read_bytes()
    for name in ("report.json", "report.html", "predictions.csv", "calibration.npz"):
        (straight / name).unlink()
    done = launch("--mode=evaluate", f"--workdir={straight}", "--config.score.gallery=2")
    assert report_of(straight)["metrics"] == before["metrics"]
    assert (straight / "predictions.csv").read_bytes() == predictions
    assert str(straight / "report.html") in done.stdout
    assert "test/phantom/image_auroc" in done.stdout


def test_report_json_has_the_documented_content(straight: Path):
    report = report_of(straight)
    metrics = {key.removeprefix("test/phantom/") for key in report["metrics"]}
    assert metrics >= {"image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro", "aupro_bmad"}
    assert metrics >= {f"task/{task}/image_auroc" for task in ("masked", "cluster")}
    assert metrics >= {"best_single/image_auroc", "leave_out/masked/image_auroc"}
    assert any(key.startswith("floor/") for key in metrics)
    provenance = report["provenance"]
    assert provenance["checkpoint_step"] == NUM_STEPS
    assert provenance["counts"] == {"train": 18, "calibration": 6, "test": 8}  # 24 normals, a quarter held out
    assert set(provenance) >= {"versions", "devices", "seed", "git_revision", "manifest_hash", "evaluation_seconds"}
    with (straight / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert list(rows[0])[:4] == ["name", "label", "score", "p_value"]
    assert {row["label"] for row in rows} == {"0", "1"}


class Page(html.parser.HTMLParser):
    """Collects tags left open, addresses and the visible text of a page."""

    VOID = ("meta", "link", "img", "br", "hr", "input", "col", "path", "circle", "line", "rect", "use")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(path: Path) -> Page:
    """The page is closed in itself: every tag has its end, and nothing is loaded from anywhere."""
    text = path.read_text()
    page = Page(text)
    assert not page.open
    assert page.addresses
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "@import" not in text
    assert "url(http" not in text
    return page


def test_report_html_is_one_whole_file(straight: Path):
    page = check_page(straight / "report.html")
    value = report_of(straight)["metrics"]["test/phantom/image_auroc"]
    assert f"{value:.3f}" in page.text
    assert "masked" in page.text
    assert "cluster" in page.text


def test_predict_scores_a_folder_of_images(launch: Any, straight: Path, tmp_path: Path):
    """Any folder of PNG files, whatever their sizes and modes; the result is written beside the run by default."""
    source = tmp_path / "new images"
    (source / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, shape in {"b.png": (40, 50), "a.png": (64, 64, 3), "sub/c.png": (32, 32)}.items():
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(source / name)
    done = launch("--mode=predict", f"--workdir={straight}", f"--input={source}")
    folder = straight / "predict" / "new images"
    assert str(folder / "predictions.csv") in done.stdout
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a.png", "b.png", "sub/c.png"]
    assert all(row["label"] == "" and 0 < float(row["p_value"]) <= 1 for row in rows)
    page = check_page(folder / "report.html")
    assert "sub/c.png" in page.text


def test_a_prepared_cache_trains_without_the_images(launch: Any, config_flag: str, tmp_path: Path):
    """prepare writes a folder of PNG files to one .npz; with the folder gone, training from it gives a report."""
    root, cache, workdir = tmp_path / "data", tmp_path / "cache.npz", tmp_path / "w"
    rng = np.random.default_rng(0)
    for folder, count in {"train/good": 24, "test/good": 4, "test/Ungood/img": 4, "test/Ungood/label": 4}.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (40, 40), dtype=np.uint8)
            if folder.endswith("label"):
                pixels = np.where(np.indices((40, 40)).sum(0) < 40, 255, 0).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / f"im{i:02d}.png")
    data = ("--config.data.kind=folder", "--config.data.name=mine", f"--config.data.root={root}")
    printed = launch("--mode=prepare", config_flag, *data, f"--output={cache}").stdout
    assert f"written: {cache}" in printed
    assert "corrupt files: 0" in printed
    shutil.rmtree(root)

    short = ("--config.tasks.names=masked", "--config.train.num_steps=2", "--config.data.name=mine")
    launch(config_flag, *short, "--config.data.kind=npz", f"--config.data.root={cache}", f"--workdir={workdir}")
    report = report_of(workdir)
    assert report["provenance"]["counts"] == {"train": 18, "calibration": 6, "test": 8}
    assert {"test/mine/image_auroc", "test/mine/pixel_auroc"} <= set(report["metrics"])
