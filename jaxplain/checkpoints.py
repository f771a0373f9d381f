"""Checkpoints by Orbax: written in the background, atomic, the newest few kept, restored onto any mesh.

Every array's bits are summed before it is written, and again when it is read, so that a damaged checkpoint is
known as one even where its files can still be read.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from jaxplain.errors import JaxplainError, first_line
from jaxplain.processes import any_process

State = TypeVar("State")

_SUMS = "bit_sums"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored(Generic[State]):
    """A state to go on from.

    Attributes:
        step: The step that it was saved at.
        state: The state.
        about: What was saved beside it.
        unreadable: Of each newer checkpoint, why it cannot be read.
    """

    step: int
    state: State
    about: dict[str, Any]
    unreadable: list[str]


class Checkpoints:
    """Under a folder that all processes see; use as a context manager. States are pytrees of arrays.

    The newest `keep` stay; while one is written there is one more. All processes make the same calls.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        # What Orbax logs on its way to an exception, the exception says too.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.folder = folder if "://" in str(folder) else Path(folder).expanduser().absolute()
        self._unchecked = False
        with self._failing():
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=LatestN(keep), create=True, cleanup_tmp_directories=True
                ),
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        # What failed has been said, and closing may fail of it again.
        with contextlib.suppress(Exception):
            self._manager.close()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of which there are checkpoints, ascending."""
        return tuple(sorted(self._manager.all_steps()))

    def save(self, step: int, state: Any, about: Mapping[str, Any]) -> None:
        """Write a checkpoint in the background, after any that is being written; one of that step stays.

        Raises JaxplainError where it, or the one before, cannot be written.
        """
        self.wait()
        if step in self.steps:
            return
        arrays = _named(state)
        with self._failing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),  # pyright: ignore[reportCallIssue]
                    about=ocp.args.JsonSave({**about, _SUMS: _bit_sums(arrays)}),  # pyright: ignore[reportCallIssue]
                ),
                force=True,
            )
        self._unchecked = True

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._manager.is_saving_in_progress()

    def check(self) -> None:
        """Raise JaxplainError if what was written in the background has failed by now."""
        # Nothing of Orbax's is asked before it has ended: asking takes the error from the thread that
        # removes older checkpoints, which then takes the new one for complete.
        if self._unchecked and not self.writing:
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written. Raises JaxplainError where that fails."""
        with self._failing():
            self._manager.wait_until_finished()
        self._unchecked = False

    def restore(self, like: Callable[[dict[str, Any]], State]) -> Restored[State] | None:
        """The newest state that can be read, or None where none was ever saved; newer ones are removed.

        `like` gives a tree of arrays, or of shapes, dtypes and shardings, for what was saved beside one.

        Raises JaxplainError where there are checkpoints, and none can be read.
        """
        self.wait()  # or the one that is being written is taken for damaged
        damaged: dict[int, str] = {}
        for step in reversed(self.steps):
            found, problem = None, ""
            try:
                found = self._read(step, like)
            except Exception as error:  # a damaged checkpoint fails in any of several libraries
                problem = first_line(error)
            if not any_process(found is None):
                assert found is not None
                state, about = found
                sums, kept = _bit_sums(_named(state)), about.pop(_SUMS, {})
                wrong = [name for name in sums if sums[name] != kept.get(name)]
                if not wrong:
                    for torn in damaged:
                        self._manager.delete(torn)
                    return Restored(step=step, state=state, about=about, unreadable=list(damaged.values()))
                problem = f"the bits of {wrong[0]} are not those that were saved"
            damaged[step] = f"checkpoint {step} in {self.folder} cannot be read" + (
                f" ({problem})" if problem else ""
            )
        if damaged:
            raise JaxplainError(f"{damaged[max(damaged)]}, nor any before it; start anew with --overwrite.")
        return None

    def _read(self, step: int, like: Callable[[dict[str, Any]], State]) -> tuple[State, dict[str, Any]]:
        # Each process reads by itself, so that one that cannot leaves none of the others waiting.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone),
        )
        with contextlib.closing(manager):
            beside = manager.restore(
                step,
                args=ocp.args.Composite(about=ocp.args.JsonRestore()),  # pyright: ignore[reportCallIssue]
            )
            about = dict(beside["about"])  # pyright: ignore[reportCallIssue, reportArgumentType]
            wanted = like(about)
            shapes = {
                name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
                for name, x in _named(wanted).items()
            }
            found = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(shapes)  # pyright: ignore[reportCallIssue]
                ),
            )
        arrays = found["state"]  # pyright: ignore[reportCallIssue]
        leaves = [arrays[name] for name in shapes]
        return jax.tree.unflatten(jax.tree.structure(wanted), leaves), about

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Turn a failure to write within, a full disk for one, into one sentence."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of the devices, or of another process
            raise
        except Exception as error:  # it comes from any of several libraries
            reason = error.strerror if isinstance(error, OSError) else None
            raise JaxplainError(
                f"a checkpoint could not be written to {self.folder}: {reason or first_line(error)}; make "
                "room, and the same command goes on from the one before."
            ) from error


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, in order, by names such as `0.tops.max.priority_RG`."""

    def name(path: tuple[Any, ...]) -> str:
        return jax.tree_util.keystr(path, simple=True, separator=".")

    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _bit_sums(arrays: dict[str, Any]) -> dict[str, int]:
    """Every array's bits, summed as unsigned numbers modulo 2**32."""
    return {name: int(np.asarray(_bit_sum(value))) for name, value in arrays.items()}


@jax.jit
def _bit_sum(x: jax.Array) -> jax.Array:
    x = jax.device_put(x, jax.memory.Space.Device)  # it may be in the host's memory
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
    return bits.sum(dtype=jnp.uint32)
