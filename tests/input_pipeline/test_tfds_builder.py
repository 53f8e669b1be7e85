"""`tfds.load("bmad/brain")` on a tiny tree, in a process of its own: TFDS and TensorFlow warn on import."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from trees import BRAIN, make_tree

CODE = """
import json, sys
import tensorflow_datasets as tfds
import input_pipeline.tfds_builder
manual, data_dir = sys.argv[1:]
config = tfds.download.DownloadConfig(manual_dir=manual)
splits = tfds.load("bmad/brain", data_dir=data_dir, download_and_prepare_kwargs={"download_config": config})
rows = {}
for split, dataset in splits.items():
    rows[split] = [
        {"name": r["name"].decode(), "group": r["group"].decode(), "label": int(r["label"]), "shape": r["image"].shape,
         "sum": int(r["image"].sum()), "mask": int(r["mask"].sum()), "mask_shape": r["mask"].shape}
        for r in dataset.as_numpy_iterator()
    ]
print(json.dumps({"rows": rows, "configs": sorted(input_pipeline.tfds_builder.Bmad.builder_configs)}))
"""


def test_tfds_load(tmp_path):
    # tensorflow-datasets 4.9.10 imports this without declaring it, and no builder of any kind prepares without it
    root = make_tree(tmp_path / "manual" / "Brain", BRAIN)
    command = [sys.executable, "-c", CODE, str(tmp_path / "manual"), str(tmp_path / "tfds")]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["configs"] == ["brain", "camelyon16", "liver", "oct2017", "resc", "rsna"]
    assert {split: len(rows) for split, rows in found["rows"].items()} == {"train": 10, "valid": 2, "test": 4}
    for row in (row for rows in found["rows"].values() for row in rows):
        assert row["sum"] == np.asarray(Image.open(root / row["name"])).sum()
        assert row["shape"] == row["mask_shape"] == [12, 12, 1]
        assert row["group"] == Path(row["name"]).stem.split("_")[0]
        assert row["label"] == ("Ungood" in row["name"])
        mask = root / row["name"].replace("/img/", "/anomaly_mask/")
        assert (
            row["mask"] == (np.asarray(Image.open(mask)) > 0).sum() * row["label"] if row["label"] else not row["mask"]
        )
