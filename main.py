"""The one entry: --config says what, --mode says which step, --workdir says where.

  python main.py --config=configs/mtl_moe/bmad.py:brain --config.data.root=DIR --workdir=W     trains, then evaluates
  python main.py --mode=evaluate --workdir=W            restores the newest checkpoint and evaluates
  python main.py --mode=predict --workdir=W --input=DIR scores any folder (--normals=DIR: against these)
  python main.py --mode=prepare --config=... --output=CACHE.npz   checks a data folder and writes a decoded cache
  python main.py --mode=slices --config=... --config.data.root=VOLUMES --output=DIR   cuts NIfTI volumes into images
  python main.py --mode=volumes --config=... --config.data.root=VOLUMES --input=PREDICTION --output=DIR   and maps back
  python main.py --mode=compress --workdir=W --reduction=2 --output=S   distils a trained detector into a smaller one
  python main.py --config=configs/vit_distill/distill.py --config.teacher.checkpoint=T --config.data.root=D --workdir=W
  python main.py --mode=plan --config=configs/vit_distill/distill.py --config.teacher.checkpoint=T   what it will cost
  python main.py --mode=export --workdir=W --export=timm   writes the merged student for other tools
  python main.py --mode=export --workdir=W --export=stablehlo   writes it, or a detector, as a program of its own

Any config field can be changed on the command line: --config.train.num_steps=500.
"""

import importlib
import os
import platform
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

NO_CONFIG = "--config is missing, and so is the --workdir of an earlier run"
# What each system offers; functions of the same name in its run.py.
MODES = {
    "mtl_moe": ("train", "evaluate", "predict", "prepare", "slices", "volumes", "compress", "export"),
    "vit_distill": ("train", "evaluate", "plan", "export"),
}
WITHOUT_WORKDIR = ("prepare", "slices", "volumes", "plan")
EXPORTS = ("timm", "huggingface", "adapters", "stablehlo", "onnx")
CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; without it, the one of --workdir.")
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    list(dict.fromkeys(mode for modes in MODES.values() for mode in modes)),
    "What to do; train also evaluates at its end.",
)
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run: config, checkpoints, metrics, report.")
INPUT = flags.DEFINE_string("input", "", "Folder of images for --mode=predict; of its results for volumes.")
NORMALS = flags.DEFINE_string(
    "normals",
    "",
    "For --mode=predict: folder of normal images of the site that the input comes from; they calibrate the scores "
    "instead of the training set's.",
)
EXPORT = flags.DEFINE_enum("export", "timm", EXPORTS, "What --mode=export writes; a detector: stablehlo.")
OUTPUT = flags.DEFINE_string(
    "output",
    "",
    "Where predict writes (default WORKDIR/predict/NAME, of --input), prepare its .npz, slices its images, volumes its "
    "maps, export its folder (WORKDIR/export/KIND), compress the smaller detector's work directory.",
)
REDUCTION = flags.DEFINE_integer("reduction", None, "For --mode=compress: one block in so many is kept.", lower_bound=2)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Several hosts: initialise jax.distributed first.")


