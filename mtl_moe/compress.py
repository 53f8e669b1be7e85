"""A smaller detector from a trained one: distils its encoder into a shallower one and makes that a work directory.

The output is an ordinary work directory with one thing more, compress.json: what it was made from and what that cost,
shown in every report of it. Only training normals are used, without labels; held-out (calibration) normals tell how far
the tokens are from the full detector's and, in the evaluation that follows, calibrate the scores anew. Run the same
command again to resume. See `mtl_moe.shrink` for what is kept and what trains.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from core.checkpoint import Checkpointer
from core.files import write_json
from core.logs import MetricLogger
from core.loop import train_loop
from core.mesh import check_batch_size, shard_batch, shardings
from core.optim import build_optimizer
from core.sampling import even_rows
from core.state import TrainState, init_state
from core.step import make_train_step_fn
from core.tree import fingerprint, num_params
from core.workdir import check_config, save_config
from input_pipeline.batches import train_batches
from input_pipeline.dataset import Dataset
from mtl_moe.cost import score_macs
from mtl_moe.free_fields import DETECTOR
from mtl_moe.infer import Scorer, Trained, restore
from mtl_moe.model import build_geometry
from mtl_moe.provenance import COMPRESS_FILE, compressed_from
from mtl_moe.shrink import (
    copy_blocks,
    init_updates,
    kept_blocks,
    make_distill_loss_fn,
    make_error_fn,
    updated,
    weights_of,
)
from mtl_moe.system import System
from mtl_moe.tiling import num_tiles
from mtl_moe.training_data import FILE, bind_training_data, other_training_data

# Fields in which the output may differ from an earlier run of the same command: none changes the distillation.
FREE_FIELDS = (*DETECTOR, "score.", "compress.save_every")
TIMING_ROUNDS = 7  # batches scored by each detector, in turn; the median counts
MAX_HELD_OUT = 256  # normals on which tokens are compared


def small_config(config: Any, reduction: int | None = None) -> Any:
    """The config of the smaller detector; `reduction` None: as in config.compress.

    Raises:
      ValueError: for a reduction that this detector does not allow.
    """
    small = config.copy_and_resolve_references()
    if reduction is not None:
        small.compress.reduction = reduction
    kept = kept_blocks(config.model, small.compress.reduction)
    small.model.update(num_dense_layers=len(kept["block"]), num_moe_layers=len(kept["expert"]))
    return small


def compress(full: System, small: System, dataset: Dataset, workdir: Path, output: Path) -> dict[str, Any]:
    """Distils the detector of `workdir` and leaves a work directory in `output` that lacks nothing but its evaluation.

    Args:
      full, small: built from the config of `workdir` and from its `small_config`.

    Returns:
      The content of compress.json.

    Raises:
      ValueError: if `output` is a work directory of another run, or was made from another detector or config, or if
        the full detector learned from other images: it may have been trained on the normals held out of these.
    """
    config = small.config
    if other := other_training_data(dataset, workdir):
        raise ValueError(
            f"{workdir} holds a detector that learned from other images ({other}) than these of {dataset.name}, which "
            "may hold out what it was trained on: compress it with the very images that it learned from"
        )
    check_batch_size(config.train.batch_size, config.train.accumulation, small.mesh)
    trained = restore(full, workdir)
    weights = weights_of(trained.params, trained.extra)
    kept = kept_blocks(full.model.config, config.compress.reduction)
    base = copy_blocks(weights, kept)
    options, optim = config.compress, config.optim.copy_and_resolve_references()
    optim.update(kind=options.kind, learning_rate=options.learning_rate)
    tx = build_optimizer(optim, options.num_steps)  # what it refuses ends here, before anything is written
    jax.eval_shape(_init_fn(base, config.compress.rank), jax.random.key(0))  # a rank too high ends here
    facts = {
        "source_sha256": fingerprint(jax.device_get(weights)),
        "source_step": trained.step,
        "blocks": {"trunk": list(kept["block"]), "expert": list(kept["expert"])},
        **config.compress.to_dict(),
    }
    found = _earlier(output, facts, config)
    if "ms_per_image" in found:
        return found
    facts |= {"source": workdir.absolute().name} | _source_metrics(workdir, trained.step)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / COMPRESS_FILE, facts)
    if (workdir / FILE).exists():  # else nothing is known of what the full detector learned from, and nothing claimed
        bind_training_data(dataset, output)
    save_config(config, output)

    distilled = updated(base, _distil(full, small, tx, trained, base, dataset, output))
    extra = _extra(trained.extra, distilled)
    _save_detector(small, distilled["params"], extra, trained.step, output)
    facts |= _measure(full, small, trained, base["params"], Trained(distilled["params"], extra, trained.step), dataset)
    write_json(output / COMPRESS_FILE, facts)
    return facts


def _earlier(output: Path, facts: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The content of an earlier compress.json of `output`, empty where there is none; writes nothing."""
    found = compressed_from(output)
    if not found:
        if (output / "config.json").exists() or (output / "checkpoints").exists():
            raise ValueError(f"{output} is the work directory of another run: choose another --output")
        return {}
    compared = {name: value for name, value in facts.items() if f"compress.{name}" not in FREE_FIELDS}
    different = [name for name, value in compared.items() if found.get(name) != json.loads(json.dumps(value))]
    if different:
        lines = [f"  {name}: there {found.get(name)}, now {facts[name]}" for name in different]
        raise ValueError(
            f"{output} was compressed from another detector or with other settings; use another --output, or the same:"
            "\n" + "\n".join(lines)
        )
    check_config(config, output, FREE_FIELDS)
    return found


