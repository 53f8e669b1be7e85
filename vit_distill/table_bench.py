"""What all rows of an ablation share: the teacher, few-shot sets, held-out images and probe sets, each read once.

Axes: n images, S stored image side, H W C image, N tokens, D width, B batch.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core.mesh import make_mesh
from core.sampling import even_rows
from core.vit import VitConfig
from input_pipeline.classification import load_labelled
from input_pipeline.few_shot import select_few_shot
from input_pipeline.sources import LabelledSet
from vit_distill.distill import Distiller, build_distiller, make_loss_fn, make_targets_fn
from vit_distill.features import extract_features, make_feature_fn
from vit_distill.images import draw
from vit_distill.losses import LossConfig
from vit_distill.probe import KINDS, Labelled, ProbeOptions, probe, wanted_metric
from vit_distill.probe_command import SPLITS
from vit_distill.segment_command import check_masked, read_masks
from vit_distill.segment_probe import Segmented, SegmentOptions, segment_probe
from vit_distill.teacher import Teacher
from vit_distill.train import train

HELD_OUT_BATCH = 32
SEGMENT = "segment"  # the kind of probe that names the class of every pixel
WHOLE = 1.0  # the ratio of a bench of one student: the images were chosen before


@dataclasses.dataclass(frozen=True)
class Trained:
    """A student after training: what it is, what was trained (all its weights but for "lora"), wall seconds."""

    distiller: Distiller
    trainable: Any
    seconds: float

    @property
    def params(self) -> Any:
        return self.distiller.merged(self.trainable)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Data and teacher of a table.

    Attributes:
      few_shot: by ratio, images to distil on; subsets of one seed, so smaller ones lie in larger ones.
      held_out: normalised images [n, H, W, C] of the validation split, n a multiple of the batch they are run in;
        learning rates are chosen by the feature loss on them. Their labels are not looked at.
      held_out_hash: over the names of these images.
      probe_sets: train, valid and test of the probe; () where there are no labels to probe with.
      cache: folder for cached teacher features (train.cached_views above 0).
      targets, calibrated: teacher tokens of the held-out images by what they are compared with, and calibrated blocks
        by (ratio, reduction); filled when first needed.
      begun_with: metric of the cells that the table has already, "" for none.
    """

    config: Any
    teacher: Teacher
    few_shot: dict[float, LabelledSet]
    held_out: np.ndarray
    held_out_hash: str
    probe_sets: tuple[LabelledSet, ...]
    cache: Path
    targets: dict[Any, list[tuple[np.ndarray, ...]]] = dataclasses.field(default_factory=dict)
    calibrated: dict[tuple[float, int], tuple[int, ...]] = dataclasses.field(default_factory=dict)
    begun_with: str = ""

    @property
    def metric(self) -> str:
        """What rows are compared by: what probes are chosen by, or as the table was begun (earlier versions: top1).

        "" without a probe.
        """
        if not self.probe_sets:
            return ""
        if self.config.table.probe.kind == SEGMENT:
            return "miou"
        _, valid, test = self.probe_sets
        return self.begun_with or wanted_metric(len(test.classes), valid.labels, test.labels)

    @property
    def num_effective(self) -> float | None:
        """Test images n for which a (1 - a) / n is the variance of the metric a by their chance.

        top1: all of them. AUC: those of the rarer class, at most (van Dantzig, 1951). Balanced accuracy: C^2 over the
        sum of 1 / n_c over the C classes that occur, as if their recalls were equal. None for a mean AUC or IoU:
        unknown, and without a probe.
        """
        if self.metric in ("", "mean_auc", "miou"):
            return None
        labels = self.probe_sets[2].labels
        counts = np.unique(labels, return_counts=True)[1]
        found = {"top1": counts.sum(), "auc": counts.min(), "balanced_accuracy": len(counts) ** 2 / (1 / counts).sum()}
        return float(found[self.metric])

    @property
    def num_test(self) -> int:
        """Images that the probe is scored on."""
        return len(self.probe_sets[2]) if self.probe_sets else 0

    def data_hashes(self, ratio: float | None) -> dict[str, str | None]:
        """Hashes over names and labels of the images of a cell; `ratio` is None for a row that trains on none."""
        sets = dict(zip(SPLITS, self.probe_sets, strict=False))
        return {
            "few_shot": None if ratio is None else self.few_shot[ratio].manifest_hash(),
            "held_out": self.held_out_hash,
            **{f"probe_{split}": found.manifest_hash() for split, found in sets.items()},
        }


