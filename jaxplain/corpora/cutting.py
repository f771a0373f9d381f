"""Cutting tokenised documents into windows: packed end to end, or one window of every document."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from jaxplain.corpora.hashing import lottery
from jaxplain.store.writer import SequenceBlock

PADDING = -1
"""The token id of a place without a token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenisedDocuments:
    """Documents end to end: all their tokens, the place at which each one begins, and their ids.

    A place below 0 is of a document whose first tokens are not there any more.
    """

    token_M: Int[np.ndarray, "M"]
    place_N: Int[np.ndarray, "N"]
    document_N: Int[np.ndarray, "N"]

    @property
    def length_N(self) -> Int[np.ndarray, "N"]:
        """How many tokens of each document there are."""
        return np.diff(np.maximum(self.place_N, 0), append=len(self.token_M))

    def after(self, tokens: int) -> "TokenisedDocuments":
        """What remains without so many of the first tokens."""
        begun = max(int(np.searchsorted(self.place_N, tokens, side="right")) - 1, 0)
        return TokenisedDocuments(
            token_M=self.token_M[tokens:],
            place_N=self.place_N[begun:] - tokens,
            document_N=self.document_N[begun:],
        )


def end_to_end(
    ids: Sequence[int], tokens: Sequence[Int[np.ndarray, "_"]], *, separator: Sequence[int] = ()
) -> TokenisedDocuments:
    """Documents of these ids and tokens, each followed by the separator."""
    after = np.array(separator, np.int32)
    ends = np.cumsum([0, *(len(its) + len(after) for its in tokens)], dtype=np.int64)
    pieces = [piece for its in tokens for piece in (its, after)]
    return TokenisedDocuments(
        token_M=np.concatenate([np.empty(0, np.int32), *pieces]),
        place_N=ends[:-1],
        document_N=np.array(ids, np.int64),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """What the windows of a source share: its `number`, their `prefix`, and the `room` for text after it."""

    number: int
    prefix: list[int]
    room: int

    def cut(
        self,
        documents: TokenisedDocuments,
        *,
        place_W: Int[np.ndarray, "W"],
        length_W: Int[np.ndarray, "W"],
        begun_W: Int[np.ndarray, "W"],
    ) -> SequenceBlock:
        """Windows of the tokens from `place_W` on, which are of documents number `begun_W`."""
        place_T, before = np.arange(self.room), len(self.prefix)
        tokens_WT = np.full((len(place_W), before + self.room), PADDING, np.int32)
        tokens_WT[:, :before] = self.prefix
        inside_WT = place_T < length_W[:, None]
        tokens_WT[:, before:][inside_WT] = documents.token_M[(place_W[:, None] + place_T)[inside_WT]]
        return SequenceBlock(
            token_NT=tokens_WT,
            corpus_N=np.full(len(place_W), self.number, np.int32),
            document_N=documents.document_N[begun_W],
            start_N=(place_W - documents.place_N[begun_W]).astype(np.int32),
            length_N=length_W.astype(np.int32),
        )


def head_windows(documents: TokenisedDocuments, frame: Frame) -> SequenceBlock:
    """The first tokens of every document that has any."""
    some_W = np.flatnonzero(documents.length_N)
    length_W = np.minimum(documents.length_N[some_W], frame.room)
    return frame.cut(documents, place_W=documents.place_N[some_W], length_W=length_W, begun_W=some_W)


def random_windows(documents: TokenisedDocuments, frame: Frame, *, seed: int) -> SequenceBlock:
    """A piece of every document, drawn by the seed and the document's id, the same in whatever run."""
    some_W = np.flatnonzero(documents.length_N)
    length_W = np.minimum(documents.length_N[some_W], frame.room)
    starts_W = documents.length_N[some_W] - length_W + 1
    # A number of its own, lest the draw for random exemplars favour certain pieces.
    drawn_W = lottery(seed ^ _RANDOM_WINDOWS, documents.document_N[some_W], np.zeros_like(some_W))
    start_W = np.minimum((drawn_W.astype(np.float64) * starts_W).astype(np.int64), starts_W - 1)
    place_W = documents.place_N[some_W] + start_W
    return frame.cut(documents, place_W=place_W, length_W=length_W, begun_W=some_W)


_RANDOM_WINDOWS = 0x72616E646F6D


class PackedWindows(grain.IterDataset[SequenceBlock]):
    """Documents joined end to end and cut every `stride` tokens into windows."""

    def __init__(
        self,
        documents: grain.IterDataset[TokenisedDocuments],
        *,
        frame: Frame,
        stride: int,
    ):
        super().__init__(documents)
        self.frame, self.stride = frame, stride

    def __iter__(self) -> grain.DatasetIterator[SequenceBlock]:
        return _PackedWindowsIterator(self, iter(self._parent))


class _PackedWindowsIterator(grain.DatasetIterator[SequenceBlock]):
    """Holds the documents, or rests of them, that the next window is cut from.

    `_shown` of their first tokens stand in an earlier window too.
    """

    def __init__(self, dataset: PackedWindows, documents: grain.DatasetIterator[TokenisedDocuments]):
        super().__init__(documents)
        self._dataset = dataset
        self._held, self._shown = end_to_end([], []), 0

    def __next__(self) -> SequenceBlock:
        room, stride = self._dataset.frame.room, self._dataset.stride
        while len(self._held.token_M) < room:
            documents = next(self._parent, None)
            if documents is None:
                return self._last()
            self._held = _joined(self._held, documents)
        windows = (len(self._held.token_M) - room) // stride + 1
        block = self._cut(np.arange(windows) * stride, np.full(windows, room))
        self._held, self._shown = self._held.after(windows * stride), room - stride
        return block

    def _last(self) -> SequenceBlock:
        rest = len(self._held.token_M)
        if rest <= self._shown:
            raise StopIteration
        block = self._cut(np.array([0]), np.array([rest]))
        self._held, self._shown = end_to_end([], []), 0
        return block

    def _cut(self, place_W: Int[np.ndarray, "W"], length_W: Int[np.ndarray, "W"]) -> SequenceBlock:
        # Where documents without tokens begin at a place too, it is the last one that has the token there.
        begun_W = np.searchsorted(self._held.place_N, place_W, side="right") - 1
        return self._dataset.frame.cut(self._held, place_W=place_W, length_W=length_W, begun_W=begun_W)

    def get_state(self) -> dict[str, Any]:
        held = {name: array.tolist() for name, array in vars(self._held).items()}
        return {"parent": self._parent.get_state(), "held": held, "shown": self._shown}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        held = {name: np.array(values, np.int64) for name, values in state["held"].items()}
        held["token_M"] = held["token_M"].astype(np.int32)
        self._held, self._shown = TokenisedDocuments(**held), state["shown"]


def _joined(first: TokenisedDocuments, second: TokenisedDocuments) -> TokenisedDocuments:
    return TokenisedDocuments(
        token_M=np.concatenate([first.token_M, second.token_M]),
        place_N=np.concatenate([first.place_N, second.place_N + len(first.token_M)]),
        document_N=np.concatenate([first.document_N, second.document_N]),
    )
