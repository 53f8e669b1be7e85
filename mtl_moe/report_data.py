"""What the detector's report is made from, and which cases its gallery shows.

Axis alphabet: H W C image, N test images, M calibration normals, T tasks, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mtl_moe.painted_check import PaintedCheck
from mtl_moe.patients import Patients


@dataclass(frozen=True, kw_only=True)
class Case:
    """One picture row of the gallery; maps in calibrated units (0 = calibration median, 1 = its 95th percentile)."""

    section: str  # heading it stands under, a key of `select_cases`
    name: str
    label: int  # 1 abnormal, 0 normal, -1 unknown
    score: float
    p_value: float
    image: np.ndarray  # uint8 [H, W, C], C of 1 or 3
    anomaly_map: np.ndarray  # float [H, W]
    evidence_maps: Mapping[str, np.ndarray] = field(default_factory=dict)  # evidence -> float [h, w]
    mask: np.ndarray | None = None  # [H, W], non-zero inside the lesion


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What the report shows. Metric keys are those of report.json:

    `test/<dataset>/` + `image_auroc` | `image_ap` | `pixel_auroc` | `pixel_ap` | `aupro` | `aupro_bmad` |
    `matched_auroc` | `floor_matched_auroc` (over pairs alike in the strongest floor) | `patient_auroc` (of patients,
    where some have several images) | `normal_vs_calibration` |
    `abnormal_vs_calibration` (AUROC of test images against the calibration normals), bare or after `task/<evidence>/`,
    `leave_out/<task>/` (fused without it) or `floor/<floor>/`.
    With abnormal and normal images `image_auroc` must be there; all others are shown where they are.
    """

    dataset: str
    layout: str  # one line: what was found where, with counts
    headline: str  # one sentence of the caller's, above the result in numbers
    caution: str = ""  # what stands in the way of believing the page, in a box below the headline
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # metric key -> 95 % (low, high)
    tasks: Sequence[str]
    names: Sequence[str]  # [N]
    labels: np.ndarray  # int [N]: 1 abnormal, 0 normal, -1 unknown
    scores: np.ndarray  # float [N], higher is odder
    p_values: np.ndarray  # float [N] in (0, 1]: share of normals at least as odd, by the calibration
    evidence_scores: Mapping[str, np.ndarray]  # evidence -> [N]
    calibration_scores: np.ndarray  # float [M]
    groups: Sequence[str]  # [N]: patient of each image
    num_calibration_groups: int  # patients among the calibration normals
    patients: Patients | None = None  # where some bring several images
    painted: PaintedCheck | None = None
    tested: bool = True  # False: the images are the calibration normals themselves, and tell nothing of new ones
    # Each with `fpr` and `threshold`, and where labels allow `observed_fpr` and `tpr` (else None or absent).
    thresholds: Sequence[Mapping[str, float | None]] = ()
    cases: Sequence[Case] = ()
    history: Sequence[Mapping[str, float]] = ()  # records of metrics.jsonl: step, loss, loss/<task>
    router: Mapping[str, np.ndarray] = field(default_factory=dict)  # layer -> [T, E], rows in the order of `tasks`
    floors: Mapping[str, str] = field(default_factory=dict)  # floor -> what it is, in a few words
    provenance: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num = len(self.names)
        columns = {"labels": self.labels, "scores": self.scores, "p_values": self.p_values}
        columns |= {f"evidence_scores[{name!r}]": scores for name, scores in self.evidence_scores.items()}
        for key, column in columns.items():
            if np.shape(column) != (num,):
                raise ValueError(f"Expected {key} of shape ({num},), one value a name, found {np.shape(column)}.")
        if num == 0 or not np.all(np.isfinite(self.scores)):
            raise ValueError(f"Expected finite scores of at least one image, found {self.scores}.")
        for layer, utilisation in self.router.items():
            if np.ndim(utilisation) != 2 or len(utilisation) != len(self.tasks):
                raise ValueError(
                    f"Expected router[{layer!r}] as [{len(self.tasks)} tasks, E], found {np.shape(utilisation)}."
                )
        if self.has_both and self.prefix + "image_auroc" not in self.metrics:
            raise ValueError(f"Expected the metric {self.prefix}image_auroc, found {sorted(self.metrics)}.")

    @property
    def prefix(self) -> str:
        return f"test/{self.dataset}/"

    @property
    def has_both(self) -> bool:
        """Whether there are labelled normal and abnormal images to tell apart."""
        return bool(np.any(self.labels == 0) and np.any(self.labels == 1))

    def grouped(self, group: str, metric: str) -> dict[str, float]:
        """Evidence or floor name -> value, from the keys `<prefix><group>/<name>/<metric>`, in the metrics' order."""
        start, end = f"{self.prefix}{group}/", f"/{metric}"
        return {
            key[len(start) : -len(end)]: value
            for key, value in self.metrics.items()
            if key.startswith(start) and key.endswith(end)
        }

    def value(self, name: str) -> str:
        """A metric with its interval as text; empty where there is none. `name` is its key after the prefix."""
        key = self.prefix + name
        if not np.isfinite(self.metrics.get(key, np.nan)):
            return ""
        text = f"{self.metrics[key]:.3f}"
        return f"{text} ({span(self.intervals[key])})" if key in self.intervals else text


def select_cases(labels: np.ndarray, scores: np.ndarray, num_each: int = 6) -> dict[str, np.ndarray]:
    """Chooses the cases of the gallery: section heading -> indices into labels [N] and scores [N], in order of showing.

    Best hits, worst misses (both abnormal), false alarms and quiet normals, at most `num_each` of each and no image in
    two of them; without any label the highest and the lowest scores. Images of unknown label among
    known ones are left out.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    order = np.argsort(scores, kind="stable")
    sections = {}
    groups = {1: ("Best hits", "Worst misses"), 0: ("False alarms", "Quiet normals")}
    if np.all(labels == -1):
        groups = {-1: ("Highest scores", "Lowest scores")}
    for label, (high_title, low_title) in groups.items():
        members = order[labels[order] == label]
        num_high = min(num_each, -(-len(members) // 2))
        num_low = min(num_each, len(members) - num_high)
        sections[high_title] = members[::-1][:num_high]
        sections[low_title] = members[:num_low]
    return {title: indices for title, indices in sections.items() if len(indices)}


def span(interval: tuple[float, float]) -> str:
    """An interval as text, e.g. "0.843 to 0.921"."""
    return f"{interval[0]:.3f} to {interval[1]:.3f}"
