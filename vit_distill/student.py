"""A distilled student as data: what probing, export and reports take."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from core.vit import VitConfig
from vit_distill.preprocessing import Preprocessing

METHODS = ("lora", "full", "scratch", "copy")


@dataclasses.dataclass(frozen=True)
class Student:
    """See the module's docstring.

    Attributes:
      config: architecture; its depth is len(blocks).
      params: merged float32 parameters of core.vit.VisionTransformer.
      preprocessing: the teacher's.
      blocks: which teacher blocks were copied, from 0.
      method: one of METHODS.
      base: parameters before the adapters (params itself without adapters).
      adapters: tree of vit_distill.lora, None without.
      facts: plain JSON for reports and model cards: teacher (name, sha256, licence, format, depth), rank, targets,
        few-shot manifest hash, seed, metrics.
      lora: vit_distill.lora.LoraConfig of the adapters, None without: exporting adapters alone needs it.
    """

    config: VitConfig
    params: Any
    preprocessing: Preprocessing
    blocks: tuple[int, ...]
    method: str
    base: Any
    adapters: Any
    facts: Mapping[str, Any]
    lora: Any = None