def load_bench(config: Any, teacher: Teacher, workdir: Path) -> Bench:
    """Reads the data; images are decoded when they are first used, and once.

    Raises:
      ValueError: as `load_labelled`; for another kind of probe; if the set that table.probe_data names has no labels,
        or the probed one no masks for kind "segment", or `data` fewer than table.held_out validation images.
    """
    section, preprocessing = config.table, teacher.preprocessing
    if section.probe.kind not in (*KINDS, SEGMENT):
        raise ValueError(f"table.probe.kind: expected one of {(*KINDS, SEGMENT)}, found {section.probe.kind!r}")

    def load(data: Any, split: str) -> LabelledSet:
        return load_labelled(data, split, preprocessing.resize_size, preprocessing.interpolation)

    train, valid = load(config.data, "train"), load(config.data, "valid")
    probed = probed_data(config)
    if section.probe.kind == SEGMENT:
        # The middle square at the input size, as of `run_segment`: images and masks cover each other exactly.
        size, interpolation = preprocessing.image_size, preprocessing.interpolation
        splits = [load_labelled(probed, split, size, interpolation) for split in SPLITS]
    else:
        splits = [train, valid] if probed is config.data else [load(probed, split) for split in SPLITS[:2]]
        if all(split.labelled for split in splits):
            splits.append(load(probed, "test"))
        elif probed is config.data:
            way = "table.probe.kind=segment" if train.has_masks else "table.probe_data"
            print(f"{train.name} has no labels: students are compared by held-out features ({way}: and probed)")
            splits = []
        else:
            raise ValueError(f"table.probe_data: {splits[0].name} has images without labels; expected a labelled set")
    if splits and section.probe.per_class:
        rows = select_few_shot(splits[0], per_class=section.probe.per_class, seed=config.few_shot.seed + 1)
        splits[0] = splits[0].take(rows)
    if section.probe.kind == SEGMENT:
        check_masked(dict(zip(SPLITS, splits, strict=True)), teacher.config, config.data.memory_limit_gb)
    few_shot = {
        ratio: train.take(select_few_shot(train, ratio=ratio, seed=config.few_shot.seed)) for ratio in section.ratios
    }
    batch = min(HELD_OUT_BATCH, section.held_out)
    if not 0 < section.held_out <= len(valid) or section.held_out % batch:
        raise ValueError(
            f"table.held_out={section.held_out}: expected a multiple of {HELD_OUT_BATCH} (or less than that), at most "
            f"the {len(valid)} validation images"
        )
    rows = draw(np.arange(len(valid)), section.held_out, config.few_shot.seed)
    held_out, hashed = (
        np.asarray(preprocessing.evaluate(jnp.asarray(valid.images(rows)))),
        valid.take(rows).manifest_hash(),
    )
    begun = next(iter(sorted((workdir / "cells").glob("*_seed*.json"))), None)
    return Bench(
        config,
        teacher,
        few_shot,
        held_out,
        hashed,
        tuple(splits),
        workdir / "teacher_features",
        begun_with=json.loads(begun.read_text())["metric"] if begun else "",
    )


