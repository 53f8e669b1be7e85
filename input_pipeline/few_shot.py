"""Few-shot subsets: a ratio or a number per class, nested, equal on every machine, kept as a manifest.

Axis alphabet: N images of the whole set, n of the subset.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.classification import corrupt_rows, name_order
from input_pipeline.index import DataError
from input_pipeline.sources import LabelledSet

FORMAT = "mtl_moe_vit_distill few-shot manifest"
VERSION = 1


def select_few_shot(
    found: LabelledSet, ratio: float = 1.0, per_class: int = 0, seed: int = 0, skip_corrupt: bool = False
) -> np.ndarray:
    """Rows of a subset: of each class the first images of an order that depends on names and seed alone.

    Subsets of one seed nest: a smaller ratio or number gives a part of a larger one's rows. Of each class at least one
    image is taken. Images without labels are one class; in multi-label sets every finding is a class, and so is having
    none, and an image is taken when any of them takes it.

    Args:
      ratio: share of each class, in (0, 1]; int(n * ratio) of its n images, as in the reference.
      per_class: images of each class (all, where a class has fewer); 0: by ratio. Not both.
      seed: of the order.
      skip_corrupt: decodes what is drawn; for a file that cannot be, the next of its class is taken.

    Returns:
      int64 [n], ascending.

    Raises:
      ValueError: a ratio or number out of range, or both given.
      DataError: no image can be decoded.
    """
    if not 0 < ratio <= 1 or per_class < 0 or (per_class and ratio != 1):
        raise ValueError(
            f"few_shot: expected a ratio in (0, 1], or per_class above 0 with ratio 1, found ratio={ratio} and "
            f"per_class={per_class}"
        )
    order = name_order(found.names, seed)
    if found.multi_label:
        positive = found.labels > 0
        members = [*positive.T, ~positive.any(axis=1)]
    else:
        members = [found.labels == label for label in np.unique(found.labels)]
    classes = [order[member[order]] for member in members]
    sizes = [per_class or max(1, int(len(of_class) * ratio)) for of_class in classes]
    good, unknown = np.ones(len(found), bool), np.full(len(found), skip_corrupt)
    while True:
        parts = [of_class[good[of_class]][:size] for of_class, size in zip(classes, sizes, strict=True)]
        rows = np.unique(np.concatenate(parts))
        if len(rows) == 0:
            raise DataError(
                f"{found.name}: none of its {len(found)} images can be decoded; check data.root and the files"
            )
        drawn = rows[unknown[rows]]
        if len(drawn) == 0:
            return rows
        good[corrupt_rows(found, drawn)] = unknown[drawn] = False


def write_manifest(path: str | Path, found: LabelledSet, rows: np.ndarray, **selection: Any) -> dict[str, Any]:
    """Writes which images a subset holds, beside and renamed, and returns what was written.

    Args:
      found: the whole set that `rows` (int [n]) select from.
      selection: how they were chosen, as plain JSON and for the record: ratio, per_class, seed, source and so on.
    """
    path, subset = Path(path), found.take(rows)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "dataset": found.name,
        "source_hash": found.manifest_hash(),
        "hash": subset.manifest_hash(),
        "selection": selection,
        "num_images": len(subset),
        "names": list(subset.names),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return manifest


def read_manifest(path: str | Path, found: LabelledSet) -> np.ndarray:
    """Rows (int64 [n], ascending) of the images that a manifest names, in a set that may hold others besides.

    Raises:
      DataError: no such file, not a manifest, names that the set does not have, or labels that have changed.
    """
    path = Path(path)
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a manifest written by `write_manifest`") from error
    except ValueError as error:
        raise DataError(f"{path}: not a manifest ({error}); expected JSON written by `write_manifest`") from error
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise DataError(f"{path}: not a manifest; expected JSON with format '{FORMAT}' and version {VERSION}")
    row_of = {name: row for row, name in enumerate(found.names)}
    if missing := [name for name in manifest["names"] if name not in row_of]:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(
            f"{path}: {len(missing)} of its {len(manifest['names'])} images are not in the set {found.name} of "
            f"{len(found)} images: {shown}; use the data it was made of ({manifest['dataset']}) or select anew"
        )
    rows = np.asarray(sorted(row_of[name] for name in manifest["names"]), np.int64)
    if found.take(rows).manifest_hash() != manifest["hash"]:
        raise DataError(f"{path}: the labels or class names of {found.name} have changed since; select anew")
    return rows
