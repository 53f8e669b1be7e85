"""What a format is and what its reader gives."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit_distill.formats.canonical import State


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a format's reader found.

    Attributes:
      format: for example "timm".
      state: canonical state; names that are no part of a ViT stay in it and are reported as unused.
      source_name: canonical name -> name(s) in the file, also for tensors that are missing.
      unused: names in the file that could not be translated.
      settings: fields of VitConfig that the file's config or the family gives.
      preprocessing: fields of Preprocessing likewise.
      facts: plain JSON about the origin: architecture, licence, name, class_names (a name for each class of the head).
      position_resize: variant of vit_distill.positions that the model's own code uses.
      notes: assumptions for the report.
      trained_activation: the activation that the weights were trained with, where the file names another model's; "".
    """

    format: str
    state: State
    source_name: Callable[[str], str] = lambda name: name
    unused: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    position_resize: str = "timm"
    notes: tuple[str, ...] = ()
    trained_activation: str = ""


@dataclasses.dataclass(frozen=True)
class Beside:
    """What lies beside the tensors that a reader is given, and tells where they come from.

    Attributes:
      config, preprocessor: config.json and preprocessor_config.json, None where absent.
      wrapper: key under which a torch file holds the weights, "" where it is nothing but them.
      left_out: names in the file that are no part of a ViT.
    """

    config: Mapping[str, Any] | None = None
    preprocessor: Mapping[str, Any] | None = None
    wrapper: str = ""
    left_out: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Reader:
    """A format: how to recognise it, what of it is no part of a ViT, how to read it.

    Attributes:
      anchors: a name that every file of the format has, one a dialect; what stands before it is a prefix of all names.
      read: (tensors without prefix, what lies beside) -> Checkpoint.
      outside: patterns of names that belong to the model though they lack the prefix.
      ignored, ignored_outside: patterns to leave out, with the reason: of the names that have the prefix (it is taken
        off; where it is empty, all names have it) and of those that lack it.
      unsupported: patterns that show another kind of model, with what to do.
    """

    anchors: tuple[str, ...]
    read: Callable[[State, Beside], Checkpoint]
    outside: tuple[str, ...] = ()
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored_outside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unsupported: Mapping[str, str] = dataclasses.field(default_factory=dict)
