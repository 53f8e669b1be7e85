"""Every pixel format against hand-computed values, and every damaged file."""

import numpy as np
import pytest
from PIL import Image
from trees import picture, write

from input_pipeline.decode import check_mask_size, read_example, read_image, read_mask, read_native, read_native_mask
from input_pipeline.index import DataError, Example

RGB = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
# ITU-R 601 luma, the definition; Pillow computes it in integers, so one grey level may differ by rounding.
LUMA = RGB @ np.array([0.299, 0.587, 0.114])


def test_grey_and_colour_at_native_size(tmp_path):
    grey = picture(1, 9)
    path = write(tmp_path / "g.png", grey)
    np.testing.assert_array_equal(read_image(path, 9, 1), grey[..., None])
    np.testing.assert_array_equal(read_image(path, 9, 3), np.stack([grey] * 3, -1))
    path = write(tmp_path / "c.png", RGB)
    np.testing.assert_array_equal(read_image(path, 9, 3), RGB)
    np.testing.assert_allclose(read_image(path, 9, 1)[..., 0], LUMA, atol=1)


@pytest.mark.parametrize("suffix", ["bmp", "tiff", "png"])
def test_lossless_containers(tmp_path, suffix):
    np.testing.assert_array_equal(read_image(write(tmp_path / f"x.{suffix}", RGB), 9, 3), RGB)


def test_webp(tmp_path):
    """Lossless gives the pixels; of an animation no frame is chosen; masks are cut at one half, as JPEG masks are."""
    Image.fromarray(RGB).save(tmp_path / "x.webp", lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / "x.webp", 9, 3), RGB)
    frames = [Image.fromarray(np.roll(RGB, k, 0)) for k in range(2)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"moving\.webp: 2 pages in one WEBP; expected one image a file"):
        read_image(tmp_path / "moving.webp", 9, 3)
    Image.fromarray(np.array([[0, 100], [200, 255]], np.uint8)).convert("RGB").save(tmp_path / "m.webp", lossless=True)
    np.testing.assert_array_equal(read_native_mask(tmp_path / "m.webp")[..., 0], [[0, 0], [1, 1]])


def test_jpeg(tmp_path):
    smooth = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 8
    values = read_image(write(tmp_path / "x.jpeg", smooth), 16, 1)
    np.testing.assert_allclose(values[..., 0].astype(int), smooth, atol=6)  # quality 75


def test_alpha(tmp_path):
    opaque = np.dstack([RGB, np.full((9, 9), 255, np.uint8)])
    np.testing.assert_array_equal(read_image(write(tmp_path / "o.png", opaque), 9, 3), RGB)
    np.testing.assert_allclose(read_image(tmp_path / "o.png", 9, 1)[..., 0], LUMA, atol=1)
    half = opaque.copy()
    half[:4, :, 3] = 0
    laid = read_image(write(tmp_path / "h.png", half), 9, 3)
    assert (laid[:4] == 0).all()
    np.testing.assert_array_equal(laid[4:], RGB[4:])
    Image.fromarray(picture(2, 9)).convert("LA").save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(tmp_path / "la.png", 9, 1)[..., 0], picture(2, 9))


def test_palette_and_bilevel(tmp_path):
    indices = np.arange(81, dtype=np.uint8).reshape(9, 9) % 3
    image = Image.fromarray(indices)
    image.putpalette([10, 20, 30, 200, 100, 0, 255, 255, 255])
    image.save(tmp_path / "p.png")
    expected = np.array([[10, 20, 30], [200, 100, 0], [255, 255, 255]], np.uint8)[indices]
    np.testing.assert_array_equal(read_image(tmp_path / "p.png", 9, 3), expected)
    write(tmp_path / "b.png", indices == 1)
    np.testing.assert_array_equal(read_image(tmp_path / "b.png", 9, 1)[..., 0], (indices == 1) * 255)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_is_scaled_by_its_range_not_by_its_extrema(tmp_path, suffix):
    deep = np.array([[0, 257], [257 * 128, 65535]], np.uint16)
    np.testing.assert_array_equal(read_image(write(tmp_path / f"d.{suffix}", deep), 2, 1)[..., 0], [[0, 1], [128, 255]])
    np.testing.assert_array_equal(read_image(tmp_path / f"d.{suffix}", 2, 3)[1, 0], [128] * 3)
    dim = np.full((2, 2), 257 * 10, np.uint16)
    assert (read_image(write(tmp_path / f"dim.{suffix}", dim), 2, 1) == 10).all()


