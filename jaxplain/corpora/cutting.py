"""Cutting tokenised documents into windows: packed end to end, or one window of every document."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from jaxplain.corpora.hashing import lottery

PADDING = -1
"""The token id of a place without a token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """One sequence for the subject, and where it comes from.

    `tokens_T` ends in PADDING where the text ran out. `corpus` numbers the source; `document` and
    `start` are the id of the document that the first text token belongs to, and that token's
    number within it; `length` counts the text tokens (not padding, not the BOS or chat prefix before them).
    """

    tokens_T: Int[np.ndarray, "T"]
    corpus: int
    document: int
    start: int
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenisedDocument:
    """A document's id and its tokens."""

    id: int
    tokens: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """What the windows of a source share: its `number`, their `prefix`, and the `room` for text after it."""

    number: int
    prefix: list[int]
    room: int

    def window(self, text: list[int], *, document: int, start: int) -> Window:
        """A window of up to `room` tokens of text."""
        tokens_T = np.full(len(self.prefix) + self.room, PADDING, np.int32)
        tokens_T[: len(self.prefix) + len(text)] = self.prefix + text
        return Window(tokens_T=tokens_T, corpus=self.number, document=document, start=start, length=len(text))


def head_window(document: TokenisedDocument, frame: Frame) -> Window:
    """The first tokens of a document."""
    return frame.window(document.tokens[: frame.room], document=document.id, start=0)


def random_window(document: TokenisedDocument, frame: Frame, *, seed: int) -> Window:
    """A piece of a document, drawn by the seed and the document's id, the same in whatever run it is seen."""
    places = max(len(document.tokens) - frame.room, 0) + 1
    # A number of its own, lest the draw for random exemplars favour certain pieces.
    drawn = lottery(seed ^ _RANDOM_WINDOWS, np.array([document.id]), np.array([0]))
    start = min(int(float(drawn[0]) * places), places - 1)
    piece = document.tokens[start : start + frame.room]
    return frame.window(piece, document=document.id, start=start)


_RANDOM_WINDOWS = 0x72616E646F6D


class PackedWindows(grain.IterDataset[Window]):
    """Documents joined end to end and cut every `stride` tokens into windows."""

    def __init__(
        self,
        documents: grain.IterDataset[TokenisedDocument],
        *,
        frame: Frame,
        stride: int,
    ):
        super().__init__(documents)
        self.frame, self.stride = frame, stride

    def __iter__(self) -> grain.DatasetIterator[Window]:
        return _PackedWindowsIterator(self, iter(self._parent))


class _PackedWindowsIterator(grain.DatasetIterator[Window]):
    """Holds the documents, or rests of them, that the next window is cut from.

    `_joined` lists them as [id, position of the first remaining token, remaining tokens].
    `_fresh` counts the tokens of `_joined`, from its end, that no window has shown yet.
    """

    def __init__(self, dataset: PackedWindows, documents: grain.DatasetIterator[TokenisedDocument]):
        super().__init__(documents)
        self._dataset = dataset
        self._joined: list[tuple[int, int, list[int]]] = []
        self._fresh = 0

    def __next__(self) -> Window:
        room = self._dataset.frame.room
        while sum(len(tokens) for _, _, tokens in self._joined) < room:
            document = next(self._parent, None)
            if document is None:
                break
            if document.tokens:
                self._joined.append((document.id, 0, document.tokens))
                self._fresh += len(document.tokens)
        if self._fresh == 0:
            raise StopIteration
        text = list(itertools.islice(itertools.chain.from_iterable(t for _, _, t in self._joined), room))
        document, start, _ = self._joined[0]
        window = self._dataset.frame.window(text, document=document, start=start)
        self._advance(len(text))
        return window

    def _advance(self, shown: int) -> None:
        held = sum(len(tokens) for _, _, tokens in self._joined)
        self._fresh = min(self._fresh, held - shown)
        step = self._dataset.stride
        while step and self._joined:
            document, start, tokens = self._joined[0]
            taken = min(step, len(tokens))
            step -= taken
            self._joined[0] = (document, start + taken, tokens[taken:])
            if taken == len(tokens):
                self._joined.pop(0)

    def get_state(self) -> dict[str, Any]:
        joined = [[document, start, list(tokens)] for document, start, tokens in self._joined]
        return {"parent": self._parent.get_state(), "joined": joined, "fresh": self._fresh}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._joined = [(document, start, tokens) for document, start, tokens in state["joined"]]
        self._fresh = state["fresh"]
