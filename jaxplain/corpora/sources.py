"""Where text comes from: Hugging Face datasets, local files and packaged corpora, as documents."""

import dataclasses
import glob
import json
from typing import Any, Literal, Protocol, runtime_checkable

import datasets
import datasets.exceptions
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedTokenizerBase

from jaxplain.configs import SourceConfig
from jaxplain.corpora.hashing import text_hash
from jaxplain.corpora.packaged import PACKAGED_CORPORA, packaged_file
from jaxplain.errors import JaxplainError

_LOCAL_FORMATS = ("json", "csv", "parquet", "text")


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
    """Records with random access, and which column of them to read how."""

    name: str
    weight: float
    records: Records
    column: str
    layout: Literal["text", "chat"]

    def document(self, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Document:
        """The record's document; a chat is laid out by the tokenizer's chat template."""
        value = record[self.column]
        if self.layout == "text":
            text = value or ""
            return Document(id=text_hash(text), text=text)
        text = tokenizer.apply_chat_template(value, tokenize=False)
        return Document(id=text_hash(json.dumps(value, sort_keys=True)), text=str(text))


def open_source(config: SourceConfig, tokenizer: PreTrainedTokenizerBase) -> Source:
    """Open a source. Raises JaxplainError where it, its files or its column cannot be had."""
    if config.preset is not None:
        if config.preset not in PACKAGED_CORPORA:
            raise JaxplainError(
                f"corpus.sources.preset is {config.preset!r}; known are {', '.join(PACKAGED_CORPORA)}."
            )
        packaged = PACKAGED_CORPORA[config.preset]
        records = _load(
            dataclasses.replace(
                config, preset=None, dataset="json", data_files=str(packaged_file(config.preset))
            )
        )
        column, layout = packaged.column, packaged.layout
    else:
        records = _load(config)
        column = config.chat_column or config.text_column or "text"
        layout = "chat" if config.chat_column else "text"
    if column not in (records.column_names or ()):
        raise JaxplainError(
            f"{config.name} has no column {column!r}; it has "
            f"{', '.join(records.column_names or ())}. Set text_column or chat_column."
        )
    if layout == "chat" and not getattr(tokenizer, "chat_template", None):
        raise JaxplainError(
            f"{config.name} is chat data, but the subject's tokenizer has no chat template; "
            "use a chat model as the subject, or plain text."
        )
    if len(records) == 0:
        raise JaxplainError(f"{config.name} holds no documents.")
    return Source(name=config.name, weight=config.weight, records=records, column=column, layout=layout)


def _load(config: SourceConfig) -> datasets.Dataset:
    options: dict[str, Any] = {}
    if config.dataset in _LOCAL_FORMATS:
        if config.data_files is None:
            raise JaxplainError(
                f"a {config.dataset} source needs corpus.sources.data_files, a path or a list of paths."
            )
        patterns = [config.data_files] if isinstance(config.data_files, str) else config.data_files
        for pattern in patterns:
            if "://" not in pattern and not glob.glob(pattern, recursive=True):
                raise JaxplainError(f"corpus.sources.data_files: no such file: {pattern}.")
        options["data_files"] = patterns
        if config.dataset == "csv":
            options["delimiter"] = config.delimiter
    elif config.data_files is not None:
        options["data_files"] = config.data_files
    try:
        return datasets.load_dataset(
            str(config.dataset),
            name=config.config,
            split=config.split,
            revision=config.revision,
            **options,
        )
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise JaxplainError(
            f"the dataset {config.dataset!r} could not be found: {_first_line(error)}. Check its "
            f"name, or use one of {', '.join(_LOCAL_FORMATS)} with data_files for local files."
        ) from error
    except (ConnectionError, HfHubHTTPError) as error:
        raise JaxplainError(
            f"the dataset {config.dataset!r} could not be fetched: {_first_line(error)}. "
            "Check the network, or the access token for a gated dataset."
        ) from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise JaxplainError(
            f"the dataset {config.name!r} could not be read: {_first_line(error.__cause__ or error)}."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
