"""Decodes many files in parallel and in order: by tf.data where TensorFlow is at hand, else by a thread pool.

Both call the same Pillow decoder (`decode.py`), so the bytes are the same. Importing TensorFlow takes seconds, more
than decoding a small set: "auto" uses it for long streams only.

Axis alphabet: H W C image, M mask side.
"""

import importlib.util
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

READERS = ("auto", "tf", "threads")
TF_MIN_IMAGES = 4096  # below, two threads decode 224 px images faster than TensorFlow imports (about 5 s)
TF_CHUNK = 16  # images decoded by one call

Decoded = tuple[np.ndarray, np.ndarray, str]  # image, mask, error message or ''; the same shapes for every row


def choose_reader(reader: str, num_images: int) -> str:
    """'tf' or 'threads' for a stream of `num_images`; ValueError for an unknown name."""
    if reader not in READERS:
        raise ValueError(f"unknown reader '{reader}': expected one of {', '.join(READERS)}")
    if reader != "auto":
        return reader
    return "tf" if num_images >= TF_MIN_IMAGES and importlib.util.find_spec("tensorflow") else "threads"


def decode_in_order(
    decode: Callable[[int], Decoded], rows: Callable[[], Iterable[int]], reader: str
) -> Iterator[Decoded]:
    """`decode(row)` of every row in order, computed ahead in parallel.

    Args:
      decode: row -> (image uint8, mask uint8, error message), of the same shapes for every row; reports a bad file
        through the message, never by raising.
      rows: makes the sequence of rows, which is consumed ahead of what was yielded and may be endless.
      reader: 'tf' or 'threads', from `choose_reader`.
    """
    return _by_tf_data(decode, rows) if reader == "tf" else _by_threads(decode, rows)


def _num_cpus() -> int:
    """CPUs that this process may use, which in a container or a batch job are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _by_threads(decode: Callable[[int], Decoded], rows: Callable[[], Iterable[int]]) -> Iterator[Decoded]:
    workers = _num_cpus()
    pool = ThreadPoolExecutor(workers)  # Pillow decodes and resizes outside the GIL
    pending = deque()
    try:
        for row in rows():
            pending.append(pool.submit(decode, row))
            if len(pending) >= 16 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also when the consumer stops early
        pool.shutdown(cancel_futures=True)


def _by_tf_data(decode: Callable[[int], Decoded], rows: Callable[[], Iterable[int]]) -> Iterator[Decoded]:
    first = "tensorflow" not in sys.modules
    import tensorflow as tf

    if first:
        tf.config.set_visible_devices([], "GPU")  # the accelerator's memory belongs to JAX

    def call(chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        images, masks, errors = zip(*(decode(int(row)) for row in chunk), strict=True)
        return np.stack(images), np.stack(masks), np.asarray([error.encode() for error in errors])

    # Measured on 2 cores: calls of one image under AUTOTUNE read 400 images/s (threads fight for the GIL), one call
    # per core 1,250, and chunks besides 1,800, about as many as the thread pool.
    dataset = tf.data.Dataset.from_generator(lambda: iter(rows()), output_signature=tf.TensorSpec((), tf.int64))
    dataset = dataset.batch(TF_CHUNK).map(
        lambda chunk: tf.numpy_function(call, [chunk], [tf.uint8, tf.uint8, tf.string]),
        num_parallel_calls=_num_cpus(),
        deterministic=True,
    )
    for images, masks, errors in dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
        for image, mask, error in zip(images, masks, errors, strict=True):
            yield image, mask, error.decode()
