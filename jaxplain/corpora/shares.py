"""Blocks of a corpus dealt out over the processes of a run, in turn; the first gets the results in order.

Each process works on its share by workers of its own. The first sends the others what to work on, some blocks
ahead of those that it needs, so that they need not know how sources are mixed or where the mixture ends, and
the results are those that it would have had alone.
"""

import collections
import itertools
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

from jaxplain.corpora.workers import AHEAD, Work
from jaxplain.errors import JaxplainError

_SECONDS_FOR_A_STOP = 3.0


@runtime_checkable
class Messages(Protocol):
    """Contents by name, which one process sends to another."""

    def send(self, name: str, contents: bytes) -> None:
        """Send contents, which wait until they are received."""
        ...

    def receive(self, name: str) -> bytes | None:
        """The contents, which are then gone; None where they have not come within about a second."""
        ...


def shared_out(work: Work, messages: Messages, *, processes: int, workers: int) -> Work:
    """Work, in the first process, by so many processes of which each has about so many workers.

    `work` is that of the first process's own. The results, and what is raised, are the same. Every process
    must see the same corpus.
    """
    asked = [itertools.count() for _ in range(processes)]
    ahead = processes * AHEAD * max(workers, 1)

    def share(function: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        remaining = enumerate(items)
        turns: collections.deque[str | None] = collections.deque()  # names of answers; None for one of here
        here: collections.deque[Any] = collections.deque()
        failure: Exception | None = None

        def deal() -> bool:
            nonlocal remaining, failure
            try:
                number, item = next(remaining)
            except StopIteration:
                return False
            except Exception as error:
                # Items are taken ahead, so what is wrong with one waits until those before are done.
                remaining, failure = enumerate(()), error
                return False
            process = number % processes
            if process == 0:
                here.append(item)
                turns.append(None)
                return True
            name = f"{process}/{next(asked[process])}"
            messages.send(f"{name}/asked", pickle.dumps((function, item), pickle.HIGHEST_PROTOCOL))
            turns.append(f"{name}/done")
            return True

        def dealt_here() -> Iterator[Any]:
            while here or deal():
                if here:
                    yield here.popleft()

        results = work(function, dealt_here())
        while True:
            while len(turns) < ahead and deal():
                pass
            if not turns:
                break
            name = turns.popleft()
            yield next(results) if name is None else _answer(messages, name)
        if failure is not None:
            raise failure

    return share


def _answer(messages: Messages, name: str) -> Any:
    while (contents := messages.receive(name)) is None:
        pass
    answer = pickle.loads(contents)
    if isinstance(answer, JaxplainError):
        raise answer
    return answer


def help_first(work: Work, messages: Messages, *, process: int, workers: int, over: threading.Event) -> None:
    """Do this process's share of what the first one deals out, until it is over.

    `work` is that of this process's own workers. A JaxplainError is the first one's to raise, in its
    turn; any other exception is raised here, and sets `over`.
    """
    hands = AHEAD * workers or 1

    def take_turns(hand: int) -> None:
        try:
            for number in itertools.count(hand, hands):
                while (contents := messages.receive(f"{process}/{number}/asked")) is None:
                    if over.is_set():
                        return
                function, item = pickle.loads(contents)
                try:
                    answer = next(work(function, [item]))
                except JaxplainError as error:
                    # Where SIGTERM comes to all processes of a host, workers die of it first.
                    if over.wait(_SECONDS_FOR_A_STOP):
                        return
                    answer = error
                messages.send(f"{process}/{number}/done", pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))
        except BaseException:
            over.set()
            raise

    with ThreadPoolExecutor(hands) as pool:
        for _ in pool.map(take_turns, range(hands)):
            pass