def student_bench(distiller: Distiller, images: LabelledSet, held_out: LabelledSet, workdir: Path) -> Bench:
    """The bench of a single distillation: nothing is probed, its blocks are chosen, teacher features are shared."""
    config, teacher = distiller.config, distiller.teacher
    rows = even_rows(len(held_out), len(held_out) // HELD_OUT_BATCH * HELD_OUT_BATCH or len(held_out))
    inputs = np.asarray(teacher.preprocessing.evaluate(jnp.asarray(held_out.images(rows))))
    blocks = {(WHOLE, config.student.reduction): distiller.blocks}
    cache, names = workdir / "teacher_features", held_out.take(rows).manifest_hash()
    return Bench(config, teacher, {WHOLE: images}, inputs, names, (), cache, calibrated=blocks)


def probed_data(config: Any) -> Any:
    """The section `data` of the set that students are probed on: `config.data`, or a copy with table.probe_data in it.

    Raises:
      ValueError: if table.probe_data has a name or root, but no kind.
    """
    named = {key: value for key, value in config.table.probe_data.items() if value}
    if not named:
        return config.data
    if "kind" not in named:
        raise ValueError(f"table.probe_data: expected a kind, as of data.kind, found {named}")
    data = config.data.copy_and_resolve_references()
    data.update({**config.table.probe_data, "groups": config.table.probe_data.groups or data.groups})
    return data


def train_student(bench: Bench, config: Any, ratio: float | None) -> Trained:
    """Trains one student with `config`, in memory; method "copy" (no images) is only copied."""
    start = time.monotonic()
    distiller = build_distiller(config, bench.teacher, blocks=_calibrated(bench, config, ratio))
    if config.student.method == "copy":
        return Trained(distiller, distiller.base, time.monotonic() - start)
    state = train(distiller, bench.few_shot[ratio], cache_folder=bench.cache)
    trainable = jax.device_get(state.ema_params)
    return Trained(distiller, trainable, time.monotonic() - start)


def _calibrated(bench: Bench, config: Any, ratio: float | None) -> tuple[int, ...] | None:
    """The blocks of student.blocks="calibrated", chosen once for a few-shot set (the largest for "copy"); or None."""
    if config.student.blocks != "calibrated":
        return None
    key = (max(bench.few_shot) if ratio is None else ratio, config.student.reduction)
    if key not in bench.calibrated:
        few = bench.few_shot[key[0]]
        sample = few.images(even_rows(len(few), config.calibration.num_images))
        bench.calibrated[key] = build_distiller(config, bench.teacher, sample).blocks
    return bench.calibrated[key]


def held_out_metrics(bench: Bench, student: Trained) -> dict[str, float]:
    """Mean feature distances on the held-out images: "loss" is what is trained; before the norm "l1" and its parts."""
    distances = _distances(bench, student.distiller, student.trainable)
    if student.distiller.loss.target == "pre_norm":
        return distances
    # One measure for all rows, whatever they were trained for.
    plain = dataclasses.replace(student.distiller, loss=LossConfig())
    return _distances(bench, plain, student.trainable) | {"loss": distances["loss"]}


def _distances(bench: Bench, distiller: Distiller, trainable: Any) -> dict[str, float]:
    """The distiller's loss on the held-out images, and what it says beside."""
    loss_fn = make_loss_fn(distiller)

    @jax.jit
    def evaluate(trainable: Any, base: Any, views: jax.Array, targets: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        loss, (metrics, _) = loss_fn(trainable, {}, {"views": views, "targets": targets}, None, 0, base)
        return metrics | {"loss": loss}

    base = distiller.base if distiller.lora else {}
    found = [
        jax.device_get(evaluate(trainable, base, views, targets))
        for views, targets in zip(_batches(bench.held_out), _held_out_targets(bench, distiller), strict=True)
    ]
    return {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}


def _batches(images: np.ndarray) -> list[np.ndarray]:
    size = min(HELD_OUT_BATCH, len(images))
    return [images[i : i + size] for i in range(0, len(images), size)]


def _held_out_targets(bench: Bench, distiller: Distiller) -> list[tuple[np.ndarray, ...]]:
    pairs = distiller.pairs if distiller.loss.blocks == "aligned" else distiller.pairs[-1:]
    key = (distiller.loss.target, pairs)
    if key not in bench.targets:
        targets_fn = make_targets_fn(distiller)
        bench.targets[key] = [
            jax.device_get(targets_fn(bench.teacher.params, views)) for views in _batches(bench.held_out)
        ]
    return bench.targets[key]


def probe_model(bench: Bench, config: VitConfig, params: Any) -> dict[str, float]:
    """Probes the pooled features (after the final norm) of a model, or its patch tokens; what the probe returns."""
    section = bench.config.table.probe
    if section.kind == SEGMENT:
        return _segment_model(bench, config, params)
    apply = make_feature_fn(config, params, bench.teacher.preprocessing, make_mesh(), dtype=bench.config.train.dtype)
    pairs = [
        Labelled(extract_features(apply, images, section.batch_size), images.labels) for images in bench.probe_sets
    ]
    options = ProbeOptions(
        batch_size=section.linear_batch_size,
        **{name: section[name] for name in ("epochs", "warmup_epochs", "max_iterations")},
        **{name: tuple(section[name]) for name in ("learning_rates", "c_values", "neighbours")},
    )
    return probe(*pairs, section.kind, classes=bench.probe_sets[0].classes, options=options)


def _segment_model(bench: Bench, config: VitConfig, params: Any) -> dict[str, float]:
    """Probes the patch tokens of a model by a linear head; what `segment_probe` returns."""
    section, square = bench.config.table.probe, dataclasses.replace(bench.teacher.preprocessing, crop_fraction=1.0)
    dtype = bench.config.train.dtype
    apply = make_feature_fn(config, params, square, make_mesh(), output="patches", dtype=dtype)
    size = section.batch_size
    pairs = [Segmented(extract_features(apply, images, size), read_masks(images, size)) for images in bench.probe_sets]
    fields = section.segment.to_dict() | {"learning_rates": tuple(section.segment.learning_rates)}
    options = SegmentOptions(hidden_dim=0, **fields)
    return segment_probe(*pairs, classes=bench.probe_sets[0].classes, options=options)
