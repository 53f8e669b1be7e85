"""What the detector's report draws: curves, histograms, heat maps and map overlays.

Functions of arrays to figures or pixels. Axis alphabet: H W C image, T tasks, E experts, N images.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage

from core.report import COLORS, GRID, INK, SOFT, curve, new_axes

COLOR_LIMIT = 3.0  # upper end of every map's colour scale, in calibrated units
OVERLAY_OPACITY = (
    0.65  # of the overlay where the map is 1 or more; it fades to none at 0, so normal tissue stays as it is
)
OUTLINE_COLOR = (0, 229, 255)  # cyan: absent from the map's colours, black to yellow by way of purple and red
NORMAL_COLOR, ABNORMAL_COLOR, CALIBRATION_COLOR = COLORS[0], COLORS[1], SOFT
CASE_SIDE = 224  # longer side of a case's pictures, in pixels
EVIDENCE_MAP_SIDE = 88


def map_colors(values: np.ndarray) -> np.ndarray:
    """Map values of any shape S in calibrated units -> uint8 [*S, 3], on the fixed scale 0..COLOR_LIMIT, clipped."""
    return colormaps["inferno"](np.clip(values / COLOR_LIMIT, 0, 1), bytes=True)[..., :3]


def resize(pixels: np.ndarray, side: int, resample: Image.Resampling) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3], or float32 [H, W], scaled so that its longer side is `side`; same dtype."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, resample))


def overlay(image: np.ndarray, anomaly_map: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The image and the map laid over it, both at the size in which the report shows them.

    Args:
      image: uint8 [H, W, C], C of 1 or 3.
      anomaly_map: float [H', W'] in calibrated units; stretched over the image.
      mask: [H, W], non-zero inside the annotated lesion, or None; its outline is drawn just outside it.

    Returns:
      uint8 [H", W"] or [H", W", 3]: the image; uint8 [H", W", 3]: the overlay.
    """
    shown = resize(image[:, :, 0] if image.shape[2] == 1 else image, CASE_SIDE, Image.Resampling.BICUBIC)
    height, width = shown.shape[:2]
    stretched = Image.fromarray(anomaly_map.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    values = np.asarray(stretched)
    opacity = OVERLAY_OPACITY * np.clip(values, 0, 1)[:, :, None]
    colored = np.broadcast_to(shown.reshape(height, width, -1), (height, width, 3))
    blended = np.rint((1 - opacity) * colored + opacity * map_colors(values)).astype(np.uint8)
    if mask is not None and np.any(mask):
        inside = Image.fromarray((np.asarray(mask) > 0).astype(np.uint8)).resize(
            (width, height), Image.Resampling.NEAREST
        )
        lesion = np.asarray(inside) > 0
        blended[ndimage.binary_dilation(lesion, iterations=2) & ~lesion] = OUTLINE_COLOR
    return shown, blended


def evidence_map_pixels(anomaly_map: np.ndarray) -> np.ndarray:
    """A map [h, w] in calibrated units -> uint8 [h', w', 3] at the size of the small pictures."""
    small = resize(anomaly_map.astype(np.float32), EVIDENCE_MAP_SIDE, Image.Resampling.BILINEAR)
    return map_colors(small)


def roc_figure(fused: tuple[np.ndarray, np.ndarray], evidences: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """ROC curves from (false-positive rates, true-positive rates): the fused score thick, the evidences thin."""
    fig, (ax,) = new_axes(6.4, 4.6)
    ax.plot([0, 1], [0, 1], color="#b8c1ca", linewidth=1, linestyle="--", label="chance")
    for i, (name, (fpr, tpr)) in enumerate(evidences.items()):
        ax.plot(fpr, tpr, color=_color(i), linestyle=_line(i), linewidth=1, alpha=0.8, label=name)
    ax.plot(*fused, color=INK, linewidth=2.6, label="fused score")
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    ax.set_xlabel("normal images flagged (false-positive rate)", fontsize=9)
    ax.set_ylabel("abnormal images found (true-positive rate)", fontsize=9)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def score_figure(groups: Mapping[str, np.ndarray], thresholds: Sequence[Mapping[str, float]]) -> Figure:
    """Histograms of scores as the share of each group in a bin, over common bins, with the thresholds.

    `groups` is name -> scores [N]; the colours know the names "calibration normals", "normal", "abnormal".
    """
    fig, (ax,) = new_axes(5.4, 4.6)
    colors = {"calibration normals": CALIBRATION_COLOR, "normal": NORMAL_COLOR, "abnormal": ABNORMAL_COLOR}
    edges = np.histogram_bin_edges(np.concatenate([*groups.values()]), bins=36)
    for name, scores in groups.items():
        share = np.histogram(scores, edges)[0] / max(len(scores), 1)
        color = colors.get(name, ABNORMAL_COLOR)
        fill = name != "calibration normals"
        if fill:
            ax.stairs(share, edges, fill=True, color=color, alpha=0.35)
        ax.stairs(share, edges, color=color, linewidth=1.4, label=f"{name} ({len(scores)})")
    top = ax.get_ylim()[1] * 1.12
    reachable = [row for row in thresholds if np.isfinite(row["threshold"])]
    for i, row in enumerate(sorted(reachable, key=lambda row: row["threshold"])):
        ax.axvline(row["threshold"], color=INK, linewidth=0.9, linestyle=":")
        # Staggered, because strict thresholds lie close to one another.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        height = top * (0.98 - 0.045 * (i % 4))
        ax.text(row["threshold"], height, one_in(row["fpr"]), fontsize=7.5, va="top", ha="center", bbox=box)
    ax.set_ylim(0, top)
    ax.set_xlabel("anomaly score", fontsize=9)
    ax.set_ylabel("share of the group's images", fontsize=9)
    ax.legend(fontsize=8, frameon=False, loc="center right")
    return fig


def calibration_figure(p_values: np.ndarray, num_test: int, num_calibration: int) -> Figure:
    """Share of the test normals [N] with a p-value up to p, against p: on the diagonal where test and calibration
    normals are alike. The band is twice the standard error from the numbers of patients of both."""
    fig, (ax,) = new_axes(5.0, 4.4)
    p = np.linspace(0, 1, 201)
    error = 2 * flag_rate_error(p, num_test, num_calibration)
    ax.fill_between(p, np.clip(p - error, 0, 1), np.clip(p + error, 0, 1), color="#dde3e9", label="expected range")
    ordered = np.sort(p_values)
    share = np.searchsorted(ordered, p, side="right") / len(ordered)
    ax.step(p, share, where="post", color=NORMAL_COLOR, linewidth=1.8, label=f"test normals ({len(ordered)})")
    ax.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle="--")
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set_xlabel("false-positive rate asked for", fontsize=9)
    ax.set_ylabel("test normals flagged", fontsize=9)
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    return fig


def flag_rate_error(rate: np.ndarray | float, num_test: int, num_calibration: int) -> np.ndarray:
    """Standard error of the share of test normals flagged at a rate set on calibration normals (binomial, both)."""
    return np.sqrt(rate * (1 - np.asarray(rate)) * (1 / max(num_test, 1) + 1 / max(num_calibration, 1)))


def router_figure(router: Mapping[str, np.ndarray], tasks: Sequence[str]) -> Figure:
    """Heat maps of the share of routed tokens per expert, layer name -> [T, E], on one common scale."""
    columns = min(3, len(router))
    rows = -(-len(router) // columns)
    num_experts = max(utilisation.shape[1] for utilisation in router.values())
    width = min(11.0, 1.4 + columns * (0.5 * num_experts + 0.5))
    fig, axes = new_axes(width, rows * (0.3 * len(tasks) + 0.9), columns, rows)
    largest = max(float(utilisation.max()) for utilisation in router.values())
    for i, (ax, (layer, utilisation)) in enumerate(zip(axes, router.items(), strict=False)):
        ax.imshow(utilisation, cmap="cividis", vmin=0, vmax=largest, aspect="auto")
        for (row, column), share in np.ndenumerate(utilisation):
            color = "white" if share < 0.55 * largest else "black"
            ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5, color=color)
        ax.set_title(layer, fontsize=9)
        ax.set_xticks(range(utilisation.shape[1]))
        ax.set_yticks(range(len(tasks)), tasks if i % columns == 0 else [""] * len(tasks))
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0, labelsize=8)
        ax.set_xlabel("expert", fontsize=8)
    for ax in axes[len(router) :]:
        ax.set_axis_off()
    return fig


def loss_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """Training losses against the step, from records with `step`, `loss` and `loss/<task>`; others are passed over."""
    fig, (total, tasks) = new_axes(10.6, 3.4, columns=2)
    keys = dict.fromkeys(key for record in history for key in record if key.startswith("loss/"))
    total.plot(*curve(history, "loss"), color=INK, linewidth=1.6)
    for i, key in enumerate(keys):
        label = key.removeprefix("loss/")
        tasks.plot(*curve(history, key), color=_color(i), linestyle=_line(i), linewidth=1.1, label=label)
    for ax, title in ((total, "total loss"), (tasks, "loss of each task")):
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("training step", fontsize=9)
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
        ax.grid(axis="y", color=GRID, linewidth=0.8)
    if keys:
        tasks.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def one_in(rate: float) -> str:
    """A rate in (0, 1] in words: 0.05 -> "1 of 20"; above 0.1 in hundredths: 0.3 -> "30 of 100"."""
    return f"1 of {round(1 / rate):,}" if rate <= 0.1 else f"{round(100 * rate)} of 100"


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _line(index: int) -> str:
    # A second round of the colours is dashed, so that more tasks than colours stay apart.
    return "-" if index < len(COLORS) else "--"
