"""Which of many images stand for all of them where looking at each would cost too much."""

import numpy as np


def even_rows(total: int, most: int) -> np.ndarray:
    """At most `most` of `total` row numbers, evenly spaced from the first to the last, ascending, none twice."""
    return np.linspace(0, total - 1, min(total, most)).round().astype(int)
