"""The loop: order and cadence of a turn, resuming bit for bit, events once, stops that leave a good checkpoint."""

import itertools
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest

from core import loop
from core.checkpoint import Checkpointer
from core.logs import MetricLogger, progress_bar, read_history
from core.loop import NonFiniteLossError, due, train_loop
from core.mesh import make_mesh
from core.state import init_state
from core.step import make_train_step_fn


@pytest.mark.parametrize(
    ("every", "total", "expected"),
    [(3, 7, [3, 6, 7]), (3, 6, [3, 6]), (1, 3, [1, 2, 3]), (10, 4, [4])],
)
def test_due(every, total, expected):
    assert [step for step in range(1, total + 1) if due(step, every, total)] == expected


class _State:
    """As much of a training state as the loop itself looks at."""

    def __init__(self, step=0):
        self.step = step


class _Journal:
    """Step function, logger, checkpointer, data and event in one, noting the order of calls."""

    def __init__(self):
        self.calls = []

    def batches(self, first, last):
        for step in range(first, last + 1):
            self.calls.append(f"batch {step}")
            yield {"x": np.zeros(8, np.float32)}

    def step(self, state, batch, key):
        self.calls.append(f"step {state.step + 1}")
        return _State(state.step + 1), {"loss": np.float32(1.0)}

    def log(self, step, values):
        self.calls.append(f"log {step}")

    def event(self, state):
        self.calls.append(f"event {state.step}")
        return state

    def save(self, state):
        self.calls.append(f"save {state.step}")

    def wait(self):
        self.calls.append("wait")


def test_order_and_cadence_of_a_turn():
    journal = _Journal()
    state = train_loop(
        _State(1),
        journal.step,
        journal.batches(2, 9),
        key=jax.random.key(0),
        num_steps=5,
        mesh=make_mesh(),
        logger=journal,
        checkpointer=journal,
        log_every=2,
        save_every=3,
        images_per_step=8,
        events={1: journal.event, 3: journal.event},
    )
    assert state.step == 5
    assert ", ".join(journal.calls) == (
        "batch 2, step 2, log 2, "
        "batch 3, step 3, event 3, save 3, "
        "batch 4, step 4, log 4, "
        "batch 5, step 5, log 5, save 5, wait"
    )


def test_the_time_left_counts_no_compilation(monkeypatch):
    journal, bars = _Journal(), []

    def bar(*args, **options):
        bars.append(progress_bar(*args, **options))
        return bars[0]

    def slow_first(state, batch, key):
        time.sleep(0.5 if state.step == 0 else 0)
        return journal.step(state, batch, key)

    monkeypatch.setattr(loop, "progress_bar", bar)
    options = dict(key=jax.random.key(0), num_steps=3, mesh=make_mesh(), logger=None, checkpointer=None, log_every=9)
    train_loop(_State(), slow_first, journal.batches(1, 3), save_every=9, images_per_step=8, **options)
    assert bars[0].format_dict["elapsed"] < 0.4


@pytest.fixture(scope="module")
def train(toy):
    """Function of a work directory that trains there as a new process would; compiled once."""
    mesh = make_mesh(2)
    step_fn = make_train_step_fn(toy.loss_fn, toy.tx, ema_decay=0.9)

    def run(workdir, batches=None, events=None, save_every=3, log_every=1):
        state = init_state(toy.init_fn, jax.random.key(0), toy.tx, mesh)
        checkpointer = Checkpointer(workdir)
        if checkpointer.latest_step() is not None:
            state = checkpointer.restore_train(state)
        start = int(state.step)
        try:
            with MetricLogger(workdir, start) as logger:
                state = train_loop(
                    state,
                    step_fn,
                    batches or map(toy.make_batch, itertools.count(start + 1)),
                    key=jax.random.key(3),
                    num_steps=toy.num_steps,
                    mesh=mesh,
                    logger=logger,
                    checkpointer=checkpointer,
                    log_every=log_every,
                    save_every=save_every,
                    images_per_step=8,
                    events=events,
                )
        finally:
            checkpointer.close()
        return jax.device_get(state)

    return run


