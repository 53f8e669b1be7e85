"""Metrics of one test split: the detector's, its parts', and those of floors that learn next to nothing.

Axes: N test images, K evidences, H W C image, M side of the finished maps.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from scipy import stats

from core.bootstrap import bootstrap_intervals, matched_interval, pixel_intervals, possible_resamples
from core.metrics import auroc, auroc_between, average_precision, matched_aurocs, pixel_metrics
from core.optim import build_optimizer
from core.sampling import even_rows
from input_pipeline.batches import image_batches
from input_pipeline.dataset import Dataset, Split
from mtl_moe import floors
from mtl_moe.calibration import Calibration, evidence_names, task_evidences
from mtl_moe.infer import Scorer, Trained, calibrate
from mtl_moe.patients import Patients
from mtl_moe.scoring import make_map_fn
from mtl_moe.system import System

# Pairs count as of like contrast when their log mean gradients differ by less: 7 % contrast.
MATCHED_TOLERANCE = 0.07
# Pairs count as alike in a floor when at most this share of the test images lies between them: whatever its unit.
FLOOR_TOLERANCE = 0.05
FLOOR_IMAGES = 5000  # training images that floors are fitted on
MASK_BATCH = 256  # masks read at a time
MAX_EVIDENCE_MAPS = 256  # images whose maps of every evidence are measured,
EVIDENCE_MAP_BYTES = 512e6  # or fewer: as many as these hold
BANDS = [f"{low:g}-{high:g}" for low, high in itertools.pairwise(floors.BAND_SIGMAS)]
FLOORS = {
    "mean_intensity": "how bright the image is",
    "intensity_distance": "how far its brightness is from the normals'",
    "low_gradient": "how smooth the image is",
    "gradient_distance": "how far its smoothness is from the normals'",
    **{f"band_{i}_low": f"how little structure it has, sigma {s} pixels" for i, s in enumerate(BANDS)},
    **{f"band_{i}_distance": f"how unusual its structure is, sigma {s} pixels" for i, s in enumerate(BANDS)},
    "histogram_distance": "distance of its grey-level histogram to the normals'",
    "pca_error": "error after 40 principal components at 32 x 32",
    "nearest_neighbour": "distance to the nearest training image at 32 x 32",
    "smoothed_intensity": "blurred brightness as a map",
    "untrained": "the same network before training",
}


class Results:
    """Metrics of one test split under their flat keys, with intervals; `texture` [N]: log mean gradients."""

    def __init__(self, dataset: str, split: Split, texture: np.ndarray, num_resamples: int):
        self.metrics: dict[str, float] = {}
        self.intervals: dict[str, tuple[float, float]] = {}
        self._prefix = f"test/{dataset}/"
        self._split = split
        self._num_resamples = possible_resamples(split.labels, split.groups, num_resamples) if self.has_both else 0
        self._texture = texture
        self._masks: np.ndarray | None = None

    @property
    def has_both(self) -> bool:
        """Whether there are normal and abnormal images."""
        return len(np.unique(self._split.labels)) == 2

    def add_detector(
        self,
        system: System,
        calibration: Calibration,
        corrected: np.ndarray,
        fused: np.ndarray,
        maps: np.ndarray | None,
        kept: Mapping[str, np.ndarray],
    ) -> None:
        """Fused scores [N] with intervals, each evidence of `corrected` [N, K], the best single one, each task left
        out; where the split has masks, finished maps [N, M, M], and the evidences' own of `kept` images.

        Args:
          kept: `Scored.kept` of the split's `evidence_map_rows`.
        """
        evidences = calibration.by_name(corrected)
        self._images({"": fused} | {f"task/{name}/": scores for name, scores in evidences.items()}, interval=True)
        for name, label in (("normal_vs_calibration", 0), ("abnormal_vs_calibration", 1)):
            against = auroc_between(calibration.fused, fused[self._split.labels == label])
            self.metrics[self._prefix + name] = against
        if self._split.has_masks:
            self._pixel("", maps, interval=True)
            self._evidence_pixels(calibration, kept, maps.shape[1])
        # Named best with the test labels in sight: a comparison, never a choice.
        singles = [self.metrics[f"{self._prefix}task/{name}/image_auroc"] for name in evidence_names(system.tasks)]
        self.metrics[self._prefix + "best_single/image_auroc"] = max(singles)
        parts = task_evidences(system.tasks).items()
        self._images({f"leave_out/{task}/": calibration.fuse(corrected, leave_out=names) for task, names in parts})

    def add_patients(self, patients: Patients) -> None:
        """AUROC of patients, each one image of the bootstrap; none where a label or one of both kinds is missing."""
        if set(patients.labels) != {0, 1}:
            return
        key, scores, labels = self._prefix + "patient_auroc", patients.scores, patients.labels
        self.metrics[key] = auroc(scores, labels)
        if self._num_resamples and min(np.bincount(labels)) > 1:
            (interval,) = bootstrap_intervals([scores], labels, np.arange(len(labels)), self._num_resamples)
            self.intervals[key] = interval["auroc"]

    def add_floors(self, dataset: Dataset, fused: np.ndarray) -> None:
        """Scores and maps that learn next to nothing, fitted on the same training normals; without these, those that
        need no fit. And what the detector's `fused` scores [N] say of pairs that are alike in the strongest of them."""
        fit = floors.statistics(_some_images(dataset.splits["train"])) if "train" in dataset.splits else None
        scores = floors.floor_scores(fit, floors.statistics(image_batches(self._split)))
        self._images({f"floor/{name}/": values for name, values in scores.items()})
        self._match_floor(scores, fused)
        if self._split.has_masks:
            map_fn, size, parts = floors.make_floor_map_fn(fit), dataset.mask_size, []
            for images in image_batches(self._split):
                resized = {
                    name: np.asarray(jax.image.resize(maps, (len(maps), size, size), "bilinear"))
                    for name, maps in map_fn(images).items()
                }
                parts.append(resized)
            for name in list(parts[0]):
                self._pixel(f"floor/{name}/", np.concatenate([part.pop(name) for part in parts]))

    def add_untrained(self, system: System, scorer: Scorer, dataset: Dataset) -> None:
        """The same network before its first update, calibrated and fused in the same way."""
        # By training's own program, which is compiled already.
        state = system.init_state(build_optimizer(system.config.optim, system.config.train.num_steps), dataset)
        scorer = scorer.trained_as(Trained(state.params, state.extra, 0))
        del state  # averages and the optimizer's moments
        calibration = calibrate(system, scorer, dataset.splits["calibration"])
        size, mask_size = dataset.image_size, dataset.mask_size
        map_fn = make_map_fn(calibration, size, mask_size) if self._split.has_masks else None
        scored = scorer.split(self._split, "untrained", map_fn)
        self._images({"floor/untrained/": calibration.fuse(calibration.corrected(scored.raw, scored.texture))})
        if scored.maps is not None:
            self._pixel("floor/untrained/", scored.maps)

    def _match_floor(self, scores: Mapping[str, np.ndarray], fused: np.ndarray) -> None:
        # The strongest is found with the test labels, which makes the comparison harder for the detector.
        name = max(scores, key=lambda name: self.metrics[f"{self._prefix}floor/{name}/image_auroc"])
        ranks = stats.rankdata(scores[name]) / len(scores[name])
        pairs = (self._split.labels, ranks, FLOOR_TOLERANCE)
        (auroc_of_pairs, of_floor), num_pairs = matched_aurocs([fused, scores[name]], *pairs)
        if not num_pairs:
            return
        self.metrics[self._prefix + "floor_matched_auroc"] = auroc_of_pairs
        self.metrics[f"{self._prefix}floor/{name}/floor_matched_auroc"] = of_floor  # near 0.5: it tells no pair apart
        if self._num_resamples:
            interval = matched_interval(fused, *pairs, np.array(self._split.groups), self._num_resamples)
            self.intervals[self._prefix + "floor_matched_auroc"] = interval

    def _images(self, scores: Mapping[str, np.ndarray], interval: bool = False) -> None:
        """Image metrics of all `scores` [N], by key: their pairs and resamples are the same, and looked for once."""
        labels, keys = self._split.labels, [self._prefix + key for key in scores]
        matched, pairs = matched_aurocs(list(scores.values()), labels, self._texture, MATCHED_TOLERANCE)
        for key, values, of_pairs in zip(keys, scores.values(), matched, strict=True):
            self.metrics[key + "image_auroc"] = auroc(values, labels)
            self.metrics[key + "image_ap"] = average_precision(values, labels)
            if pairs:
                self.metrics[key + "matched_auroc"] = of_pairs
        if interval and self._num_resamples:
            groups = np.array(self._split.groups)
            intervals = bootstrap_intervals(list(scores.values()), labels, groups, self._num_resamples)
            for key, found in zip(keys, intervals, strict=True):
                self.intervals[key + "image_auroc"] = found["auroc"]
                self.intervals[key + "image_ap"] = found["average_precision"]
            if pairs:  # of the fused scores alone: every pair is counted in every resample
                of_pairs = (labels, self._texture, MATCHED_TOLERANCE, groups, self._num_resamples)
                self.intervals[keys[0] + "matched_auroc"] = matched_interval(scores[""], *of_pairs)

    def _evidence_pixels(self, calibration: Calibration, kept: Mapping[str, np.ndarray], side: int) -> None:
        """What each evidence's map would be worth by itself, finished as the fused one is."""
        num_maps, size = kept["maps"].shape[1], kept["maps"].shape[-1]
        masks = self._masks[evidence_map_rows(self._split, num_maps, size)]
        if not masks.any():  # of few images, where maps are large: no lesion to find
            return
        names = np.array(calibration.names[:num_maps])
        for name in dict.fromkeys(names.tolist()):
            own = names == name  # one for each network
            alone = dataclasses.replace(
                calibration, map_low=calibration.map_low[own], map_scale=calibration.map_scale[own]
            )
            map_fn, parts = make_map_fn(alone, size, side), []
            for start in range(0, len(masks), MASK_BATCH):
                some = slice(start, start + MASK_BATCH)
                parts.append(np.asarray(map_fn(kept["maps"][some][:, own], kept["body"][some])))
            self._add_pixel(f"task/{name}/", np.concatenate(parts), masks)

    def _pixel(self, key: str, maps: np.ndarray, interval: bool = False) -> None:
        if self._masks is None:
            rows = np.arange(len(self._split))
            parts = (rows[i : i + MASK_BATCH] for i in range(0, len(rows), MASK_BATCH))
            self._masks = np.concatenate([self._split.masks(part)[..., 0] > 0 for part in parts])
        if interval and self._num_resamples:
            groups = np.array(self._split.groups)
            found = pixel_intervals(maps, self._masks, groups, self._num_resamples)
            self.intervals |= {self._prefix + key + name: value for name, value in found.items()}
        self._add_pixel(key, maps, self._masks)

    def _add_pixel(self, key: str, maps: np.ndarray, masks: np.ndarray) -> None:
        values = pixel_metrics(maps, masks)
        self.metrics |= {self._prefix + key + name: value for name, value in values.items() if np.isfinite(value)}


def evidence_map_rows(split: Split, num_maps: int, size: int) -> np.ndarray:
    """The images of a split with masks whose `num_maps` maps of `size` pixels are measured; none without masks."""
    fitting = int(EVIDENCE_MAP_BYTES / (4 * num_maps * size**2))
    return even_rows(len(split), min(MAX_EVIDENCE_MAPS, max(fitting, 1)) if split.has_masks else 0)


def _some_images(split: Split) -> Iterator[np.ndarray]:
    """At most FLOOR_IMAGES images, evenly spaced, in batches: floors need no more."""
    rows = even_rows(len(split), FLOOR_IMAGES)
    return image_batches(split if len(rows) == len(split) else split.take(rows))
