"""Maps of slices come back to the voxels that the slices were cut from."""

import dataclasses
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from input_pipeline.index import DataError
from input_pipeline.nifti import AXES, write_slices
from input_pipeline.nifti_maps import write_volumes
from mtl_moe import run

SHAPE = (10, 12, 14)  # X Y Z


@dataclasses.dataclass
class Volumes:
    """Two volumes of random grey, their slices, and the folder of maps, which are the slices themselves in 0..1."""

    root: Path
    grey: np.ndarray
    maps: Path


def make(folder: Path, axis: str = "axial", every: int = 1, axes: str = "RAS", tree: str = "") -> Volumes:
    grey = np.random.default_rng(0).uniform(1, 200, SHAPE).astype(np.float32)
    image = nibabel.Nifti1Image(grey, np.diag([2.0, 3.0, 4.0, 1.0]))
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    for name in ("a", "b"):
        path = folder / "volumes" / (tree.format(name) or f"{name}.nii.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(image.as_reoriented(turn), path)
    write_slices(str(folder / "volumes"), folder / "slices", axis, every, 0.0, ())
    for path in (folder / "slices").rglob("*.png"):
        target = folder / "maps" / path.relative_to(folder / "slices")
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target.with_suffix(".png.npy"), np.asarray(Image.open(path), np.float32) / 255)
    black, white = grey.min(), np.percentile(grey[grey > grey.min()], 99.5)
    return Volumes(folder / "volumes", np.clip((grey - black) / (white - black), 0, 1), folder / "maps")


def canonical(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nibabel.as_closest_canonical(nibabel.load(path))
    return image.get_fdata(), image.affine


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SRA"])
@pytest.mark.parametrize("axis", AXES)
def test_maps_lie_where_their_slices_were(tmp_path: Path, axis: str, axes: str) -> None:
    made = make(tmp_path, axis, axes=axes)
    assert write_volumes(str(made.root), made.maps, tmp_path / "out", axis, 1) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_anomaly.nii.gz", "b_anomaly.nii.gz"]
    found, affine = canonical(tmp_path / "out" / "a_anomaly.nii.gz")
    np.testing.assert_allclose(found, made.grey, atol=1 / 255)  # slices are rounded to 8 bits
    np.testing.assert_allclose(affine, canonical(made.root / "a.nii.gz")[1])


def test_maps_lie_voxel_by_voxel_as_the_file_does(tmp_path: Path) -> None:
    made = make(tmp_path)
    turn = nibabel.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], [[2, -1], [0, -1], [1, 1]])
    stored = nibabel.orientations.apply_orientation(np.round(made.grey * 1000).astype(np.int16), turn)
    tilt = np.array([[0, -0.2, 0.98], [-1, 0, 0], [0, 0.98, 0.2]]) * [4.0, 3.0, 2.0]  # oblique and left-handed
    affine = np.block([[tilt, np.array([[7], [8], [9]])], [np.zeros((1, 3)), 1]])
    image = nibabel.Nifti1Image(stored[..., None], affine)
    image.header.set_slope_inter(0.001, 5.0)
    image.header.set_xyzt_units("mm")
    image.header["cal_max"] = 1000
    image.set_sform(affine, "mni")
    volumes = tmp_path / "volumes_as_exported"
    volumes.mkdir()
    nibabel.save(image, volumes / "a.nii")
    write_slices(str(volumes), tmp_path / "again", "axial", 1, 0.0, ())
    maps = tmp_path / "maps_again"
    maps.mkdir()
    for path in (tmp_path / "again").rglob("*.png"):
        np.save(maps / f"{path.name}.npy", np.asarray(Image.open(path), np.float32) / 255)
    write_volumes(str(volumes), maps, tmp_path / "out", "axial", 1)
    found = nibabel.load(tmp_path / "out" / "a_anomaly.nii.gz")
    np.testing.assert_allclose(found.get_fdata(), stored / 1000, atol=1 / 100)
    np.testing.assert_array_equal(found.affine, nibabel.load(volumes / "a.nii").affine)
    assert found.header["sform_code"] == 4
    assert found.header.get_xyzt_units()[0] == "mm"
    assert found.header["cal_max"] == 0


