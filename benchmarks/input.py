"""Input: files to device batches against a torch DataLoader and plain Pillow threads, and what training waits for it.

  python -m benchmarks.input [--root=FOLDER_OF_IMAGES] [--rounds=5] [--quick]

First table: images/s from image files (default: 256 synthetic photographs, JPEG of 500 x 375, each under eight names:
the readers are for long streams, and tf.data takes a third of a second to start) to uint8 batches on the device,
decoded and stretched to 224 px, grey and RGB. All sides decode with Pillow, their bytes are compared before anything is
timed, and they take turns in alternating order. "memory" starts from a decoded .npz in memory.
Second table: the detector's training loop (tiny preset) with batches from one repeated array, from memory and from the
files: time in `next(batches)` as a share of the wall time, an upper bound of the waiting (dispatched work may go on
meanwhile), and the time of an update beside that with the repeated array. --quick: little of everything, no record.
Axes: B batch, H W C image.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks.record import write_record
from configs.mtl_moe import folder as recipe
from core.loop import train_loop
from core.mesh import make_mesh, shard_batch
from core.optim import build_optimizer
from input_pipeline.batches import eval_batches, train_batches
from input_pipeline.cache import load_npz, save_npz
from input_pipeline.dataset import load_dataset
from mtl_moe.system import build_system
from mtl_moe.train import make_update_fn

SIZE, BATCH = 224, 32
WARM_UP = 3  # updates before the clock starts: compilation, filling of read-ahead queues
WORKERS = 2
NUM_PHOTOS, NAMES = 256, 8


def write_photos(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """Writes JPEG files that compress about like photographs: coloured noise of several scales."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng, total = np.random.default_rng(i), np.zeros((size[1], size[0], 3), np.float32)
        for cells in (4, 16, 64, 256):
            layer = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            total += np.asarray(layer.resize(size, Image.Resampling.BILINEAR), np.float32) * 2.0 / cells**0.5
        total = 255 * (total - total.min()) / (total.max() - total.min())
        Image.fromarray(total.astype(np.uint8)).save(folder / f"{i:04d}.jpg", quality=90)


def link_again(folder: Path, names: int) -> None:
    """Every file of the folder under `names` names."""
    for path in sorted(folder.iterdir()):
        for i in range(1, names):
            path.with_stem(f"{path.stem}_{i}").hardlink_to(path)