def _source_metrics(workdir: Path, step: int) -> dict[str, Any]:
    """Fused metrics of the full detector, where its report is of this checkpoint."""
    path = workdir / "report.json"
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    if "metrics" not in report or report["provenance"].get("checkpoint_step") != step:
        return {}
    fused = {name: value for name, value in report["metrics"].items() if name.count("/") == 2}
    return {"source_metrics": fused, "source_git_revision": report["provenance"]["git_revision"]}


def _distil(
    full: System,
    small: System,
    tx: optax.GradientTransformation,
    trained: Trained,
    base: Any,
    dataset: Dataset,
    output: Path,
) -> Any:
    """Trains the updates from the newest checkpoint of `output`/distillation, if there is one."""
    config, options = small.config, small.config.compress
    state = init_state(_init_fn(base, options.rank), jax.random.key(config.seed), tx, small.mesh)
    # The average is the last state: the cosine schedule ends at 0.
    loss_fn = make_distill_loss_fn(full, small)
    step_fn = make_train_step_fn(loss_fn, tx, ema_decay=0.0, accumulation=config.train.accumulation)
    frozen = ({"params": trained.params, "extra": trained.extra}, base)
    with Checkpointer(output / "distillation", keep=1) as checkpointer:
        state = checkpointer.resume(state)
        start = int(state.step)
        split, size = dataset.splits["train"], config.train.batch_size
        by_group = config.train.sampling == "groups"
        batches = train_batches(split, size, config.seed, start, options.num_steps, by_group=by_group)
        with MetricLogger(output, start, config.train.tensorboard) as logger:
            state = train_loop(
                state,
                lambda state, batch, key: step_fn(state, batch, key, *frozen),
                ({"image": batch["image"]} for batch in batches),
                key=jax.random.key(config.seed + 1),
                num_steps=options.num_steps,
                mesh=small.mesh,
                logger=logger,
                checkpointer=checkpointer,
                log_every=config.train.log_every,
                save_every=options.save_every,
                images_per_step=size,
            )
    return state.params


def _init_fn(base: Any, rank: int) -> Callable[[jax.Array], tuple[Any, Any]]:
    """Function key -> (updates, extra) for `core.state.init_state`."""
    return lambda key: (init_updates(key, base, rank), {})


