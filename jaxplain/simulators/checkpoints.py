"""Checkpoints of a training run, by Orbax: the newest two to go on from, and the best one to keep."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from jaxplain.errors import JaxplainError, first_line

State = TypeVar("State")

_NEWEST = 2


@dataclasses.dataclass(kw_only=True)
class Progress:
    """What a run knows besides the state: the lowest held-out loss, when it was, and how long ago."""

    best_loss: float = float("inf")
    best_step: int = -1
    evaluations_since: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored(Generic[State]):
    """A state to go on from; `unreadable` says of each newer checkpoint why it cannot be read."""

    state: State
    progress: Progress
    unreadable: list[str]


class Checkpoints:
    """Under a folder; use as a context manager. States are pytrees of arrays, restored onto any mesh."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._newest = _manager(folder / "newest", keep=_NEWEST)
        self._best = _manager(folder / "best", keep=1)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._newest.close()
        self._best.close()

    def save(self, step: int, state: Any, progress: Progress) -> None:
        """Keep a state to go on from; written in the background."""
        self._write(self._newest, step, state, dataclasses.asdict(progress))

    def save_best(self, step: int, state: Any) -> None:
        """Keep what is the best so far."""
        # One step may be written twice, before and after an interruption.
        if step not in self._best.all_steps():
            self._write(self._best, step, state, {})

    def restore(self, like: State) -> Restored[State] | None:
        """The newest state that can be read, or None where none was ever saved; newer ones are removed.

        Raises JaxplainError where there are checkpoints, and none can be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._newest.all_steps(), reverse=True):
            try:
                found = self._read(self._newest, step, like)
            except Exception as error:  # a damaged checkpoint fails in any of several libraries
                damaged[step] = f"checkpoint {step} in {self._folder} cannot be read ({first_line(error)})"
                continue
            for torn in damaged:
                self._newest.delete(torn)
            return Restored(
                state=found["state"],
                progress=Progress(**found["progress"]),
                unreadable=list(damaged.values()),
            )
        if damaged:
            raise JaxplainError(f"{damaged[max(damaged)]}, nor any before it; start anew with --overwrite.")
        return None

    def best(self, like: State) -> State | None:
        """The best state, where one was kept."""
        step = self._best.latest_step()
        return None if step is None else self._read(self._best, step, like)["state"]

    def _write(
        self, manager: ocp.CheckpointManager, step: int, state: Any, progress: Mapping[str, Any]
    ) -> None:
        try:
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
                    progress=ocp.args.JsonSave(progress),  # pyright: ignore[reportCallIssue]
                ),
                force=True,
            )
        except OSError as error:
            raise JaxplainError(
                f"a checkpoint could not be written to {self._folder}: {error.strerror}."
            ) from error

    def _read(self, manager: ocp.CheckpointManager, step: int, like: Any) -> Any:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        return manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(shapes),  # pyright: ignore[reportCallIssue]
                progress=ocp.args.JsonRestore(),
            ),
        )


def _manager(folder: Path, *, keep: int) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(preservation_policy=LatestN(keep), create=True),
    )
