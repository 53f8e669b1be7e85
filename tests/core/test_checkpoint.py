"""Checkpoints: round trips over meshes, and every way in which one is missing, damaged, foreign or not written."""

import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import tree
from core.checkpoint import Checkpointer, CheckpointError
from core.mesh import make_mesh, shardings
from core.state import TrainState, init_state

# A failed read or write leaves Orbax's other reads of that moment unawaited: warnings that belong to no other test.
leaves_unawaited_reads = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)


@pytest.fixture
def collect_garbage():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def make_state(toy):
    """Function (step, mesh) -> state whose leaves all differ from those of other steps and of a fresh state."""
    first = jax.device_get(init_state(toy.init_fn, jax.random.key(0), toy.tx, make_mesh(2)))
    # Leaves below 1 KiB lie inside Orbax's index; one of 16 KiB that does not compress gets a data file.
    noise = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    first = first.replace(params=first.params | {"noise": noise})

    def build(step=0, mesh=None):
        state = first.replace(
            step=np.int32(step),
            params=jax.tree.map(lambda x: x + np.float32(step), first.params),
            ema_params=jax.tree.map(lambda x: x - np.float32(step), first.params),
            opt_state=jax.tree.map(lambda x: x + x.dtype.type(step), first.opt_state),
            extra=jax.tree.map(lambda x: x + x.dtype.type(3 * step), first.extra),
        )
        return jax.device_put(state, shardings(state, mesh or make_mesh(2)))

    return build


def _save(workdir, *states):
    with Checkpointer(workdir) as checkpointer:
        for state in states:
            checkpointer.save(state)


def _restore(workdir, state):
    with Checkpointer(workdir) as checkpointer:
        return checkpointer.restore_train(state)


def _assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def saved(make_state, tmp_path_factory):
    """A work directory with steps 3 and 6."""
    workdir = tmp_path_factory.mktemp("saved")
    _save(workdir, make_state(3), make_state(6))
    return workdir


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copied")


def test_newest_state_comes_back_onto_any_mesh(make_state, saved):
    expected = make_state(6)
    for mesh in (make_mesh(2), make_mesh(), make_mesh(devices=jax.devices()[:1])):
        like = make_state(0, mesh)
        placements = jax.tree.map(lambda x: x.sharding, like)
        restored = _restore(saved, like)
        _assert_equal(restored, expected)
        assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim), restored, placements))


def test_only_the_newest_are_kept_and_saving_copies_the_values(make_state, tmp_path):
    """The update donates the state's buffers: what is saved must not change with them."""
    checkpointer = Checkpointer(tmp_path, keep=2)
    overwrite = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    for step in (1, 2, 3):
        state = make_state(step)
        checkpointer.save(state)
        overwrite(state)
    checkpointer.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    _assert_equal(_restore(tmp_path, make_state()), make_state(3))


def test_a_run_that_fails_leaves_what_it_saved_and_resumes_from_it(make_state, tmp_path, capsys):
    def run():
        with Checkpointer(tmp_path) as checkpointer:
            fresh = make_state()
            assert checkpointer.resume(fresh) is fresh
            checkpointer.save(make_state(1))
            raise KeyError("an error of the run")

    with pytest.raises(KeyError, match="of the run"):
        run()
    with Checkpointer(tmp_path) as checkpointer:
        _assert_equal(checkpointer.resume(make_state()), make_state(1))
    assert capsys.readouterr().out == "resuming after step 1\n"


def test_a_step_that_is_not_newer_is_refused_not_skipped(make_state, copied):
    checkpointer = Checkpointer(copied)
    for step in (6, 4):
        with pytest.raises(CheckpointError, match=f"step {step} is not newer than step 6 in .*checkpoints"):
            checkpointer.save(make_state(step))
    checkpointer.close()
    _assert_equal(_restore(copied, make_state()), make_state(6))


def test_no_checkpoint(make_state, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no complete checkpoint in .*checkpoints \(found: nothing\): train first"
    ):
        _restore(tmp_path / "mistyped", make_state())
    assert not list(tmp_path.iterdir())  # who only reads makes no folder
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        _restore(tmp_path, make_state())


def test_model_alone_is_restored_without_optimizer_state(make_state, copied):
    """Evaluation reads averaged parameters, also where the training item was removed to save space."""
    shutil.rmtree(copied / "checkpoints" / "6" / "train")
    state = make_state(6)
    like = jax.eval_shape(lambda: (state.params, state.extra))
    checkpointer = Checkpointer(copied)
    params, extra, step = checkpointer.restore_model(*like)
    _assert_equal((params, extra), (state.ema_params, state.extra))
    assert step == 6
    with pytest.raises(CheckpointError, match="6 is damaged"):
        checkpointer.restore_train(state)
    checkpointer.close()


