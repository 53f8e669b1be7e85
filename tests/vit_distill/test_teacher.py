"""Loading of teachers: strictness, overrides, bad input."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core import tree
from core.vit import VisionTransformer
from vit_distill.formats import canonical, reading
from vit_distill.formats.timm import to_timm, write_timm_folder
from vit_distill.teacher import Teacher, load_teacher

SMALL = {"depth": 3, "width": 32, "num_heads": 2, "mlp_dim": 48, "image_size": 32, "patch_size": 8, "num_classes": 5}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("random:vit_tiny_patch16_224", overrides=SMALL)


@pytest.fixture(scope="module")
def state(teacher: Teacher) -> dict[str, np.ndarray]:
    return to_timm(teacher.config, teacher.params)


def write(folder: Path, state: dict[str, Any]) -> str:
    save_file(state, folder / "weights.safetensors")
    return str(folder / "weights.safetensors")


def load(path: str, **options: Any) -> Teacher:
    overrides = {"num_heads": 2, **HALF, **options.pop("overrides", {})}
    return load_teacher(path, overrides=overrides, **options)


def test_folder_round_trip(teacher: Teacher, tmp_path: Path) -> None:
    facts = {"name": "mine", "licence": "cc-by-nc-4.0"}
    write_timm_folder(tmp_path, teacher.config, teacher.params, teacher.preprocessing, facts)
    again = load_teacher(str(tmp_path))
    assert (again.config, again.preprocessing) == (teacher.config, teacher.preprocessing)
    assert tree.fingerprint(again.params) == tree.fingerprint(teacher.params)
    assert (again.name, again.source["licence"], again.source["file"]) == ("mine", "cc-by-nc-4.0", "model.safetensors")
    assert again.report.missing == again.report.unused == again.report.reshaped == ()
    assert len(again.report.matched) == 4 + 12 * 3 + 2 + 2
    json.dumps(dict(again.source))


def test_the_documents_format_reads_what_it_describes(teacher: Teacher, tmp_path: Path, monkeypatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text().partition("## A teacher format")[2]
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    state = canonical.from_params(teacher.config, teacher.params)
    state["pos_embed"] = state["pos_embed"][0]
    state = {f"module.{names['NAMES'].source(name)}": array for name, array in state.items()}
    assert "module.layer2.to_q.weight" in state
    path = write(tmp_path, state)
    with pytest.raises(ValueError, match=r"not a vision transformer of a known format"):
        load_teacher(path)
    monkeypatch.setattr(reading, "READERS", (*reading.READERS, names["READER"]))
    found = load_teacher(path)
    assert (found.config, found.report.format) == (teacher.config, "mine")
    assert tree.fingerprint(found.params) == tree.fingerprint(teacher.params)
    with pytest.raises(ValueError, match=r"1 of \d+ tensors are missing: 'module.layer1.to_k.bias'"):
        load_teacher(write(tmp_path, {name: a for name, a in state.items() if name != "module.layer1.to_k.bias"}))


def test_random_is_seeded_and_named(teacher: Teacher) -> None:
    again = load_teacher("random:vit_tiny_patch16_224", overrides=SMALL)
    assert tree.fingerprint(again.params) == tree.fingerprint(teacher.params) == again.source["sha256"]
    with pytest.raises(ValueError, match="resnet50"):
        load_teacher("random:resnet50")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_become_float32(state: dict, tmp_path: Path, dtype: Any) -> None:
    path = write(tmp_path, {name: array.astype(dtype) for name, array in state.items()})
    loaded = load(path)
    kernel = loaded.params["block_01"]["mlp"]["fc1"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, state["blocks.1.mlp.fc1.weight"].T.astype(dtype).astype(np.float32))


def test_overrides_resize_positions(state: dict, tmp_path: Path) -> None:
    path = write(tmp_path, state)
    loaded = load(path, overrides={"image_size": 48, "crop_fraction": 0.9, "interpolation": "bilinear"})
    assert loaded.config.image_size == loaded.preprocessing.image_size == 48
    assert loaded.params["pos_embedding"].shape == (1, 37, 32)
    assert loaded.report.reshaped == ("pos_embed [1, 17, 32] -> [1, 37, 32] (timm)",)
    np.testing.assert_array_equal(loaded.params["pos_embedding"][:, 0], state["pos_embed"][:, 0])
    other = load(path, overrides={"image_size": 48, "position_resize": "dinov2"})
    assert np.abs(other.params["pos_embedding"] - loaded.params["pos_embedding"]).max() > 1e-4
    images = np.zeros((1, 48, 48, 3), np.float32)
    out = jax.eval_shape(VisionTransformer(loaded.config).apply, {"params": loaded.params}, images)
    assert out.logits.shape == (1, 5)


def test_missing_and_unused_are_refused_unless_named(state: dict, tmp_path: Path) -> None:
    changed = {name: array for name, array in state.items() if name != "blocks.1.norm2.bias"}
    path = write(tmp_path, {**changed, "gate.weight": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"weights\.safetensors.*gate\.weight"):
        load(path)
    with pytest.raises(ValueError, match=r"blocks\.1\.norm2\.bias"):
        load(path, allow_unused=["gate.*"])
    loaded = load(path, allow_unused=["gate.*"], allow_missing=["blocks.1.norm2.bias"])
    assert loaded.report.missing == ("blocks.1.norm2.bias",)
    assert loaded.report.unused == ("gate.weight (allowed)",)
    assert "blocks.1.norm2.bias" in str(loaded.report)
    np.testing.assert_array_equal(loaded.params["block_01"]["norm2"]["bias"], np.zeros(32))


def test_left_out_head_gives_a_headless_model(state: dict, tmp_path: Path) -> None:
    loaded = load(write(tmp_path, state), allow_unused=["head.*"])
    assert loaded.config.num_classes == 0
    assert "head" not in loaded.params


def bad_states(state: dict) -> dict[str, tuple[dict, str]]:
    one_indexed = {n.replace("blocks.2.", "blocks.3."): a for n, a in state.items()}
    nan = state["blocks.0.mlp.fc1.weight"].copy()
    nan[3, 4] = np.nan
    return {
        "gap": (one_indexed, r"indices 0\.\.2 without a gap, found \[0, 1, 3\]"),
        "nan": ({**state, "blocks.0.mlp.fc1.weight": nan}, "'blocks.0.mlp.fc1.weight' has 1 values that are NaN"),
        "shape": ({**state, "blocks.1.attn.proj.weight": np.ones((32, 31), np.float32)}, r"expected shape \[32, 32\]"),
        "distilled": ({**state, "dist_token": state["cls_token"]}, "distilled DeiT"),
        "grid": ({**state, "pos_embed": np.ones((1, 12, 32), np.float32)}, "square grid"),
        "family": ({"layer1.0.conv1.weight": np.ones((3, 3), np.float32)}, "known format"),
        "two": ({f"{p}.{n}": a for p in ("student", "teacher") for n, a in state.items()}, "expected one model"),
    }


@pytest.mark.parametrize("case", ["gap", "nan", "shape", "distilled", "grid", "family", "two"])
def test_bad_tensors(state: dict, tmp_path: Path, case: str) -> None:
    content, message = bad_states(state)[case]
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, content))


def test_bad_files(state: dict, tmp_path: Path) -> None:
    whole = Path(write(tmp_path, state))
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights\.safetensors: not a whole safetensors"):
        load(str(whole))
    np.savez(tmp_path / "objects.npz", weights=np.asarray([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"objects\.npz: holds pickled"):
        load(str(tmp_path / "objects.npz"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "objects.npz").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cut\.npz"):
        load(str(tmp_path / "cut.npz"))
    with pytest.raises(ValueError, match="no such file"):
        load(str(tmp_path / "absent.safetensors"))
    with pytest.raises(ValueError, match="single weight file"):
        load(str(tmp_path))
    (tmp_path / "weights.txt").write_text("")
    with pytest.raises(ValueError, match="ending in"):
        load(str(tmp_path / "weights.txt"))


def write_shards(folder: Path, state: dict[str, Any], weight_map: dict[str, str] | None = None) -> Path:
    """Two files and their index, as save_pretrained writes them; gives the index."""
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [dict(list(state.items())[i::2]) for i in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    file_of = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": file_of | (weight_map or {})}))
    return index


def test_weights_in_several_files(teacher: Teacher, state: dict, tmp_path: Path) -> None:
    index = write_shards(tmp_path, state)
    loaded, named = load(str(tmp_path)), load(str(index))
    assert tree.fingerprint(loaded.params) == tree.fingerprint(teacher.params)
    assert loaded.source == named.source
    assert (loaded.name, loaded.source["file"]) == (tmp_path.name, index.name)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    save_file({name: array + np.float32(1) for name, array in load_file(shard).items()}, shard)
    assert load(str(tmp_path)).source["sha256"] != loaded.source["sha256"]
    shard.rename(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"index\.json: 1 of its 2 files are missing: 'model-00002.*max_shard_size"):
        load(str(tmp_path))
    index.unlink()
    with pytest.raises(ValueError, match=r"expected model\.safetensors, model\.safetensors\.index\.json or a single"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"norm.bias": "../model-00001-of-00002.safetensors"}, r"beside it, found '\.\./model"),
        ({"norm.bias": "/weights.safetensors"}, "beside it, found '/weights"),
        ({"norm.bias": "weights.pth"}, r"beside it, found 'weights\.pth'"),
        ({"norm.bias": 3}, "expected 'weight_map'"),
        ({"gate": "model-00001-of-00002.safetensors"}, "00001.*: holds other tensors than .* says: 'gate'"),
    ],
)
def test_bad_indices(state: dict, tmp_path: Path, weight_map: dict[str, Any], message: str) -> None:
    write_shards(tmp_path, state, weight_map)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path))


def test_unknown_heads_and_statistics_are_asked_for(state: dict, tmp_path: Path) -> None:
    path = write(tmp_path, state)
    with pytest.raises(ValueError, match="num_heads: no config"):
        load_teacher(path, overrides=HALF)
    with pytest.raises(ValueError, match="mean and std: no config"):
        load_teacher(path, overrides={"num_heads": 2})
    with pytest.raises(ValueError, match="found heads"):
        load_teacher(path, overrides={"heads": 2})
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        load(path)
