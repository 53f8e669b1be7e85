"""The command "segment": frozen patch tokens of a model over a set with masks, small heads on them, one report.

Axes: N images, P patch tokens, D width, M mask side.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core.compilation import enable_compilation_cache
from core.mesh import make_mesh
from core.vit import VitConfig
from core.workdir import save_config
from input_pipeline.classification import LabelledSet, load_labelled
from vit_distill.features import extract_features, make_feature_fn
from vit_distill.probe_command import SPLITS, check_workdir, load_subject, write_probe_report
from vit_distill.segment_probe import HEADS, Segmented, SegmentOptions, segment_probe


def run_segment(config: Any, workdir: Path) -> dict[str, Any]:
    """Probes one model on one set with masks by every head of `config.segment.heads`; writes workdir/report.json.

    Images and masks are the middle square at the model's input size, so that they cover each other exactly.

    Returns:
      The report, as `run_probe` with "test/<data set>/segment/<head>/<metric>".

    Raises:
      ValueError: as `load_subject`, `load_labelled` and `segment_probe`; for a set without masks, or one that
        does not fit data.memory_limit_gb.
    """
    enable_compilation_cache()
    section = config.segment
    unknown = sorted(set(section.heads) - set(HEADS))
    if unknown or not section.heads or section.num_seeds < 1:
        raise ValueError(
            f"segment: expected heads among {HEADS} and num_seeds of at least 1, found {tuple(section.heads)} and "
            f"{section.num_seeds}"
        )
    check_workdir(config, workdir)
    subject = load_subject(config)
    preprocessing = dataclasses.replace(subject.preprocessing, crop_fraction=1.0)
    size, interpolation = preprocessing.image_size, preprocessing.interpolation
    sets = {split: load_labelled(config.data, split, size, interpolation) for split in SPLITS}
    check_masked(sets, subject.config, config.data.memory_limit_gb)
    apply = make_feature_fn(
        subject.config, subject.params, preprocessing, make_mesh(), output="patches", dtype=section.feature_dtype
    )
    save_config(config, workdir)
    pairs = {}
    for split, images in sets.items():
        print(f"{split}: {len(images)} images; {images.layout}")
        tokens = extract_features(apply, images, section.feature_batch_size, description=f"{split} tokens")
        pairs[split] = Segmented(tokens, read_masks(images, section.feature_batch_size))
    options = SegmentOptions(
        **{name: section[name] for name in ("num_steps", "warmup_steps", "batch_size", "hidden_dim", "weight_decay")},
        learning_rates=tuple(section.learning_rates),
    )
    seeds = range(config.seed, config.seed + section.num_seeds)
    classes = sets["train"].classes
    results = {
        head: segment_probe(*(pairs[split] for split in SPLITS), head, classes=classes, seeds=seeds, options=options)
        for head in section.heads
    }
    return write_probe_report(config, workdir, subject, sets, "segment", results)


def check_masked(sets: Mapping[str, LabelledSet], config: VitConfig, memory_limit_gb: float) -> None:
    """Raises ValueError for a split without masks, or more patch tokens, images and masks than memory is to hold."""
    without = [split for split, images in sets.items() if not images.has_masks]
    if without:
        raise ValueError(f"{sets['test'].name} has no masks in {', '.join(without)}: expected data.kind=segmentation")
    # Of a pixel: its channels, its class, and the two bytes that checking or predicting classes takes beside.
    an_image = 4 * config.num_patches * config.width + config.image_size**2 * (config.in_channels + 3)
    needed = sum(map(len, sets.values())) * an_image / 2**30
    if needed > memory_limit_gb:
        raise ValueError(
            f"patch tokens, images and masks take {needed:.1f} GiB, data.memory_limit_gb is {memory_limit_gb}: raise "
            "it, or use fewer images"
        )


def read_masks(images: LabelledSet, batch_size: int) -> np.ndarray:
    """uint8 [N, M, M]: the masks of a set, in order."""
    starts = range(0, len(images), batch_size)
    return np.concatenate([images.masks(np.arange(s, min(s + batch_size, len(images)))) for s in starts])
