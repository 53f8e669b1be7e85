"""Runs the trained detector over splits: raw scores, calibration, finished maps.

Several networks that score together (the seeds of an ensemble) are one with as many times the evidences.
Axes: N images of a split, T networks, S evidences of all of them, H W map, M side of the finished map.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core.checkpoint import Checkpointer
from core.logs import progress_bar
from core.mesh import shard_batch
from core.optim import build_optimizer
from core.sampling import even_rows
from input_pipeline.batches import image_batches
from input_pipeline.dataset import Split
from mtl_moe.calibration import Calibration, evidence_names, fused_names, load_calibration
from mtl_moe.calibration_fit import fit_calibration
from mtl_moe.floors import log_mean_gradient
from mtl_moe.scoring import make_map_fn, make_score_fn
from mtl_moe.seeds import seed_folders
from mtl_moe.system import System
from mtl_moe.tasks.base import to_float
from mtl_moe.tiling import random_tiles
from mtl_moe.training_data import image_hashes

MAX_CALIBRATION_MAPS = 256  # maps kept for the quantiles of the map scale


@dataclasses.dataclass(frozen=True)
class Trained:
    """Parameters ready to score: averaged ones of a checkpoint, or fresh ones for the untrained floor."""

    params: Any
    extra: Any
    step: int


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a pass over N images gives.

    Attributes:
      raw: [N, S] raw scores; texture: [N] log mean gradients.
      maps: finished fused maps [N, M, M] in calibrated units, or None where they were not asked for.
      kept: {"maps" [n, S, H, W], "body" [n, H, W]} of the n rows that were asked for.
      hashes: `image_hashes` of the N images.
    """

    raw: np.ndarray
    texture: np.ndarray
    maps: np.ndarray | None = None
    kept: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    hashes: Sequence[str] = ()


def restore(system: System, workdir: Path) -> Trained:
    """Restores the newest checkpoint of `workdir`; nothing but the checkpoint is read.

    Raises:
      CheckpointError: if there is none, it is damaged, or of another architecture.
    """
    state = system.abstract_state(build_optimizer(system.config.optim, system.config.train.num_steps))
    with Checkpointer(workdir) as checkpointer:
        return Trained(*checkpointer.restore_model(state.ema_params, state.extra))


def restore_networks(system: System, workdir: Path) -> list[Trained]:
    """The newest checkpoint of `workdir`, or of each seed where that is an ensemble's folder; errors as `restore`.

    Raises:
      ValueError: if the seeds were not trained equally long.
    """
    folders = seed_folders(system.config, workdir)
    networks = [restore(system, folder) for folder in folders]
    if len({network.step for network in networks}) > 1:
        steps = ", ".join(f"{folder.name} {found.step}" for folder, found in zip(folders, networks, strict=True))
        raise ValueError(f"the seeds of {workdir} were trained to different steps ({steps}): train all to the same one")
    return networks


