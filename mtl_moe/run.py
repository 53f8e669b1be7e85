"""The commands of the detector, as main.py calls them: train, evaluate, predict, prepare, slices, volumes, compress,
export."""

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from core.checkpoint import has_checkpoint
from core.compilation import enable_compilation_cache
from core.files import write_json
from core.provenance import print_devices
from core.workdir import check_config, save_config
from input_pipeline.dataset import Dataset, load_dataset, preprocessing
from input_pipeline.nifti import write_slices
from input_pipeline.nifti_maps import write_volumes
from input_pipeline.prepare import format_report
from input_pipeline.prepare import prepare as prepare_data
from mtl_moe import compress as compression
from mtl_moe import evaluate as evaluation
from mtl_moe import export as exporting
from mtl_moe import predict as prediction
from mtl_moe.calibration_fit import check_calibration
from mtl_moe.free_fields import DETECTOR
from mtl_moe.infer import own_calibration, restore
from mtl_moe.provenance import check_source
from mtl_moe.seeds import ENSEMBLE, check_one_seed, seed_folders, summarise
from mtl_moe.system import build_system, sample_images
from mtl_moe.train import train
from mtl_moe.training_data import bind_training_data

# Fields that may differ between a work directory's config and the one it is run with: none changes the training done
# so far. A larger train.num_steps trains on, by the rest of the longer schedule.
FREE_FIELDS = (*DETECTOR, "train.num_steps", "score.", "compress.")


def train_and_evaluate(config: Any, workdir: Path, distributed: bool = False) -> None:
    """Trains (or resumes) and evaluates; with `num_seeds` above 1 each seed in its own folder, then all as an ensemble.

    A config with `command="ablation"` (configs/mtl_moe/ablation.py) trains and compares many detectors instead.
    """
    enable_compilation_cache()
    if distributed:
        jax.distributed.initialize()
    print_devices()
    if config.get("command") == "ablation":
        from mtl_moe.ablation import run_ablation  # its statistics take a fifth of the start of every command

        run_ablation(config, workdir)
        return
    _check_single(config)
    load = functools.cache(lambda: load_dataset(config.data, min_size=config.model.patch_size))  # once for all seeds
    if config.num_seeds == 1:
        _train_one(config, load, workdir)
        return
    if config.num_seeds < 1:
        raise ValueError(f"num_seeds={config.num_seeds}: expected at least 1")
    if (workdir / "config.json").exists():
        raise ValueError(f"{workdir} holds a single run, whose report would be lost: choose another --workdir")
    reports = []
    for seed, folder in enumerate(seed_folders(config, workdir / ENSEMBLE), config.seed):
        one = config.copy_and_resolve_references()
        one.update(seed=seed, num_seeds=1)
        reports.append(_train_one(one, load, folder))
    if jax.process_count() == 1:
        _report_seeds(config, load(), workdir, reports)


def evaluate(config: Any, workdir: Path) -> None:
    """Restores the newest checkpoint and evaluates; needs nothing but the work directory and the data.

    On data other than those it was trained on the results go to `workdir`/evaluate/NAME, see `result_folder`.
    """
    _check_single(config)
    enable_compilation_cache()
    print_devices()
    check_config(config, workdir, FREE_FIELDS)
    _check_seed(workdir)
    system = build_system(config)
    dataset = load_dataset(config.data, min_size=config.model.patch_size, require_train=False)
    evaluation.check_score(config.score, dataset)
    folder = evaluation.result_folder(config.data, dataset, workdir)
    _print_report(evaluation.evaluate(system, dataset, workdir), folder)


def predict(config: Any, workdir: Path, source: str, output: str, normals: str = "") -> None:
    """Scores a folder of images with a trained detector, calibrated in its evaluation or on a folder of normals.

    Without `output` the results go to `workdir`/predict/NAME, NAME that of the folder and of the normals'; where that
    holds the results of another folder of this name they are kept: ValueError.
    """
    if not source:
        raise ValueError("--input is missing: the folder of images to score")
    _check_single(config)
    enable_compilation_cache()
    print_devices()
    check_config(config, workdir, FREE_FIELDS)
    _check_seed(workdir)
    images, site = Path(source), Path(normals) if normals else None
    name = "_against_".join(path.resolve().name for path in (images, site) if path)
    folder = Path(output) if output else workdir / "predict" / name
    if output:
        prediction.check_output(folder, images, site)
    else:
        check_source(folder, prediction.source_of(images, site), "name another folder with --output=FOLDER")
    prediction.predict(build_system(config), workdir, images, folder, site)
    print(f"scores (a low p_value is suspicious): {folder / 'predictions.csv'}")
    if (folder / "patients.csv").exists():
        print(f"of patients, who bring several images: {folder / 'patients.csv'}")
    print(f"report: {folder / 'report.html'}")


