"""From documents to windows of tokens: a deterministic Grain pipeline for each split.

documents --shuffle--> of this split --tokenise--> packed windows --mix sources by weight--> windows
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from jaxplain.configs.extraction import CorpusConfig
from jaxplain.corpora.hashing import split_of
from jaxplain.corpora.sources import Source

PADDING = -1
"""The token id of a place without a token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """One sequence for the subject, and where it comes from.

    `tokens_T` ends in PADDING where the text ran out. `corpus` numbers the source; `document` and
    `start` are the id of the document that the first text token belongs to, and that token's
    number within it; `length` counts the text tokens (not padding, not the leading BOS).
    """

    tokens_T: Int[np.ndarray, "T"]
    corpus: int
    document: int
    start: int
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TokenisedDocument:
    id: int
    tokens: list[int]


def windows_of_split(
    sources: Sequence[Source],
    config: CorpusConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
) -> grain.IterDataset[Window]:
    """The split's windows, each source's share as its weight says at any point of the way.

    They end when one source has no more, or never began where a source has no document in the split.
    """
    packed = [
        _packed_windows(source, number, config, split, tokenizer) for number, source in enumerate(sources)
    ]
    return grain.IterDataset.mix(packed, weights=[source.weight for source in sources])


def exhausted_source(windows: grain.IterDataset[Window], sources: Sequence[Source]) -> str | None:
    """The name of the source that ended windows of `windows_of_split`; None while none has."""
    for part, source in zip(windows.parents, sources, strict=True):
        if isinstance(part, PackedWindows) and part.exhausted:
            return source.name
    return None


def _as_list(token_id: Any) -> list[int]:
    """One of a tokenizer's special tokens, as a list; empty where it has none of the kind."""
    return [] if token_id is None else [int(token_id)]


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token, as a list, for a tokenizer that begins every text with one; else empty."""
    tokens = tokenizer("a")["input_ids"]
    begins = bool(tokens) and tokens[0] == tokenizer.bos_token_id
    return [tokens[0]] if begins else []


def _packed_windows(
    source: Source,
    number: int,
    config: CorpusConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
) -> grain.IterDataset[Window]:
    separator = _as_list(tokenizer.eos_token_id) if config.separator else []

    def tokenise(document: Any) -> _TokenisedDocument:
        encoding = tokenizer(document.text, add_special_tokens=False, verbose=False)
        tokens = [int(token) for token in encoding["input_ids"]]
        return _TokenisedDocument(id=document.id, tokens=tokens + separator)

    documents = (
        grain.MapDataset.range(len(source.records))
        .seed(config.seed)
        .shuffle()
        .map(lambda row: source.document(row, tokenizer))
        .filter(lambda document: bool(document.text) and split_of(document.id, config.splits) == split)
        .map(tokenise)
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64))
    )
    prefix = bos_prefix(tokenizer)
    room = config.sequence_length - len(prefix)
    stride = min(config.stride or room, room)
    return PackedWindows(documents, number=number, prefix=prefix, room=room, stride=stride)


class PackedWindows(grain.IterDataset[Window]):
    """Documents joined end to end and cut every `stride` tokens into windows of `room` tokens.

    `exhausted` tells whether an iterator has come to the end.
    """

    def __init__(
        self,
        documents: grain.IterDataset[_TokenisedDocument],
        *,
        number: int,
        prefix: list[int],
        room: int,
        stride: int,
    ):
        super().__init__(documents)
        self.number, self.prefix, self.room, self.stride = number, prefix, room, stride
        self.exhausted = False

    def __iter__(self) -> grain.DatasetIterator[Window]:
        return _PackedWindowsIterator(self, iter(self._parent))


class _PackedWindowsIterator(grain.DatasetIterator[Window]):
    """Holds the documents, or rests of them, that the next window is cut from.

    `_joined` lists them as [id, position of the first remaining token, remaining tokens].
    `_fresh` counts the tokens of `_joined`, from its end, that no window has shown yet.
    """

    def __init__(self, dataset: PackedWindows, documents: grain.DatasetIterator[_TokenisedDocument]):
        super().__init__(documents)
        self._dataset = dataset
        self._joined: list[tuple[int, int, list[int]]] = []
        self._fresh = 0

    def __next__(self) -> Window:
        room = self._dataset.room
        while sum(len(tokens) for _, _, tokens in self._joined) < room:
            document = next(self._parent, None)
            if document is None:
                break
            if document.tokens:
                self._joined.append((document.id, 0, document.tokens))
                self._fresh += len(document.tokens)
        if self._fresh == 0:
            self._dataset.exhausted = True
            raise StopIteration
        text = list(itertools.islice(itertools.chain.from_iterable(t for _, _, t in self._joined), room))
        document, start, _ = self._joined[0]
        prefix = self._dataset.prefix
        tokens_T = np.full(len(prefix) + room, PADDING, np.int32)
        tokens_T[: len(prefix) + len(text)] = prefix + text
        window = Window(
            tokens_T=tokens_T,
            corpus=self._dataset.number,
            document=document,
            start=start,
            length=len(text),
        )
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
