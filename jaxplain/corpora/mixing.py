"""Mixing the windows of several sources in the ratio of their weights, and leaving out repeated ones."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from jaxplain.store.writer import SequenceBlock, joined_blocks

_BLOCK = 1024  # windows


class Mixture(grain.IterDataset[SequenceBlock]):
    """Blocks of `size` windows of all parts, each part's share as its weight says at any point of the way.

    They end after `limit` windows (0: no limit). When a part has no more before that, the mixture ends, or
    goes on with the others. A window with exactly the tokens of an earlier one of whatever part is passed
    over in favour of its part's next one, if so asked.

    `exhausted` are the parts that the latest iterator found at their end, and `repeated` counts the
    windows that it passed over.
    """

    def __init__(
        self,
        parts: Sequence[grain.IterDataset[SequenceBlock]],
        *,
        weights: Sequence[float],
        limit: int = 0,
        go_on: bool = False,
        deduplicate: bool = False,
        size: int = _BLOCK,
    ):
        super().__init__(parts)
        # As Grain's own mixing does it, which knows no other way than to end with the first part.
        self.shares = [int(weight * (100 / min(weights))) for weight in weights]
        self.limit, self.go_on, self.deduplicate, self.size = limit, go_on, deduplicate, size
        self.exhausted: set[int] = set()
        self.repeated = 0

    def __iter__(self) -> grain.DatasetIterator[SequenceBlock]:
        self.exhausted, self.repeated = set(), 0
        return _MixtureIterator(self, [iter(part) for part in self._parents])


class _MixtureIterator(grain.DatasetIterator[SequenceBlock]):
    """`_turns` counts the windows since the parts that take turns were last fewer, `_given` all of them."""

    def __init__(self, mixture: Mixture, parts: Sequence[grain.DatasetIterator[SequenceBlock]]):
        super().__init__(parts)
        self._mixture = mixture
        self._rows = [_Rows(part) for part in parts]
        self._turns = self._given = 0
        self._seen: set[bytes] = set()

    def __next__(self) -> SequenceBlock:
        mixture = self._mixture
        size = min(mixture.size, mixture.limit - self._given) if mixture.limit else mixture.size
        picked = list(itertools.islice(self._picked(), size))
        if not picked:
            raise StopIteration
        self._given += len(picked)
        return _gathered(picked)

    def _picked(self) -> Iterator["_Row"]:
        """Window after window, as a row of a part's block."""
        mixture = self._mixture
        while not self._ended():
            left = [part for part in range(len(self._rows)) if part not in mixture.exhausted]
            shares = [mixture.shares[part] for part in left]
            while (row := self._next_of(part := left[_whose_turn(self._turns, shares)])) is not None:
                self._turns += 1
                yield row
            mixture.exhausted.add(part)
            self._turns = 0

    def _ended(self) -> bool:
        enough = len(self._rows) if self._mixture.go_on else 1
        return len(self._mixture.exhausted) >= enough

    def _next_of(self, part: int) -> "_Row | None":
        """The part's next window, or its next new one; None at its end."""
        for block, number in self._rows[part]:
            if not self._mixture.deduplicate:
                return block, number
            digest = hashlib.blake2b(block.token_NT[number].tobytes(), digest_size=16).digest()
            if digest not in self._seen:
                self._seen.add(digest)
                return block, number
            self._mixture.repeated += 1
        return None

    def get_state(self) -> dict[str, Any]:
        return {
            "parts": [rows.get_state() for rows in self._rows],
            "turns": self._turns,
            "given": self._given,
            "exhausted": sorted(self._mixture.exhausted),
            "repeated": self._mixture.repeated,
            "seen": sorted(self._seen),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        for rows, part_state in zip(self._rows, state["parts"], strict=True):
            rows.set_state(part_state)
        self._turns, self._given, self._seen = state["turns"], state["given"], set(state["seen"])
        self._mixture.exhausted, self._mixture.repeated = set(state["exhausted"]), state["repeated"]


_Row = tuple[SequenceBlock, int]


class _Rows:
    """The rows of a part's blocks one by one; the state is the part's before a block, and the rows taken."""

    def __init__(self, blocks: grain.DatasetIterator[SequenceBlock]):
        self._blocks = blocks
        self._block: SequenceBlock | None = None
        self._taken = 0
        self._before: Any = None

    def __iter__(self) -> Iterator[_Row]:
        return self

    def __next__(self) -> _Row:
        while self._block is None or self._taken == len(self._block):
            self._before, self._block, self._taken = self._blocks.get_state(), None, 0
            self._block = next(self._blocks)
        self._taken += 1
        return self._block, self._taken - 1

    def get_state(self) -> dict[str, Any]:
        held = self._block is not None
        return {"part": self._before if held else self._blocks.get_state(), "taken": self._taken}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._blocks.set_state(state["part"])
        self._block, self._taken = None, 0
        for _ in itertools.islice(self, state["taken"]):
            pass


def _gathered(picked: Sequence[_Row]) -> SequenceBlock:
    """A block of rows of other blocks, which are few, and of which successive rows are wanted."""
    places: dict[int, list[int]] = {}
    blocks = {id(block): block for block, _ in picked}
    for place, (block, _) in enumerate(picked):
        places.setdefault(id(block), []).append(place)
    taken = [
        block[np.array([picked[place][1] for place in places[identity]])]
        for identity, block in blocks.items()
    ]
    order = np.concatenate([places[identity] for identity in blocks])
    return joined_blocks(taken)[np.argsort(order)]


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
