"""Tiny image trees for the tests of the input pipeline (H W C image)."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image


def write(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def picture(seed: int, size: int = 12) -> np.ndarray:
    """Grey uint8 [size, size] noise, another one for every seed."""
    return np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)


def make_tree(root: Path, folders: dict[str, list[str]]) -> Path:
    """Writes files by folder; folders with a mask word hold 0/255 masks, all others noise. Returns `root`."""
    seed = 0
    for folder, names in folders.items():
        is_mask = any(word in folder.lower() for word in ("mask", "label", "ground_truth"))
        for name in names:
            seed += 1
            values = picture(seed)
            write(root / folder / name, (values > 200).astype(np.uint8) * 255 if is_mask else values)
    return root


TRAIN = [f"{patient:05d}_{z}.png" for patient in range(5) for z in (60, 70)]
BRAIN = {
    "train/good/img": TRAIN,
    "valid/good/img": ["00025_99.png"],
    "valid/Ungood/img": ["00124_60.png"],
    "valid/Ungood/anomaly_mask": ["00124_60.png"],
    "test/good/img": ["00000_96.png", "00100_97.png"],
    "test/Ungood/img": ["00002_60.png", "00200_68.png"],
    "test/Ungood/anomaly_mask": ["00002_60.png", "00200_68.png"],
}


def data_config(root: Path | str = "", **changes: object) -> ConfigDict:
    """A `config.data` for tiny trees."""
    values = {
        "kind": "folder",
        "name": "",
        "root": str(root),
        "image_size": 8,
        "mask_size": 8,
        "channels": 1,
        "window": (),
        "calibration_fraction": 0.2,
        "groups": "auto",
        "seed": 0,
        "skip_corrupt": False,
        "memory_limit_gb": 1.0,
        "cache": "",
        "phantom": {"num_train": 12, "num_valid": 4, "num_test": 6, "seed": 0},
    }
    return ConfigDict(values | changes)


def equal_batches(found: Iterable[dict], expected: Iterable[dict]) -> None:
    """Asserts equal batches: number, keys, dtypes, values."""
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
