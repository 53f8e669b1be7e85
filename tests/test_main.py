"""What main.py and the commands behind it say to a user, above all when something is wrong.

The command line is tested in processes of its own; those that only parse flags take a fraction of a second, because
JAX is imported after that. The commands themselves are called in this process, without a word to the compiler where
they stop before training.
"""

import csv
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import nibabel
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from configs import common
from configs import workdir as saved
from core.workdir import check_config
from mtl_moe import run
from vit_distill import run as distill_run

ROOT = Path(__file__).parents[1]
QUICKSTART = f"--config={ROOT / 'configs' / 'mtl_moe' / 'quickstart.py'}"


def call(*arguments: str, options: tuple[str, ...] = (), cwd: Path | None = None) -> subprocess.CompletedProcess:
    argv = [sys.executable, *options, str(ROOT / "main.py"), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=1200, check=False, cwd=cwd)


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands turn JAX's cache on: here in a folder of the test instead of the user's."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


# The command line.


def test_help_comes_without_jax():
    """Importing JAX takes seconds; nothing that only parses flags waits for it."""
    done = call("--help", options=("-X", "importtime"))
    assert "--workdir" in done.stdout
    assert "--mode: <train|evaluate|predict|prepare|slices|volumes|compress|export|plan>" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "ml_collections" in imported  # the list is that of the program itself
    assert not imported & {"jax", "flax", "numpy", "tensorflow", "orbax", "matplotlib", "mtl_moe"}


DISTILL = f"--config={ROOT / 'configs' / 'vit_distill' / 'distill.py'}"
W, O, THIRD = {"workdir": Path("w")}, {"output": "o"}, {"reduction": 3}
PROGRAM = {"kind": "stablehlo", "output": ""}
COMMANDS = [  # the command line, and what of which `run` module it calls with what beside the config
    ([QUICKSTART, "--workdir=w"], "train_and_evaluate", W | {"distributed": False}),
    ([QUICKSTART, "--workdir=w", "--distributed"], "train_and_evaluate", W | {"distributed": True}),
    ([QUICKSTART, "--workdir=w", "--mode=evaluate"], "evaluate", W),
    (
        [QUICKSTART, "--workdir=w", "--mode=predict", "--input=i", "--output=o", "--normals=n"],
        "predict",
        W | O | {"source": "i", "normals": "n"},
    ),
    ([QUICKSTART, "--mode=prepare", "--output=o"], "prepare", O),
    ([QUICKSTART, "--mode=slices", "--output=o"], "slices", O),
    ([QUICKSTART, "--mode=volumes", "--input=i", "--output=o"], "volumes", O | {"source": "i"}),
    (
        [QUICKSTART, "--workdir=w", "--mode=compress", "--output=o", "--reduction=3"],
        "compress",
        W | O | {"reduction": 3},
    ),
    (
        [QUICKSTART, "--workdir=w", "--mode=export", "--export=stablehlo"],
        "export",
        W | {"kind": "stablehlo", "output": ""},
    ),
    ([DISTILL, "--workdir=w", "--distributed"], "train_and_evaluate", W | {"distributed": True}),
    ([DISTILL, "--workdir=w", "--mode=evaluate"], "evaluate", W),
    ([DISTILL, "--mode=plan"], "plan", {"workdir": None}),
    ([DISTILL, "--workdir=w", "--mode=plan"], "plan", W),
    ([DISTILL, "--workdir=w", "--mode=export", "--export=onnx", "--output=o"], "export", W | O | {"kind": "onnx"}),
]