def prepare(config: Any, output: str) -> None:
    """Checks a data folder and, with `output`, writes the decoded cache."""
    report = prepare_data(config.data, output, min_size=config.model.patch_size)
    print(format_report(report))
    if "train" not in report["counts"]:  # the report says it
        return
    try:
        check_calibration(config.score.fusion, report["calibration_groups"])
    except ValueError as error:
        print(f"warning: training will be refused: {error}")


def slices(config: Any, output: str) -> None:
    """Cuts a folder of volumes into a folder of images."""
    if not config.data.root or not output:
        raise ValueError("--mode=slices: expected --config.data.root=VOLUMES and --output=FOLDER, a new one")
    counts = write_slices(config.data.root, Path(output), **config.slices, window=config.data.window)
    for folder, count in sorted(counts.items()):
        print(f"{folder:<28} {count}" + (" (slices.min_body)" if folder == "left out" else ""))
    print(f"check it: --mode=prepare --config.data.root={output}")


def volumes(config: Any, source: str, output: str) -> None:
    """Puts the maps that predict wrote for the slices of volumes back into volumes."""
    if not (config.data.root and source and output):
        raise ValueError(
            "--mode=volumes: expected --config.data.root=VOLUMES, --input=PREDICTION, the folder that predict wrote to "
            "with --config.score.save_maps=True, and --output=FOLDER, a new one"
        )
    maps = Path(source) / "maps" if (Path(source) / "maps").is_dir() else Path(source)
    count = write_volumes(config.data.root, maps, Path(output), config.slices.axis, config.slices.every)
    print(f"{count} volumes of maps in {output}: 0 the normals' median, 1 their 95th percentile")


def compress(config: Any, workdir: Path, output: str, reduction: int | None = None) -> None:
    """Distils a trained detector into a shallower one, whose work directory is `output`, and evaluates that."""
    if not output or Path(output).absolute() == workdir.absolute():
        raise ValueError("--output: expected the work directory of the smaller detector, another than --workdir")
    if not (workdir / "config.json").exists():
        raise ValueError(f"{workdir} is no work directory of a trained detector: train one, or check --workdir")
    enable_compilation_cache()
    print_devices()
    check_one_seed(config)
    check_config(config, workdir, FREE_FIELDS)
    small = build_system(compression.small_config(config, reduction))
    dataset = load_dataset(config.data, min_size=config.model.patch_size)
    evaluation.check_score(config.score, dataset)
    folder = Path(output)
    facts = compression.compress(build_system(config), small, dataset, workdir, folder)
    if (folder / "report.json").exists():
        print(f"{folder} is finished; evaluate it again with --mode=evaluate --workdir={folder}")
    else:
        _print_report(evaluation.evaluate(small, dataset, folder), folder)
    _print_compression(facts)


def export(config: Any, workdir: Path, kind: str, output: str) -> None:
    """Writes the detector's scoring as a program of its own, compared on some training normals."""
    if kind != "stablehlo":
        raise ValueError(f"a detector is exported as one program: expected --export=stablehlo, found {kind!r}")
    enable_compilation_cache()
    check_one_seed(config)
    check_config(config, workdir, FREE_FIELDS)
    system = build_system(config)
    trained = restore(system, workdir)
    data = config.data.copy_and_resolve_references()
    data.memory_limit_gb = 0.0  # of files, only the images that are compared are decoded
    dataset = load_dataset(data, min_size=config.model.patch_size)
    folder = Path(output) if output else workdir / "export" / kind
    try:
        calibration = own_calibration(system, workdir, trained.step)
    except ValueError as error:
        logging.warning("the exported program gives raw scores, no p-values: %s", error)
        calibration = None
    images = sample_images(dataset, config.seed, config.score.batch_size)
    facts = exporting.export(system, trained, calibration, images, preprocessing(data), folder)
    print(f"exported to {folder}; reloaded, it differs by {max(facts['max_difference'].values()):.1e}")


