"""From documents to windows of tokens: a deterministic Grain pipeline for each split.

documents --shuffle--> of this split --tokenise--> windows --mix sources by weight--> windows
"""

from collections.abc import Sequence
from typing import Any

import grain
from transformers import PreTrainedTokenizerBase

from jaxplain.configs.extraction import CorpusConfig
from jaxplain.corpora.cutting import (
    Frame,
    PackedWindows,
    TokenisedDocument,
    Window,
    head_window,
    random_window,
)
from jaxplain.corpora.hashing import split_of
from jaxplain.corpora.mixing import Mixture
from jaxplain.corpora.prefixes import bos_prefix, chat_prefix
from jaxplain.corpora.sources import Source
from jaxplain.errors import JaxplainError


def windows_of_split(
    sources: Sequence[Source],
    config: CorpusConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Mixture:
    """The split's windows, each source's share as its weight says at any point of the way.

    They end as `config.when_exhausted` says, or never begin where a source that ends them has no document in
    the split.

    Raises JaxplainError where the chat prefix leaves no room for text.
    """
    parts = [
        _windows_of_source(source, number, config, split, tokenizer) for number, source in enumerate(sources)
    ]
    return Mixture(
        parts,
        weights=[source.weight for source in sources],
        go_on=config.when_exhausted == "continue",
        deduplicate=config.deduplicate,
    )


def _windows_of_source(
    source: Source,
    number: int,
    config: CorpusConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
) -> grain.IterDataset[Window]:
    packed = config.windows == "packed"
    separator = _as_list(tokenizer.eos_token_id) if config.separator and packed else []

    def tokenise(document: Any) -> TokenisedDocument:
        encoding = tokenizer(document.text, add_special_tokens=False, verbose=False)
        tokens = [int(token) for token in encoding["input_ids"]]
        return TokenisedDocument(id=document.id, tokens=tokens + separator)

    documents = (
        source.documents(tokenizer, seed=config.seed)
        .filter(lambda document: bool(document.text) and split_of(document.id, config.splits) == split)
        .map(tokenise)
    )
    if isinstance(documents, grain.MapDataset):
        documents = documents.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64))
    prefix = prefix_of(source, config, tokenizer)
    frame = Frame(number=number, prefix=prefix, room=config.sequence_length - len(prefix))
    if packed:
        stride = min(config.stride or frame.room, frame.room)
        return PackedWindows(documents, frame=frame, stride=stride)
    some = documents.filter(lambda document: bool(document.tokens))
    if config.windows == "head":
        return some.map(lambda document: head_window(document, frame))
    return some.map(lambda document: random_window(document, frame, seed=config.seed))


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