@pytest.fixture(scope="module")
def program() -> Any:
    """main.py as a module: its flags may be defined once only."""
    spec = importlib.util.spec_from_file_location("main_of_the_test", ROOT / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # by ml_collections
@pytest.mark.parametrize(("arguments", "command", "expected"), COMMANDS)
def test_every_mode_calls_its_command_with_what_was_given(monkeypatch, program, arguments, command, expected):
    called = {}
    for module in (run, distill_run):
        for name in {name for _, name, _ in COMMANDS} & set(vars(module)):
            signature = inspect.signature(getattr(module, name))

            def record(*args, name=name, signature=signature, module=module):
                called[module.__name__, name] = signature.bind(*args).arguments

            monkeypatch.setattr(module, name, record)
    flags.FLAGS.unparse_flags()
    program._parse_flags(["main.py", *arguments])
    program.main(["main.py"])
    flags.FLAGS.unparse_flags()
    (((module, name), found),) = called.items()
    config = found.pop("config")
    assert (module, name, found) == (f"{config.system}.run", command, expected)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # by ml_collections
def test_a_seed_below_0_is_refused(program, capsys):
    flags.FLAGS.unparse_flags()
    program._parse_flags(["main.py", QUICKSTART, "--workdir=w"])
    program.CONFIG.value.seed = -1
    with pytest.raises(SystemExit):
        program.main(["main.py"])
    flags.FLAGS.unparse_flags()
    assert capsys.readouterr().err == "error: seed: expected at least 0, found -1\n"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # by ml_collections
@pytest.mark.parametrize("mode", ["evaluate", "predict", "compress", "export"])
def test_only_training_runs_on_several_hosts(monkeypatch, program, capsys, mode):
    """All of them would write the same files."""
    monkeypatch.setattr(run, mode, lambda *_: pytest.fail("it was run"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    flags.FLAGS.unparse_flags()
    program._parse_flags(["main.py", QUICKSTART, "--workdir=w", f"--mode={mode}"])
    with pytest.raises(SystemExit):
        program.main(["main.py"])
    flags.FLAGS.unparse_flags()
    said = capsys.readouterr().err
    assert f"error: --mode={mode} runs on one host, and JAX found 2: start it on one, without --distributed" in said


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ([], ["--config is missing, and so is the --workdir"]),
        (["--workdir=w"], ["error: --workdir=w: no such folder; expected the folder of an earlier run"]),
        (["--workdir=.", "--mode=predict"], ["error: --workdir=.: it holds no config.json; expected the folder of"]),
        (["--workdir=w", "--config.data.root=d"], ["error: --workdir=w: no such folder"]),
        (["--config.data.root=d"], ["error: --config is missing"]),
        (["--config=nowhere.py", "--workdir=w"], ["error: --config: ", "No such file or directory: 'nowhere.py'"]),
        (["--config=nowhere.py", "--config.seed=3"], ["error: --config: ", "No such file or directory: 'nowhere.py'"]),
        (
            ["--config=.", "--workdir=w"],
            ["--config=.: expected a Python file", "name its folder: --workdir=RUN"],
        ),
        (["--config=w/config.json"], ["error: --config=w/config.json: expected a Python file", "--workdir=w\n"]),
        (["--config", "w/config.json", "--workdir=w"], ["leave --config out and name its folder: --workdir=w\n"]),
        (
            [f"--config={ROOT / 'configs' / 'common.py'}", "--workdir=w"],
            ["error: --config: the file has no function get_config"],
        ),
        (["--workdir"], ["Missing value for flag --workdir"]),
        ([QUICKSTART], ["--workdir is missing"]),
        ([QUICKSTART, "--workdir=w", "--mode=plan"], ["--mode=plan for config.system='mtl_moe': expected one of"]),
        ([QUICKSTART, "--workdir=w", "--mode=evaluate", "--distributed"], ["--mode=evaluate runs on one host"]),
        ([QUICKSTART, "--workdir=w", "extra"], ["unexpected arguments ['extra']", "--config.field=value"]),
        (
            [QUICKSTART, "--workdir=w", "--mode=fit"],
            ["<train|evaluate|predict|prepare|slices|volumes|"],
        ),
        ([QUICKSTART, "--workdir=w", "--config.train.num_stepz=3"], ["field 'num_stepz'", "num_steps"]),
        ([QUICKSTART, "--workdir=w", "--config.trian.num_steps=3"], ["field 'trian'", 'mean "train"']),
        ([QUICKSTART, "--workdir=w", "--config.train.num_steps=many"], ["config.train.num_steps=many", "int"]),
        ([QUICKSTART, "--workdir=w", "--config.data.skip_corrupt=maybe"], ["config.data.skip_corrupt=maybe"]),
        ([f"{QUICKSTART}:tiny", "--workdir=w"], ["error: flag --config=", ".py:tiny: config argument 'tiny': exp"]),
        ([QUICKSTART.replace("quickstart.py", "bmad.py:lung"), "--workdir=w"], ["'camelyon16'", "found 'lung'"]),
    ],
)
def test_a_wrong_command_line_is_explained(arguments: list[str], messages: list[str], tmp_path: Path):
    done = call(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    text = done.stdout + done.stderr
    assert all(message in text for message in messages), text
    if arguments:  # else the usage is shown
        assert text.startswith("error: "), text
        assert text.count("\n") == 1, text


def test_a_syntax_error_of_a_config_file_is_named(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def get_config(:\n")
    assert re.fullmatch(r"error: --config: .*\(mine\.py, line 1\)\n", call(f"--config={tmp_path / 'mine.py'}").stderr)


def test_saved_config_is_found_in_both_spellings(tmp_path: Path):
    """--workdir=W and --workdir W read W/config.json, and its fields can be changed."""
    folder = tmp_path / "config"  # a folder called as a flag is
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"data": {"root": ""}}))
    for spelling in ([f"--workdir={folder}"], ["--workdir", str(folder)], ["-workdir", str(folder)]):
        done = call(*spelling, "--config.data.root=elsewhere", "--config.data.rot=x")
        assert "unknown config field 'rot'" in done.stderr
    (tmp_path / "runs" / "seed_0").mkdir(parents=True)
    (folder / "config.json").rename(tmp_path / "runs" / "seed_0" / "config.json")
    done = call("--mode=evaluate", f"--workdir={tmp_path / 'runs'}")
    assert f"runs holds 1 seeds: name one of them, --workdir={tmp_path / 'runs' / 'seed_0'}" in done.stderr


# Errors of the commands.


def write_images(folder: Path, count: int, size: int = 32) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(folder / f"im{i:02d}.png")


@pytest.fixture
def folder_config(tiny_config: Any, tmp_path: Path) -> ConfigDict:
    """A folder of 24 training normals and 4 + 4 test images; one task, one expert block, two updates."""
    root = tmp_path / "data"
    write_images(root / "train" / "good", 24)
    write_images(root / "test" / "good", 4)
    write_images(root / "test" / "Ungood", 4)
    config = tiny_config()
    config.data.update(kind="folder", name="mine", root=str(root))
    config.tasks.names = ("masked",)
    config.model.num_neck_layers = 0
    config.train.num_steps = 2
    return config


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def corrupt(config: ConfigDict, root: Path) -> None:
    cut_short(root / "train" / "good" / "im07.png")


def corrupt_test(config: ConfigDict, root: Path) -> None:
    cut_short(root / "test" / "Ungood" / "im02.png")


def abnormal_under_train(config: ConfigDict, root: Path) -> None:
    write_images(root / "train" / "Ungood", 2)


def strange_folder(config: ConfigDict, root: Path) -> None:
    write_images(root / "test" / "perhaps", 2)


def smaller_than_a_patch(config: ConfigDict, root: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(root / "train" / "good" / "small.png")


def no_root(config: ConfigDict, root: Path) -> None:
    config.data.root = ""


def missing_root(config: ConfigDict, root: Path) -> None:
    config.data.root = str(root / "nowhere")


def no_calibration(config: ConfigDict, root: Path) -> None:
    config.data.calibration_fraction = 0.0


def few_calibration_normals(config: ConfigDict, root: Path) -> None:
    config.data.calibration_fraction = 0.1


def unknown_fusion(config: ConfigDict, root: Path) -> None:
    config.score.fusion = "best"


def unknown_task(config: ConfigDict, root: Path) -> None:
    config.tasks.names = ("masked", "magic")


def more_experts_than_there_are(config: ConfigDict, root: Path) -> None:
    config.model.top_k = 9


def impossible_rate(config: ConfigDict, root: Path) -> None:
    config.score.false_positive_rates = (0.0,)


def no_seed(config: ConfigDict, root: Path) -> None:
    config.num_seeds = 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (corrupt, r"train/good/im07\.png.*skip_corrupt"),
        (corrupt_test, r"test/Ungood/im02\.png"),
        (abnormal_under_train, r"train/Ungood: 2 abnormal images under train.*move"),
        (strange_folder, r"test/perhaps"),
        (smaller_than_a_patch, r"small\.png.*4.*8"),
        (no_root, r"data\.root is empty: set --config\.data\.root"),
        (missing_root, r"nowhere.*data\.root"),
        (no_calibration, r"only 0 calibration normals.*calibration_fraction"),
        (few_calibration_normals, r"only 2 calibration normals.*calibration_fraction"),
        (unknown_fusion, r"score\.fusion: expected one of .*'tail'.*found 'best'"),
        (unknown_task, r"tasks\.names: expected some of .*'masked'.*found .*'magic'"),
        (more_experts_than_there_are, r"top_k"),
        (impossible_rate, r"score\.false_positive_rates"),
        (no_seed, r"num_seeds=0: expected at least 1"),
    ],
)
def test_training_stops_before_it_starts(
    spoil: Callable[[ConfigDict, Path], None], message: str, folder_config: ConfigDict, tmp_path: Path
):
    """The message names the file or field; the work directory is not bound to a config that cannot be trained."""
    spoil(folder_config, tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        run.train_and_evaluate(folder_config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_an_error_is_one_line_to_the_user(folder_config: ConfigDict, tmp_path: Path):
    """Through main.py itself: `error: ...` with the file's name on standard error, no traceback, status 1."""
    corrupt(folder_config, tmp_path / "data")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_text(json.dumps(folder_config.to_dict()))
    done = call(f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "im07.png" in line
    assert "Traceback" not in done.stderr


def test_a_work_directory_of_another_config_is_refused(folder_config: ConfigDict, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(folder_config.to_dict()))
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    check_config(saved.get_config(str(tmp_path)), tmp_path, run.FREE_FIELDS)
    other = folder_config.copy_and_resolve_references()
    other.data.root = "elsewhere"
    other.score.gallery = 2
    other.train.num_steps += 1  # trains on
    check_config(other, tmp_path, run.FREE_FIELDS)  # none changes the training done so far
    other.train.num_steps -= 2
    with pytest.raises(ValueError, match=r"train\.num_steps: there 2, now 1"):
        check_config(other, tmp_path, run.FREE_FIELDS)
    other.model.width = 32
    other.optim.learning_rate = 0.5
    with pytest.raises(ValueError, match=r"another config") as caught:
        run.train_and_evaluate(other, tmp_path)
    text = str(caught.value)
    assert "model.width: there 16, now 32" in text
    assert f"optim.learning_rate: there {folder_config.optim.learning_rate}, now 0.5" in text
    assert "data.root" not in text
    for command in (run.evaluate, lambda *a: run.predict(*a, str(tmp_path), "")):
        with pytest.raises(ValueError, match=r"model\.width"):
            command(other, tmp_path)


def test_without_a_checkpoint_there_is_nothing_to_score(folder_config: ConfigDict, tmp_path: Path):
    images = str(tmp_path / "data" / "test")
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*train first"):
        run.evaluate(folder_config, tmp_path / "w")
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*train first"):
        run.predict(folder_config, tmp_path / "w", images, "")
    with pytest.raises(ValueError, match=r"--input is missing"):
        run.predict(folder_config, tmp_path / "w", "", "")
    assert not (tmp_path / "w" / "config.json").exists()


def test_prepare_names_what_it_cannot_check(tiny_config: Any):
    with pytest.raises(ValueError, match=r"one of bmad, folder.*found 'phantom'"):
        run.prepare(tiny_config(), "")


def test_prepare_reports_a_corrupt_file_and_writes_nothing(
    folder_config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture
):
    corrupt(folder_config, tmp_path / "data")
    run.prepare(folder_config, str(tmp_path / "cache.npz"))
    printed = capsys.readouterr().out
    assert "corrupt files: 1" in printed
    assert "im07.png" in printed
    assert not (tmp_path / "cache.npz").exists()


def test_prepare_says_what_the_calibration_normals_allow(
    folder_config: ConfigDict, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    """Of 24 training normals; training says the same by `check_calibration`."""
    run.prepare(folder_config, "")
    printed = capsys.readouterr().out
    assert "smallest p-value: 1/7 = 0.14, by 6 calibration normals of 6 patients or groups" in printed
    assert "training will be refused" not in printed
    assert "the 6 calibration normals come from 6 patient(s) or group(s)" in caplog.text
    few_calibration_normals(folder_config, Path())
    run.prepare(folder_config, "")
    printed = capsys.readouterr().out
    assert "smallest p-value: 1/3 = 0.33, by 2 calibration normals" in printed
    assert "warning: training will be refused: only 2 calibration normals: at least 5 are needed" in printed
    no_calibration(folder_config, Path())
    run.prepare(folder_config, "")
    assert "training will be refused: only 0 calibration normals" in capsys.readouterr().out
    shutil.rmtree(Path(folder_config.data.root) / "train")
    run.prepare(folder_config, "")
    printed = capsys.readouterr().out
    assert "no training normals" in printed
    assert "training will be refused" not in printed


def test_slices_prints_what_it_wrote_and_asks_for_both_folders(tmp_path: Path, capsys: pytest.CaptureFixture):
    volume = np.pad(np.ones((4, 4, 4), np.float32), 2)
    for name in ("a", "b"):
        (tmp_path / "in").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "in" / f"{name}.nii.gz")
    config = common.detector()
    with pytest.raises(ValueError, match=r"expected --config\.data\.root=VOLUMES and --output=FOLDER"):
        run.slices(config, str(tmp_path / "out"))
    config.data.root = str(tmp_path / "in")
    run.slices(config, str(tmp_path / "out"))
    assert "train/good                   8" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "train" / "good").glob("*.png"))) == 8


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Two seeds, and a corrupt file that is to be skipped, in one run.