def _check_seed(workdir: Path) -> None:
    """Of several seeds' common folder there is no one detector."""
    seeds = sorted(path.parent for path in workdir.glob("seed_*/config.json"))
    if seeds and not (workdir / "config.json").exists():
        raise ValueError(
            f"{workdir} holds {len(seeds)} seeds: name one of them, --workdir={seeds[0]}, or all together, --workdir="
            f"{workdir / ENSEMBLE}"
        )


def _check_single(config: Any) -> None:
    """An ordinary detector's config has no command."""
    if config.get("command") == "ablation":
        raise ValueError("an ablation is many detectors: evaluate, or predict with, one of WORKDIR/cells/*")
    if "command" in config:
        raise ValueError(f"command: expected 'ablation' or none, found {config.command!r}")


def _train_one(config: Any, load: Callable[[], Dataset], workdir: Path) -> dict[str, Any] | None:
    if has_checkpoint(workdir):  # before, nothing is trained: what ran out of memory may run again with less
        check_config(config, workdir, FREE_FIELDS)
    system = build_system(config)
    dataset = load()
    counts = ", ".join(f"{len(split)} {key}" for key, split in dataset.splits.items())
    print(f"{dataset.name}: {dataset.layout}\nimages: {counts}")
    evaluation.check_score(config.score, dataset)
    train(system, dataset, workdir)
    if jax.process_count() > 1:  # one host evaluates afterwards: every image is then counted once by construction
        print(f"trained; now run on one host: python main.py --mode=evaluate --workdir={workdir}")
        return None
    report = evaluation.evaluate(system, dataset, workdir)
    _print_report(report, workdir)
    return report


def _report_seeds(config: Any, dataset: Dataset, workdir: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """report.json of all seeds, and the ensemble's work directory, evaluated."""
    bind_training_data(dataset, workdir / ENSEMBLE)
    save_config(config, workdir / ENSEMBLE)
    together = evaluation.evaluate(build_system(config), dataset, workdir / ENSEMBLE)
    summary = summarise(reports) | {ENSEMBLE: {key: together[key] for key in ("metrics", "intervals")}}
    write_json(workdir / "report.json", summary)
    print(f"\nmean and standard deviation over {config.num_seeds} seeds")
    for key, value in _headline_metrics(summary["metrics"]).items():
        print(f"  {key:<48} {value:.3f} +- {summary['std'][key]:.3f}")
    print("all seeds together")
    _print_report(together, workdir / ENSEMBLE)
    print(f"report of the seeds: {workdir / 'report.json'}; pages: {workdir}/seed_*/report.html")


def _headline_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The fused metrics, each task's image AUROC, and the strongest floor."""
    fused = {key: value for key, value in metrics.items() if key.count("/") == 2}
    tasks = {k: v for k, v in metrics.items() if "/task/" in k and k.endswith("image_auroc")}
    floors = {k: v for k, v in metrics.items() if "/floor/" in k and k.endswith("/image_auroc")}
    strongest = {max(floors, key=floors.get): max(floors.values())} if floors else {}
    return fused | tasks | strongest


def _print_report(report: Mapping[str, Any], workdir: Path) -> None:
    _print_metrics(_headline_metrics(report["metrics"]), report["intervals"])
    print(f"report: {os.path.join(workdir, 'report.html')}")


def _print_metrics(metrics: Mapping[str, float], intervals: Mapping[str, Any]) -> None:
    for key, value in metrics.items():
        interval = intervals.get(key)
        print(f"  {key:<48} {value:.3f}" + (f"  [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""))


def _print_compression(facts: Mapping[str, Any]) -> None:
    for name in ("num_params", "gflops_per_image", "ms_per_image"):
        print(f"  {name:<48} {facts[name]['full']:.4g} -> {facts[name]['small']:.4g}")
    error = facts["token_error"]
    print(f"  {'token_error, copied -> distilled':<48} {error['copied']:.3f} -> {error['distilled']:.3f}")
    print(f"  {'speedup':<48} {facts['speedup']:.2f}")
    for name, value in facts.get("source_metrics", {}).items():
        print(f"  {'full detector: ' + name:<48} {value:.3f}")
