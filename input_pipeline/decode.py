"""Image files to uint8 arrays, and nothing else: no augmentation, no normalisation.

Axis alphabet: H W C image, M mask side.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from input_pipeline.dicom import Window, dicom_size, is_dicom, read_dicom
from input_pipeline.index import DataError, Example

# What Pillow's readers raise on damaged files; anything else is a bug of ours and must surface.
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, zlib.error)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_LOSSY = ("JPEG", "WEBP")
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "nearest")}


@dataclass(frozen=True)
class Resize:
    """How a picture becomes a square.

    Attributes:
      crop: False stretches it (the BMAD protocol); True resizes the short side and cuts out the middle, as Resize and
        CenterCrop of torchvision do (long side rounded down, offsets rounded half to even).
      interpolation: of images, one of INTERPOLATIONS; all but nearest are antialiased. Masks take the nearest pixel.
    """

    crop: bool = False
    interpolation: str = "bilinear"

    def __post_init__(self):
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, found '{self.interpolation}'"
            )

    def square(self, image: Image.Image, size: int, nearest: bool = False) -> Image.Image:
        """`image` as size x size pixels."""
        width, height = (size, size)
        if self.crop:
            short = min(image.size)
            width, height = (int(size * side / short) for side in image.size)
        how = Image.Resampling.NEAREST if nearest else INTERPOLATIONS[self.interpolation]
        image = image if image.size == (width, height) else image.resize((width, height), how)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return image if (width, height) == (size, size) else image.crop((left, top, left + size, top + size))


STRETCH = Resize()


def _open(path: Path, load: bool = True, window: Window = ()) -> Image.Image:
    """Opens and, unless only the header is wanted, decodes one file; DataError naming it."""
    if path.suffix == ".npy":
        return _from_npy(path)
    if is_dicom(path):
        return read_dicom(path, window)
    try:
        with path.open("rb") as file:
            image = Image.open(file)
            pages = getattr(image, "n_frames", 1) if image.format in ("TIFF", "WEBP") else 1
            if load:
                image.load()
    except _BOMBS as error:
        raise DataError(f"{path}: {error}; tile the image or scale it down") from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; was the data moved after it was indexed?") from error
    except _DAMAGED as error:
        empty = path.is_file() and path.stat().st_size == 0
        reason = "empty file (0 bytes)" if empty else f"cannot be decoded ({error})"
        raise DataError(
            f"{path}: {reason}; expected a whole PNG, JPEG, TIFF, BMP, WebP or DICOM: replace or remove it, or set "
            f"data.skip_corrupt"
        ) from error
    if pages > 1:
        raise DataError(f"{path}: {pages} pages in one {image.format}; expected one image a file: split the stack")
    return image


def _load_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, without trailing axes of one; DataError naming it."""
    try:
        values = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; was the data moved after it was indexed?") from error
    except _DAMAGED as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a whole .npy of numbers") from error
    return values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values


def _from_npy(path: Path) -> Image.Image:
    values = _load_npy(path)
    unit = values.dtype.kind == "f" and values.size > 0 and bool(values.min() >= 0 and values.max() <= 1)
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[-1] == 3)) or not (unit or values.dtype == np.uint8):
        raise DataError(
            f"{path}: {values.dtype} {values.shape}; expected uint8 or 0..1 of shape [H, W] or [H, W, 3]: scale it, "
            f"and choose three bands of a spectral image"
        )
    return Image.fromarray(np.rint(values * 255).astype(np.uint8) if unit else values)


def native_size(path: Path) -> tuple[int, int]:
    """(height, width) from the file's header; DataError if it has none."""
    if is_dicom(path):
        return dicom_size(path)
    image = _open(path, load=False)
    return image.height, image.width


def _opaque(image: Image.Image) -> Image.Image:
    """Palette and transparency resolved: grey or RGB. Transparent pixels turn black, opaque alpha is dropped."""
    if image.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != "RGBA":
        return image
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image).convert("RGB")


def _deep_values(image: Image.Image) -> np.ndarray:
    """[H, W] of a grey picture of 16 or 32 bits, white the largest."""
    values = np.asarray(image)
    # Photometric interpretation 0, "white is zero": Pillow turns 1 to 8 bits round, 16 not.
    white_is_zero = image.format == "TIFF" and image.mode.startswith("I;16") and image.tag_v2.get(262) == 0
    return 65535 - values if white_is_zero else values


