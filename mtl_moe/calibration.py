"""From raw scores to calibrated and fused ones: on the host, fitted on normals alone that were not trained on.

Axes: N images, n calibration normals, S evidences with a map (a task gives one or two; several networks give these
one after the other), K = S + 1 evidences, texture last, H W map.

- scores that are a map's top lose their linear fit on the image's log mean gradient, called its texture below: a smooth
  image is easy to reconstruct, and gives few false alarms, whatever it shows;
- what that takes away, how unusual the texture itself is to either side, is an evidence of its own: an image is as odd
  as its errors are for its texture, and as its texture is;
- u = -log(1 - F(s)), with F the normals' mid-rank distribution and a generalised Pareto tail above its 80 % point;
- image score = mean of u over the evidences of each kind, then over the kinds: what fails together counts as one;
  p-value = share of calibration normals at least as odd, each scored by a fit that did not see it nor any image of its
  patient: by the fit that it is part of it would look more normal than a new patient's image does.
"""

import dataclasses
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.files import replacing
from core.metrics import p_values
from mtl_moe.tasks import Task
from mtl_moe.tasks.base import EPS

FUSIONS = ("tail", "robust_z", "max", "mean")
SCORING = 3  # raised where raw scores or maps become others: normals scored before say nothing about images scored now
TEXTURE = "texture"  # name of the evidence that no task gives


def evidence_names(tasks: Sequence[Task]) -> list[str]:
    """Names of the tasks' evidences, in the order of axis S."""
    return [name for task in tasks for name in task.reductions]


def fused_names(tasks: Sequence[Task], num_networks: int = 1) -> list[str]:
    """Names of all evidences that are fused, in the order of axis K."""
    return [*evidence_names(tasks) * num_networks, TEXTURE]


def task_evidences(tasks: Sequence[Task]) -> Mapping[str, tuple[str, ...]]:
    """Evidence names by task, and the texture's by its own."""
    return {task.name: tuple(task.reductions) for task in tasks} | {TEXTURE: (TEXTURE,)}


class Evidence(NamedTuple):
    """An evidence with a map: its name, its kind, and whether its score loses its fit on texture."""

    name: str
    kind: str
    corrected: bool


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What held-out normals say about each evidence; see the module's docstring. All arrays are float64.

    `corrected`, `tail_scores` and `fuse` take arrays of NumPy, float64 then, or of JAX, in float32 (`export`).

    Attributes:
      evidences: the S with a map.
      fusion: one of FUSIONS.
      slope, intercept: [S] linear fit of raw scores on texture; 0 where a score is a map's mean.
      texture_median: of the calibration normals.
      reference: [n, K] corrected scores of the calibration normals, each column sorted.
      tail: [K, 3] threshold, scale and shape of the Pareto tail.
      map_low, map_scale: [S] median, and 95th percentile less median, of the evidence's map inside the body.
      fused: [n] fused scores of the calibration normals in their order, each by a fit without it.
      fused_low, fused_scale: the same two numbers of the finished fused map, inside the body.
      num_groups: patients that the normals come from.
      groups: [n] number of each normal's patient; empty in files of before it was written down.
      source, manifest_hash, dtype: of which data set the normals are, the hash of that, and `score.dtype`; "" in files
        of before these were written down.
    """

    evidences: tuple[Evidence, ...]
    fusion: str
    slope: np.ndarray
    intercept: np.ndarray
    texture_median: float
    reference: np.ndarray
    tail: np.ndarray
    map_low: np.ndarray
    map_scale: np.ndarray
    fused: np.ndarray
    fused_low: float = 0.0
    fused_scale: float = 1.0
    num_groups: int = 0
    groups: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))
    source: str = ""
    manifest_hash: str = ""
    dtype: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all evidences, length K."""
        return (*(evidence.name for evidence in self.evidences), TEXTURE)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of all evidences, length K."""
        return (*(evidence.kind for evidence in self.evidences), TEXTURE)

    def by_name(self, columns: np.ndarray) -> dict[str, np.ndarray]:
        """Columns [N, K] -> evidence name -> [N], the mean over the networks."""
        names = np.array(self.names)
        return {name: columns[:, names == name].mean(1) for name in dict.fromkeys(self.names)}

    def corrected(self, raw: np.ndarray, texture: np.ndarray) -> np.ndarray:
        """Raw scores [N, S] and textures [N] -> scores [N, K]: those without the texture's share, and its distance."""
        xp, texture = raw.__array_namespace__(), texture[:, None]
        away = xp.abs(texture - np.float64(self.texture_median))
        return xp.hstack([raw - self.intercept[None] - texture * self.slope[None], away])

    def tail_scores(self, corrected: np.ndarray) -> np.ndarray:
        """u = -log(1 - F(s)), [N, K]: 0.7 at the normals' median, 3 at their 95th percentile, linear-like beyond."""
        columns = zip(corrected.T, self.reference.T, self.tail, strict=True)
        return corrected.__array_namespace__().stack([_tail_score(s, r, t) for s, r, t in columns], 1)

    def fuse(self, corrected: np.ndarray, leave_out: Sequence[str] = ()) -> np.ndarray:
        """Image scores [N] from corrected scores [N, K], without the named evidences.

        "tail" (default) means u, "max" its maximum, "robust_z" the mean of (s - median) / (1.48 MAD), "mean" that of
        s; means are over the evidences of each kind, then over the kinds.
        """
        keep = [i for i, name in enumerate(self.names) if name not in leave_out]
        values = corrected
        if self.fusion == "robust_z":
            median = np.median(self.reference, axis=0, keepdims=True)
            spread = 1.4826 * np.median(np.abs(self.reference - median), axis=0, keepdims=True) + EPS
            values = (corrected - median) / spread
        elif self.fusion in ("tail", "max"):
            values = self.tail_scores(corrected)
        if self.fusion == "max":
            return values[:, np.array(keep)].max(1)
        columns = [[i for i in keep if self.kinds[i] == kind] for kind in dict.fromkeys(self.kinds)]
        means = [values[:, np.array(same)].mean(1) for same in columns if same]
        return values.__array_namespace__().stack(means).mean(0)

    def p_values(self, fused: np.ndarray) -> np.ndarray:
        """Share of calibration normals at least as odd, [N] in [1 / (n + 1), 1]."""
        return p_values(fused, self.fused)

    def save(self, path: Path, step: int) -> None:
        """Writes all fields and the checkpoint's step as .npz, beside and renamed."""
        own = [field.name for field in dataclasses.fields(self) if field.name != "evidences"]
        fields = {name: np.asarray(getattr(self, name)) for name in ("names", "kinds", *own)}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, step=step, scoring=SCORING, **fields)