def main(argv: list[str]) -> None:
    """Dispatches to the system of the config. Errors a user can mend end in one line, not in a traceback."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments {argv[1:]}: fields are changed with --config.field=value")
    config = CONFIG.value
    if config is None:
        if WORKDIR.value:
            sys.exit(f"error: {_no_config_in(WORKDIR.value)}")
        raise app.UsageError(NO_CONFIG)
    try:
        mode, system = MODE.value, config.get("system", "nothing")
    except OSError as error:  # ml_collections raises it when a field is read, not when flags are parsed
        sys.exit(f"error: --config: {_reason(error)}")
    if mode not in MODES.get(system, ()):
        known = "; ".join(f"{name}: {', '.join(modes)}" for name, modes in MODES.items())
        sys.exit(f"error: --mode={mode} for config.system={system!r}: expected one of {known}")
    if not WORKDIR.value and mode not in WITHOUT_WORKDIR:
        sys.exit("error: --workdir is missing: the folder where checkpoints, metrics and the report go")
    if DISTRIBUTED.value and mode != "train":
        sys.exit(f"error: --distributed is for training: --mode={mode} runs on one host, start it there without")
    run = importlib.import_module(f"{system}.run")  # imports JAX: seconds, so that --help need not wait
    from core.mesh import check_one_host

    workdir = Path(WORKDIR.value)
    commands = {
        "train": lambda: run.train_and_evaluate(config, workdir, DISTRIBUTED.value),
        "evaluate": lambda: run.evaluate(config, workdir),
        "predict": lambda: run.predict(config, workdir, INPUT.value, OUTPUT.value, NORMALS.value),
        "prepare": lambda: run.prepare(config, OUTPUT.value),
        "slices": lambda: run.slices(config, OUTPUT.value),
        "volumes": lambda: run.volumes(config, INPUT.value, OUTPUT.value),
        "compress": lambda: run.compress(config, workdir, OUTPUT.value, REDUCTION.value),
        "plan": lambda: run.plan(config, workdir if WORKDIR.value else None),
        "export": lambda: run.export(config, workdir, EXPORT.value, OUTPUT.value),
    }
    try:
        if config.get("seed", 0) < 0:
            raise ValueError(f"seed: expected at least 0, found {config.seed}")
        if mode != "train" and mode not in WITHOUT_WORKDIR:
            check_one_host(f"--mode={mode}")
        commands[mode]()
    except (ValueError, OSError) as error:
        logging.debug("traceback", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def run() -> None:
    """Console entry point. Without --config, the config saved in --workdir is used."""
    _use_huge_pages()
    # Native libraries and Orbax report every step of theirs otherwise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # a line of warning at every start; nothing here computes by it
    logging.set_verbosity(logging.WARNING)
    app.run(main, argv=_with_saved_config(sys.argv), flags_parser=_parse_flags)


def _with_saved_config(arguments: list[str]) -> list[str]:
    """Adds --config=configs/workdir.py:WORKDIR where there is a --workdir of an earlier run and no --config."""
    names = [argument.split("=", 1)[0].lstrip("-") if argument.startswith("-") else "" for argument in arguments]
    if "config" in names:
        _check_python(_value(arguments, names.index("config")).partition(":")[0])
        return arguments
    workdir = ""
    if "workdir" in names:
        workdir = _value(arguments, names.index("workdir"))
        if (Path(workdir) / "config.json").exists():
            config = Path(__file__).parent / "configs" / "workdir.py"
            return [arguments[0], f"--config={config}:{workdir}", *arguments[1:]]
        if seeds := sorted(Path(workdir).glob("seed_*/config.json")):
            sys.exit(
                f"error: {workdir} holds {len(seeds)} seeds: name one of them, --workdir={seeds[0].parent}, or all "
                f"together, --workdir={Path(workdir) / 'ensemble'}, or the --config that all were trained with"
            )
    if any(name.startswith("config.") for name in names):  # absl would call the field an unknown flag
        sys.exit(f"error: {_no_config_in(workdir) if workdir else NO_CONFIG}")
    return arguments


def _value(arguments: list[str], position: int) -> str:
    """What the flag there is given: after its sign, or as the next argument."""
    _, sign, value = arguments[position].partition("=")
    return value if sign else "".join(arguments[position + 1 : position + 2])


def _check_python(path: str) -> None:
    """A run's config.json would be executed as a config file is."""
    if not path.endswith(".py"):
        folder = Path(path).parent if Path(path).name == "config.json" else "RUN"
        sys.exit(
            f"error: --config={path}: expected a Python file, such as configs/mtl_moe/folder.py; to go on with a run, "
            f"or to evaluate it, leave --config out and name its folder: --workdir={folder}"
        )


def _no_config_in(workdir: str) -> str:
    """What is wrong with a work directory whose config was to be used."""
    found = "it holds no config.json" if Path(workdir).exists() else "no such folder"
    return f"--workdir={workdir}: {found}; expected the folder of an earlier run, or a --config to train there"


def _parse_flags(arguments: list[str]) -> list[str]:
    """absl's parser; what is wrong with a flag, a config's argument or a config field ends in one line."""
    try:
        return flags.FLAGS(arguments)
    except OSError as error:
        sys.exit(f"error: --config: {_reason(error)}")
    except SyntaxError as error:  # of a config file
        sys.exit(f"error: --config: {error}")
    except flags.Error as error:  # one of a config file holds a whole traceback, whose last line says what is wrong
        flag, sign, trace = str(error).partition(": Error whilst parsing config file:")
        reason = ": " + trace.strip().splitlines()[-1].removeprefix("ValueError: ") if sign else ""
        sys.exit(f"error: {flag}{reason}")
    except (AttributeError, KeyError) as error:  # ConfigDict raises either, the first around the second
        reason = error.args[0]
        text = str(reason.args[0] if isinstance(reason, KeyError) else reason)
        if "'get_config'" in text:
            sys.exit("error: --config: the file has no function get_config: expected one of configs/, or one like them")
        sys.exit(f"error: unknown config field {' '.join(text.split())}")


def _reason(error: OSError) -> str:
    """Why a config file could not be read, without what ml_collections puts around it."""
    return str(error.__cause__ or error).splitlines()[-1].strip()


def _use_huge_pages() -> None:
    """Starts this program anew with glibc's transparent huge pages: they are read at start-up only.

    XLA's CPU backend allocates its large buffers by malloc, whose small pages cost a fault for every 4 KiB.
    """
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


if __name__ == "__main__":
    run()
