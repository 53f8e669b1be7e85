"""The page builder: escaping, self-containedness, safe writing, pictures read back."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from core import report


def decode(html: str) -> np.ndarray:
    png = base64.b64decode(re.search(r"data:image/(?:png|jpeg);base64,([A-Za-z0-9+/=]+)", html).group(1))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_page_escapes_text_lists_sections_and_fetches_nothing(tmp_path):
    sections = [
        report.Section("First & last", report.paragraph("<script>alert(1)</script>")),
        report.Section("Second", report.table(["a", "b"], [["<b>", "1"]], caption="x < y")),
    ]
    report.write_page(tmp_path / "p.html", "T<i>", "sub", sections, footer="<end>")
    html = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "<td class='number'>1</td>" in html
    assert "T&lt;i&gt;" in html
    assert "&lt;end&gt;" in html
    assert html.count('href="#first-last"') == html.count('id="first-last"') == 1
    assert not re.search(r"(src|href)=.(?!data:image/(png|jpeg)|#)|https?:|url\(|@import", html)


def test_a_failed_write_leaves_the_earlier_page(tmp_path, monkeypatch):
    path = tmp_path / "p.html"
    report.write_page(path, "old", "", [])
    before = path.read_text(encoding="utf-8")

    def full(self, text, encoding):
        with self.open("w", encoding=encoding) as file:
            file.write(text[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        report.write_page(path, "new", "", [])
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.html"]


def test_sections_with_one_anchor_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must differ"):
        report.write_page(
            tmp_path / "p.html", "", "", [report.Section("A b", Markup()), report.Section("a B", Markup())]
        )
    assert not list(tmp_path.iterdir())


def test_table_marks_rows_and_refuses_ragged_ones():
    html = report.table(["a", "b"], [["x", "1"], ["y", "2"], ["z", "3"]], strong=(1,), alert=(2,))
    assert re.findall(r"<tr class='(\w*)'><td class=''>(\w)", html) == [("", "x"), ("strong", "y"), ("alert", "z")]
    with pytest.raises(ValueError, match="Expected 2 cells"):
        report.table(["a", "b"], [["x"]])


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
def test_grey_pictures_are_exact(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    shown = decode(report.picture(pixels, "alt"))
    np.testing.assert_array_equal(shown, np.broadcast_to(pixels.reshape(5, 7, 1), (5, 7, 3)))


def test_few_colors_are_exact():
    few = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)  # as many as a palette holds
    pixels = np.random.default_rng(1).choice(few, (40, 50))
    np.testing.assert_array_equal(decode(report.image_uri(pixels)), pixels)


def test_many_colors_are_close_and_grey_stays_grey_beside_rare_colors():
    rng = np.random.default_rng(0)
    pixels = np.repeat(rng.integers(60, 200, (64, 64, 1), np.uint8), 3, axis=2)
    pixels[24:32, 24:32] = rng.integers((200, 150, 0), (255, 250, 60), (8, 8, 3))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) < 256
    pixels[:, 40:] = rng.integers(0, 256, (64, 24, 3))
    shown = decode(report.image_uri(pixels)).astype(int)
    assert np.abs(shown - pixels).mean() < 5  # white noise in quality 92; an image of a device is nearer
    grey = shown[:, :24]  # whole 8 x 8 blocks of grey
    assert np.ptp(grey, axis=2).max() <= 2  # rounding of the conversion to YCbCr and back


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)])
def test_other_pixels_are_refused(bad):
    with pytest.raises(ValueError, match="Expected uint8"):
        report.image_uri(bad)


def test_chart_is_drawn_at_its_size():
    fig, (left, _) = report.new_axes(4.0, 2.0, columns=2)
    left.plot([0, 1], [0, 1], color=report.COLORS[0])
    html = report.chart(fig, "a <line>", "cap")
    pixels = decode(html)
    assert pixels.shape == (300, 600, 3)
    assert np.any(np.all(pixels == (0x00, 0x72, 0xB2), axis=-1))
    assert 'alt="a &lt;line&gt;"' in html
    assert 'width="384"' in html


def test_details_and_values_escape():
    html = report.details("s<", report.key_values({"k<": "v>", "n": {"a": [1, "<"]}}) + report.json_text({"x": "<y>"}))
    assert "<summary>s&lt;</summary>" in html
    assert "<dt>k&lt;</dt><dd>v&gt;</dd>" in html
    assert "&lt;y&gt;" in html
    assert "<y>" not in html
