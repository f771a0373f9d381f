"""A run of several processes: what they tell each other, and how they end together.

With one process everything here is done without any communication. Otherwise all processes make the same
calls in the same order.
"""

import contextlib
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jaxtyping import Int

from jaxplain.errors import JaxplainError, Stopped, first_line
from jaxplain.resuming import first_difference
from jaxplain.stopping import StopRequest

Result = TypeVar("Result")

_SECONDS_BETWEEN_SIGNS = 1.0
_MILLISECONDS_TO_RECEIVE = 1000
_WORKING, _DONE, _FAILED = range(3)


class AgreedError(JaxplainError):
    """An error for which all processes of the run end, and know that they do."""


def leads() -> bool:
    """Whether this is the process that speaks, and that writes what there is one of."""
    return jax.process_index() == 0


def exchange(values: Sequence[int]) -> Int[np.ndarray, "P N"]:
    """What each process has to tell, int32; row p is process p's."""
    mine_N = np.asarray(values, np.int32)
    return mine_N[None] if jax.process_count() == 1 else multihost_utils.process_allgather(mine_N)


def any_process(holds: bool) -> bool:
    """Whether a condition holds in any process."""
    return bool(exchange([holds]).any())


def all_in_time(holds: Callable[[], bool], *, seconds: float) -> bool:
    """Whether a condition comes to hold in all processes; each looks again every second."""
    end = time.monotonic() + seconds
    while any_process(not holds()):
        if any_process(time.monotonic() > end):
            return False
        time.sleep(_SECONDS_BETWEEN_SIGNS)
    return True


def gathered(tree: Any) -> Any:
    """Arrays that are spread over the devices of all processes as ones that each process has whole."""
    return tree if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def wait_for_others(place: str) -> None:
    """Go on when all processes have come to this place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Work that needs no other process, after which an error of one ends all. An error of all is said once.

    Raises JaxplainError.
    """
    error = None
    try:
        yield
    except JaxplainError as raised:
        error = raised
    # A message's checksum tells whether the first process says the same.
    sign = 0 if error is None else (zlib.crc32(str(error).encode()) & 0x7FFFFFFF) or 1
    signs_P = exchange([sign])[:, 0]
    if error is not None:
        said = not leads() and sign == signs_P[0]
        raise AgreedError("" if said else str(error)) from error
    for process in np.flatnonzero(signs_P)[:1]:
        raise AgreedError(
            f"process {process} of the run stopped with an error of its own, which its output tells."
            if leads()
            else ""
        )


def require_agreement(facts: Mapping[str, Any]) -> None:
    """Raise JaxplainError, naming what differs, where processes were started for different runs."""
    if jax.process_count() == 1:
        return
    mine = json.dumps(facts, sort_keys=True).encode()
    sizes_P = exchange([len(mine)])[:, 0]
    padded_N = np.zeros(int(sizes_P.max()), np.uint8)
    padded_N[: len(mine)] = np.frombuffer(mine, np.uint8)
    first, *others = (
        json.loads(text_N[:size].tobytes())
        for text_N, size in zip(multihost_utils.process_allgather(padded_N), sizes_P, strict=True)
    )
    for process, other in enumerate(others, 1):
        if difference := first_difference(first, other):
            name, here, there = difference
            raise AgreedError(
                f"the processes of the run disagree: {name.removeprefix('config.')} is {here!r} in process 0 "
                f"and {there!r} in process {process}; start all of them with the same command and versions."
                if leads()
                else ""
            )


def sharers_of(cores: Sequence[int]) -> int:
    """How many processes of the run, this one included, have the very same cores of this host."""
    sign = zlib.crc32(json.dumps([platform.node(), *cores]).encode()) & 0x7FFFFFFF
    return int((exchange([sign]) == sign).sum())