def _to_8_or_float(image: Image.Image, path: Path, channels: int) -> Image.Image:
    """A picture of mode L, RGB or F (F: grey in 0..255, for deep files), to be resized and rounded once."""
    if image.mode in _DEEP_MODES:
        values = _deep_values(image).astype(np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(
                f"{path}: 32-bit values in [{values.min():g}, {values.max():g}]; expected 0..65535: window it"
            )
        return Image.fromarray(values / 257.0)  # 65535 -> 255
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # written so that NaN is refused
            raise DataError(
                f"{path}: floating-point values in [{values.min():g}, {values.max():g}]; expected 0..1: scale it"
            )
        return Image.fromarray(values * np.float32(255))
    try:
        return _opaque(image).convert("L" if channels == 1 else "RGB")
    except ValueError as error:  # CIELab, which Pillow turns to RGB only
        raise DataError(f"{path}: {error}; expected grey or RGB: save the image again as one of them") from error


def _to_array(image: Image.Image, channels: int) -> np.ndarray:
    values = np.asarray(image)
    if values.dtype != np.uint8:
        values = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    if values.ndim == 2:
        values = np.repeat(values[..., None], channels, axis=-1)
    return values


def read_native(path: Path, channels: int) -> np.ndarray:
    """One image at its own size: uint8 [H, W, channels]. Rules and errors as `read_image`."""
    return _to_array(_read(path, channels, min_size=1), channels)


def _read(path: Path, channels: int, min_size: int, window: Window = ()) -> Image.Image:
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (luminance) or 3 (RGB), found {channels}")
    image = _open(path, window=window)
    if min(image.size) < min_size:
        raise DataError(
            f"{path}: {image.height}x{image.width} pixels, smaller than a patch of {min_size}: remove the image or "
            f"use a smaller model.patch_size"
        )
    return _to_8_or_float(image, path, channels)


def resize_array(image: np.ndarray, size: int, channels: int, resize: Resize) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, channels]: what `read_image` does to a file of these pixels."""
    picture = Image.fromarray(image).convert("L" if channels == 1 else "RGB")
    return _to_array(resize.square(picture, size), channels)


def read_image(
    path: Path, size: int, channels: int, min_size: int = 1, resize: Resize = STRETCH, window: Window = ()
) -> np.ndarray:
    """One image as a square, by default stretched with antialiased bilinear resampling (the BMAD protocol).

    Args:
      path: PNG, JPEG, TIFF, BMP, WebP or DICOM (see `dicom.read_dicom`); 1, 8 or 16-bit grey, RGB, RGBA or palette.
        Colour becomes luminance (ITU-R 601) for channels=1, grey is repeated for channels=3. 16-bit grey is scaled by
        its range (65535 -> 255), never by its own extrema; integers beyond 16 bit are refused; floating point must be
        in 0..1. Transparency is laid on black; an opaque alpha is dropped.
      size: side of the result in pixels.
      channels: 1 or 3.
      min_size: smallest side accepted, the model's patch size.
      resize: how the picture becomes a square.
      window: (centre, width) of DICOM files, () for their own; others have none.

    Returns:
      uint8 [size, size, channels].

    Raises:
      DataError: missing, empty, truncated, undecodable, huge or too small a file, naming it.
    """
    image = _read(path, channels, min_size, window)
    return _to_array(resize.square(image, size), channels)


def _mask_values(image: Image.Image) -> np.ndarray:
    """[H, W]: the largest channel."""
    if image.mode in _DEEP_MODES:
        return _deep_values(image)
    if image.mode not in ("L", "1", "F"):
        image = _opaque(image).convert("RGB")
    values = np.asarray(image)
    return values.max(axis=-1) if values.ndim == 3 else values


def largest_value(path: Path) -> float:
    """The largest value of a mask file at its own size; DataError as `read_image`."""
    return float(_mask_values(_open(path)).max())


def read_native_mask(path: Path) -> np.ndarray:
    """One mask at its own size: uint8 {0, 1} [H, W, 1]; DataError as `read_image`.

    Foreground is every value above zero; JPEG and WebP masks are cut at one half, as compression blurs their edges.
    """
    mask = _open(path)
    return (_mask_values(mask) > (127 if mask.format in _LOSSY else 0)).astype(np.uint8)[..., None]


def read_mask(path: Path, size: int, resize: Resize = STRETCH) -> np.ndarray:
    """One mask: uint8 {0, 1} [size, size, 1], resized to the nearest pixel; foreground as in `read_native_mask`."""
    mask = Image.fromarray(read_native_mask(path)[..., 0])
    return np.asarray(resize.square(mask, size, nearest=True))[..., None]


def read_class_mask(path: Path) -> np.ndarray:
    """Class ids at the mask's own size: uint8 [H, W], from grey or palette pictures or a .npy of integers 0..255.

    Raises:
      DataError: an undecodable file, a colour picture, one stored as JPEG or WebP, or ids beyond 0..255.
    """
    if path.suffix == ".npy":
        values = _load_npy(path)
        fits = values.dtype.kind in "iub" and values.size > 0 and values.min() >= 0 and values.max() <= 255
    else:
        picture = _open(path)
        if picture.format in _LOSSY:
            raise DataError(
                f"{path}: class ids stored as {picture.format}, whose compression changes them; expected PNG, TIFF, "
                f"BMP or .npy: export the masks again"
            )
        values, fits = np.asarray(picture), picture.mode in ("L", "P", "1")
    if values.ndim != 2 or not fits:
        raise DataError(
            f"{path}: {values.dtype} {values.shape}; expected class ids 0..255 (255: ignored) of shape [H, W]"
        )
    return values.astype(np.uint8)


def check_mask_size(example: Example) -> None:
    """DataError naming both files when an example's mask is not of its image's size."""
    image, mask = native_size(example.image), native_size(example.mask)
    if image != mask:
        raise DataError(
            f"{example.mask}: mask of {mask[0]}x{mask[1]} pixels, its image {example.image} has {image[0]}x{image[1]}; "
            f"expected equal sizes: export the mask again at the image's size"
        )


def read_example(
    example: Example,
    size: int,
    mask_size: int,
    channels: int,
    min_size: int,
    resize: Resize = STRETCH,
    window: Window = (),
) -> tuple:
    """(image uint8 [size, size, channels], mask uint8 [M, M, 1], zeros if it has none); errors as `read_image`."""
    image = read_image(example.image, size, channels, min_size, resize, window)
    return image, read_example_mask(example, mask_size, resize)


def read_example_mask(example: Example, mask_size: int, resize: Resize = STRETCH) -> np.ndarray:
    """Its mask alone, as `read_example`; of the image nothing but the size is looked at."""
    if example.mask is None:
        return np.zeros((mask_size, mask_size, 1), np.uint8)
    check_mask_size(example)
    return read_mask(example.mask, mask_size, resize)
