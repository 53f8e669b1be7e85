"""Teacher features of a fixed number of views an image, computed once: the teacher then leaves the training loop.

Axes: n images, V views, T targets (1, or one a student block), N tokens, D width, B batch, S stored image side.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core.files import replacing
from core.logs import progress_bar
from core.mesh import make_mesh, replicate, shard_batch
from core.tree import fingerprint
from vit_distill.distill import Distiller, make_targets_fn, make_views_fn
from vit_distill.features import pixels_hash
from vit_distill.teacher import function_facts

HASHED = 256  # images that are read at once for their hash


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    """Float32 features [T, n * V, N, D], in memory or mapped from disk; row of (image i, view v) is i * V + v."""

    features: np.ndarray
    num_views: int

    def extend(self, batch: Mapping[str, np.ndarray], epoch_view: np.ndarray) -> dict[str, np.ndarray]:
        """Adds view int32 [B] and target_00, ...: [B, N, D] to a host batch with image and index."""
        rows = batch["index"].astype(np.int64) * self.num_views + epoch_view
        targets = {f"target_{t:02d}": np.asarray(found[rows]) for t, found in enumerate(self.features)}
        return dict(batch) | {"view": epoch_view.astype(np.int32)} | targets


def cached_batches(
    batches: Iterator[dict[str, np.ndarray]],
    cache: TeacherCache,
    num_images: int,
    seed: int,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches with their views and targets; which view an image shows is a function of (seed, its epoch, its index).

    Args:
      batches: of `train_batches` with the same images, seed, step and process.
    """
    for step, batch in enumerate(batches, start_step):
        size = len(batch["index"])
        # Positions in the stream of all hosts, whose parts of a batch follow one another.
        epochs = ((step * process_count + process_index) * size + np.arange(size)) // num_images
        # An offset for each image, then one view after the other: all views are seen equally often.
        offsets = np.random.default_rng((seed, 7)).integers(cache.num_views, size=num_images)
        yield cache.extend(batch, (offsets[batch["index"]] + epochs) % cache.num_views)


def build_cache(distiller: Distiller, images: Any, manifest_hash: str, folder: Path | None) -> TeacherCache:
    """Computes the features, or maps those of an earlier run with the same teacher, images, views and target.

    Args:
      images: rows -> uint8 [B, S, S, C] with a length n (a split's `pixels`).
      manifest_hash: of the images' names and labels; with their pixels part of the key.
      folder: where the features go; None keeps them in memory.
    """
    config = distiller.config
    num_views, n = config.train.cached_views, len(images)
    targets = len(distiller.pairs) if distiller.loss.blocks == "aligned" else 1
    student = distiller.student_config
    shape = (targets, n * num_views, student.num_tokens, student.width)
    if folder is None:
        features = np.empty(shape, np.float32)
        _compute(distiller, images, features, num_views)
        return TeacherCache(features, num_views)
    key = {
        # Not the file's sha256: overrides and the config beside it make other functions of the same file.
        "teacher": fingerprint(distiller.teacher.params),
        "function": function_facts(distiller.teacher.config, distiller.teacher.preprocessing),
        "images": manifest_hash,
        "pixels": pixels_hash(images, HASHED),
        "views": num_views,
        "seed": int(config.seed),
        "augment": config.augment.to_dict(),
        "target": [distiller.loss.target, list(distiller.pairs) if targets > 1 else "last"],
        "dtype": config.teacher.dtype,
        "shape": list(shape),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{name}.npy"
    if not path.exists():
        updates = config.train.num_steps * config.train.batch_size
        if n * num_views >= updates:
            print(
                f"WARNING: train.cached_views={num_views}: the teacher sees {n * num_views} views for the cache, in "
                f"the loop it would see {updates}: set cached_views=0 or lower it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(folder).free, int(np.prod(shape)) * 4
        if needed > free:
            raise ValueError(
                f"{folder}: the teacher's features need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: "
                "lower train.cached_views or the number of images, or set cached_views=0"
            )
        with replacing(path) as temporary:
            features = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
            _compute(distiller, images, features, num_views)
            features.flush()
        path.with_suffix(".json").write_text(json.dumps(key, indent=2) + "\n")
    return TeacherCache(np.lib.format.open_memmap(path, "r"), num_views)


def _compute(distiller: Distiller, images: Any, features: np.ndarray, num_views: int) -> None:
    """Fills `features` batch by batch; the last batch is filled up with repeats, which are dropped.

    Every host computes all of them, each batch split over its own devices.
    """
    devices = [device for device in distiller.mesh.devices.flat if device.process_index == jax.process_index()]
    mesh = make_mesh(devices=devices)
    distiller = dataclasses.replace(distiller, mesh=mesh)
    views_fn, targets_fn = make_views_fn(distiller), make_targets_fn(distiller)
    params = replicate(distiller.teacher.params, mesh)
    total = features.shape[1]
    size = min(distiller.config.train.batch_size, total)
    size += -size % len(devices)
    key = jax.random.key(distiller.config.seed)
    with progress_bar(-(-total // size), scale=size, description="teacher features") as bar:
        for start in range(0, total, size):
            rows = np.minimum(np.arange(start, start + size), total - 1)
            index, view = (part.astype(np.int32) for part in np.divmod(rows, num_views))
            batch = shard_batch({"image": images.images(index), "index": index, "view": view}, mesh)
            views = views_fn(batch, key, np.int32(0))
            keep = min(size, total - start)
            for t, found in enumerate(targets_fn(params, views)):
                features[t, start : start + keep] = np.asarray(found)[:keep]
            bar.update()
