"""Checkpoints through Orbax: asynchronous, atomic, compared with what is expected before anything is restored.

One checkpoint holds two items: `model` (averaged parameters and the loss function's extra state: all that evaluation
needs) and `train` (parameters, optimizer state, step). Beside them `spec`, the paths, shapes and dtypes as JSON: Orbax
reports partial loads silently in places (orbax issue 2972), so trees are compared here, first.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from core import tree
from core.state import TrainState


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another model."""


def has_checkpoint(workdir: Path) -> bool:
    """Whether something was trained in `workdir`; makes no folder."""
    return any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*"))


class Checkpointer:
    """Saves and restores training states under `workdir/checkpoints/<step>`; the first save makes the folder.

    A context manager: its end is `close`.

    Args:
      workdir: the run's folder.
      keep: how many of the newest checkpoints stay on disk.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        self._folder = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, step_prefix=None, create=False)
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=("model", "train", "spec"))

    def latest_step(self) -> int | None:
        """Newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts writing; returns as soon as the state is copied. An earlier save that failed raises here.

        Raises:
          CheckpointError: if writing failed (a full disk, a folder without write permission), or a checkpoint of this
            step or a later one is there already; older ones are untouched.
        """
        model, train = _split(_one_copy(state))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            started = self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(model),
                    train=ocp.args.StandardSave(train),
                    spec=ocp.args.JsonSave({"model": tree.spec(model), "train": tree.spec(train)}),
                ),
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(error) from error
        if not started:  # Orbax only reports that it skipped
            raise CheckpointError(
                f"step {int(state.step)} is not newer than step {self.latest_step()} in {self._folder}: restore that "
                "checkpoint first, or use another --workdir"
            )

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          CheckpointError: as `save`.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(error) from error

    def close(self) -> None:
        """Waits and releases threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def resume(self, state: TrainState) -> TrainState:
        """The newest checkpoint as `restore_train` gives it, saying so; `state` where there is none."""
        if self.latest_step() is None:
            return state
        state = self.restore_train(state)
        print(f"resuming after step {int(state.step)}")
        return state

    def restore_train(self, state: TrainState) -> TrainState:
        """Restores the newest checkpoint into the shapes and placement of `state`.

        Raises:
          CheckpointError: if there is none, it is damaged, or its tree differs from `state`'s.
        """
        model, train = _split(state)
        restored = self._restore({"model": model, "train": train})
        return TrainState(
            step=restored["train"]["step"],
            params=restored["train"]["params"],
            opt_state=restored["train"]["opt_state"],
            ema_params=restored["model"]["params"],
            extra=restored["model"]["extra"],
        )

    def restore_model(self, params: Any, extra: Any) -> tuple[Any, Any, int]:
        """Restores (averaged parameters, extra, step) alone: no optimizer state is read.

        Args:
          params, extra: arrays or ShapeDtypeStructs (with shardings) that say what is expected.

        Raises:
          CheckpointError: as `restore_train`.
        """
        model = self._restore({"model": {"params": params, "extra": extra}})["model"]
        return model["params"], model["extra"], int(self.latest_step())

    def _restore(self, expected: dict[str, Any]) -> dict[str, Any]:
        step = self.latest_step()
        if step is None:
            found = sorted(path.name for path in self._folder.glob("*"))  # none where there is no folder
            raise CheckpointError(
                f"no complete checkpoint in {self._folder} (found: {found or 'nothing'}): train first, or check "
                "--workdir"
            )
        where = self._folder / str(step)
        try:
            spec = self._manager.restore(step, args=ocp.args.Composite(spec=ocp.args.JsonRestore()))["spec"]
            for item, target in expected.items():
                difference = tree.spec_difference(tree.spec(target), spec[item])
                if difference:
                    raise CheckpointError(
                        f"{where} holds another architecture than this config builds ({item}):\n{difference}\n"
                        "Use the config the checkpoint was trained with, or another --workdir."
                    )
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, expected)
            args = {item: ocp.args.StandardRestore(target) for item, target in abstract.items()}
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except CheckpointError:
            raise
        except Exception as error:  # a missing or cut data file makes Orbax raise a bare Exception
            older = [s for s in self._manager.all_steps() if s != step]
            advice = f"to continue from step {max(older)}" if older else "and train again"
            raise CheckpointError(
                f"checkpoint {where} is damaged, incomplete or not readable: move it away {advice}. "
                f"Cause: {_root_cause(error)}"
            ) from error
        return {item: restored[item] for item in expected}

    def _write_error(self, error: Exception) -> CheckpointError:
        steps = list(self._manager.all_steps())
        return CheckpointError(
            f"could not save a checkpoint in {self._folder}: check the disk's free space and permissions. Complete "
            f"checkpoints on disk: {steps or 'none'}; run the same command again to continue from the newest. "
            f"Cause: {_root_cause(error)}"
        )


def _one_copy(state: TrainState) -> TrainState:
    """Arrays that every device holds, as the first device's own: Orbax would write a slice from each device.

    With eight devices and 450 arrays of 64 x 64 a save blocks for 0.1 s instead of 1.9. Several hosts keep theirs:
    Orbax writes what all of them name as one array.
    """
    if jax.process_count() > 1:
        return state
    return jax.tree.map(lambda x: x.addressable_data(0) if x.is_fully_replicated else x, state)


def _split(state: TrainState) -> tuple[dict, dict]:
    model = {"params": state.ema_params, "extra": state.extra}
    return model, {"params": state.params, "opt_state": state.opt_state, "step": state.step}


def _root_cause(error: BaseException) -> str:
    """The first error of a chain, without the specifications of many lines that TensorStore adds."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0][:400]
