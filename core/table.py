"""Tables of results, as both systems write them: numbers over seeds, and Markdown."""

import statistics
from collections.abc import Sequence


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean (None of nothing) and the sample deviation (None of fewer than two values)."""
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
