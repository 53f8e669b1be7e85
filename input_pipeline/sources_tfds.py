"""Classification sets of TensorFlow Datasets by name: cifar100, eurosat/rgb, resisc45, imagenet2012, ...

Read by random access (array_record files): the first run reads all records for their labels, which are kept beside
them, and a few-shot subset of a large set then costs what it holds.

Axis alphabet: N images, H W C image.
"""

import contextlib
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from input_pipeline.index import DataError
from input_pipeline.sources import LabelledSet, Sizes, set_of_arrays

_SPLITS = {"train": "train", "validation": "valid", "test": "test"}
EXPECTED = (
    "Expected data.name to be a TFDS set with `image` and `label` (cifar100, eurosat/rgb, resisc45, imagenet2012, "
    "imagenet2012_subset/1pct or 10pct) and data.root its data_dir (empty: ~/tensorflow_datasets). resisc45 and "
    "imagenet2012 are downloaded by hand into DATA_DIR/downloads/manual, see "
    "https://www.tensorflow.org/datasets/catalog/overview"
)


@dataclass
class _Images(Sequence):
    """The images of a TFDS data source of encoded images, each decoded to uint8 [H, W, 3] when asked for."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.source[row]["image"])).convert("RGB"))


def read_tfds(root: str, name: str, sizes: Sizes) -> dict[str, LabelledSet]:
    """The labelled splits among train, validation ("valid") and test; downloads and prepares the set the first time.

    Raises:
      DataError: an unknown name, no network or no manual download, a set prepared in a format without random access,
        or one without `image` and `label`.
    """
    import tensorflow_datasets as tfds  # takes seconds, and only this source needs it

    try:
        builder = tfds.builder(name, data_dir=root or None)
        if not builder.is_prepared():
            builder.download_and_prepare(file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:  # its own text names hundreds of sets
        raise DataError(f"TFDS has no set '{name}', nor has {root or 'the default data_dir'}. {EXPECTED}") from error
    except (AssertionError, ValueError, OSError) as error:  # it asserts the folder of manual downloads
        raise DataError(f"TFDS '{name}' cannot be had: {error}. {EXPECTED}") from error
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise DataError(f"TFDS '{name}' has features {', '.join(features)}. {EXPECTED}")
    if "array_record" not in str(builder.info.file_format.value):
        raise DataError(
            f"TFDS '{name}' is prepared as {builder.info.file_format.value} in {builder.data_dir}, which has no random "
            f"access: prepare it with `tfds build {name} --file_format=array_record` (--data_dir for another data.root)"
        )
    label = features["label"]
    sets, classes = {}, [str(word) for word in label.names or range(label.num_classes)]
    for split in (s for s in _SPLITS if s in builder.info.splits):
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        labels, layout = _labels(source, Path(builder.data_dir) / f"labels_{split}.npy"), f"TFDS {name} {split}"
        if not len(labels) or labels.min() < 0:
            continue  # the test split of ImageNet
        sets[_SPLITS[split]] = set_of_arrays(name, layout, classes, _Images(source), labels, sizes, split)
    if not sets:
        raise DataError(f"TFDS '{name}' has splits {', '.join(builder.info.splits)}, none with labels. {EXPECTED}")
    return sets


def _labels(source: Sequence, path: Path) -> np.ndarray:
    """int32 [N]: the label of every record, from `path` where an earlier run has kept them."""
    if path.exists():
        try:
            labels = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: cannot be read ({error}); delete it, the labels are read again then") from error
        if len(labels) == len(source):
            return labels
    labels = np.asarray([int(row["label"]) for row in source], np.int32)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, labels)
        temporary.replace(path)
    except OSError as error:  # a folder that others share, for example
        logging.warning("%s: cannot be kept (%s): every run reads the whole set for its labels", path, error)
    finally:
        with contextlib.suppress(OSError):  # on a read-only disk it is refused even though there is nothing to remove
            temporary.unlink(missing_ok=True)
    return labels
