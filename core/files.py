"""JSON written beside and renamed, so that a failure leaves an earlier file whole."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_json(path: Path, content: Any) -> None:
    """Strict JSON: infinite and undefined numbers become null."""
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(_strict(content), indent=2, allow_nan=False) + "\n")
    temporary.replace(path)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
