"""Which normals calibrate when a folder is no longer what a detector learned from."""

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline.dataset import Dataset, load_dataset
from mtl_moe.training_data import FILE, bind_training_data, calibration_normals, other_training_data, pixel_hashes


@pytest.fixture
def config(tiny_config, tmp_path) -> ConfigDict:
    """A folder of forty images, three of each patient and one of the last."""
    root, rng = tmp_path / "scans", np.random.default_rng(0)
    root.mkdir()
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(root / f"p{i // 3:02d}_{i:02d}.png")
    config = tiny_config()
    config.data.update(kind="folder", name="scans", root=str(root))
    return config


def groups_of(dataset: Dataset, name: str) -> set[str]:
    return set(dataset.splits[name].groups)


@pytest.mark.parametrize("limit", [8.0, 0.0], ids=["in memory", "on disk"])
def test_after_a_change_the_patients_held_out_before_calibrate(config, tmp_path, limit, caplog):
    config.data.memory_limit_gb = limit
    workdir, root = tmp_path / "w", Path(config.data.root)
    before = load_dataset(config.data)
    bind_training_data(before, workdir)
    assert calibration_normals(before, workdir) == (before.splits["calibration"], True)
    held_out = before.splits["calibration"].names

    (root / "p12_38.png").unlink()
    for name, value in (("p00_90.png", 1), ("p77_91.png", 2)):  # one more of a patient of before, and a new one
        Image.fromarray(np.full((32, 32), value, np.uint8)).save(root / name)
    after = load_dataset(config.data)
    assert other_training_data(after, workdir) == "40 images of scans"
    assert groups_of(after, "calibration") & groups_of(before, "train"), "the same draw: nothing to find out"
    normals, known = calibration_normals(after, workdir)
    assert known
    wanted = {*held_out, "p77_91.png"} | ({"p00_90.png"} if "p00_00.png" in held_out else set())
    assert normals.names == sorted(wanted - {"p12_38.png"})
    images = dict(zip(before.splits["calibration"].names, pixel_hashes(before.splits["calibration"]), strict=True))
    found = dict(zip(normals.names, pixel_hashes(normals), strict=True))
    assert all(found[name] == key for name, key in images.items() if name in found)
    assert "were trained on" in caplog.text

    facts = json.loads((workdir / FILE).read_text())
    del facts["images"]  # a work directory of before they were written down
    (workdir / FILE).write_text(json.dumps(facts))
    assert calibration_normals(after, workdir) == (after.splits["calibration"], False)
    (workdir / FILE).unlink()
    assert calibration_normals(after, workdir) == (after.splits["calibration"], False)


def test_another_set_calibrates_on_its_own_held_out_normals(config, tmp_path):
    bind_training_data(load_dataset(config.data), tmp_path / "w")
    rng = np.random.default_rng(1)  # the same names, other pictures
    for path in Path(config.data.root).iterdir():
        Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(path)
    elsewhere = load_dataset(config.data)
    assert calibration_normals(elsewhere, tmp_path / "w") == (elsewhere.splits["calibration"], True)
