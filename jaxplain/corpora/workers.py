"""Work on blocks of a corpus, in the order of the blocks, by processes beside this one or without any.

Grain's own worker processes are started anew for every source and split, cannot share out a stream, and
outlive a run that is killed. These are started once, take the blocks of all sources and splits in turn, and
end with the run however it ends. Since each block is worked on by itself and the results come in the
order of the blocks, they are the same for any number of workers.
"""

import collections
import contextlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from jaxplain.errors import JaxplainError

Work = Callable[[Callable[[Any, Any], Any], Iterable[Any]], Iterator[Any]]
"""Called with a function and items, it gives `function(shared, item)` for each item in turn.

Function and items must be such as pickle can send to another process.
"""

AHEAD = 2  # blocks per worker that are begun before they are asked for, so that none has to wait
_MOST = 8
_WORTH_WORKERS = 20_000  # sequences; fewer are cut before the processes would have started

_shared: Any = None


def worker_count(chosen: int | None, *, sequences: int | None, sharers: int = 1) -> int:
    """How many workers to start, where none are chosen, for about so many sequences (None: no one knows).

    So many processes share this one's cores.
    """
    if chosen is not None:
        return chosen
    cores = len(cores_of_process()) // sharers
    worth = sequences is None or sequences >= _WORTH_WORKERS
    return min(cores, _MOST) if worth and cores > 1 else 0


def cores_of_process() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def in_this_process(shared: Any) -> Work:
    """Work without any other process."""
    return lambda function, items: (function(shared, item) for item in items)


@contextlib.contextmanager
def open_workers(count: int, shared: Any) -> Iterator[Work]:
    """Work by `count` processes, which are given `shared` once, and which end with the context.

    What a function raises is raised here, when its item's turn comes. Raises JaxplainError where a
    process dies.
    """
    if count == 0:
        yield in_this_process(shared)
        return
    with tempfile.TemporaryDirectory() as folder:
        # Through a file: what a process is started with is read by it late, and would be waited for.
        file = Path(folder) / "shared.pickle"
        file.write_bytes(pickle.dumps(shared, pickle.HIGHEST_PROTOCOL))
        pool = ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn"), initializer=_start, initargs=(str(file),)
        )
        try:
            with _deaf_to_interrupts():
                for _ in range(count):
                    pool.submit(os.getpid)  # each of the first submissions starts a process
            yield lambda function, items: _in_order(pool, function, items, ahead=AHEAD * count)
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, function: Callable[[Any, Any], Any], items: Iterable[Any], *, ahead: int
) -> Iterator[Any]:
    begun: collections.deque[Future[Any]] = collections.deque()
    remaining = iter(items)
    more, failure = True, None
    try:
        while True:
            while more and len(begun) < ahead:
                try:
                    begun.append(pool.submit(_work, function, next(remaining)))
                except StopIteration:
                    more = False
                except BrokenProcessPool:
                    raise
                except Exception as error:
                    # Items are taken ahead, so what is wrong with one waits until those before are done.
                    more, failure = False, error
            if not begun:
                break
            yield begun.popleft().result()
    except BrokenProcessPool as error:
        raise JaxplainError(
            "one of the processes that tokenise the corpus died, as they do where memory runs out; lower "
            "run.input_workers, or set it to 0 to do without them."
        ) from error
    finally:
        for future in begun:
            future.cancel()
    if failure is not None:
        raise failure


def _work(function: Callable[[Any, Any], Any], item: Any) -> Any:
    return function(_shared, item)


def _start(file: str) -> None:
    global _shared
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what there is one of per core
    _shared = pickle.loads(Path(file).read_bytes())


def _end_with_parent() -> None:
    """A parent that is killed can tell its children nothing; they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started within never hear of Ctrl-C, which a terminal tells all of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
