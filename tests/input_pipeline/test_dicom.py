"""DICOM files: the values of DICOM PS3.3 by a second way, compressed files against plain ones, bad files, patients."""

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pydicom
import pytest
from labelled import data as labelled_config
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian
from trees import data_config

from input_pipeline.classification import load_labelled
from input_pipeline.dataset import load_dataset, load_images
from input_pipeline.decode import native_size, read_example, read_image, read_native
from input_pipeline.dicom import check_window, is_dicom, patients_of, read_dicom
from input_pipeline.groups import groups_of
from input_pipeline.index import DataError, Example
from input_pipeline.prepare import prepare

RAMP = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)


def sample(name: str) -> Path:
    """A file that pydicom brings."""
    return Path(get_testdata_file(name, download=False))


def make_dicom(path: Path, stored: np.ndarray = RAMP, **elements: Any) -> Path:
    """Writes a grey image of 12 bits (16 if signed), with further elements by their keywords."""
    dicom = Dataset()
    dicom.file_meta = FileMetaDataset()
    dicom.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dicom.SOPClassUID, dicom.SOPInstanceUID = CTImageStorage, pydicom.uid.generate_uid()
    dicom.Rows, dicom.Columns = stored.shape
    dicom.SamplesPerPixel, dicom.PhotometricInterpretation = 1, "MONOCHROME2"
    signed = stored.dtype.kind == "i"
    dicom.BitsAllocated, dicom.BitsStored, dicom.PixelRepresentation = 16, 16 if signed else 12, int(signed)
    dicom.HighBit = dicom.BitsStored - 1
    dicom.PixelData = stored.tobytes()
    for name, value in elements.items():
        setattr(dicom, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dicom.save_as(path, enforce_file_format=True)
    return path


def unit(path: Path, window: tuple[float, ...] = ()) -> np.ndarray:
    return np.asarray(read_dicom(path, window))


def test_without_a_window_the_stored_bits_are_the_range(tmp_path):
    np.testing.assert_allclose(unit(make_dicom(tmp_path / "a.dcm")), RAMP / 4095, rtol=1e-6)
    scaled = make_dicom(tmp_path / "b.dcm", RescaleSlope=2, RescaleIntercept=-1024)
    np.testing.assert_allclose(unit(scaled), RAMP / 4095, rtol=1e-6)
    falling = make_dicom(tmp_path / "c.dcm", RescaleSlope=-1, RescaleIntercept=0)
    np.testing.assert_allclose(unit(falling), 1 - RAMP / 4095, atol=1e-6)


def test_where_the_stored_bits_say_too_little_a_window_is_asked_for(tmp_path):
    """-1000..3000 of 16 bits would be 16 grey levels."""
    signed, window = (RAMP.astype(np.int16) - 1000), {"WindowCenter": 0, "WindowWidth": 4000}
    for name, stored, elements in (("signed", signed, {"Modality": "MR"}), ("CT", RAMP, {"Modality": "CT"})):
        file = make_dicom(tmp_path / name / "a.dcm", stored, **elements)
        with pytest.raises(DataError, match=rf"a\.dcm: {name}.* without a window in the file.*--config\.data\.window="):
            unit(file)
        expected = np.clip((stored.astype(float)) / 4000 + 0.5, 0, 1)
        np.testing.assert_allclose(unit(file, (0.0, 4000.0)), expected, atol=1e-6)
        np.testing.assert_allclose(unit(make_dicom(file, stored, **elements, **window)), expected, atol=1e-3)


def test_the_files_window_is_the_standards_formula(tmp_path):
    """C.11.2.1.2: y = (x - (c - 0.5)) / (w - 1) + 0.5, black below and white above; the first of several windows."""
    elements = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": [40, 600], "WindowWidth": [400, 1500]}
    found = unit(make_dicom(tmp_path / "a.dcm", **elements))
    for value, pixel in zip(RAMP.ravel().astype(float) - 1024, found.ravel(), strict=True):
        expected = min(max((value - 39.5) / 399 + 0.5, 0.0), 1.0)
        assert pixel == pytest.approx(expected, abs=1e-6)
    exact = unit(make_dicom(tmp_path / "b.dcm", WindowCenter=2000, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT"))
    np.testing.assert_allclose(exact, np.clip((RAMP.astype(float) - 2000) / 1000 + 0.5, 0, 1), atol=1e-6)
    soft = unit(make_dicom(tmp_path / "c.dcm", WindowCenter=2000, WindowWidth=1000, VOILUTFunction="SIGMOID"))
    np.testing.assert_allclose(soft, 1 / (1 + np.exp(-4 * (RAMP.astype(float) - 2000) / 1000)), atol=1e-6)


def test_a_window_of_the_config_goes_before_the_files(tmp_path):
    file = make_dicom(tmp_path / "a.dcm", RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=600, WindowWidth=1500)
    expected = np.clip((RAMP.astype(float) - 1024 - 40) / 400 + 0.5, 0, 1)
    np.testing.assert_allclose(unit(file, (40.0, 400.0)), expected, atol=1e-6)
    pixels = read_image(file, 16, 1, window=(40.0, 400.0))[..., 0]
    np.testing.assert_array_equal(pixels, np.rint(expected * 255))
    example = Example("a.dcm", file, 0, None, "a")
    np.testing.assert_array_equal(read_example(example, 16, 8, 1, 1, window=(40.0, 400.0))[0][..., 0], pixels)
    split, _ = load_images(tmp_path, data_config(image_size=16, window=(40.0, 400.0)))
    np.testing.assert_array_equal(split.images([0])[0, ..., 0], pixels)
    for bad in ((1.0,), (40.0, 0.0), (1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match=r"data\.window: expected \(\) or \(centre, width\)"):
            check_window(bad)


def test_monochrome1_is_turned_and_padding_stays_black(tmp_path):
    file = make_dicom(tmp_path / "a.dcm", PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0)
    expected = 1 - RAMP / 4095
    expected[0, 0] = 0
    np.testing.assert_allclose(unit(file), expected, atol=1e-6)
    ranged = make_dicom(
        tmp_path / "b.dcm",
        PhotometricInterpretation="MONOCHROME1",
        PixelPaddingValue=64,
        PixelPaddingRangeLimit=0,
    )
    assert (unit(ranged)[RAMP <= 64] == 0).all()
    np.testing.assert_allclose(unit(ranged)[RAMP > 64], 1 - RAMP[RAMP > 64] / 4095, atol=1e-6)


def test_a_table_of_the_file_is_applied(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [256, 1000, 10], [1023 - 4 * k for k in range(256)]
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    found = unit(make_dicom(tmp_path / "a.dcm", VOILUTSequence=[table], RescaleSlope=1, RescaleIntercept=0))
    entries = np.clip(RAMP.astype(int) - 1000, 0, 255)
    np.testing.assert_allclose(found, (1023 - 4 * entries) / 1023, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["MR_small_RLE", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "MR_small_bigendian"]
)
def test_losslessly_compressed_files_give_the_plain_ones_pixels(name: str):
    np.testing.assert_array_equal(unit(sample(f"{name}.dcm")), unit(sample("MR_small.dcm")))


def test_jpeg_lossless_gives_the_plain_ones_pixels(tmp_path):
    """Written by the library that also decodes it: none of the files that come with pydicom is of this kind."""
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(sample("MR_small.dcm")))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetFileName(str(tmp_path / "a.dcm"))
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    assert "JPEG Lossless" in pydicom.dcmread(tmp_path / "a.dcm").file_meta.TransferSyntaxUID.name
    np.testing.assert_array_equal(unit(tmp_path / "a.dcm"), unit(sample("MR_small.dcm")))


def test_colour_is_scaled_by_the_bits_it_is_stored_in(tmp_path):
    colour = np.random.default_rng(0).integers(0, 4096, (16, 16, 3), dtype=np.uint16)
    options = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    file = make_dicom(tmp_path / "a.dcm", PixelData=colour.tobytes(), **options)
    np.testing.assert_array_equal(np.asarray(read_dicom(file)), colour >> 4)


def test_colour_and_palettes():
    plain = pydicom.dcmread(sample("examples_rgb_color.dcm"))
    picture = read_dicom(sample("examples_rgb_color.dcm"))
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), plain.pixel_array)
    assert read_native(sample("examples_rgb_color.dcm"), 1).shape == (*plain.pixel_array.shape[:2], 1)
    palette = pydicom.dcmread(sample("examples_palette.dcm"))
    tables = [getattr(palette, f"{c}PaletteColorLookupTableData") for c in ("Red", "Green", "Blue")]
    bits = palette.RedPaletteColorLookupTableDescriptor[2]
    entries = np.stack([np.frombuffer(table, "<u2" if bits == 16 else np.uint8) for table in tables], -1)
    first = palette.RedPaletteColorLookupTableDescriptor[1]
    expected = entries[palette.pixel_array.astype(int) - first] >> (bits - 8)
    np.testing.assert_array_equal(np.asarray(read_dicom(sample("examples_palette.dcm"))), expected)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "text.dcm").write_text("not a picture")
    (tmp_path / "empty.dcm").write_bytes(b"")
    whole = make_dicom(tmp_path / "whole.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-100])
    dicom = pydicom.dcmread(tmp_path / "whole.dcm")
    dicom.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dicom.save_as(tmp_path / "deflated.dcm", enforce_file_format=True)
    (tmp_path / "cut_deflated.dcm").write_bytes((tmp_path / "deflated.dcm").read_bytes()[:-50])
    for name in ("text", "empty", "cut", "cut_deflated"):
        with pytest.raises(DataError, match=rf"{name}\.dcm: cannot be read as DICOM .*skip_corrupt"):
            read_image(tmp_path / f"{name}.dcm", 8, 1)
    with pytest.raises(DataError, match=r"absent\.dcm: no such file"):
        read_image(tmp_path / "absent.dcm", 8, 1)
    with pytest.raises(DataError, match=r"2 frames in one DICOM; expected one image a file"):
        read_image(sample("SC_rgb_rle_2frame.dcm"), 8, 1)
    with pytest.raises(DataError, match=r"DICOM without a picture .*SR"):
        read_image(sample("test-SR.dcm"), 8, 1)
    with pytest.raises(DataError, match="40000x40000 pixels; tile"):
        read_image(make_dicom(tmp_path / "huge.dcm", Rows=40000, Columns=40000), 8, 1)


def test_pictures_may_be_as_large_as_those_of_other_formats(tmp_path, monkeypatch):
    """Pillow warns above MAX_IMAGE_PIXELS and refuses above twice as many."""
    file = make_dicom(tmp_path / "a.dcm")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", RAMP.size // 2)
    assert read_dicom(file).size == (16, 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", RAMP.size // 2 - 1)
    with pytest.raises(DataError, match="16x16 pixels; tile"):
        read_dicom(file)


def test_files_without_suffix_are_found_and_others_left_out(tmp_path):
    for patient, name in ((1, "IM0001"), (1, "1.2.840.113.5"), (2, "1.2.840.113.6"), (3, "c.DCM")):
        make_dicom(tmp_path / name, PatientID=f"hospital-{patient}")
    make_dicom(tmp_path / "DICOMDIR")
    (tmp_path / "notes").write_text("no image" * 50)
    dataset = load_dataset(data_config(tmp_path, calibration_fraction=0.3))
    found = {
        name: group for split in dataset.splits.values() for name, group in zip(split.names, split.groups, strict=True)
    }
    assert sorted(found) == ["1.2.840.113.5", "1.2.840.113.6", "IM0001", "c.DCM"]
    assert found["IM0001"] == found["1.2.840.113.5"] == patients_of(tmp_path, ["IM0001"])["IM0001"]
    assert len(set(found.values())) == 3
    assert not any("hospital" in group for group in found.values())
    assert not set(dataset.splits["train"].groups) & set(dataset.splits["calibration"].groups)
    assert native_size(tmp_path / "IM0001") == (16, 16)
    assert not is_dicom(tmp_path / "DICOMDIR")
    assert not is_dicom(tmp_path / "notes")
    assert load_images(tmp_path, data_config())[0].names == sorted(found)


@pytest.mark.parametrize("patient", [" ", "ANONYMOUS", "Anonymized", "anon", "Unknown", "none", "0"])
def test_patients_fall_back_to_the_study_and_the_name(tmp_path, patient: str):
    make_dicom(tmp_path / "a.dcm", PatientID=patient, StudyInstanceUID="1.2.3")
    make_dicom(tmp_path / "b.dcm", PatientID=patient)
    (tmp_path / "c.dcm").write_text("damaged")
    make_dicom(tmp_path / "d.dcm", PatientID="hospital-1", StudyInstanceUID="1.2.4")
    make_dicom(tmp_path / "e.dcm", PatientID="hospital-1", StudyInstanceUID="1.2.5")
    study, *others, one, two = groups_of(tmp_path, [f"{name}.dcm" for name in "abcde"], "auto")
    assert others == ["b", "c"]
    assert one == two != study
    assert study == patients_of(tmp_path, ["a.dcm"])["a.dcm"]
    assert {group[:8] for group in (study, one)} == {"patient-"}


def test_studies_stand_for_patients_that_all_have_one_number(tmp_path, caplog):
    for k in range(6):
        make_dicom(tmp_path / f"{k}.dcm", RAMP + k, PatientID="TRIAL", StudyInstanceUID=f"1.2.{k // 2}")
    splits = load_dataset(data_config(tmp_path, calibration_fraction=0.3)).splits
    groups = {name: group for split in splits.values() for name, group in zip(split.names, split.groups, strict=True)}
    assert [groups[f"{k}.dcm"] for k in (0, 2, 4)] == [groups[f"{k}.dcm"] for k in (1, 3, 5)]
    assert len(set(groups.values())) == 3
    assert "6 DICOM files share one PatientID and come from 3 studies" in caplog.text
    for k in range(6):
        make_dicom(tmp_path / f"{k}.dcm", RAMP + k, PatientID="TRIAL", StudyInstanceUID="1.2")
    with pytest.raises(DataError, match=r"6 images of one, 'patient-\w+' \(from the DICOM headers.*data\.groups=image"):
        load_dataset(data_config(tmp_path))
    assert len(load_dataset(data_config(tmp_path, groups="image")).splits["calibration"]) == 1


def test_a_report_among_images_to_score_is_left_out(tmp_path):
    make_dicom(tmp_path / "a.dcm")
    shutil.copy(sample("test-SR.dcm"), tmp_path / "b.dcm")
    split, skipped = load_images(tmp_path, data_config(skip_corrupt=True))
    assert split.names == ["a.dcm"]
    assert "DICOM without a picture" in skipped["b.dcm"]


@pytest.mark.parametrize("kind", ["folder", "segmentation"])
@pytest.mark.parametrize("groups", ["auto", "image"])
def test_slices_of_a_patient_stay_in_one_split_of_labelled_sets(tmp_path, kind: str, groups: str):
    for patient in range(8):
        folder = tmp_path / "train" / ("images" if kind == "segmentation" else "ab"[patient % 2])
        for k in range(4):
            make_dicom(folder / f"{patient}-{k}.dcm", RAMP + 4 * patient + k, PatientID=f"hospital-{patient}")
    if kind == "segmentation":
        (tmp_path / "train/masks").mkdir()
        for file in folder.iterdir():
            np.save(tmp_path / f"train/masks/{file.stem}.npy", RAMP % 2)
    config = labelled_config(kind, tmp_path, groups=groups)
    splits = (load_labelled(config, split, 16).names for split in ("train", "valid", "test"))
    parts = [{name.split("/")[-1][0] for name in names} for names in splits]
    crossing = parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert bool(crossing) == (groups == "image")


def test_a_corrupt_file_can_be_skipped(tmp_path, caplog):
    for k in range(4):
        make_dicom(tmp_path / f"{k}.dcm", RAMP + k)
    (tmp_path / "4.dcm").write_bytes((tmp_path / "0.dcm").read_bytes()[:-50])
    with pytest.raises(DataError, match=r"4\.dcm: cannot be read as DICOM"):
        load_dataset(data_config(tmp_path))
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(data_config(tmp_path, skip_corrupt=True))
    assert sum(map(len, dataset.splits.values())) == 4
    assert "4.dcm" in caplog.text


def test_prepare_warns_of_windows_that_differ(tmp_path):
    for k in range(4):
        make_dicom(tmp_path / f"{k}.dcm", RAMP + k, WindowCenter=2000 + 10 * (k % 2), WindowWidth=3000)
    report = prepare(data_config(tmp_path))
    assert "4 DICOM files bring 2 different windows" in "".join(report["warnings"])
    assert report["native_sizes"] == {"16x16": 4}
    assert not prepare(data_config(tmp_path, window=(2000.0, 3000.0)))["warnings"]


def test_the_distiller_reads_them_too(tmp_path):
    for k in range(3):
        make_dicom(tmp_path / f"IM{k}", RAMP + k)
    found = load_labelled(labelled_config("folder", tmp_path, valid_fraction=0.0), "train", 16, "bilinear")
    assert found.names == ("IM0", "IM1", "IM2")
    np.testing.assert_array_equal(found.images([1])[0, ..., 0], np.rint(unit(tmp_path / "IM1") * 255))


def test_without_pydicom_the_way_out_is_said(tmp_path, monkeypatch):
    file = make_dicom(tmp_path / "a.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r"pip install -e '\.\[medical\]'"):
        read_dicom(file)
