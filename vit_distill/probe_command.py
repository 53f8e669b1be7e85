"""The command "probe": features of a frozen model over a labelled set, classifiers on them, one report.

Axes: N images, D width, F classes or findings.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from core.compilation import enable_compilation_cache
from core.files import write_json
from core.mesh import make_mesh
from core.provenance import environment
from core.vit import VitConfig
from core.workdir import READING, check_config, plain, save_config
from input_pipeline.classification import load_labelled
from vit_distill.features import cached_features, extract_features, make_feature_fn, model_fingerprint
from vit_distill.preprocessing import Preprocessing
from vit_distill.probe import HYPER_PARAMETERS, KINDS, Labelled, ProbeOptions, probe
from vit_distill.student_io import FACTS, load_student
from vit_distill.teacher import load_teacher_of

SPLITS = ("train", "valid", "test")
# Fields that may differ between a work directory's config and the one it is run with.
FREE_FIELDS = (*READING, "probe.", "segment.")  # grids are widened; the report is anew


class Subject(NamedTuple):
    """The model that is probed; `facts` is plain JSON for the report."""

    config: VitConfig
    params: Any
    preprocessing: Preprocessing
    facts: Mapping[str, Any]


def load_subject(config: Any) -> Subject:
    """The student of `config.student.workdir` or the teacher of `config.teacher.checkpoint`.

    Raises:
      ValueError: unless exactly one of them is set, for overrides of a student's teacher, and as `load_student` and
        `load_teacher`.
    """
    student, teacher = config.student.workdir, config.teacher.checkpoint
    if bool(student) == bool(teacher):
        raise ValueError(
            "expected either --config.student.workdir (of a distilled student) or --config.teacher.checkpoint, "
            f"found {student!r} and {teacher!r}"
        )
    if student:
        given = [f"overrides.{name}" for name, value in config.teacher.overrides.items() if value is not None]
        given += [name for name in ("allow_missing", "allow_unused") if config.teacher[name]]
        if given:
            raise ValueError(
                f"teacher.{given[0]}: a student is read as it was distilled; leave it out, or probe a teacher with "
                "--config.teacher.checkpoint"
            )
        found = load_student(Path(student))
        return Subject(found.config, found.params, found.preprocessing, {"student": dict(found.facts)})
    found = load_teacher_of(config)
    return Subject(found.config, found.params, found.preprocessing, {"teacher": {"name": found.name, **found.source}})


def check_workdir(config: Any, workdir: Path) -> None:
    """Raises ValueError for a folder that holds a student, or a report made with another config."""
    if (workdir / FACTS).exists():
        raise ValueError(f"{workdir} holds a distilled student, whose report must stay: use --workdir={workdir}/probe")
    check_config(config, workdir, FREE_FIELDS)


def run_probe(config: Any, workdir: Path) -> dict[str, Any]:
    """Probes one model on one labelled set with every kind of `config.probe.kinds`; writes workdir/report.json.

    Returns:
      The report: "metrics" {"test/<data set>/probe/<kind>/<metric>"}, "probes" (all that `probe` returns, by kind),
      "data", "model", "provenance".

    Raises:
      ValueError: as `load_subject`, `load_labelled` and `probe`.
    """
    enable_compilation_cache()
    section = config.probe
    unknown = sorted(set(section.kinds) - set(KINDS))
    if unknown or not section.kinds or section.num_seeds < 1:
        raise ValueError(
            f"probe: expected kinds among {KINDS} and num_seeds of at least 1, found {tuple(section.kinds)} and "
            f"{section.num_seeds}"
        )
    check_workdir(config, workdir)
    subject = load_subject(config)
    size, interpolation = subject.preprocessing.resize_size, subject.preprocessing.interpolation
    sets = {split: load_labelled(config.data, split, size, interpolation) for split in SPLITS}
    apply = make_feature_fn(
        subject.config, subject.params, subject.preprocessing, make_mesh(), dtype=section.feature_dtype
    )
    fingerprint = model_fingerprint(subject.config, subject.params, subject.preprocessing, section.feature_dtype)
    save_config(config, workdir)
    pairs = {}
    for split, images in sets.items():
        print(f"{split}: {len(images)} images; {images.layout}")
        label = f"{split} features"
        if section.cache:
            folder = workdir / "features"
            found = cached_features(folder, fingerprint, apply, images, section.feature_batch_size, description=label)
        else:
            found = extract_features(apply, images, section.feature_batch_size, description=label)
        pairs[split] = Labelled(found, images.labels)
    options = ProbeOptions(
        **{name: section[name] for name in ("epochs", "warmup_epochs", "batch_size", "max_iterations")},
        **{name: tuple(section[name]) for name in ("learning_rates", "c_values", "neighbours")},
    )
    seeds = range(config.seed, config.seed + section.num_seeds)
    classes = sets["train"].classes
    results = {
        kind: probe(*(pairs[split] for split in SPLITS), kind, classes=classes, seeds=seeds, options=options)
        for kind in section.kinds
    }
    return write_probe_report(config, workdir, subject, sets, "probe", results)


def write_probe_report(
    config: Any,
    workdir: Path,
    subject: Subject,
    sets: Mapping[str, Any],
    command: str,
    results: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Writes and prints report.json of a probe; `results` are those of `probe` or `segment_probe`, by kind."""
    name = sets["test"].name
    settings = {*HYPER_PARAMETERS.values(), "at_grid_edge", "all_tied", "num_seeds"}
    metrics = {}
    for kind, result in results.items():
        for key, value in result.items():
            split, short = ("valid", key[6:]) if key.startswith("valid_") else ("test", key)
            if key not in settings:
                metrics[f"{split}/{name}/{command}/{kind}/{short}"] = value
    report = {
        "metrics": metrics,
        "probes": results,
        "data": {
            split: {"num_images": len(images), "manifest_hash": images.manifest_hash(), "layout": images.layout}
            for split, images in sets.items()
        },
        "model": dict(subject.facts),
        "config": plain(config),
        "provenance": environment() | {"seed": int(config.seed)},
    }
    write_json(workdir / "report.json", report)
    for kind, result in results.items():
        chosen = next((key for key in HYPER_PARAMETERS.values() if key in result), "")
        edge = ", at the edge of its grid: widen it" if result["at_grid_edge"] else ""
        # A probe of tokens does not say it: the IoU of so many pixels does not tie.
        tied = "; all of its grid do equally well there: they are too few images" if result.get("all_tied") else ""
        print(f"{kind}: {chosen} {result[chosen]:g} chosen on valid{edge}{tied}")
        for key, value in result.items():
            if key not in settings and not key.endswith("_std"):
                spread = f" +- {result[f'{key}_std']:.4f}" if f"{key}_std" in result else ""
                print(f"  {key:<40} {value:.4f}{spread}")
    print(f"report: {workdir / 'report.json'}")
    return report
