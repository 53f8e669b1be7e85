"""The commands "probe" and "segment" end to end on tiny sets and a tiny random model.

Axes: N images, H W C image.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs.vit_distill import probe as probe_config
from configs.vit_distill import segment as segment_config
from vit_distill import probe_command
from vit_distill.probe_command import run_probe
from vit_distill.segment_command import run_segment


def tiny(config: ConfigDict) -> ConfigDict:
    """A random two-block model on 16 pixels, for the config's command."""
    config.teacher.checkpoint = "random:vit_tiny_patch16_224"
    config.teacher.overrides = ConfigDict(
        dict(depth=2, width=16, num_heads=2, mlp_dim=32, image_size=16, patch_size=8, num_classes=0, crop_fraction=0.8)
    )
    config.data.update(name="toy", valid_fraction=0.25)
    return config


@pytest.fixture
def probe_toy(tmp_path: Path) -> ConfigDict:
    """Probe of dark against bright images, 32 + 16 + 24."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, num in (("train", 32), ("val", 16), ("test", 24)):
        labels = np.arange(num) % 2
        arrays[f"{split}_images"] = (rng.integers(0, 100, (num, 20, 20)) + 120 * labels[:, None, None]).astype(np.uint8)
        arrays[f"{split}_labels"] = labels
    np.savez(tmp_path / "toy.npz", classes=np.array(["dark", "bright"]), **arrays)
    config = tiny(probe_config.get_config())
    config.data.update(kind="npz", root=str(tmp_path / "toy.npz"))
    config.probe.update(
        num_seeds=2, feature_batch_size=16, epochs=30, warmup_epochs=2, batch_size=16, learning_rates=(3.0, 30.0)
    )
    return config


def test_probe_writes_a_report(probe_toy: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    workdir = tmp_path / "probe"
    run_probe(probe_toy, workdir)
    printed = capsys.readouterr().out
    report = json.loads((workdir / "report.json").read_text())
    for kind in ("linear", "logistic", "knn"):
        assert report["metrics"][f"test/toy/probe/{kind}/top1"] > 0.85
        assert report["metrics"][f"valid/toy/probe/{kind}/top1"] > 0.85
        assert report["metrics"][f"test/toy/probe/{kind}/auc"] == 1.0
        assert report["metrics"][f"test/toy/probe/{kind}/majority_share"] == 0.5
        assert f"{kind}: " in printed
    assert "test/toy/probe/linear/top1_std" in report["metrics"]
    assert not {"test/toy/probe/linear/learning_rate", "test/toy/probe/linear/all_tied"} & set(report["metrics"])
    assert report["probes"]["logistic"]["all_tied"] == 1.0  # every value tells dark from bright
    assert re.search(r"logistic: c \S+ chosen on valid.*; all of its grid do equally well there", printed)
    assert report["probes"]["linear"]["learning_rate"] in (3.0, 30.0)
    assert {split: data["num_images"] for split, data in report["data"].items()} == dict(train=32, valid=16, test=24)
    assert report["model"]["teacher"]["sha256"]
    assert report["provenance"]["seed"] == 0
    assert report["config"]["probe"]["num_seeds"] == 2
    # A second run reads the features from disk and says the same.
    monkeypatch.setattr(probe_command, "make_feature_fn", lambda *args, **kwargs: pytest.fail)
    assert run_probe(probe_toy, workdir)["metrics"] == report["metrics"]


def test_probe_refuses_what_it_cannot_do(probe_toy: ConfigDict, tmp_path: Path):
    def refused(message: str, workdir: Path = tmp_path / "probe", **changes: Any) -> None:
        config = probe_toy.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        with pytest.raises(ValueError, match=message):
            run_probe(config, workdir)
        assert not (tmp_path / "probe" / "report.json").exists()

    refused(r"either --config.student.workdir.*or --config.teacher", **{"student.workdir": "somewhere"})
    refused(r"either --config.student.workdir", **{"teacher.checkpoint": ""})
    student = {"teacher.checkpoint": "", "student.workdir": "somewhere"}
    refused(r"teacher\.overrides\.crop_fraction: a student is read as it was distilled", **student)
    refused(r"kinds among .*'svm'", **{"probe.kinds": ("svm",)})
    refused(r"num_seeds of at least 1, found .* 0", **{"probe.num_seeds": 0})
    refused(r"max_iter.*-1", **{"probe.max_iterations": -1, "probe.kinds": ("logistic",)})
    refused(r"feature.*float16", **{"probe.feature_dtype": "float16"})
    student = tmp_path / "student"
    student.mkdir()
    (student / "student.json").write_text("{}")
    refused(f"holds a distilled student.*{student}/probe", workdir=student)


def test_a_report_is_not_overwritten_by_another_config(probe_toy: ConfigDict, tmp_path: Path):
    probe_toy.probe.update(kinds=("knn",), cache=False)
    run_probe(probe_toy, tmp_path / "probe")
    assert not (tmp_path / "probe" / "features").exists()
    probe_toy.probe.neighbours = (3,)
    assert run_probe(probe_toy, tmp_path / "probe")["probes"]["knn"]["neighbours"] == 3  # a grid may change
    probe_toy.data.valid_fraction = 0.3
    with pytest.raises(ValueError, match=r"data.valid_fraction: there 0.25, now 0.3"):
        run_probe(probe_toy, tmp_path / "probe")


def write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def segment_toy(tmp_path: Path) -> ConfigDict:
    """Heads on images whose abnormal half of 20 x 16 pixels is bright; the masks are 16 x 16 after the crop."""
    rng = np.random.default_rng(0)
    for i in range(40):
        image, mask = rng.integers(0, 60, (20, 16), np.uint8), np.zeros((20, 16), np.uint8)
        if i % 2:
            image[10:] += 150
            mask[10:] = 255
            write(tmp_path / "toy" / "test" / "Ungood" / "anomaly_mask" / f"{i:03d}.png", mask)
        write(tmp_path / "toy" / "test" / ("Ungood" if i % 2 else "good") / "img" / f"{i:03d}.png", image)
    config = tiny(segment_config.get_config())
    config.data.update(kind="bmad", root=str(tmp_path / "toy"))
    config.segment.update(num_seeds=2, feature_batch_size=16, num_steps=60, warmup_steps=5, learning_rates=(3e-2,))
    return config


def test_segment_writes_a_report(segment_toy: ConfigDict, tmp_path: Path):
    run_segment(segment_toy, tmp_path / "segment")
    report = json.loads((tmp_path / "segment" / "report.json").read_text())
    for head in ("linear", "mlp"):
        assert report["metrics"][f"test/toy/segment/{head}/miou"] > 0.8
        assert report["metrics"][f"test/toy/segment/{head}/iou/abnormal"] > 0.7
        assert f"test/toy/segment/{head}/miou_std" in report["metrics"]
        assert report["probes"][head]["learning_rate"] == 3e-2


def test_segment_names_what_is_missing(segment_toy: ConfigDict, probe_toy: ConfigDict, tmp_path: Path):
    workdir = tmp_path / "segment"
    segment_toy.segment.heads = ("unet",)
    with pytest.raises(ValueError, match=r"heads among .*'unet'"):
        run_segment(segment_toy, workdir)
    segment_toy.segment.heads = ("linear",)
    segment_toy.data.memory_limit_gb = 1e-6
    with pytest.raises(ValueError, match=r"patch tokens, images and masks take .* GiB, data.memory_limit_gb"):
        run_segment(segment_toy, workdir)
    segment_toy.data = probe_toy.data
    with pytest.raises(ValueError, match="toy has no masks in train, valid, test"):
        run_segment(segment_toy, workdir)
    assert not workdir.exists()
