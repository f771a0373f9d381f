"""Mixing the windows of several sources in the ratio of their weights, and leaving out repeated ones."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain

from jaxplain.corpora.cutting import Window


class Mixture(grain.IterDataset[Window]):
    """Windows of all parts, each part's share as its weight says at any point of the way.

    When a part has no more, the mixture ends, or goes on with the others. A window with exactly the tokens
    of an earlier one of whatever part is passed over in favour of its part's next one, if so asked.

    `exhausted` are the parts that the latest iterator found at their end, and `repeated` counts the
    windows that it passed over.
    """

    def __init__(
        self,
        parts: Sequence[grain.IterDataset[Window]],
        *,
        weights: Sequence[float],
        go_on: bool = False,
        deduplicate: bool = False,
    ):
        super().__init__(parts)
        # As Grain's own mixing does it, which knows no other way than to end with the first part.
        self.shares = [int(weight * (100 / min(weights))) for weight in weights]
        self.go_on, self.deduplicate = go_on, deduplicate
        self.exhausted: set[int] = set()
        self.repeated = 0

    def __iter__(self) -> grain.DatasetIterator[Window]:
        self.exhausted, self.repeated = set(), 0
        return _MixtureIterator(self, [iter(part) for part in self._parents])


class _MixtureIterator(grain.DatasetIterator[Window]):
    """`_turns` counts the windows since the parts that take turns were last fewer."""

    def __init__(self, mixture: Mixture, parts: Sequence[grain.DatasetIterator[Window]]):
        super().__init__(parts)
        self._mixture = mixture
        self._turns = 0
        self._seen: set[bytes] = set()

    def __next__(self) -> Window:
        mixture = self._mixture
        while not self._ended():
            left = [part for part in range(len(self._parents)) if part not in mixture.exhausted]
            part = left[_whose_turn(self._turns, [mixture.shares[part] for part in left])]
            window = self._next_of(part)
            if window is not None:
                self._turns += 1
                return window
            mixture.exhausted.add(part)
            self._turns = 0
        raise StopIteration

    def _ended(self) -> bool:
        enough = len(self._parents) if self._mixture.go_on else 1
        return len(self._mixture.exhausted) >= enough

    def _next_of(self, part: int) -> Window | None:
        """The part's next window, or its next new one; None at its end."""
        for window in self._parents[part]:
            if not self._mixture.deduplicate:
                return window
            digest = hashlib.blake2b(window.tokens_T.tobytes(), digest_size=16).digest()
            if digest not in self._seen:
                self._seen.add(digest)
                return window
            self._mixture.repeated += 1
        return None

    def get_state(self) -> dict[str, Any]:
        return {
            "parts": [part.get_state() for part in self._parents],
            "turns": self._turns,
            "exhausted": sorted(self._mixture.exhausted),
            "repeated": self._mixture.repeated,
            "seen": sorted(self._seen),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        for part, part_state in zip(self._parents, state["parts"], strict=True):
            part.set_state(part_state)
        self._turns, self._seen = state["turns"], set(state["seen"])
        self._mixture.exhausted, self._mixture.repeated = set(state["exhausted"]), state["repeated"]


def _whose_turn(turn: int, shares: Sequence[int]) -> int:
    """Which of several parts gives window number `turn`, so that every prefix has their shares to within one.

    The first part's windows are spread evenly over all, the second's over what the first leaves, and so on.
    """
    rest, before, after = sum(shares), turn, turn + 1
    for part, share in enumerate(shares):
        others_before, others_after = (count * (rest - share) // rest for count in (before, after))
        if others_before == others_after:
            return part
        rest, before, after = rest - share, others_before, others_after
    raise AssertionError("every turn is someone's")
