"""Batches whose order is a pure function of (seed, step).

Axis alphabet: B batch (in training of all hosts), N images of a split, H W C image, M mask side.
"""

from collections.abc import Iterator

import numpy as np

from input_pipeline.index import DataError
from input_pipeline.sources import LabelledSet
from input_pipeline.split import Split


def _host_slice(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"batch size {batch_size} cannot be shared by {process_count} hosts (this is {process_index}): expected a "
            f"positive multiple of the number of hosts"
        )
    local = batch_size // process_count
    return slice(process_index * local, (process_index + 1) * local)


def _train_rows(
    groups: np.ndarray, batch_size: int, seed: int, start_step: int, num_steps: int
) -> Iterator[np.ndarray]:
    """Rows int32 [B] of steps start_step .. num_steps - 1: of L groups, position p of the stream is in epoch p // L at
    p % L. An epoch has one image of each group [N]."""
    length, epochs = len(np.unique(groups)), {}
    for step in range(start_step, num_steps):
        positions = step * batch_size + np.arange(batch_size)
        needed = range(positions[0] // length, positions[-1] // length + 1)
        epochs = {e: epochs[e] if e in epochs else _epoch(groups, seed, e) for e in needed}
        yield np.asarray([epochs[p // length][p % length] for p in positions.tolist()], np.int32)


def _epoch(groups: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """One random image of each group, in random order: rows [L]."""
    rng = np.random.default_rng((seed, epoch))
    rows = rng.permutation(len(groups))
    _, first = np.unique(groups[rows], return_index=True)
    return rows if len(first) == len(rows) else rows[rng.permutation(first)]


def train_batches(
    split: Split | LabelledSet,
    batch_size: int,
    seed: int,
    start_step: int,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
    by_group: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Training batches of steps start_step .. num_steps - 1: shuffled epochs one after the other, nothing dropped.

    Step s is the same batch whatever `start_step`, so a resumed run continues the uninterrupted sequence.

    Args:
      split: N images; may be fewer than a batch, which then holds several epochs.
      batch_size: B, of all hosts together; each host gets its contiguous B / process_count rows.
      seed: non-negative; the order is a function of (seed, step) alone.
      start_step, num_steps: first step, and the step to stop before (the total, not a count from `start_step`).
      by_group: draws every group of `split` (a Split) equally often, one of its images each time: near-duplicates and
        patients of many images then weigh as much as one image.

    Yields:
      {image: uint8 [B_local, H, W, C], index: int32 [B_local], rows of the split}.
    """
    if len(split) == 0:
        raise DataError("the training split is empty: expected at least one normal image")
    part = _host_slice(batch_size, process_index, process_count)
    # Every image by itself, or numbers of the groups.
    groups = np.unique(split.groups, return_inverse=True)[1] if by_group else np.arange(len(split))

    def rows() -> Iterator[np.ndarray]:
        return (batch[part] for batch in _train_rows(groups, batch_size, seed, start_step, num_steps))

    for index, (image, _) in zip(rows(), split.pixels.batches(rows, with_masks=False), strict=True):
        yield {"image": image, "index": index}


def eval_batches(split: Split | LabelledSet, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Every image exactly once, in order, in equal batches.

    Yields:
      {image: uint8 [B, H, W, C], label: int32 [B], index: int32 [B], valid: bool [B]} and, if the split has masks,
      mask: uint8 {0, 1} [B, M, M, 1]. Rows that fill up the last batch repeat the last image and have valid False.
    """
    n = len(split)
    positions = [np.arange(start, start + batch_size) for start in range(0, n, batch_size)]
    indices = [np.minimum(p, n - 1).astype(np.int32) for p in positions]
    different = [np.unique(index) for index in indices]  # the last image is read once, not for every row it fills
    batches = split.pixels.batches(lambda: different, with_masks=split.has_masks)
    for position, index, rows, (image, mask) in zip(positions, indices, different, batches, strict=True):
        of_row = index - rows[0]
        batch = {"image": image[of_row], "label": split.labels[index], "index": index, "valid": position < n}
        yield batch | ({"mask": mask[of_row]} if split.has_masks else {})


def image_batches(split: Split | LabelledSet, batch_size: int = 256) -> Iterator[np.ndarray]:
    """Every image once, in order: uint8 [n, H, W, C] with n = `batch_size`, less in the last batch."""
    rows = [np.arange(start, min(start + batch_size, len(split))) for start in range(0, len(split), batch_size)]
    for image, _ in split.pixels.batches(lambda: rows, with_masks=False):
        yield image