def _extra(extra: Mapping[str, Any], distilled: Mapping[str, Any]) -> dict[str, Any]:
    """The full detector's state beside its parameters, the frozen encoder of pseudo-labels made shallower."""
    if "teacher" not in distilled:
        return dict(extra)
    return dict(extra) | {"teacher": dict(extra["teacher"]) | {"trunk": distilled["teacher"]}}


def _save_detector(small: System, params: Any, extra: Any, step: int, output: Path) -> None:
    """A checkpoint as training writes it, of the full detector's step: it can be evaluated, and trained on."""
    tx = build_optimizer(small.config.optim, small.config.train.num_steps)
    # The schedule counts in the optimizer's state: trained on, it goes on where the full detector's stood.
    optimizer = optax.tree.set(tx.init(params), count=jnp.asarray(step, jnp.int32))
    state = TrainState(jnp.asarray(step, jnp.int32), params, params, optimizer, extra)
    with Checkpointer(output) as checkpointer:
        if checkpointer.latest_step() is None:
            checkpointer.save(jax.device_put(state, shardings(state, small.mesh)))


def _measure(
    full: System, small: System, trained: Trained, copied: Any, distilled: Trained, dataset: Dataset
) -> dict[str, Any]:
    """Size, multiply-adds and speed of both detectors; token errors of the copied and of the distilled parameters."""
    geometry = build_geometry(full.config)
    tiles = num_tiles(full.config.data.image_size, geometry.image_size)
    macs = [score_macs(s.model.config, s.tasks, geometry, tiles) for s in (full, small)]
    held_out = dataset.splits["calibration"]
    images = held_out.images(even_rows(len(held_out), MAX_HELD_OUT))
    scorers = (Scorer(full, trained), Scorer(small, distilled))
    errors = _token_errors(full, small, trained.params, (copied, distilled.params), images, scorers[0].batch_size)
    times = _time_in_turn(scorers, images)
    return {
        "num_params": {"full": num_params(trained.params), "small": num_params(distilled.params)},
        "gflops_per_image": {"full": 2e-9 * macs[0], "small": 2e-9 * macs[1]},
        "token_error": {"copied": errors[0], "distilled": errors[1]},
        "ms_per_image": {"full": times[0], "small": times[1]},
        "speedup": times[0] / times[1],
    }


def _token_errors(
    full: System, small: System, full_params: Any, candidates: Sequence[Any], images: np.ndarray, batch_size: int
) -> list[float]:
    """For each of the small parameter trees its mean token error on uint8 images [n, H, W, C]."""
    error_fn = make_error_fn(full, small)
    errors = np.zeros((len(candidates), len(images)))
    for start in range(0, len(images), batch_size):
        rows = images[start : start + batch_size]
        padded = np.concatenate([rows, np.repeat(rows[-1:], batch_size - len(rows), axis=0)])
        batch = shard_batch({"image": padded}, small.mesh)["image"]
        for i, params in enumerate(candidates):
            errors[i, start : start + len(rows)] = np.asarray(error_fn(full_params, params, batch))[: len(rows)]
    return [float(value) for value in errors.mean(1)]


def _time_in_turn(scorers: Sequence[Scorer], images: np.ndarray) -> list[float]:
    """Milliseconds an image for each scorer, median over batches that they score in turn."""
    size = scorers[0].batch_size
    batch = images[np.arange(size) % len(images)]
    for scorer in scorers:
        jax.block_until_ready(scorer.batch(batch))  # compiles
    seconds = np.zeros((len(scorers), TIMING_ROUNDS))
    for turn in range(TIMING_ROUNDS):
        for i, scorer in enumerate(scorers):
            start = time.perf_counter()
            jax.block_until_ready(scorer.batch(batch))
            seconds[i, turn] = time.perf_counter() - start
    return [float(1e3 * value / size) for value in np.median(seconds, axis=1)]
