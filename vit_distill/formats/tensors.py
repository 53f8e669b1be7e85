"""Named arrays from and to weight files. Nothing is unpickled: torch files are read with `weights_only=True` only."""

import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from core.files import replacing
from vit_distill.formats.canonical import shorten

_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# Where torch files keep the weights: DeiT and MAE, lightning-like trainers, DINO's averaged network.
_WRAPPERS = ("model", "state_dict", "teacher")
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")
INDEX = ".safetensors.index.json"  # how the index of weights in several files ends, as Hugging Face writes it


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """What a weight file holds.

    Attributes:
      path: the file, or the index of several.
      tensors: by name; floats of any width as float32, integers as they are.
      sha256: of the file's bytes; of several files: of their digests, one after the other in the order of their names.
      wrapper: key of a torch file that the tensors were under, "" if none.
      notes: decisions taken while reading, for the load report.
    """

    path: Path
    tensors: Mapping[str, np.ndarray]
    sha256: str
    wrapper: str = ""
    notes: tuple[str, ...] = ()


def read_tensors(path: Path) -> TensorFile:
    """Reads a .safetensors, .npz, .pth, .pt or .bin file, or all files of a .safetensors.index.json.

    Raises:
      ValueError: for another suffix, a broken or missing file, pickled objects, a tensor with NaN or infinity, or a
        torch file where torch is not installed.
    """
    is_index = path.name.endswith(INDEX)
    if path.suffix not in SUFFIXES and not is_index:
        expected = (*SUFFIXES, INDEX)
        raise ValueError(f"{path}: expected a weight file ending in one of {expected}, found {path.suffix or 'no'!r}")
    wrapper, notes, files = "", (), [path]
    if is_index:
        tensors, files = _read_indexed(path)
    elif path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    elif path.suffix == ".npz":
        tensors = _read_npz(path)
    else:
        tensors, wrapper, notes = _read_torch(path)
    if not tensors:
        raise ValueError(f"{path}: expected tensors, found none")
    tensors = {name: _as_float32(array) for name, array in tensors.items()}
    for name, array in tensors.items():
        if array.dtype == np.float32 and not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            raise ValueError(
                f"{path}: tensor {name!r} has {count} values that are NaN or infinite: the file is damaged"
            )
    digests = [file_sha256(file) for file in files]
    sha256 = hashlib.sha256("".join(digests).encode()).hexdigest() if is_index else digests[0]
    return TensorFile(path, tensors, sha256, wrapper, notes)


def file_sha256(path: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_float32(array: np.ndarray) -> np.ndarray:
    is_float = np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16
    return array.astype(np.float32, copy=False) if is_float else array


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        # Not safetensors.numpy: it cannot read bfloat16 (0.8.0).
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); download or write it again") from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} is {entry['dtype']}: expected one of {', '.join(_SAFETENSORS_DTYPES)}"
            )
        flat = np.frombuffer(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def _read_indexed(path: Path) -> tuple[dict[str, np.ndarray], list[Path]]:
    """(tensors of all files that an index names, the files)."""
    file_of = (read_config_json(path) or {}).get("weight_map")
    if not isinstance(file_of, Mapping) or not all(isinstance(file, str) for file in file_of.values()):
        raise ValueError(f"{path}: expected 'weight_map', the file of every tensor: download or write it again")
    names = sorted(set(file_of.values()))
    # An index may come from anywhere: it reads files beside it and no others.
    if odd := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ValueError(f"{path}: expected names of .safetensors files beside it, found {shorten(odd)}")
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise ValueError(
            f"{path}: {len(missing)} of its {len(names)} files are missing: {shorten(missing)}; put them beside it, or "
            'save the model in one file: save_pretrained(FOLDER, max_shard_size="100GB")'
        )
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        found = _read_safetensors(path.parent / name)
        expected = {tensor for tensor, file in file_of.items() if file == name}
        if other := sorted(expected ^ set(found)):
            raise ValueError(
                f"{path.parent / name}: holds other tensors than {path.name} says: {shorten(other)} are in one of them "
                "alone; download or write both again"
            )
        tensors |= found
    return tensors, [path.parent / name for name in names]


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a whole .npz file; download or write it again")
    tensors: dict[str, np.ndarray] = {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for name in archive.files:
                array = archive[name]
                # numpy has no bfloat16: big_vision's files hold its bytes as void.
                tensors[name] = array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a whole .npz file ({error}); download or write it again") from error
    except ValueError as error:
        raise ValueError(
            f"{path}: holds pickled Python objects or broken arrays, which are never loaded: {error}"
        ) from error
    return tensors


def _read_torch(path: Path) -> tuple[dict[str, np.ndarray], str, tuple[str, ...]]:
    """(tensors, wrapper, notes) of a torch file."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a torch pickle and torch is not installed. Convert it to .safetensors where torch is, or "
            "install the extra: pip install 'mtl-moe-vit-distill[torch]'"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises unpickling, zip, end-of-file and runtime errors here
        raise ValueError(
            f"{path}: torch cannot read it with weights_only=True: it is damaged, or holds Python objects besides "
            f"tensors, which are never run. Save its state_dict alone, best as .safetensors. torch says: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(content).__name__}; save model.state_dict()")
    wrapper, notes = "", ()
    for key in _WRAPPERS:
        if isinstance(content.get(key), Mapping):
            wrapper, others = key, sorted(str(other) for other in content if other != key)
            notes = (f"weights taken from {key!r} of the torch file" + (f", not {others}" if others else ""),)
            content = content[key]
            break
    tensors: dict[str, np.ndarray] = {}
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {name!r}: expected a tensor, found {type(value).__name__}")
        tensors[str(name)] = _torch_to_numpy(value)
    return tensors, wrapper, notes


def _torch_to_numpy(value: Any) -> np.ndarray:
    value = value.detach()
    return (value.float() if value.is_floating_point() else value).contiguous().numpy()


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Safetensors with the metadata that torch's readers ask for, written beside and renamed; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with replacing(path) as temporary:
        save_file(arrays, temporary, metadata={"format": "pt"})


def read_config_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no such file.

    Raises:
      ValueError: for a file that is not a JSON object.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
