"""One self-contained HTML page: tables, figures, pictures and text, with nothing fetched from anywhere.

Every text is escaped; only `Markup` (what the helpers below return) is inserted as it is. Axis alphabet: H W C image.
"""

import base64
import importlib.resources
import io
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from core.files import replacing, write_text

# Okabe and Ito's palette (black and yellow left out): told apart under the common colour-vision deficiencies.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, SOFT, GRID = "#1b2733", "#6b7785", "#e8ecf0"  # of figures: what matters most, what stands back, grid lines
DPI = 150  # of figures


@dataclass(frozen=True)
class Section:
    """A titled part of the page, listed in the table of contents."""

    title: str
    body: Markup

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def write_page(path: str | Path, title: str, subtitle: str, sections: Sequence[Section], footer: str = "") -> None:
    """Writes the page beside `path` and then moves it there, so that a failure leaves an earlier page whole.

    Raises ValueError when two sections would share an anchor, OSError as the file system gives it.
    """
    anchors = [section.anchor for section in sections]
    if len(set(anchors)) != len(anchors):
        raise ValueError(
            f"Section titles must differ in their letters and digits, found {[s.title for s in sections]}."
        )
    source = importlib.resources.files("core").joinpath("report_template.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    html = template.render(title=title, subtitle=subtitle, sections=sections, footer=footer)
    write_text(Path(path), html)


def join(parts: Iterable[str]) -> Markup:
    """Parts one after the other, plain strings escaped."""
    return Markup("\n").join(parts)


def paragraph(text: str, kind: str = "") -> Markup:
    """A paragraph; `kind` is "" | "lead" | "note" | "callout" | "callout warn"."""
    return Markup('<p class="{}">{}</p>').format(kind, text)


def heading(text: str) -> Markup:
    """A heading inside a section."""
    return Markup("<h3>{}</h3>").format(text)


def bullets(items: Iterable[str]) -> Markup:
    """A list of points, escaped."""
    return Markup("<ul>{}</ul>").format(join(Markup("<li>{}</li>").format(item) for item in items))


def block(parts: Iterable[str], kind: str) -> Markup:
    """A box around parts; `kind` is "row" (side by side, wrapping) | "card" | "stats"."""
    return Markup('<div class="{}">{}</div>').format(kind, join(parts))


def details(summary: str, body: Markup) -> Markup:
    """A block that is closed until it is clicked."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, body)


def stat(value: str, label: str, note: str = "") -> Markup:
    """One large number with what it is."""
    return Markup('<div class="stat"><span>{}</span><b>{}</b><span>{}</span></div>').format(label, value, note)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    text_columns: Collection[int] = (0,),
    strong: Collection[int] = (),
    alert: Collection[int] = (),
) -> Markup:
    """A table of ready-made cells. `strong` and `alert` are indices of marked rows; columns outside `text_columns`
    are set as numbers (to the right). Raises ValueError when a row has not one cell for each column."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"Expected {len(header)} cells ({', '.join(header)}) in a row, found {list(row)}.")

    def line(cells: Sequence[str], tag: str, row_kind: str) -> Markup:
        kinds = ["" if column in text_columns else "number" for column in range(len(cells))]
        inner = join(
            Markup("<{0} class='{1}'>{2}</{0}>").format(Markup(tag), kind, cell)
            for cell, kind in zip(cells, kinds, strict=True)
        )
        return Markup("<tr class='{}'>{}</tr>").format(row_kind, inner)

    marks = ["alert" if i in alert else "strong" if i in strong else "" for i in range(len(rows))]
    body = join(line(row, "td", mark) for row, mark in zip(rows, marks, strict=True))
    return Markup('<div class="scroll"><table>{}<thead>{}</thead><tbody>{}</tbody></table></div>').format(
        Markup("<caption>{}</caption>").format(caption) if caption else "", line(header, "th", ""), body
    )


def key_values(values: Mapping[str, object]) -> Markup:
    """A definition list; nested values are shown as JSON."""
    rows = [
        Markup("<dt>{}</dt><dd>{}</dd>").format(
            key, value if isinstance(value, str) else json.dumps(value, default=str)
        )
        for key, value in values.items()
    ]
    return Markup("<dl>{}</dl>").format(join(rows))


def json_text(values: Mapping[str, object]) -> Markup:
    """Values as indented JSON, escaped; what JSON does not know is shown as its text."""
    return Markup("<pre>{}</pre>").format(json.dumps(values, indent=2, default=str))


def provenance(values: Mapping[str, object], config: Mapping[str, object], title: str = "Configuration") -> Markup:
    """What a page was made with and the config, both closed until they are clicked."""
    return join([details("Provenance", key_values(values)), details(title, json_text(config))])


def new_axes(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches outside pyplot's global state, and its axes row by row."""
    fig = Figure(figsize=(width, height), layout="constrained")
    axes = list(fig.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    return fig, axes


def curve(history: Iterable[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps, and the values of `key` at them, of those logged records that have it."""
    records = [record for record in history if key in record]
    return [record["step"] for record in records], [record[key] for record in records]


def save_png(path: Path, fig: Figure) -> None:
    """The figure as a file of its own."""
    with replacing(path) as temporary:
        fig.savefig(temporary, format="png", dpi=DPI)


def chart(fig: Figure, alt: str, caption: str = "") -> Markup:
    """The figure as an embedded PNG, shown at its size in CSS inches."""
    buffer = io.BytesIO()
    FigureCanvasAgg(fig)
    fig.savefig(buffer, format="png", dpi=DPI)
    width = round(fig.get_size_inches()[0] * 96)
    return Markup(
        '<figure class="chart"><img src="{}" alt="{}" width="{}"><figcaption>{}</figcaption></figure>'
    ).format(_data_uri(buffer.getvalue(), "png"), alt, width, caption)


def picture(pixels: np.ndarray, alt: str, caption: str = "") -> Markup:
    """An image, uint8 [H, W] or [H, W, C] with C of 1 or 3, shown W CSS pixels wide."""
    return Markup(
        '<figure class="pixels" style="width:{}px"><img src="{}" alt="{}"><figcaption>{}</figcaption></figure>'
    ).format(pixels.shape[1], image_uri(pixels), alt, caption)


def color_bar(colors: np.ndarray, ticks: Sequence[str], label: str) -> Markup:
    """A horizontal colour bar from uint8 [W, 3] colours, with ticks at equal distances."""
    inner = join(Markup("<span>{}</span>").format(tick) for tick in ticks)
    return Markup('<div class="bar"><img src="{}" alt="colour bar"><div>{}</div><div>{}</div></div>').format(
        image_uri(colors[None]), inner, label
    )


def image_uri(pixels: np.ndarray) -> str:
    """uint8 [H, W], [H, W, 1] or [H, W, 3] as a data URI: a PNG, exact, for grey and for up to 256 colours; a JPEG of
    quality 92 at full chroma for more, which halves a page. Raises ValueError on anything else."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        raise ValueError(f"Expected uint8 [H, W], [H, W, 1] or [H, W, 3], found {pixels.dtype} {pixels.shape}.")
    buffer = io.BytesIO()
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        Image.fromarray(pixels.reshape(pixels.shape[:2])).save(buffer, format="PNG", optimize=True)
        return _data_uri(buffer.getvalue(), "png")
    packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)  # seven times faster than axis=0
    colors, index = np.unique(packed, return_inverse=True)
    if len(colors) <= 256:
        image = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8))
        image.putpalette((colors[:, None] >> np.array([16, 8, 0], np.uint32)).astype(np.uint8).tobytes())
        image.save(buffer, format="PNG", optimize=True)
        return _data_uri(buffer.getvalue(), "png")
    # Not an adaptive palette: it paints rare greys in the colours of others, specks that look like findings.
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=92, subsampling=0, optimize=True)
    return _data_uri(buffer.getvalue(), "jpeg")


def _data_uri(encoded: bytes, kind: str) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(encoded).decode("ascii")