def test_another_architecture_is_told_by_path_and_shapes(make_state, saved):
    state = make_state()
    params = state.params | {"dense": {"kernel": jnp.zeros((4, 5)), "offset": jnp.zeros(3)}}
    with pytest.raises(CheckpointError) as caught:
        _restore(saved, state.replace(params=params))
    text = str(caught.value)
    assert re.search(r"checkpoints/6 holds another architecture than this config builds \(train\)", text)
    for line in (
        "missing: params/dense/offset [[3], 'float32']",
        "unexpected: params/dense/bias [[3], 'float32']",
        "different: params/dense/kernel expected [[4, 5], 'float32'], found [[4, 3], 'float32']",
    ):
        assert line in text
    extra = state.extra | {"mean": jnp.zeros(3, jnp.bfloat16)}
    with pytest.raises(
        CheckpointError, match=r"\(model\):\ndifferent: extra/mean expected .*bfloat16.*found .*float32"
    ):
        _restore(saved, state.replace(extra=extra))


@leaves_unawaited_reads
@pytest.mark.usefixtures("collect_garbage")
@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_every_file_removed_or_cut_is_reported_or_harmless(make_state, saved, tmp_path, damage):
    """Never another value: either an error that names folder and the step to go on from, or the exact state."""
    expected, reported = make_state(6), set()
    files = sorted(p.relative_to(saved) for p in (saved / "checkpoints" / "6").rglob("*") if p.is_file())
    assert len(files) > 10
    for i, name in enumerate(files):
        workdir = shutil.copytree(saved, tmp_path / str(i))
        if damage == "removed":
            (workdir / name).unlink()
        else:
            os.truncate(workdir / name, (workdir / name).stat().st_size // 2)
        try:
            restored = _restore(workdir, expected)
        except CheckpointError as error:
            folder = workdir / "checkpoints" / "6"
            text = str(error)
            assert f"checkpoint {folder} is damaged" in text
            assert "move it away to continue from step 3. Cause: " in text
            assert len(text) < 1000
            reported.add(name)
        else:
            _assert_equal(restored, expected)
    # The tree's description, and the file of each item that holds most of its values, are missed.
    for item in ("spec", "model", "train"):
        own = [name for name in files if name.parts[2] == item]
        assert max(own, key=lambda name: (saved / name).stat().st_size) in reported


@leaves_unawaited_reads
@pytest.mark.usefixtures("collect_garbage")
def test_following_the_advice_continues_from_the_older_step(make_state, copied):
    newest = copied / "checkpoints" / "6"
    for path in (newest / "train").rglob("*"):
        if path.is_file():
            os.truncate(path, 0)
    with pytest.raises(CheckpointError, match="move it away to continue from step 3"):
        _restore(copied, make_state())
    newest.rename(copied / "moved")
    _assert_equal(_restore(copied, make_state()), make_state(3))
    (copied / "checkpoints" / "3" / "_METADATA").touch()
    shutil.rmtree(copied / "checkpoints" / "3" / "model")
    with pytest.raises(CheckpointError, match="move it away and train again"):
        _restore(copied, make_state())


@pytest.fixture
def full_disk():
    """No file grows above 4 KiB, as on a full disk: the noise fails. Python ignores the signal that goes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@leaves_unawaited_reads
@pytest.mark.usefixtures("collect_garbage")
@pytest.mark.parametrize("surfaces_at", ["wait", "next save", "close"])
def test_a_full_disk_is_an_error_and_leaves_the_older_checkpoint(make_state, tmp_path, request, surfaces_at):
    _save(tmp_path, make_state(1))
    second, third = make_state(2), make_state(3)
    checkpointer = Checkpointer(tmp_path)
    actions = {"wait": checkpointer.wait, "next save": lambda: checkpointer.save(third), "close": checkpointer.close}
    request.getfixturevalue("full_disk")
    checkpointer.save(second)  # asynchronous: nothing has failed yet
    with pytest.raises(CheckpointError, match=r"could not save .*disk's free space.*on disk: \[1\]; run the same"):
        actions[surfaces_at]()
    checkpointer.close()  # reported once
    _assert_equal(_restore(tmp_path, third), make_state(1))


KILLED = """
import os, signal, sys
from pathlib import Path
import jax, jax.numpy as jnp, optax
from core.checkpoint import Checkpointer
from core.mesh import make_mesh
from core.state import init_state

init = lambda key: ({"w": jax.random.normal(key, (4 << 20,))}, {})
state = init_state(init, jax.random.key(0), optax.sgd(0.1), make_mesh())
checkpointer = Checkpointer(Path(sys.argv[1]))
checkpointer.save(state.replace(step=jnp.int32(1)))
checkpointer.wait()
checkpointer.save(state.replace(step=jnp.int32(2)))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_earlier_step(tmp_path):
    root = Path(__file__).parents[2]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    # 32 MiB take longer to write than the kill takes to arrive: the second save was under way.
    assert not (tmp_path / "checkpoints" / "2").exists()
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.latest_step() == 1
    like = {"w": jax.ShapeDtypeStruct((4 << 20,), jnp.float32)}
    params, _, step = checkpointer.restore_model(like, {})
    assert step == 1
    expected = jax.random.normal(jax.random.key(0), (4 << 20,))
    assert tree.fingerprint(params) == tree.fingerprint({"w": expected})
    # The resumed run writes that step again, over what was half-written.
    checkpointer.save(TrainState(jnp.int32(2), params, params, (), {}))
    checkpointer.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
