"""Stands in for ml_collections where it is not installed: measurements then use the very defaults of configs/common.py.

A GPU machine may hold JAX and PyTorch and nothing can be installed there. Only what configs/common.py and the functions
that read its configs need is here; nothing is locked or type-checked.
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

# What such a machine lacks: a trial elsewhere hides them to be like it.
ABSENT = ("tensorflow", "tensorflow_datasets", "ml_collections", "clu", "grain")


class ConfigDict(dict):
    """A dict whose fields are attributes too; nested mappings become ConfigDicts, `update` goes into them."""

    def __init__(self, values: Mapping[str, Any] | None = None):
        super().__init__()
        for name, value in (values or {}).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(value, Mapping) and not isinstance(value, ConfigDict):
            value = ConfigDict(value)
        super().__setitem__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no field {name!r}, found {sorted(self)}") from None

    __setattr__ = __setitem__

    def update(self, values: Mapping[str, Any] | None = None, **more: Any) -> None:
        """As ml_collections': mappings are merged into fields that are mappings."""
        for name, value in {**(values or {}), **more}.items():
            if isinstance(value, Mapping) and isinstance(self.get(name), ConfigDict):
                self[name].update(value)
            else:
                self[name] = value


class _Without:
    """Finds modules as `finders` do, but none of ABSENT: to whoever asks, they are not installed."""

    def __init__(self, finders: Sequence[Any]):
        self._finders = tuple(finders)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in ABSENT:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self._finders)
        return next((spec for spec in specs if spec is not None), None)


def provide(hide: bool = False) -> None:
    """Makes `ml_collections` importable where it is absent.

    Args:
      hide: first makes this process as poor as a machine without ABSENT.
    """
    if hide:
        sys.meta_path[:] = [_Without(sys.meta_path)]
    if importlib.util.find_spec("ml_collections") is not None:
        return
    package, part = ModuleType("ml_collections"), ModuleType("ml_collections.config_dict")
    package.ConfigDict = part.ConfigDict = ConfigDict
    package.config_dict, part.placeholder = part, lambda kind: None
    sys.modules |= {package.__name__: package, part.__name__: part}