def test_what_was_passed_over_runs_from_one_slice_to_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make(tmp_path, every=3)  # slices 0, 3, ..., 12 of 14
    assert write_volumes(str(made.root), made.maps, tmp_path / "whole", "axial", 3) == 2
    assert "without a map" not in caplog.text
    for path in made.maps.rglob("b_slice006*"):
        path.unlink()
    assert write_volumes(str(made.root), made.maps, tmp_path / "out", "axial", 3) == 2
    assert "1 of 2 volumes, b the first, have slices without a map between those that have one" in caplog.text
    found, _ = canonical(tmp_path / "out" / "b_anomaly.nii.gz")
    np.testing.assert_allclose(found[..., 3], made.grey[..., 3], atol=1 / 255)
    expected = (2 * made.grey[..., 0] + made.grey[..., 3]) / 3
    np.testing.assert_allclose(found[..., 1], expected, atol=1 / 255)
    assert not found[..., 4:9].any()  # between 3 and 9 one is missing: nothing is known
    assert not found[..., 13].any()


def test_maps_of_any_size_are_stretched_to_the_slice(tmp_path: Path) -> None:
    made = make(tmp_path)
    for path in made.maps.rglob("*.npy"):
        np.save(path, np.repeat([[0.0], [1.0]], 2, 1).astype(np.float32))  # the upper half, which is the front, is low
    write_volumes(str(made.root), made.maps, tmp_path / "out", "axial", 1)
    found, _ = canonical(tmp_path / "out" / "b_anomaly.nii.gz")
    assert found[:, 0].min() == 1
    assert found[:, -1].max() == 0


def test_volumes_called_alike_in_patients_folders(tmp_path: Path) -> None:
    made = make(tmp_path, tree="PAT{}/scan/v.nii.gz")
    write_volumes(str(made.root), made.maps, tmp_path / "out", "axial", 1)
    names = ["PATa+scan-v_anomaly.nii.gz", "PATb+scan-v_anomaly.nii.gz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_of_two_volumes_of_one_name_neither_gets_the_maps(tmp_path: Path) -> None:
    made = make(tmp_path, tree="train/good/{}.nii")
    (made.root / "test" / "good").mkdir(parents=True)
    (made.root / "train" / "good" / "b.nii").rename(made.root / "test" / "good" / "a.nii")
    with pytest.raises(DataError, match=r"test/good/a\.nii and .*train/good/a\.nii: two volumes of one name"):
        write_volumes(str(made.root), made.maps, tmp_path / "out", "axial", 1)
    assert write_volumes(str(made.root / "test"), made.maps, tmp_path / "out", "axial", 1) == 1


def test_volumes_without_maps_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make(tmp_path)
    for path in made.maps.rglob("a_*"):
        path.unlink()
    assert write_volumes(str(made.root), made.maps, tmp_path / "out", "axial", 1) == 1
    assert "1 of 2 volumes have no maps" in caplog.text


def test_what_does_not_fit_is_named_and_nothing_is_left(tmp_path: Path, tiny_config) -> None:
    made = make(tmp_path)

    def put(maps: Path = made.maps, axis: str = "axial", out: str = "out") -> None:
        write_volumes(str(made.root), maps, tmp_path / out, axis, 1)

    with pytest.raises(ValueError, match=r"expected axis among sagittal, .* and every .* found axis='z'"):
        put(axis="z")
    with pytest.raises(ValueError, match="slices exists: expected a new folder"):
        put(out="slices")
    with pytest.raises(DataError, match=r"no map of a slice .*save_maps=True"):
        put(maps=tmp_path / "slices")
    with pytest.raises(DataError, match=r"slice 13 of .*a\.nii\.gz, which has 10 sagittal ones"):
        put(axis="sagittal")
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "c_slice001.png.npy", np.zeros((2, 2), np.float32))
    with pytest.raises(DataError, match=r"none of its 2 volumes has maps in .*those of c: expected"):
        put(maps=tmp_path / "other")
    broken = next(made.maps.rglob("a_slice003*"))
    again = tmp_path / "maps" / "again" / broken.name
    again.parent.mkdir()
    again.write_bytes(broken.read_bytes())
    with pytest.raises(DataError, match="are maps of the same slice"):
        put()
    again.unlink()
    np.save(broken, np.zeros((2, 2), np.int32))
    with pytest.raises(DataError, match=r"a_slice003\.png\.npy: expected a map of floats .* found int32 \[2, 2\]"):
        put()
    broken.write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"a_slice003\.png\.npy: cannot be read as a map"):
        put()
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    config = tiny_config()
    config.data.root = str(made.root)
    with pytest.raises(ValueError, match=r"--mode=volumes: expected --config\.data\.root=VOLUMES, --input=PREDICTION"):
        run.volumes(config, "", str(tmp_path / "out"))


def test_the_command_finds_the_maps_of_a_prediction(tmp_path: Path, tiny_config, capsys) -> None:
    made = make(tmp_path)
    config = tiny_config()
    config.data.root = str(made.root)
    run.volumes(config, str(tmp_path), str(tmp_path / "out"))  # maps/ lies in it
    assert "2 volumes of maps in" in capsys.readouterr().out
