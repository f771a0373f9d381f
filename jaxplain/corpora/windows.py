"""From records to windows of tokens: a deterministic pipeline for each split.

blocks of records --of this split, tokenise, cut--> blocks of windows --mix sources by weight--> windows
                    in workers, but for the cutting of packed windows
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import grain
import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from jaxplain.configs.extraction import CorpusConfig
from jaxplain.corpora.cutting import (
    Frame,
    PackedWindows,
    TokenisedDocuments,
    end_to_end,
    head_windows,
    random_windows,
)
from jaxplain.corpora.mixing import Mixture
from jaxplain.corpora.prefixes import bos_prefix, chat_prefix
from jaxplain.corpora.records import RecordBlock
from jaxplain.corpora.sources import Source
from jaxplain.corpora.workers import Work, in_this_process
from jaxplain.errors import JaxplainError
from jaxplain.store.writer import SequenceBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What all work on blocks of the corpus shares: its sources, without their streams, and the tokenizer."""

    sources: tuple[Source, ...]
    tokenizer: PreTrainedTokenizerBase


def reading(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> Reading:
    """What workers for these sources are to be given."""
    return Reading(sources=tuple(source.without_stream() for source in sources), tokenizer=tokenizer)


def sequences_to_cut(sources: Sequence[Source], config: CorpusConfig, *, splits: int) -> int | None:
    """How many sequences there will be, or as many as there are documents, if so much is known beforehand."""
    wanted = config.max_sequences or config.expected_sequences
    if wanted:
        return wanted * splits
    sizes = [source.size for source in sources]
    return None if None in sizes else sum(size for size in sizes if size)


def windows_of_split(
    sources: Sequence[Source],
    config: CorpusConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    work: Work | None = None,
) -> Mixture:
    """The split's windows in blocks, each source's share as its weight says at any point of the way.

    They end after `config.max_sequences`, or as `config.when_exhausted` says, or never begin where a source
    that ends them has no document in the split. `work` is that of workers which were given the `reading` of
    these sources and tokenizer; without it all is done here. The windows are the same.

    Raises JaxplainError where the chat prefix leaves no room for text.
    """
    work = work or in_this_process(reading(sources, tokenizer))
    parts = [
        _windows_of_source(source, number, config, split, tokenizer, work)
        for number, source in enumerate(sources)
    ]
    return Mixture(
        parts,
        weights=[source.weight for source in sources],
        limit=config.max_sequences,
        go_on=config.when_exhausted == "continue",
        deduplicate=config.deduplicate,
    )


def _windows_of_source(
    source: Source,
    number: int,
    config: CorpusConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    work: Work,
) -> grain.IterDataset[SequenceBlock]:
    prefix = prefix_of(source, config, tokenizer)
    frame = Frame(number=number, prefix=prefix, room=config.sequence_length - len(prefix))
    cut = functools.partial(_cut_block, config, split, frame)
    blocks = _Worked(lambda first: work(cut, source.blocks(seed=config.seed, first=first)))
    if config.windows != "packed":
        return blocks
    return PackedWindows(blocks, frame=frame, stride=min(config.stride or frame.room, frame.room))


def _cut_block(
    config: CorpusConfig, split: str, frame: Frame, shared: Reading, block: RecordBlock
) -> SequenceBlock | TokenisedDocuments:
    """The windows of a block's documents; of packed ones the tokens, since they do not end with a block."""
    source, tokenizer = shared.sources[frame.number], shared.tokenizer
    documents = source.documents(block, tokenizer, splits=config.splits, split=split)
    packed = config.windows == "packed"
    separator = _as_list(tokenizer.eos_token_id) if config.separator and packed else []
    tokens = tokenise([document.text for document in documents], tokenizer)
    joined = end_to_end([document.id for document in documents], tokens, separator=separator)
    if config.windows == "head":
        return head_windows(joined, frame)
    return joined if packed else random_windows(joined, frame, seed=config.seed)


def tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Int[np.ndarray, "_"]]:
    """The token ids of each text, without any special tokens around it."""
    found = []
    for some in _batches(texts):
        encoding = tokenizer(
            some,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        found += [np.array(ids, np.int32) for ids in cast(list[list[int]], encoding["input_ids"])]
    return found


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts by batches of not much more than so many characters, since encodings take much memory."""
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


_CHARACTERS = 2**20


class _Worked(grain.IterDataset[Any]):
    """What becomes of a source's blocks; `results` gives it from any block on."""

    def __init__(self, results: Callable[[int], Iterator[Any]]):
        super().__init__()
        self.results = results

    def __iter__(self) -> grain.DatasetIterator[Any]:
        return _WorkedIterator(self)


class _WorkedIterator(grain.DatasetIterator[Any]):
    def __init__(self, dataset: _Worked):
        super().__init__()
        self._dataset = dataset
        self._given = 0
        self._results: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._results is None:
            self._results = self._dataset.results(self._given)
        result = next(self._results)
        self._given += 1
        return result

    def get_state(self) -> dict[str, Any]:
        return {"given": self._given}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._given, self._results = state["given"], None


def prefix_of(source: Source, config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that every window of the source begins with.

    Raises JaxplainError where a chat prefix is asked for, and there is none or it leaves no room for text.
    """
    if not config.chat_prefix or source.layout == "chat":
        return bos_prefix(tokenizer)
    prefix = chat_prefix(tokenizer)
    if len(prefix) >= config.sequence_length:
        raise JaxplainError(
            f"corpus.sequence_length is {config.sequence_length}, but the subject's chat prefix alone takes "
            f"{len(prefix)} tokens; give more, or set corpus.chat_prefix to false."
        )
    return prefix


def _as_list(token_id: Any) -> list[int]:
    """One of a tokenizer's special tokens, as a list; empty where it has none of the kind."""
    return [] if token_id is None else [int(token_id)]
