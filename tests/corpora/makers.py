"""Sources of made-up texts, corpus configs, and the documents and windows that come of both."""

from typing import NamedTuple

import numpy as np

from jaxplain.configs.extraction import CorpusConfig, SourceConfig
from jaxplain.corpora.records import RecordBlock
from jaxplain.corpora.sources import Source
from jaxplain.corpora.windows import windows_of_split

EVERYTHING = {"splits": {"all": 1.0}, "split": "all"}


class Window(NamedTuple):
    tokens_T: np.ndarray
    corpus: int
    document: int
    start: int
    length: int


def source(texts, name="made-up", weight=1.0):
    records = [{"text": text} for text in texts]
    return Source(name=name, weight=weight, records=records, column="text", layout="text")


def config(**fields):
    defaults = {
        "sources": (SourceConfig(preset="chitchat"),),
        "sequence_length": 16,
        "max_sequences": 0,
    }
    return CorpusConfig(**defaults | {"splits": {"train": 1.0}} | fields)


def rows_of(blocks):
    """The windows of blocks one by one."""
    for block in blocks:
        columns = (block.corpus_N, block.document_N, block.start_N, block.length_N)
        yield from map(Window, block.token_NT, *(column.tolist() for column in columns))


def windows(sources, config, tokenizer, split="train", work=None):
    return list(rows_of(windows_of_split(sources, config, split, tokenizer, work)))


def documents(opened, tokenizer, seed=0):
    """All documents of a source, in its order."""
    for block in opened.blocks(seed=seed):
        yield from opened.documents(block, tokenizer, **EVERYTHING)


def documents_of_rows(opened, tokenizer, rows):
    return opened.documents(RecordBlock(rows=list(rows)), tokenizer, **EVERYTHING)
