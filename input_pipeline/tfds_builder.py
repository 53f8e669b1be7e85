"""TFDS builder `bmad`: importing this module registers it for `tfds.load("bmad/brain", ...)`.

    import input_pipeline.tfds_builder
    config = tfds.download.DownloadConfig(manual_dir="folder of the BMAD sets")
    tfds.load("bmad/brain", data_dir=..., download_and_prepare_kwargs={"download_config": config})

Axis alphabet: H W C image at its native size.
"""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from input_pipeline.bmad import BMAD, index_bmad
from input_pipeline.decode import check_mask_size, read_native, read_native_mask
from input_pipeline.index import Example


class Bmad(tfds.core.GeneratorBasedBuilder):
    """Six medical anomaly sets, normal images only in train (arXiv 2306.11876)."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  # TFDS reads a plain list
        tfds.core.BuilderConfig(name=name, description=f"BMAD {name}") for name in BMAD
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "manual_dir must hold the set's folder (train/, valid/, test/), or be it; any layout of docs/data.md is read. "
        "The sets are linked from https://github.com/DorisBao/BMAD."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        facts = BMAD[self.builder_config.name]
        features = {
            "image": tfds.features.Image(shape=(None, None, facts.channels), dtype=np.uint8, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["normal", "abnormal"]),
            "name": tfds.features.Text(),
            "group": tfds.features.Text(),
        }
        if facts.has_masks:  # elsewhere an all-zero mask would claim that abnormal images have no lesion
            features["mask"] = tfds.features.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format="png")
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            description="BMAD: Benchmarks for Medical Anomaly Detection.",
            homepage="https://github.com/DorisBao/BMAD",
            citation="Bao et al., BMAD: Benchmarks for Medical Anomaly Detection, arXiv 2306.11876",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        # No calibration split: it depends on a seed and is drawn by whoever trains (`index.calibration_rows`).
        index = index_bmad(self.builder_config.name, dl_manager.manual_dir, calibration_fraction=0, require_train=False)
        return {split: self._generate_examples(examples) for split, examples in index.splits.items()}

    def _generate_examples(self, examples: tuple[Example, ...]) -> Iterator[tuple[str, dict]]:
        facts = BMAD[self.builder_config.name]
        for example in examples:
            image = read_native(example.image, facts.channels)
            row = {"image": image, "label": example.label, "name": example.name, "group": example.group}
            if facts.has_masks:
                row["mask"] = np.zeros((*image.shape[:2], 1), np.uint8)
                if example.mask:
                    check_mask_size(example)
                    row["mask"] = read_native_mask(example.mask)
            yield example.name, row
