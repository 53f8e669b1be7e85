"""Recognises the format of named tensors and reads them."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from vit_distill.formats import (
    canonical,
    clip,
    google_npz,
    hugging_face_dinov3,
    hugging_face_reader,
    hugging_face_siglip,
    timm_reader,
)
from vit_distill.formats.checkpoint import Beside, Checkpoint, Reader

READERS = (
    timm_reader.READER,
    hugging_face_reader.READER,
    hugging_face_dinov3.READER,
    clip.READER,
    hugging_face_siglip.READER,  # after CLIP, which has its anchor too
    google_npz.READER,
)


def read_format(tensors: Mapping[str, np.ndarray], beside: Beside) -> tuple[Checkpoint, dict[str, str]]:
    """(checkpoint whose names are those of the file, names left out as no part of a ViT with the reason).

    A format is recognised by its anchor; what stands before it, such as "module." or "visual.", is a prefix of the
    whole model and comes off.

    Raises:
      ValueError: for an unknown format, several models in one file, or another kind of model.
    """
    reader, prefix = _recognise(tensors)
    inside: dict[str, str] = {}  # name after the prefix -> name in the file
    outside: list[str] = []
    ignored: dict[str, str] = {}
    for name in tensors:
        is_inside = name.startswith(prefix)
        short = name.removeprefix(prefix) if is_inside else name
        if refusal := _lookup(short, reader.unsupported):
            raise ValueError(f"tensor {name!r}: {refusal}")
        if reason := _lookup(short, reader.ignored if is_inside else reader.ignored_outside):
            ignored[name] = reason
        elif is_inside or canonical.matches(name, reader.outside):
            if short in inside:
                raise ValueError(
                    f"tensors {inside[short]!r} and {name!r} are the same layer: leave one out by allow_unused"
                )
            inside[short] = name
        else:
            outside.append(name)
    beside = dataclasses.replace(beside, left_out=tuple(ignored))
    found = reader.read({short: tensors[name] for short, name in inside.items()}, beside)

    def source_name(name: str) -> str:
        short = found.source_name(name)
        return inside.get(short, short if canonical.matches(short, reader.outside) else prefix + short)

    unused = (*(inside[name] for name in found.unused), *outside)
    return dataclasses.replace(found, source_name=source_name, unused=unused), ignored


def _recognise(tensors: Mapping[str, np.ndarray]) -> tuple[Reader, str]:
    for reader in READERS:
        # The longest anchor of a name: "class_embedding" also ends "embeddings.class_embedding".
        longest = {
            name: max((a for a in reader.anchors if name.endswith(a)), key=len, default=None) for name in tensors
        }
        prefixes = {name.removesuffix(anchor) for name, anchor in longest.items() if anchor}
        found = sorted(prefix for prefix in prefixes if not prefix or prefix[-1] in "./")
        if len(found) > 1:
            raise ValueError(f"expected one model, found prefixes {found}: leave out all but one by allow_unused")
        if found:
            return reader, found[0]
    anchors = ", ".join(anchor for reader in READERS for anchor in reader.anchors)
    raise ValueError(
        f"not a vision transformer of a known format: expected a tensor whose name ends in one of {anchors}; found "
        f"{canonical.shorten(sorted(tensors))}"
    )


def _lookup(name: str, table: Mapping[str, str]) -> str | None:
    return next((reason for pattern, reason in table.items() if canonical.matches(name, [pattern])), None)
