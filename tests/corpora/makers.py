"""Sources of made-up texts, corpus configs, and the windows that come of both."""

from jaxplain.configs.extraction import CorpusConfig, SourceConfig
from jaxplain.corpora.sources import Source
from jaxplain.corpora.windows import windows_of_split


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


def windows(sources, config, tokenizer, split="train"):
    return list(windows_of_split(sources, config, split, tokenizer))
