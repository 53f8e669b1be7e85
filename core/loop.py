"""The one training loop.

Order of a turn, a contract: batch -> step -> (log, finite check) -> (event) -> (save) -> (stop); the next batch is
drawn after the save. Cadence: `step % n == 0 or step == total`. Randomness of a step is fold_in(key, step) and the data
order a function of (seed, step), so that resuming is index arithmetic: bit-exact on CPU.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from core.checkpoint import Checkpointer
from core.logs import MetricLogger, all_finite, progress_bar
from core.mesh import shard_batch
from core.state import TrainState


class NonFiniteLossError(ValueError):
    """The loss or a metric became NaN or infinite."""


def due(step: int, every: int, total: int) -> bool:
    """Whether something with cadence `every` happens after this step."""
    return step % every == 0 or step == total


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """The list that the first SIGTERM (a cluster's notice) or SIGINT (Ctrl-C) goes to instead of ending the process.

    A second one ends it as ever. Nothing is caught outside the main thread, which alone may, with several hosts, where
    JAX catches SIGTERM, and what is ignored already, as SIGINT is in a script's background.
    """
    received: list[signal.Signals] = []
    may_catch = threading.current_thread() is threading.main_thread() and jax.process_count() == 1
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT) if may_catch}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        received.append(signal.Signals(number))
        restore()

    try:
        for number in before:
            signal.signal(number, note)
        yield received
    finally:
        restore()


def _asked_to_stop(received: list[signal.Signals], step: int) -> bool:
    """Whether to stop after this step; of several hosts all say so after the same one, by JAX's notice of SIGTERM."""
    if jax.process_count() > 1:
        return jax.config.jax_enable_preemption_service and multihost_utils.reached_preemption_sync_point(step)
    return bool(received)


def train_loop(
    state: TrainState,
    step_fn: Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]],
    batches: Iterator[dict],
    *,
    key: jax.Array,
    num_steps: int,
    mesh: Mesh,
    logger: MetricLogger | None,
    checkpointer: Checkpointer | None,
    log_every: int,
    save_every: int,
    images_per_step: int,
    events: Mapping[int, Callable[[TrainState], TrainState]] | None = None,
) -> TrainState:
    """Trains from `state.step` to `num_steps`.

    Args:
      batches: host batches of this process from `state.step` on; their leaves are [B_local, ...].
      logger, checkpointer: None for a run that leaves nothing on disk.
      images_per_step: global batch size, for the rate the progress bar shows.
      events: what to do once, after the given step (say, refreshing pseudo-labels); before that step's save, so a
        resumed run has it done or does it itself.

    Returns:
      The last state, saved.

    Raises:
      SystemExit: with a checkpointer, after SIGTERM or Ctrl-C, with the signal's usual code: the step it came in was
        finished and saved, and how to go on was said.
      NonFiniteLossError: when a logged metric is not finite; nothing is saved from then on.
      ValueError: if the data end early.
    """
    if min(log_every, save_every) < 1:
        raise ValueError(f"train.log_every and train.save_every must be at least 1, found {log_every}, {save_every}")
    events = events or {}
    start = int(state.step)
    batches = iter(batches)
    with (
        progress_bar(num_steps, initial=start, scale=images_per_step, description="train") as bar,
        _stop_signals() if checkpointer else contextlib.nullcontext([]) as received,
    ):
        for step in range(start + 1, num_steps + 1):
            host = next(batches, None)
            if host is None:
                raise ValueError(f"the data ended at step {step} of {num_steps}")
            state, metrics = step_fn(state, shard_batch(host, mesh), key)
            if step == start + 1:
                bar.unpause()  # the minutes of compiling are no update's time: the time left would be hours
            bar.update()
            stop = bool(checkpointer) and _asked_to_stop(received, step)
            if stop or due(step, log_every, num_steps) or due(step, save_every, num_steps):
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                if not all_finite(values):
                    bad = sorted(name for name, value in values.items() if not all_finite({name: value}))
                    raise NonFiniteLossError(
                        f"step {step}: {', '.join(bad)} not finite. The newest checkpoint is from before it; "
                        "lower optim.learning_rate in another --workdir, or look at the images of this step."
                    )
                if due(step, log_every, num_steps):
                    if logger:
                        logger.log(step, values)
                    bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
            if step in events:
                state = events[step](state)
            if checkpointer and (stop or due(step, save_every, num_steps)):
                checkpointer.save(state)
            if stop:
                checkpointer.wait()
                number = received[0] if received else signal.SIGTERM
                how = "the same command goes on from there"
                bar.write(f"{number.name}: stopped and saved after step {step} of {num_steps}; {how}", file=sys.stderr)
                sys.exit(128 + number)
    if checkpointer:
        checkpointer.wait()
    return state