def test_16_bit_tiff_whose_white_is_zero(tmp_path):
    deep = np.array([[0, 257], [257 * 128, 65535]], np.uint16)
    content = write(tmp_path / "a.tiff", deep).read_bytes()
    entry = b"\x06\x01\x03\x00\x01\x00\x00\x00"  # photometric interpretation, one short; Pillow writes 1 only
    assert content.count(entry + b"\x01\x00") == 1
    (tmp_path / "a.tiff").write_bytes(content.replace(entry + b"\x01\x00", entry + b"\x00\x00"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tiff", 2, 1)[..., 0], [[255, 254], [127, 0]])
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tiff", 2)[..., 0], [[1, 1], [1, 0]])


def test_16_bit_big_endian_32_bit_and_float_tiff(tmp_path):
    deep = np.array([[0, 257], [257 * 128, 65535]], np.uint16)
    Image.frombytes("I;16B", (2, 2), deep.astype(">u2").tobytes()).save(tmp_path / "b.tiff")
    with Image.open(tmp_path / "b.tiff") as image:
        assert image.mode == "I;16B"
    np.testing.assert_array_equal(read_image(tmp_path / "b.tiff", 2, 1)[..., 0], [[0, 1], [128, 255]])
    np.testing.assert_array_equal(
        read_image(write(tmp_path / "i.tiff", deep.astype(np.int32)), 2, 1)[..., 0], [[0, 1], [128, 255]]
    )
    with pytest.raises(DataError, match=r"h\.tiff: 32-bit values in \[-1000, "):
        read_image(write(tmp_path / "h.tiff", deep.astype(np.int32) - 1000), 2, 1)
    unit = np.array([[0, 0.5], [0.25, 1]], np.float32)
    np.testing.assert_array_equal(read_image(write(tmp_path / "f.tiff", unit), 2, 1)[..., 0], [[0, 128], [64, 255]])
    for k, bad in enumerate((unit * 300, unit - 0.5, unit * np.nan)):
        with pytest.raises(DataError, match=r"floating-point values in .*; expected 0\.\.1"):
            read_image(write(tmp_path / f"bad{k}.tiff", bad), 2, 1)


def test_resize_stretches_and_antialiases(tmp_path):
    stripes = np.zeros((32, 64), np.uint8)
    stripes[:, ::2] = 255  # faster than the new grid: must come out grey, not black or white
    values = read_image(write(tmp_path / "s.png", stripes), 8, 1)
    assert values.shape == (8, 8, 1)
    np.testing.assert_allclose(values[:, 1:-1].astype(int), 128, atol=4)
    ramp = np.repeat(np.linspace(0, 255, 64)[None], 32, 0).astype(np.uint8)
    assert (np.diff(read_image(write(tmp_path / "r.png", ramp), 8, 1)[0, :, 0].astype(int)) > 0).all()
    np.testing.assert_array_equal(read_native(tmp_path / "r.png", 1)[..., 0], ramp)


def test_deep_images_are_resized_like_8_bit_ones(tmp_path):
    grey = picture(3, 20)
    shallow = read_image(write(tmp_path / "8.png", grey), 7, 1).astype(int)
    deep = read_image(write(tmp_path / "16.png", grey.astype(np.uint16) * 257), 7, 1)
    np.testing.assert_allclose(deep, shallow, atol=1)  # Pillow rounds after each of the two passes in 8 bits


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 1], [0, 255]], np.uint8),
        np.array([[0, 1], [0, 1]], bool),
        np.array([[0, 1], [0, 65535]], np.uint16),
        np.array([[[0, 0, 0], [3, 0, 0]], [[0, 0, 0], [0, 0, 9]]], np.uint8),
        np.array([[[0, 0, 0, 255], [3, 0, 0, 255]], [[7, 7, 7, 0], [0, 0, 9, 255]]], np.uint8),
    ],
)
def test_mask_formats(tmp_path, values):
    mask = read_mask(write(tmp_path / "m.png", values), 2)
    assert (mask.dtype, mask.shape) == (np.uint8, (2, 2, 1))
    np.testing.assert_array_equal(mask[..., 0], [[0, 1], [0, 1]])


