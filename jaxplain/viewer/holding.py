"""Searching for tokens anywhere in exemplars, by the table of tokens: no index, and no activations."""

import collections
import threading

import numpy as np
from jaxtyping import Bool, Int

from jaxplain.store.reader import Split
from jaxplain.viewer.peaks import RANKS

_SEARCHES = 8
_BLOCK = 2**17
"""Sequences that are looked at together: some 50 MB of tokens for windows of 96."""


class Holding:
    """The sequences of a split's first ranks, 40 bytes for every neuron; read when first asked for."""

    def __init__(self, split: Split):
        self._split, self._lock = split, threading.Lock()
        self._sequences: dict[str, np.ndarray] = {}
        self._found: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()

    def matches(
        self, kind: str, wanted_V: Bool[np.ndarray, "V"], place_N: Int[np.ndarray, "N"]
    ) -> Bool[np.ndarray, "N"]:
        """Whether one of the first ranks of every neuron has one of some tokens, wherever it stands in it."""
        # No exemplar is -1, and what stands last is never wanted.
        has_S = np.append(self._kept(wanted_V), False)
        return np.any(has_S[self._of_kind(kind)[place_N]], axis=1)

    def _of_kind(self, kind: str) -> Int[np.ndarray, "P R"]:
        with self._lock:
            if kind not in self._sequences:
                ranks = slice(min(RANKS, self._split.rank_count(kind)))
                sequences = self._split.whole_array(f"{kind}/sequence", last=ranks)
                self._sequences[kind] = sequences.reshape(-1, sequences.shape[-1])
        return self._sequences[kind]

    def _kept(self, wanted_V: Bool[np.ndarray, "V"]) -> Bool[np.ndarray, "S"]:
        """As `_with_any`, which is kept for the last searches: pages and other orders ask for the same."""
        key = np.packbits(wanted_V).tobytes()
        with self._lock:
            if key not in self._found:
                self._found[key] = self._with_any(wanted_V)
                if len(self._found) > _SEARCHES:
                    self._found.popitem(last=False)
            return self._found[key]

    def _with_any(self, wanted_V: Bool[np.ndarray, "V"]) -> Bool[np.ndarray, "S"]:
        """Which sequences have one of some tokens."""
        wanted_V = np.append(wanted_V, False)
        count = self._split.sequence_count
        blocks = [np.arange(at, min(at + _BLOCK, count)) for at in range(0, count, _BLOCK)]
        found = [wanted_V[self._split.tokens(rows)].any(axis=1) for rows in blocks]
        return np.concatenate([np.zeros(0, bool), *found])
