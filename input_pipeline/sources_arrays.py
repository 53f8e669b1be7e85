"""Sets that come as arrays: scikit-learn's bundled digits and .npz files of the MedMNIST layout.

Axis alphabet: N images, H W C image, F findings.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from input_pipeline.index import DataError
from input_pipeline.sources import LabelledSet, Sizes, set_of_arrays

NUM_TEST_DIGITS = 360  # the last ones: the file is ordered by writer, so these writers are not in train
EXPECTED_NPZ = (
    "Expected a .npz of the MedMNIST layout (https://medmnist.com): {train,val,test}_images uint8 [N, H, W] or "
    "[N, H, W, 3] and {train,val,test}_labels, integers [N] or [N, 1], or 0 and 1 [N, F]; val, test and a string "
    "array `classes` are optional"
)


def read_digits(sizes: Sizes) -> dict[str, LabelledSet]:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn brings along, enlarged; splits "train", "test"."""
    from sklearn.datasets import load_digits  # takes a second, and only this source needs it

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images, labels = np.repeat(images[..., None], 3, axis=-1), digits.target.astype(np.int32)
    layout, classes = "digits of scikit-learn", tuple(str(digit) for digit in range(10))
    parts = {"train": slice(0, -NUM_TEST_DIGITS), "test": slice(-NUM_TEST_DIGITS, None)}
    return {
        split: set_of_arrays("digits", layout, classes, images[part], labels[part], sizes, split)
        for split, part in parts.items()
    }


def read_npz(root: str, name: str, sizes: Sizes) -> dict[str, LabelledSet]:
    """The splits of a .npz file of the MedMNIST layout; DataError for a missing, damaged or differently made one."""
    path = Path(root)
    if not path.is_file():
        raise DataError(f"{root or 'data.root is empty'}: no such file. {EXPECTED_NPZ}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:  # .npy: no .files
        reason = error if zipfile.is_zipfile(path) else "no .npz file, or a part of one"  # numpy would speak of pickles
        raise DataError(f"{path}: cannot be read ({reason}). {EXPECTED_NPZ}") from error
    if "train_images" not in arrays:
        raise DataError(f"{path}: no train_images, found {', '.join(sorted(arrays)) or 'nothing'}. {EXPECTED_NPZ}")
    sets = {}
    for split, prefix in (("train", "train"), ("valid", "val"), ("test", "test")):
        if f"{prefix}_images" in arrays:
            sets[split] = _npz_split(arrays, prefix, path, name or path.stem, sizes)
    return sets


def _npz_split(arrays: dict[str, np.ndarray], prefix: str, path: Path, name: str, sizes: Sizes) -> LabelledSet:
    images, labels = arrays[f"{prefix}_images"], arrays.get(f"{prefix}_labels")
    if images.ndim == 3:  # grey: a view, since three copies of a large set would be held
        images = np.broadcast_to(images[..., None], (*images.shape, 3))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise DataError(f"{path}: {prefix}_images are {images.dtype} {images.shape}. {EXPECTED_NPZ}")
    if not len(images):
        raise DataError(f"{path}: {prefix}_images holds no image: fill it, or leave it out. {EXPECTED_NPZ}")
    labels = np.full(len(images), -1) if labels is None else labels
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if len(labels) != len(images) or labels.ndim > 2:
        raise DataError(f"{path}: {prefix}_labels are {labels.shape} for {len(images)} images. {EXPECTED_NPZ}")
    if labels.dtype.kind not in "biuf" or (labels.ndim == 1 and (labels != np.floor(labels)).any()):
        raise DataError(f"{path}: {prefix}_labels are {labels.dtype}, not whole numbers. {EXPECTED_NPZ}")
    train = arrays.get("train_labels", labels)
    number = labels.shape[1] if labels.ndim == 2 else int(max(train.max(), labels.max())) + 1
    classes = [str(word) for word in arrays.get("classes", range(number))]
    labels = labels.astype(np.float32 if labels.ndim == 2 else np.int32)
    return set_of_arrays(name, path.name, classes, images, labels, sizes, prefix)
