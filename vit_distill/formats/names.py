"""Names of one format against canonical ones, by templates that are read in both directions."""

import re
from collections.abc import Mapping

import numpy as np


class Names:
    """A two-way table of names.

    Args:
      table: canonical template -> the format's template. "{i}" stands for a block's index; what follows a template
        (".weight", ".bias") is kept.
    """

    def __init__(self, table: Mapping[str, str]):
        self._to_source = [(_regex(ours), _replacement(theirs)) for ours, theirs in table.items()]
        self._to_canonical = [(_regex(theirs), _replacement(ours)) for ours, theirs in table.items()]

    def canonical(self, name: str) -> str | None:
        """The canonical name of one of the format's, None if it has none."""
        return _translate(name, self._to_canonical)

    def source(self, name: str) -> str:
        """The format's name of a canonical one; the name itself if it has none."""
        return _translate(name, self._to_source) or name

    def translate(self, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """(tensors by canonical name, names that have none)."""
        found = {name: self.canonical(name) for name in tensors}
        state = {ours: tensors[name] for name, ours in found.items() if ours is not None}
        return state, tuple(name for name, ours in found.items() if ours is None)


def _regex(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(re.escape("{i}"), r"(?P<i>\d+)") + r"(?P<rest>\.weight|\.bias|)")


def _replacement(template: str) -> str:
    return template.replace("{i}", r"\g<i>") + r"\g<rest>"


def _translate(name: str, rules: list[tuple[re.Pattern, str]]) -> str | None:
    for regex, replacement in rules:
        if match := regex.fullmatch(name):
            return match.expand(replacement)
    return None
