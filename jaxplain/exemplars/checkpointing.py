"""When the reading of a split saves what it has found so far, and where it goes on."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxplain.checkpoints import Checkpoints
from jaxplain.configs.extraction import RunConfig
from jaxplain.errors import JaxplainError, Stopped
from jaxplain.exemplars.snapshots import (
    Snapshot,
    Summed,
    reductions_from,
    snapshot,
    snapshot_form,
)
from jaxplain.exemplars.step import Reductions
from jaxplain.processes import exchange, gathered, leads
from jaxplain.stopping import StopRequest

_SECONDS_BETWEEN_TALKS = 2.0
_MOST_STEPS_BETWEEN_TALKS = 1000
_MOST_TOKENS = 2**32  # per data shard, counted as uint32


class SplitCheckpoints:
    """The checkpoints of one split; use as a context manager.

    Whether time is up, or SIGTERM came, processes agree on every two seconds or so, since a step by itself
    does not bring them together.
    """

    def __init__(
        self,
        folder: str | None,
        *,
        split: str,
        begun: str,
        run: RunConfig,
        kept: Mapping[int, int],
        summed: Summed,
        mesh: Mesh,
        stop: StopRequest,
    ):
        """`folder` is None where none can be kept, `begun` names the store in the making.

        `kept` counts the neurons that are kept of each layer, `summed` is where some are summed by token.
        """
        self._store = None if folder is None else Checkpoints(folder)
        self._split, self._begun, self._run = split, begun, run
        self._kept, self._summed, self._mesh, self._stop = kept, summed, mesh, stop
        self._saved_at, self._steps = time.monotonic(), 0
        self._talked_at, self._silent, self._silent_of = time.monotonic(), 0, 0

    def __enter__(self) -> "SplitCheckpoints":
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._store is not None:
            self._store.__exit__(*raised)

    def restore(self, empty: Reductions, *, rows: int, tokens: int) -> tuple[int, Reductions] | None:
        """The row to go on from and the reductions of those before; None where no checkpoint was saved.

        `empty` are shapes and dtypes of reductions; the split has `rows` sequences of `tokens`.

        Raises JaxplainError where checkpoints are there, but none can be read, or they are of another store.
        """
        if self._store is None:
            return None

        def form(about: dict[str, Any]) -> Snapshot:
            return snapshot_form(
                empty, kept=self._kept, summed=self._summed, parts=about["data"], mesh=self._mesh
            )

        found = self._store.restore(form)
        if found is None:
            return None
        if found.about["begun"] != self._begun:
            raise JaxplainError(
                f"the checkpoints in {self._store.folder} are of another store than the one in the making; "
                "name another run.checkpoint_folder, or start anew with --overwrite."
            )
        self._require_countable(found.state, remaining=(rows - found.step) * tokens)
        if leads():
            for problem in found.unreadable:
                print(problem, file=sys.stderr)
            print(f"{self._split}: going on from sequence {found.step:,} of {rows:,}", file=sys.stderr)
        reductions = reductions_from(found.state, empty, summed=self._summed, mesh=self._mesh)
        return found.step, reductions

    def _require_countable(self, found: Snapshot, *, remaining: int) -> None:
        """Shards that are joined with others may have read more tokens than one can count."""
        parts = self._mesh.shape["data"]
        counts = [reduction.moments.token_count_G for reduction in found.values()]
        if len(counts[0]) == parts:
            return
        # A layer of experts may have none that reads every token, so that others tell more.
        counted_P = np.max([x_PG.max(axis=1) for x_PG in gathered(counts)], axis=0).astype(np.float64)
        groups = np.arange(len(counted_P)) * parts // len(counted_P)
        if np.bincount(groups, counted_P).max() + remaining / parts >= _MOST_TOKENS:
            raise JaxplainError(
                f"run.mesh.data is {parts} and was {len(counted_P)} before, and some data shard would have "
                f"more than the 4.3e9 tokens that can be counted; go on with {len(counted_P)} or more."
            )

    def before_step(self, row: int, reductions: Reductions) -> None:
        """Save the reductions of all sequences before `row` where it is time to.

        Raises Stopped, when they are saved, where SIGTERM has come, and JaxplainError where the checkpoint
        before could not be written.
        """
        due = 0 < self._run.checkpoint_steps <= self._steps
        stopped = False
        if self._silent < self._silent_of:
            self._silent += 1
        else:
            late = 0 < 60 * self._run.checkpoint_minutes <= time.monotonic() - self._saved_at
            told_PN = exchange([late, self._stop.requested, self._steps_until_talk()])
            due, stopped = due or bool(told_PN[0, 0]), bool(told_PN[:, 1].any())
            self._silent, self._silent_of = 0, int(told_PN[0, 2])
            self._talked_at = time.monotonic()
        if (due or stopped) and row > 0 and self._store is not None:
            about = {"begun": self._begun, "data": self._mesh.shape["data"]}
            kept = snapshot(reductions, kept=self._kept, summed=self._summed, mesh=self._mesh)
            self._store.save(row, kept, about)
            self._saved_at, self._steps = time.monotonic(), 0
        if stopped:
            self._leave(row)
        if self._store is not None:
            self._store.check()
        self._steps += 1

    def stop_if_asked(self) -> None:
        """Raise Stopped where SIGTERM has come to any process; nothing is saved."""
        if exchange([self._stop.requested]).any():
            saved = self._store.steps if self._store is not None else ()
            self._leave(saved[-1] if saved else 0)

    def _leave(self, row: int) -> None:
        if self._store is not None:
            self._store.wait()
        elif row:
            row = 0
        raise Stopped(
            f"stopped by SIGTERM: the same command goes on from sequence {row:,} of {self._split}."
            if leads()
            else ""
        )

    def _steps_until_talk(self) -> int:
        if jax.process_count() == 1:
            return 0
        seconds = (time.monotonic() - self._talked_at) / (self._silent_of + 1)
        return min(int(_SECONDS_BETWEEN_TALKS / max(seconds, 1e-9)), _MOST_STEPS_BETWEEN_TALKS)