class Mail:
    """Bytes by name, from one process to another, by way of the service at which the processes met.

    It is in the first process, and fast enough (180 MB/s of one core), while files on a network disk may be
    seen half a minute late.
    """

    def __init__(self, subject: str):
        # Of a run of one process, which sends nothing, there is none.
        self._client: Any = distributed.global_state.client
        self._folder = f"jaxplain/{subject}"

    def send(self, name: str, contents: bytes) -> None:
        """Send contents; a name is good for one sending."""
        self._client.key_value_set_bytes(f"{self._folder}/{name}", contents)

    def receive(self, name: str) -> bytes | None:
        """The contents, which are then gone; None where they have not come within a second."""
        key = f"{self._folder}/{name}"
        try:
            contents = self._client.blocking_key_value_get_bytes(key, _MILLISECONDS_TO_RECEIVE)
        except jax.errors.JaxRuntimeError as error:
            if str(error).startswith("DEADLINE_EXCEEDED"):
                return None
            raise
        self._client.key_value_delete(key)
        return contents

    def throw_away(self, folder: str) -> None:
        """Forget what was sent under names within a folder, and not received."""
        self._client.key_value_delete(f"{self._folder}/{folder}")


def first_works(
    work: Callable[[], Result],
    stop: StopRequest,
    message: str,
    *,
    others: Callable[[threading.Event], None],
) -> Result | None:
    """What work of the first process gives; None for the others, whose work helps until the event is set.

    An error of one process, or SIGTERM to one, ends all of them at once: raises JaxplainError, or Stopped
    with the message.
    """
    if jax.process_count() == 1:
        with stop.at_once(message):
            return work()
    return _lead(work, stop, message) if leads() else _follow(others, stop)


def _lead(work: Callable[[], Result], stop: StopRequest, message: str) -> Result:
    """Work in this thread, while another one tells the other processes each second how it goes."""
    state, stopped, lost = _WORKING, False, None
    result, failure = None, None
    ended = threading.Event()

    def tell() -> None:
        nonlocal stopped, lost
        try:
            told_PN = np.full((1, 2), _WORKING)
            while told_PN[0, 0] == _WORKING and not stopped:
                ended.wait(_SECONDS_BETWEEN_SIGNS)
                told_PN = exchange([state, stop.requested])
                stopped = bool(told_PN[:, 1].any())
        except Exception as error:
            lost = error
        if state == _WORKING:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        with stop.at_once(message):
            result = work()
        state = _DONE
    except BaseException as error:
        state, failure = _FAILED, error
    ended.set()
    thread.join()
    if lost is not None:
        raise lost
    if isinstance(failure, JaxplainError):
        raise AgreedError(str(failure)) from failure
    if failure is not None:
        raise failure
    if stopped:
        raise Stopped(message)
    return cast(Result, result)


def _follow(work: Callable[[threading.Event], None], stop: StopRequest) -> None:
    """Work in another thread, while this one tells the other processes each second how it goes."""
    over = threading.Event()
    failures: list[Exception] = []

    def help_them() -> None:
        try:
            work(over)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=help_them, daemon=True)
    thread.start()
    try:
        while True:
            told_PN = exchange([_WORKING, stop.requested])
            if told_PN[:, 1].any():
                raise Stopped("")
            if told_PN[0, 0] == _FAILED:
                raise AgreedError("")
            if told_PN[0, 0] == _DONE:
                return
            if failures:
                raise failures[0]
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def one_job() -> Iterator[None]:
    """A run of several processes: those that agree to end do so together, and one that dies ends the others.

    Raises JaxplainError, with one sentence of the process that knows.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except (Stopped, AgreedError):
        jax.distributed.shutdown()
        raise
    except jax.errors.JaxRuntimeError as error:
        raise JaxplainError(
            f"the processes of the run lost each other ({first_line(error)}): one of them ended, or the "
            "network failed; start the same command again in all of them, and it goes on from the last "
            "checkpoint."
        ) from error


def leave(status: int) -> None:
    """End this process for an error, without waiting for the others: by that they learn of it."""
    if jax.process_count() == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leave_on_errors() -> None:
    """Let an error that nobody expected end a process of several at once too, after its traceback."""
    if jax.process_count() == 1:
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        leave(1)

    sys.excepthook = hook
