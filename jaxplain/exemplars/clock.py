"""How long reading takes, and for how much of it the devices wait for sequences."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class InputClock:
    """Seconds: `total` within the clock's context, and `waited` of them for items while devices were idle.

    Whether they are idle is asked when an item has come. For a part of the time that it took to come, they
    may have been busy, so they wait no longer than `waited` says.
    """

    def __init__(self):
        self.total = self.waited = 0.0
        self._entered = 0.0

    def __enter__(self) -> "InputClock":
        self._entered = time.perf_counter()
        return self

    def __exit__(self, *raised: object) -> None:
        self.total += time.perf_counter() - self._entered

    def over(self, items: Iterable[Item], *, idle: Callable[[], bool]) -> Iterator[Item]:
        """The items, timed as they are taken."""
        remaining = iter(items)
        while True:
            asked = time.perf_counter()
            try:
                item = next(remaining)
            except StopIteration:
                return
            if idle():
                self.waited += time.perf_counter() - asked
            yield item
