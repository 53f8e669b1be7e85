"""What the distiller's report draws: loss, blocks, spectra of the adapters, accuracy against cost.

Functions of plain data to figures. Axis alphabet: R rank, L layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from core.report import COLORS, GRID, INK, SOFT, curve, new_axes

MARKERS = "osD^vPX*"


def loss_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """The loss against the update, and beside it the L1 of all, cls and patch tokens where they were logged."""
    keys = [key for key in ("l1", "cls_l1", "patch_l1") if any(key in record for record in history)]
    fig, axes = new_axes(10.6 if keys else 5.4, 3.4, columns=2 if keys else 1)
    axes[0].plot(*curve(history, "loss"), color=INK, linewidth=1.6)
    axes[0].set_title("loss", fontsize=9)
    names = {"l1": "all tokens", "cls_l1": "cls token", "patch_l1": "patch tokens"}
    for color, key in zip(COLORS, keys, strict=False):
        axes[1].plot(*curve(history, key), color=color, linewidth=1.3, label=names[key])
    if keys:
        axes[1].set_title("mean absolute difference of the features", fontsize=9)
        axes[1].legend(fontsize=8, frameon=False)
    for ax in axes:
        _style(ax, "update")
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    return fig


def blocks_figure(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> Figure:
    """L1, cosine and CKA of each student block to its teacher block, before and after; either may be empty."""
    fig, axes = new_axes(10.6, 3.2, columns=3)
    for ax, (key, title) in zip(axes, (("l1", "L1"), ("cosine", "cosine"), ("cka", "linear CKA")), strict=True):
        for rows, label, color, line in ((before, "copy", SOFT, "--"), (after, "trained", COLORS[0], "-")):
            if rows:
                x, y = [row["block"] for row in rows], [row[key] for row in rows]
                ax.plot(x, y, color=color, linestyle=line, marker="o", markersize=3.5, label=label)
        ax.set_title(title, fontsize=9)
        _style(ax, "student block")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        top = 1.02 if key != "l1" else None
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]), top=top)
    axes[0].legend(fontsize=8, frameon=False)
    return fig


def spectra_figure(values: Mapping[str, np.ndarray]) -> Figure:
    """Singular values [R] of each adapter's product by path "block_00/attn/query": a panel a layer, a line a block."""
    layers = list(dict.fromkeys(path.partition("/")[2] for path in values))
    blocks = sorted({path.partition("/")[0] for path in values})
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    fig, axes = new_axes(10.6, 2.7 * rows, columns, rows)
    colors = {name: colormaps["viridis"](0.9 * i / max(len(blocks) - 1, 1)) for i, name in enumerate(blocks)}
    for ax, layer in zip(axes, layers, strict=False):
        for name in blocks:
            if f"{name}/{layer}" in values:
                found = np.asarray(values[f"{name}/{layer}"])
                shown = np.maximum(found, 1e-6 * max(found.max(), 1e-12))  # zeros have no place on a log scale
                ax.plot(np.arange(1, len(found) + 1), shown, color=colors[name], linewidth=1.2, label=name)
        ax.set_yscale("log")
        ax.set_title(layer, fontsize=9)
        _style(ax, "rank")
    for ax in axes[len(layers) :]:
        ax.set_axis_off()
    axes[0].legend(fontsize=7, frameon=False, ncols=2)
    return fig


def cost_figure(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """Accuracy (mean, bars of one standard deviation) against GFLOPs an image: a panel a few-shot ratio, a line a row.

    Without a probe (metric "") L1 to the teacher's features, of which the teacher has none. Rows as
    `table_summary.summarise` gives them; those without a ratio (teacher, copy) stand in every panel.
    """
    ratios = sorted({row["ratio"] for row in rows if row["ratio"] is not None}) or [None]
    fig, axes = new_axes(1.6 + 4.6 * len(ratios), 4.2, columns=len(ratios))
    names = list(dict.fromkeys(row["row"] for row in rows if row["row"] != "teacher"))
    key = "accuracy" if metric else "l1"
    for ax, ratio in zip(axes, ratios, strict=True):
        for row in rows:
            if row["row"] == "teacher" and metric:
                ax.plot(row["gflops"], row["accuracy"], marker="*", markersize=13, color=INK, linestyle="")
                ax.axhline(row["accuracy"], color=INK, linewidth=0.8, linestyle=":", label=row["title"])
        for i, name in enumerate(names):
            found = [row for row in rows if row["row"] == name and row["ratio"] in (None, ratio)]
            found.sort(key=lambda row: row["gflops"])
            ax.errorbar(
                [row["gflops"] for row in found],
                [row[key] for row in found],
                [row[f"{key}_std"] or 0.0 for row in found],
                color=COLORS[i % len(COLORS)],
                linestyle="-" if i < len(COLORS) else "--",
                marker=MARKERS[i % len(MARKERS)],
                markersize=5,
                linewidth=1.2,
                capsize=2,
                label=found[0]["title"] if found else name,
            )
        if ratio is not None:
            ax.set_title(f"{100 * ratio:g} % of the images", fontsize=9)
        _style(ax, "GFLOPs an image (2 a multiply-add)")
        ax.set_xlim(left=0)
        ax.set_ylabel(metric or "L1 on held-out images", fontsize=9)
    axes[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def _style(ax: Axes, x_label: str) -> None:
    ax.set_xlabel(x_label, fontsize=9)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