def test_seeds_are_averaged_and_a_corrupt_file_is_skipped(
    folder_config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    corrupt(folder_config, tmp_path / "data")
    folder_config.data.skip_corrupt = True
    folder_config.num_seeds = 2
    workdir = tmp_path / "w"
    run.train_and_evaluate(folder_config, workdir)

    assert "im07.png" in caplog.text
    reports = [json.loads((workdir / f"seed_{seed}" / "report.json").read_text()) for seed in (0, 1)]
    assert [report["provenance"]["seed"] for report in reports] == [0, 1]
    assert reports[0]["provenance"]["counts"] == {"train": 17, "calibration": 6, "test": 8}
    summary = json.loads((workdir / "report.json").read_text())
    key = "test/mine/image_auroc"
    one, two = (report["metrics"][key] for report in reports)
    assert summary["values"][key] == [one, two]
    assert summary["metrics"][key] == pytest.approx((one + two) / 2)
    assert summary["std"][key] == pytest.approx(abs(one - two) / np.sqrt(2))  # n - 1 in the denominator
    # The seeds give different networks; the floors do not depend on them.
    scores = [(workdir / f"seed_{seed}" / "predictions.csv").read_text() for seed in (0, 1)]
    assert scores[0] != scores[1]
    floors = [name for name in summary["std"] if "/floor/" in name]
    assert floors
    assert all(summary["std"][name] == 0 for name in floors)
    printed = capsys.readouterr().out
    assert printed.startswith(f"devices: {jax.device_count()} cpu (cpu)\n")
    assert printed.count("images: 17 train, 8 test, 6 calibration\n") == 2
    assert "mean and standard deviation over 2 seeds" in printed

    # Both together are a work directory of their own.
    together = json.loads((workdir / "ensemble" / "report.json").read_text())
    assert together["provenance"]["num_seeds"] == 2
    assert together["provenance"]["num_params"] == 2 * reports[0]["provenance"]["num_params"]
    assert summary["ensemble"]["metrics"] == together["metrics"]
    assert "by 2 networks (seeds 0 to 1) that score together" in (workdir / "ensemble" / "report.html").read_text()
    one, two, both = (
        [float(row["score"]) for row in read_csv(workdir / name / "predictions.csv")]
        for name in ("seed_0", "seed_1", "ensemble")
    )
    np.testing.assert_allclose(both, np.mean([one, two], axis=0), rtol=1e-4)
    both_config = saved.get_config(str(workdir / "ensemble"))
    run.predict(both_config, workdir / "ensemble", str(tmp_path / "data" / "test" / "good"), str(tmp_path / "out"))
    known = {Path(row["name"]).name: row["score"] for row in read_csv(workdir / "ensemble" / "predictions.csv")}
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    assert len(rows) == 4
    assert [row["score"] for row in rows] == [known[row["name"]] for row in rows]
    with pytest.raises(ValueError, match=r"num_seeds=2: name the folder of one seed"):
        run.export(both_config, workdir / "ensemble", "stablehlo", "")

    for command in (run.evaluate, lambda *a: run.predict(*a, str(tmp_path), "")):
        with pytest.raises(ValueError, match=r"holds 2 seeds: name one of them, .*seed_0, or all together, .*ensemble"):
            command(folder_config, workdir)
    with pytest.raises(ValueError, match="holds a single run, whose report would be lost"):
        run.train_and_evaluate(folder_config, workdir / "seed_0")