def _events(calls):
    """After updates 2 (before the save at 3), 3 (with it) and 4 (after it): each changes what later steps compute."""

    def event(state):
        calls.append(int(state.step))
        return state.replace(extra=state.extra | {"mean": state.extra["mean"] + 1.0})

    return dict.fromkeys((2, 3, 4), event)


def test_resuming_is_bit_exact_and_events_run_once(toy, train, tmp_path):
    calls = []
    straight = train(tmp_path / "straight", events=_events(calls))
    assert calls == [2, 3, 4]

    calls.clear()
    with pytest.raises(ValueError, match="the data ended at step 6 of 6"):  # stands for a kill after step 5
        train(tmp_path / "resumed", map(toy.make_batch, range(1, 6)), _events(calls))
    assert calls == [2, 3, 4]
    assert [record["step"] for record in read_history(tmp_path / "resumed")] == [1, 2, 3, 4, 5]

    calls.clear()
    resumed = train(tmp_path / "resumed", events=_events(calls))
    assert calls == [4]  # 2 and 3 are in the checkpoint of step 3
    assert int(resumed.step) == 6
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    histories = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("straight", "resumed")]
    assert histories[0] == histories[1]
    assert len(set(histories[0].splitlines())) == 6

    # A finished run has nothing left to do: no data are drawn, the state is the checkpoint's.
    again = train(tmp_path / "resumed", iter(()))
    jax.tree.map(np.testing.assert_array_equal, again, straight)
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == histories[0]


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(toy, train, tmp_path, log_every):
    """The bad batch is the fourth, at a save: it is looked at even where it would not be logged."""

    def batches():
        for step in itertools.count(1):
            batch = toy.make_batch(step)
            yield batch if step < 4 else batch | {"y": np.full_like(batch["y"], np.nan)}

    with pytest.raises(
        NonFiniteLossError, match=r"step 4: grad_norm, loss not finite\. .*optim\.learning_rate in another --workdir"
    ):
        train(tmp_path, batches(), save_every=2, log_every=log_every)
    assert [record["step"] for record in read_history(tmp_path)] == ([1, 2, 3] if log_every == 1 else [])
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.latest_step() == 2
    checkpointer.close()
    assert int(train(tmp_path, save_every=2).step) == 6


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal: a shell's background job starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_its_step_and_the_run_resumes_bit_for_bit(toy, train, tmp_path, capsys, number):
    """It comes as batch 2 is drawn, before the event of step 2, and nothing of step 2 is due."""

    def batches():
        for step in itertools.count(1):
            if step == 2:
                os.kill(os.getpid(), number)
            yield toy.make_batch(step)

    before = signal.getsignal(number)
    straight = train(tmp_path / "straight", events=_events([]), log_every=5)
    calls = []
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "resumed", batches(), _events(calls), log_every=5)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert calls == [2]
    said = capsys.readouterr().err
    assert f"{number.name}: stopped and saved after step 2 of 6; the same command goes on from there" in said
    resumed = train(tmp_path / "resumed", events=_events(calls), log_every=5)
    assert calls == [2, 3, 4]
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    histories = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("straight", "resumed")]
    assert histories[0] == histories[1]


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_ends_at_once_and_what_is_not_saved_is_not_stopped(toy, train, tmp_path):
    def batches():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        yield

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, batches())
    assert signal.getsignal(signal.SIGINT) is before

    states = []  # not in the main thread, where no signal may be caught
    thread = threading.Thread(target=lambda: states.append(train(tmp_path)))
    thread.start()
    thread.join()
    assert int(states[0].step) == toy.num_steps


def test_a_loss_that_is_not_finite_is_not_saved_at_a_stop(toy, train, tmp_path):
    def batches():
        os.kill(os.getpid(), signal.SIGTERM)
        yield toy.make_batch(1) | {"y": np.full((8, 3), np.nan, np.float32)}

    with pytest.raises(NonFiniteLossError):
        train(tmp_path, batches(), log_every=100)
    assert Checkpointer(tmp_path).latest_step() is None