def decode(path: Path, channels: int) -> np.ndarray:
    """What any reader written by hand does: uint8 [SIZE, SIZE, C]."""
    with Image.open(path) as file:
        picture = file.convert("L" if channels == 1 else "RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.array(picture).reshape(SIZE, SIZE, channels)  # a copy: torch wants writable arrays


class Photos:
    """A map-style data set of torch: image i of the files. Of this module, so that spawned workers find it."""

    def __init__(self, paths: list[Path], channels: int):
        self.paths, self.channels = paths, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> np.ndarray:
        return decode(self.paths[row], self.channels)


def data_config(root: Path, channels: int, size: int, memory: bool) -> Any:
    """`config.data` of a flat folder, held in memory or streamed."""
    data = recipe.get_config().data
    data.update(root=str(root), channels=channels, image_size=size, mask_size=size, calibration_fraction=0.0)
    data.memory_limit_gb = 8.0 if memory else 0.0
    return data


def build_sides(root: Path, cache: Path, channels: int) -> dict[str, Callable[[], Iterator[np.ndarray]]]:
    """Functions that read all images once, in order of their names, as uint8 batches [B, SIZE, SIZE, C]."""
    from torch.utils.data import DataLoader

    def ours(split: Any) -> Callable[[], Iterator[np.ndarray]]:
        return lambda: (batch["image"][batch["valid"]] for batch in eval_batches(split, BATCH))

    splits = {
        reader: load_dataset(data_config(root, channels, SIZE, memory=False), reader=reader).splits["train"]
        for reader in ("tf", "threads")
    }
    paths = [example.image for example in splits["tf"].pixels.examples]
    # Spawned: a fork of a process with JAX's and TensorFlow's threads may hang.
    loader = DataLoader(
        Photos(paths, channels), BATCH, num_workers=WORKERS, persistent_workers=True, multiprocessing_context="spawn"
    )

    def pillow() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(WORKERS) as pool:
            images = pool.map(lambda path: decode(path, channels), paths)
            while batch := list(itertools.islice(images, BATCH)):
                yield np.stack(batch)

    save_npz(load_dataset(data_config(root, channels, SIZE, memory=True)), cache)
    return {
        "ours, tf.data": ours(splits["tf"]),
        "ours, threads": ours(splits["threads"]),
        "ours, memory": ours(load_npz(cache).splits["train"]),
        "torch DataLoader": lambda: (batch.numpy() for batch in loader),
        "Pillow threads": pillow,
    }


def measure_reading(root: Path, channels: int, rounds: int) -> list[dict]:
    """Images/s of every side: median, lowest and highest of the rounds."""
    mesh = make_mesh(devices=jax.devices()[:1])
    with tempfile.TemporaryDirectory() as folder:
        sides = build_sides(root, Path(folder) / "cache.npz", channels)
        images = {name: np.concatenate(list(side())) for name, side in sides.items()}  # starts workers as well
        expected = images["Pillow threads"]
        for name, found in images.items():
            np.testing.assert_array_equal(found, expected, err_msg=name)
        del images
        rates = {name: [] for name in sides}
        for turn in range(rounds):
            for name in list(sides)[:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                for batch in sides[name]():
                    jax.block_until_ready(shard_batch({"image": batch}, mesh))
                rates[name].append(len(expected) / (time.perf_counter() - start))
    rows = []
    for name, values in rates.items():
        row = {"what": "files to device batches", "side": name, "images": len(expected), "channels": channels}
        row |= {"images_per_second": round(statistics.median(values), 1), "lowest": round(min(values), 1)}
        rows.append(row | {"highest": round(max(values), 1), "rounds": rounds})
        print(rows[-1], flush=True)
    return rows


class Waiting:
    """Iterates over batches and adds up the time spent in `next`, from the draw after the first `skip`."""

    def __init__(self, batches: Iterator[dict], skip: int):
        self._batches, self._left, self.seconds, self.since = iter(batches), skip, 0.0, 0.0

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        start = time.perf_counter()
        if self._left == 0:
            self.since = start
        self._left -= 1
        batch = next(self._batches)
        if self._left < 0:
            self.seconds += time.perf_counter() - start
        return batch


def measure_training(root: Path, steps: int, changes: dict[str, Any]) -> list[dict]:
    """The detector's loop with three sources of batches; `changes`: fields of the config."""
    config = recipe.get_config()
    config.update_from_flattened_dict(changes)
    config.train.num_steps = WARM_UP + steps
    system, tx = build_system(config), build_optimizer(config.optim, config.train.num_steps)
    step_fn = make_update_fn(system, tx)
    size, batch_size, total = config.data.image_size, config.train.batch_size, config.train.num_steps
    memory, files = (load_dataset(data_config(root, 1, size, memory=kept)) for kept in (True, False))
    batches = lambda data: train_batches(data.splits["train"], batch_size, 0, 0, total)  # noqa: E731
    sources = {
        "one array again and again": lambda: itertools.repeat(next(batches(memory))),
        "memory": lambda: batches(memory),
        "files": lambda: batches(files),
    }
    rows = []
    for name, source in sources.items():
        waiting = Waiting(({"image": batch["image"]} for batch in source()), WARM_UP)
        state = train_loop(
            system.init_state(tx, memory), step_fn, waiting, key=jax.random.key(0), num_steps=total, mesh=system.mesh,
            logger=None, checkpointer=None, log_every=config.train.log_every, save_every=total,
            images_per_step=batch_size,
        )  # fmt: skip
        jax.block_until_ready(state)
        seconds = time.perf_counter() - waiting.since
        row = {"what": "training", "source": name, "updates": steps, "batch": batch_size, "image_size": size}
        row |= {"ms_per_update": round(1e3 * seconds / steps, 1), "wait_share": round(waiting.seconds / seconds, 4)}
        rows.append(row)
        print(row, flush=True)
    return rows


QUICK_MODEL = {"model.width": 32, "model.num_heads": 2, "model.mlp_dim": 64, "model.expert_dim": 16}


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="flat folder of images; default: synthetic photographs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = args.root or Path(folder) / "photos"
        if args.root is None:
            write_photos(root, 2 * BATCH if args.quick else NUM_PHOTOS)
            link_again(root, 2 if args.quick else NAMES)
        rows = []
        for channels in (1,) if args.quick else (1, 3):
            rows += measure_reading(root, channels, rounds=1 if args.quick else args.rounds)
        rows += measure_training(root, 3 if args.quick else args.steps, QUICK_MODEL if args.quick else {})
    if not args.quick:
        command = ["python -m benchmarks.input", *(a for a in sys.argv[1:] if not a.startswith("--root"))]
        command += ["--root=IMAGES"] if args.root else []
        write_record("input_cpu", " ".join(command), rows, ("jax", "tensorflow-cpu", "torch", "pillow", "numpy"))


if __name__ == "__main__":
    main()
