"""Which of many images stand for all of them where looking at each would cost too much."""

import numpy as np


def even_rows(total: int, most: int) -> np.ndarray:
    """int64 [min(total, most)]: rows of `total`, evenly spaced from the first to the last, ascending, none twice.

    Sets are sorted by folder or class: their first rows would be of one.
    """
    return np.linspace(0, total - 1, min(total, most)).round().astype(np.int64)