def test_mask_resize_is_nearest_and_jpeg_masks_are_cut_at_half(tmp_path):
    block = np.zeros((24, 24), np.uint8)
    block[6:12, 12:18] = 1
    mask = read_mask(write(tmp_path / "m.png", block), 8)[..., 0]
    expected = np.zeros((8, 8), np.uint8)
    expected[2:4, 4:6] = 1
    np.testing.assert_array_equal(mask, expected)
    assert read_native_mask(write(tmp_path / "m.jpg", block * 255))[..., 0].sum() == block.sum()


def test_colours_that_do_not_become_grey_are_named(tmp_path):
    Image.new("LAB", (9, 9)).save(tmp_path / "lab.tiff")
    with pytest.raises(DataError, match=r"lab\.tiff: conversion from LAB .*; expected grey or RGB"):
        read_image(tmp_path / "lab.tiff", 8, 1)


def test_only_tiffs_are_turned_by_their_orientation(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn clockwise shows it upright
    values = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)
    for name in ("x.tiff", "x.png"):
        Image.fromarray(values).save(tmp_path / name, exif=exif)
    np.testing.assert_array_equal(read_native(tmp_path / "x.tiff", 1)[..., 0], np.rot90(values, -1))
    np.testing.assert_array_equal(read_native(tmp_path / "x.png", 1)[..., 0], values)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # said by Pillow of the cut TIFF, before it fails
def test_damaged_files_are_named(tmp_path):
    good = write(tmp_path / "good.png", picture(0, 64))
    jpeg = write(tmp_path / "good.jpg", picture(0, 64))
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:-1000])
    (tmp_path / "cut.jpg").write_bytes(jpeg.read_bytes()[:-500])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    flipped = bytearray(good.read_bytes())
    flipped[60:80] = bytes(20)
    (tmp_path / "flipped.png").write_bytes(flipped)
    pages = [Image.fromarray(picture(k)) for k in range(2)]
    pages[0].save(tmp_path / "whole.tiff", save_all=True, append_images=pages[1:])
    (tmp_path / "cut.tiff").write_bytes((tmp_path / "whole.tiff").read_bytes()[:300])  # in the first of two pages
    for name in ("cut.png", "cut.jpg", "text.png", "flipped.png", "cut.tiff"):
        with pytest.raises(DataError, match=rf"{name}: cannot be decoded .*skip_corrupt"):
            read_image(tmp_path / name, 8, 1)
    with pytest.raises(DataError, match=r"empty\.png: empty file"):
        read_image(tmp_path / "empty.png", 8, 1)
    with pytest.raises(DataError, match=r"absent\.png: no such file"):
        read_image(tmp_path / "absent.png", 8, 1)


def test_small_huge_and_stacked_images(tmp_path, monkeypatch):
    path = write(tmp_path / "x.png", picture(0, 12))
    with pytest.raises(DataError, match=r"x\.png: 12x12 pixels, smaller than a patch of 16"):
        read_image(path, 8, 1, min_size=16)
    assert read_image(path, 8, 1, min_size=12).shape == (8, 8, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with pytest.raises(DataError, match=r"x\.png: .*decompression bomb"):
        read_image(path, 8, 1)
    monkeypatch.undo()
    pages = [Image.fromarray(picture(k)) for k in range(2)]
    pages[0].save(tmp_path / "stack.tiff", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match=r"stack\.tiff: 2 pages"):
        read_image(tmp_path / "stack.tiff", 8, 1)
    with pytest.raises(ValueError, match="channels must be 1"):
        read_image(path, 8, 2)


def test_mask_of_another_size_names_both(tmp_path):
    image, mask = write(tmp_path / "i.png", picture(0, 12)), write(tmp_path / "m.png", picture(1, 10))
    example = Example("i.png", image, 1, mask, "i")
    with pytest.raises(DataError, match=r"m\.png: mask of 10x10 pixels, its image .*i\.png has 12x12"):
        check_mask_size(example)
    with pytest.raises(DataError, match="expected equal sizes"):
        read_example(example, 8, 8, 1, 1)