class Scorer:
    """Scores images with networks of one system; compiled once for a batch size, `trained_as` included."""

    def __init__(self, system: System, *networks: Trained):
        self._system = system
        self._networks = networks
        self._score_fn = make_score_fn(system)
        # Every device gets the same number of rows.
        shards = system.mesh.shape["data"]
        self.batch_size = -(-system.config.score.batch_size // shards) * shards

    def trained_as(self, *networks: Trained) -> "Scorer":
        """The same compiled program with other parameters."""
        other = copy.copy(self)
        other._networks = networks
        return other

    def batch(self, images: np.ndarray) -> dict[str, jax.Array]:
        """At most batch_size uint8 images [n, H, W, C] -> raw, maps, body as in `make_score_fn`, of a full batch: the
        last image fills it up, so that one shape is compiled."""
        fill = np.repeat(images[-1:], self.batch_size - len(images), axis=0)
        placed = shard_batch({"image": np.concatenate([images, fill]) if len(fill) else images}, self._system.mesh)
        first, *more = (self._score_fn(one.params, one.extra, placed["image"]) for one in self._networks)
        if not more:
            return first
        return first | {
            name: jnp.concatenate([first[name], *(one[name] for one in more)], 1) for name in ("raw", "maps")
        }

    def images(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Any number n of uint8 images [n, H, W, C]; results are [n, ...]. For few images: everything is kept."""
        parts = []
        for start in range(0, len(images), self.batch_size):
            rows = images[start : start + self.batch_size]
            parts.append({k: np.asarray(v)[: len(rows)] for k, v in self.batch(rows).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def split(
        self,
        split: Split,
        description: str,
        map_fn: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        keep: Sequence[int] = (),
        write: Callable[[Sequence[str], np.ndarray, np.ndarray], None] | None = None,
        keep_maps: bool = True,
    ) -> Scored:
        """A whole split, every image once; with `map_fn` (`make_map_fn`) also its finished maps.

        Args:
          keep: rows, ascending, whose evidence maps and bodies are kept.
          write: gets names, images and finished maps of each batch.
          keep_maps: whether the finished maps are in the result too, which are of the size of the whole split.
        """
        raw, textures, hashes, maps, kept, start = [], [], [], None, {"maps": [], "body": []}, 0
        with progress_bar(len(split), description=description) as bar:
            for images, result, finished in self._one_ahead(split, map_fn):
                count = len(images)
                textures.append(log_mean_gradient(images))
                hashes += image_hashes(images)
                raw.append(np.asarray(result["raw"])[:count])
                if finished is not None:
                    finished = np.asarray(finished)[:count]
                    if write is not None:
                        write(split.names[start : start + count], images, finished)
                    if keep_maps:
                        maps = np.empty((len(split), *finished.shape[1:]), np.float32) if maps is None else maps
                        maps[start : start + count] = finished
                here = [row - start for row in keep if start <= row < start + count]
                for name, parts in kept.items() if here else ():
                    parts.append(np.asarray(result[name])[here])
                start += count
                bar.update(count)
        found = {name: np.concatenate(parts) for name, parts in kept.items() if parts}
        return Scored(np.concatenate(raw), np.concatenate(textures), maps, found, hashes)

    def _one_ahead(self, split: Split, map_fn: Callable[[jax.Array, jax.Array], jax.Array] | None) -> Iterator[Any]:
        """(images, results, finished maps or None) batch by batch: when one is handed out the devices have the next."""
        waiting = []
        for images in image_batches(split, self.batch_size):
            result = self.batch(images)
            finished = None if map_fn is None else map_fn(result["maps"], result["body"])
            waiting.append((images, result, finished))
            if len(waiting) > 1:
                yield waiting.pop(0)
        yield from waiting


def calibrate(system: System, scorer: Scorer, split: Split) -> Calibration:
    """Fits the calibration on held-out normals; see `mtl_moe.calibration`.

    Raises:
      ValueError: if an abnormal image is among them.
    """
    if split.labels.any():
        raise ValueError("the calibration split holds abnormal images: expected normals only")
    rows = even_rows(len(split), MAX_CALIBRATION_MAPS)
    scored = scorer.split(split, "calibrate", keep=rows)
    config, maps, body = system.config, scored.kept["maps"], scored.kept["body"]
    calibration = fit_calibration(
        system.tasks, config.score.fusion, scored.raw, scored.texture, split.groups, maps, body
    )
    finish = make_map_fn(calibration, config.data.image_size, config.data.mask_size)
    size = scorer.batch_size
    starts = range(0, len(rows), size)
    finished = np.concatenate([np.asarray(finish(maps[i : i + size], body[i : i + size])) for i in starts])
    inside = jax.image.resize(body, finished.shape, "nearest") > 0
    low, high = np.quantile(finished[np.asarray(inside)], (0.5, 0.95))
    return dataclasses.replace(calibration, fused_low=float(low), fused_scale=float(max(high - low, 1e-6)))


def own_calibration(system: System, workdir: Path, step: int) -> Calibration:
    """The calibration that the last evaluation of `workdir` on its own data left there.

    Raises:
      ValueError: if there is none, or it was made for another checkpoint, fusion or dtype.
    """
    names = fused_names(system.tasks, system.config.num_seeds)
    calibration = load_calibration(workdir / "calibration.npz", names, step)
    for field in ("fusion", "dtype"):
        made, now = getattr(calibration, field), system.config.score[field]
        if made not in ("", now):  # "": a calibration of before the dtype was written down
            raise ValueError(
                f"score.{field}={now!r}, but the calibration was made for {made!r}: run --mode=evaluate with the same "
                f"--config.score.{field} first"
            )
    return calibration


def evidence_maps(
    system: System, calibration: Calibration, maps: np.ndarray, body: np.ndarray
) -> list[dict[str, np.ndarray]]:
    """Maps [n, S, H, W] and body [n, H, W] -> for each image its maps by evidence in calibrated units (0: median, and
    outside the body; 1: 95th percentile), the mean over the networks."""
    scaled = (maps - calibration.map_low[:, None, None]) / calibration.map_scale[:, None, None] * body[:, None]
    names = evidence_names(system.tasks)
    scaled = scaled.reshape(len(maps), -1, len(names), *maps.shape[2:]).mean(1)
    return [dict(zip(names, image, strict=True)) for image in scaled]


def router_use(system: System, trained: Trained, images: np.ndarray) -> dict[str, np.ndarray]:
    """Share of each task's tokens that go to each expert, by expert block: [T, E]; empty for dense controls. Of images
    seen in tiles one random tile of each."""
    tasks: Sequence[Any] = system.tasks
    model = system.model.clone(mesh=None)  # on a mesh the number of views would have to divide over the devices

    # Images are an argument: as constants they would be folded into a program of each data set's own, of gigabytes.
    def stats(params: Any, floats: jax.Array) -> Any:
        _, aux = model.apply({"params": params}, {t.name: t.views(floats) for t in tasks}, train=False)
        return {name: block["utilisation"] for name, block in aux.items()}

    seen = to_float(random_tiles(jax.random.key(0), jnp.asarray(images), model.image_size))
    return {name: np.asarray(value) for name, value in jax.jit(stats)(trained.params, seen).items()}
