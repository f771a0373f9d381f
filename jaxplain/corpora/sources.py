"""Where text comes from: Hugging Face datasets, local files and packaged corpora, as documents."""

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import datasets
import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxplain.configs.extraction import SourceConfig
from jaxplain.corpora.hashing import splits_of, text_hash
from jaxplain.corpora.loading import explain_failure, load_records, no_documents
from jaxplain.corpora.presets import resolve
from jaxplain.corpora.records import RecordBlock, row_blocks, stream_blocks
from jaxplain.errors import JaxplainError, first_line

_SAMPLED = 64  # records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A text as the subject will read it. `id` is a hash of its content, the same in any run."""

    id: int
    text: str


@runtime_checkable
class Records(Protocol):
    """Rows by number, each a mapping from column to value: a `datasets.Dataset`, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Records with random access or a stream of them, and which column of them to read how.

    `shuffle_buffer` is among how many of a stream's records their order is drawn, and `failed` what is to
    be said where the stream breaks.
    """

    name: str
    weight: float
    records: Records | datasets.IterableDataset
    column: str
    layout: Literal["text", "chat"]
    shuffle_buffer: int = 0
    failed: Callable[[Exception], JaxplainError] = JaxplainError

    @property
    def size(self) -> int | None:
        """How many records there are; None for a stream."""
        return None if isinstance(self.records, datasets.IterableDataset) else len(self.records)

    def sample(self) -> list[int]:
        """How many records there are and the sum of the bits of some; of a stream nothing."""
        if not self.size:
            return []
        rows = sorted({place * (self.size - 1) // (_SAMPLED - 1) for place in range(_SAMPLED)})
        return [self.size, zlib.crc32(repr(self._values(rows)).encode())]

    def blocks(self, *, seed: int, first: int = 0) -> Iterator[RecordBlock]:
        """All records from block number `first` on, in an order drawn by the seed."""
        if not isinstance(self.records, datasets.IterableDataset):
            return row_blocks(len(self.records), seed=seed, first=first)
        stream = self.records
        if self.shuffle_buffer:
            stream = stream.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
        return stream_blocks(stream, self.column, failed=self.failed, first=first)

    def without_stream(self) -> "Source":
        """The source as other processes can be given it; the blocks of a stream hold their records."""
        stream = isinstance(self.records, datasets.IterableDataset)
        return dataclasses.replace(self, records=()) if stream else self

    def documents(
        self,
        block: RecordBlock,
        tokenizer: PreTrainedTokenizerBase,
        *,
        splits: Mapping[str, float],
        split: str,
    ) -> list[Document]:
        """The documents of a block that are of the split.

        A chat is laid out by the tokenizer's chat template; null and empty texts are left out.

        Raises JaxplainError where the column holds something else.
        """
        values = self._values(block.rows) if block.values is None else block.values
        some = [(row, value) for row, value in zip(block.rows, values, strict=True) if value is not None]
        id_N = np.array([self._id(row, value) for row, value in some], np.int64)
        chosen = np.flatnonzero(splits_of(id_N, splits) == list(splits).index(split))
        documents = [
            Document(id=int(id_N[place]), text=self._text(*some[place], tokenizer)) for place in chosen
        ]
        return [document for document in documents if document.text]

    def _values(self, rows: list[int]) -> list[Any]:
        if isinstance(self.records, datasets.Dataset):
            return self.records[rows][self.column]
        return [self.records[row][self.column] for row in rows]  # type: ignore[index]

    def _id(self, row: int, value: Any) -> int:
        if self.layout == "text":
            if not isinstance(value, str):
                raise JaxplainError(
                    f"column {self.column!r} of {self.name} holds {type(value).__name__}s, not text "
                    f"(row {row}: {value!r:.60}); choose another text_column."
                )
            return text_hash(value)
        if not _is_chat(value):
            raise JaxplainError(
                f"column {self.column!r} of {self.name} must hold lists of {{role, content}}, but row "
                f"{row} is {value!r:.60}; choose another chat_column, or convert the data."
            )
        return text_hash(json.dumps(value, sort_keys=True, default=str))

    def _text(self, row: int, value: Any, tokenizer: PreTrainedTokenizerBase) -> str:
        if self.layout == "text":
            return value
        try:
            return str(tokenizer.apply_chat_template(value, tokenize=False))
        except jinja2.TemplateError as error:
            raise JaxplainError(
                f"the subject's chat template refuses row {row} of {self.name}: {first_line(error)}; "
                "convert the data, or use another subject."
            ) from error


def open_source(
    config: SourceConfig, tokenizer: PreTrainedTokenizerBase, *, valueeval_dir: str | None = None
) -> Source:
    """Open a source. Raises JaxplainError where it, its files or its column cannot be had."""
    name, weight = config.name, config.weight
    if config.preset is not None:
        config = resolve(config, folder=valueeval_dir)
    records = load_records(config)
    failed = functools.partial(explain_failure, config=config)
    columns = _columns(records, failed)
    if columns is None:
        raise no_documents(name, config.split)
    column = config.chat_column or config.text_column or "text"
    if column not in columns:
        raise JaxplainError(
            f"{name} has no column {column!r}; it has {', '.join(map(_shown, columns))}. "
            f"Set text_column or chat_column{', or the delimiter' if config.dataset == 'csv' else ''}."
        )
    if config.chat_column and not getattr(tokenizer, "chat_template", None):
        raise JaxplainError(
            f"{name} is chat data, but the subject's tokenizer has no chat template; "
            "use a chat model as the subject, or plain text."
        )
    return Source(
        name=name,
        weight=weight,
        # The others would be read from disk with it.
        records=records.select_columns([column]) if isinstance(records, datasets.Dataset) else records,
        column=column,
        layout="chat" if config.chat_column else "text",
        shuffle_buffer=config.shuffle_buffer,
        failed=failed,
    )


def _columns(
    records: datasets.Dataset | datasets.IterableDataset, failed: Callable[[Exception], JaxplainError]
) -> list[str] | None:
    """The names of the columns; None where there are no records."""
    if isinstance(records, datasets.Dataset):
        # A file without any record has no columns either, or some; both are no records.
        return list(records.column_names or ()) if len(records) else None
    try:
        first = next(iter(records), None)
    except Exception as error:
        raise failed(error) from error
    return None if first is None else list(first)


def _shown(column: str) -> str:
    return column.encode("unicode_escape").decode() if not column.isprintable() else column


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value
    )
