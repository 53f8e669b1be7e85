"""One DICOM file: its picture as a viewer shows it, its size, and the patient it belongs to. Needs pydicom.

Decoding, modality tables, windows and palettes are pydicom's (DICOM PS3.3, C.7.6.3 and C.11). Decided here: which
values become black and white, and that a file holds one frame.

Axis alphabet: H W C image.
"""

import contextlib
import hashlib
import logging
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from input_pipeline.index import DataError

SUFFIXES = (".dcm", ".dicom", ".ima")
# What pydicom and its decoders raise on files that are damaged, of another kind, or compressed in a way they lack.
_UNREADABLE = (
    OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip

_NOBODY = ("0", "anonymous", "anonymized", "anonymised", "anon", "unknown", "none")  # patients of anonymisers

Window = tuple[float, ...]  # (centre, width) in the file's units (Hounsfield units in CT); () means the file's own


def check_window(window: Sequence[float]) -> Window:
    """`data.window` as it was given; ValueError unless it is () or a centre and a width above 0."""
    if len(window) not in (0, 2) or (window and not window[1] > 0):
        raise ValueError(f"data.window: expected () or (centre, width) with a width above 0, found {tuple(window)}")
    return tuple(window)


def is_dicom(path: Path) -> bool:
    """Whether a file is taken for DICOM: by suffix; without one, or with a UID's digits, by DICM at byte 128."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return True
    if path.name == "DICOMDIR" or not (suffix == "" or suffix[1:].isdigit()):
        return False
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
    return False


def read_dicom(path: Path, window: Window = ()) -> Image.Image:
    """The picture of one file.

    Args:
      window: (centre, width): what is mapped to black and white, after the modality's rescaling; () takes the file's
        own table or first window, and without one everything that its stored bits can hold, never the image's extrema.
        CT and signed values, of which that leaves a few grey levels, are refused then.

    Returns:
      Grey as mode F in 0..1, MONOCHROME1 turned so that what a viewer shows white is white, padding black; colour and
      palettes as mode RGB.

    Raises:
      DataError: damaged, no picture in it, several frames, compressed in a way no installed decoder knows, or CT or
        signed values without any window.
    """
    pydicom = _pydicom()
    with _named(path):
        dicom = pydicom.dcmread(path)
        if "PixelData" not in dicom:
            raise DataError(f"{path}: DICOM without a picture ({_kind(dicom)}); expected an image: remove it")
        frames = int(dicom.get("NumberOfFrames") or 1)
        if frames > 1:
            raise DataError(f"{path}: {frames} frames in one DICOM; expected one image a file: split the series")
        if dicom.Rows * dicom.Columns > 2 * Image.MAX_IMAGE_PIXELS:  # where Pillow refuses the other formats
            raise DataError(f"{path}: {dicom.Rows}x{dicom.Columns} pixels; tile the image or scale it down")
        stored = pydicom.pixels.pixel_array(dicom)  # YCbCr as RGB
        bits = dicom.BitsStored
        if dicom.PhotometricInterpretation == "PALETTE COLOR":
            stored = pydicom.pixels.apply_color_lut(stored, dicom)[..., :3]
            bits = 8 * stored.dtype.itemsize
        if stored.ndim == 3:
            return Image.fromarray((stored >> (bits - 8)).astype(np.uint8))
        ct = dicom.get("Modality") == "CT"
        if not window and not _has_window(dicom) and (ct or dicom.PixelRepresentation):
            raise DataError(
                f"{path}: {'CT' if ct else 'signed values'} without a window in the file, and their whole range would "
                f"leave a few grey levels of the picture; say what is black and white, for CT in Hounsfield units, for "
                f'example --config.data.window="(40., 400.)" for soft tissue (the distiller reads files with a window)'
            )
        return Image.fromarray(_grey(dicom, stored, window))


def dicom_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header; DataError if it has none."""
    with _named(path):
        dicom = _pydicom().dcmread(path, stop_before_pixels=True, specific_tags=["Rows", "Columns"])
        return int(dicom.Rows), int(dicom.Columns)


def own_window(path: Path) -> Window:
    """The first window of a file's header as (centre, width), () where it has none; DataError as `read_dicom`."""
    with _named(path):
        dicom = _pydicom().dcmread(path, stop_before_pixels=True, specific_tags=["WindowCenter", "WindowWidth"])
        ends = (dicom.get("WindowCenter"), dicom.get("WindowWidth"))
        return () if None in ends else tuple(float(np.atleast_1d(value)[0]) for value in ends)


def patients_of(root: Path, names: Iterable[str]) -> dict[str, str]:
    """{name: patient} of the DICOM files among the images `root`/name, as far as their headers tell.

    The patient is the PatientID. Where that is empty, or a placeholder that anonymisers write, the StudyInstanceUID
    stands for it; and so it does where all files share one PatientID and come from several studies, as other
    anonymisers leave them. Two studies of one patient are then two patients: nothing in the files says otherwise.

    It is a hash, so that reports do not print the hospital's number; whoever has the numbers can hash them too.
    """
    found = {name: ids for name in names if is_dicom(root / name) and any(ids := _patient_and_study(root / name))}
    patients, studies = ({ids[k] for ids in found.values()} for k in (0, 1))
    shared = len(patients) == 1 and len(studies) > 1
    if shared and patients != {""}:
        logging.warning(
            "%s: %d DICOM files share one PatientID and come from %d studies: each study is taken for a patient",
            root,
            len(found),
            len(studies),
        )
    known = {name: study if study and (shared or not patient) else patient for name, (patient, study) in found.items()}
    return {name: f"patient-{hashlib.sha256(text.encode()).hexdigest()[:12]}" for name, text in known.items()}


def _patient_and_study(path: Path) -> tuple[str, str]:
    """PatientID and StudyInstanceUID of one file, "" where it does not tell."""
    pydicom, tags = _pydicom(), ["PatientID", "StudyInstanceUID"]
    try:
        with _named(path):
            dicom = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
            patient, study = (str(dicom.get(tag) or "").strip() for tag in tags)
    except DataError:  # said where the picture is read, which can leave it out
        return "", ""
    return "" if patient.lower() in _NOBODY else patient, study


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise DataError("DICOM files need pydicom: pip install -e '.[medical]'") from error
    return pydicom


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """DataError naming the file for whatever pydicom raises."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; was the data moved after it was indexed?") from error
    except (*_UNREADABLE, _pydicom().errors.InvalidDicomError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: cannot be read as DICOM ({reason}); expected a whole image: replace or remove it, or set "
            f"data.skip_corrupt; compressed pixels may need python-gdcm (pip install -e '.[medical]')"
        ) from error


def _kind(dicom: Any) -> str:
    """For example "Basic Text SR Storage"."""
    return getattr(dicom.get("SOPClassUID"), "name", "") or dicom.get("Modality", "no modality")


def _grey(dicom: Any, stored: np.ndarray, window: Window) -> np.ndarray:
    """float32 [H, W] in 0..1, 1 what a viewer shows white."""
    values = np.clip(_unit(dicom, stored, window), 0, 1)
    if dicom.PhotometricInterpretation == "MONOCHROME1":
        values = 1 - values
    if "PixelPaddingValue" in dicom:  # outside the exposed field; white after turning MONOCHROME1 otherwise
        ends = dicom.PixelPaddingValue, dicom.get("PixelPaddingRangeLimit", dicom.PixelPaddingValue)
        values = np.where((stored >= min(ends)) & (stored <= max(ends)), 0, values)
    return values.astype(np.float32)


def _has_window(dicom: Any) -> bool:
    """Whether the file says what is black and white, by a table or a window."""
    window = dicom.get("WindowCenter") is not None and dicom.get("WindowWidth") is not None
    return window or bool(dicom.get("VOILUTSequence"))


def _unit(dicom: Any, stored: np.ndarray, window: Window) -> np.ndarray:
    """Values to be clipped to 0..1."""
    pixels = _pydicom().pixels
    values = pixels.apply_modality_lut(stored, dicom)
    if window:
        center, width = window
        return (values - center) / width + 0.5
    if dicom.get("VOILUTSequence"):
        bits = dicom.VOILUTSequence[0].LUTDescriptor[2]
        return pixels.apply_voi(np.rint(values).astype(np.int32), dicom) / (2**bits - 1)
    if _has_window(dicom):
        scale = _pydicom().Dataset()  # of eight bits: pydicom then maps the window to 0..255
        scale.PhotometricInterpretation, scale.BitsStored, scale.PixelRepresentation = "MONOCHROME2", 8, 0
        for name in ("WindowCenter", "WindowWidth", "VOILUTFunction"):
            if name in dicom:
                scale[name] = dicom[name]
        return pixels.apply_windowing(values, scale) / 255
    half = 2 ** (dicom.BitsStored - 1)
    ends = np.asarray([-half, half - 1] if dicom.PixelRepresentation else [0, 2 * half - 1])
    black, white = np.sort(pixels.apply_modality_lut(ends, dicom).astype(np.float64))
    return (values - black) / (white - black)