def load_calibration(path: Path, names: Sequence[str], step: int) -> Calibration:
    """Reads `Calibration.save`'s file.

    Raises:
      ValueError: if it is missing, damaged, of other tasks or of another checkpoint.
    """
    if not path.exists():
        raise ValueError(
            f"no {path}: run --mode=evaluate with the training data once, it writes the calibration; or bring normals "
            "to calibrate on, --normals=DIR"
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            values = {name: stored[name] for name in stored.files}
        if (scoring := int(values.pop("scoring", 1))) != SCORING:
            raise ValueError(f"scores of kind {scoring}, now they are of kind {SCORING}")
        found, saved_step = tuple(str(name) for name in values.pop("names")), int(values.pop("step"))
        # The texture's name and kind, the last, have no slope.
        evidences = zip(found, map(str, values.pop("kinds")), (values["slope"] != 0).tolist(), strict=False)
        calibration = Calibration(
            **values
            | {"evidences": tuple(Evidence(*evidence) for evidence in evidences)}
            | {name: str(values[name]) for name in ("fusion", "source", "manifest_hash", "dtype") if name in values}
            | {name: float(values[name]) for name in ("texture_median", "fused_low", "fused_scale")}
            | {"num_groups": int(values["num_groups"])}
        )
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged or of an earlier version ({error}): run --mode=evaluate again, it writes the file anew"
        ) from error
    if found != tuple(names) or saved_step != step:
        raise ValueError(
            f"{path} was made for evidences {found} at step {saved_step}; expected {tuple(names)} at step {step}: run "
            "--mode=evaluate again, it writes the file anew"
        )
    return calibration


def _tail_score(scores: np.ndarray, reference: np.ndarray, tail: np.ndarray) -> np.ndarray:
    xp = scores.__array_namespace__()
    threshold, scale, shape = tail
    n = len(reference)
    less, at_most = xp.searchsorted(reference, scores, "left"), xp.searchsorted(reference, scores, "right")
    body = -xp.log1p(-((less + at_most) / 2 + 0.5) / (n + 1))
    start = -np.log1p(-(np.searchsorted(reference, threshold, "right") / (n + 1)))
    excess = xp.maximum(scores - threshold, 0) / scale
    beyond = start + (xp.log1p(shape * excess) / shape if shape > 0 else excess)
    return xp.where(scores > threshold, beyond, xp.minimum(body, start))
