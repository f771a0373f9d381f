"""Where text comes from: Hugging Face datasets, local files and packaged corpora, as documents."""

import dataclasses
import glob
import json
from typing import Any, Literal, Protocol, runtime_checkable

import datasets
import datasets.exceptions
import jinja2
from transformers import PreTrainedTokenizerBase

from jaxplain.configs.extraction import SourceConfig
from jaxplain.corpora.hashing import text_hash
from jaxplain.corpora.packaged import PACKAGED_CORPORA, packaged_file
from jaxplain.errors import JaxplainError, first_line

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

    def document(self, row: int, tokenizer: PreTrainedTokenizerBase) -> Document:
        """A row's document; a chat is laid out by the tokenizer's chat template, null is no text.

        Raises JaxplainError where the row's column holds something else.
        """
        value = self.records[row][self.column]
        if value is None:
            return Document(id=0, text="")
        if self.layout == "text":
            if not isinstance(value, str):
                raise JaxplainError(
                    f"column {self.column!r} of {self.name} holds {type(value).__name__}s, not text "
                    f"(row {row}: {value!r:.60}); choose another text_column."
                )
            return Document(id=text_hash(value), text=value)
        if not _is_chat(value):
            raise JaxplainError(
                f"column {self.column!r} of {self.name} must hold lists of {{role, content}}, but row "
                f"{row} is {value!r:.60}; choose another chat_column, or convert the data."
            )
        try:
            text = tokenizer.apply_chat_template(value, tokenize=False)
        except jinja2.TemplateError as error:
            raise JaxplainError(
                f"the subject's chat template refuses row {row} of {self.name}: {first_line(error)}; "
                "convert the data, or use another subject."
            ) from error
        return Document(id=text_hash(json.dumps(value, sort_keys=True, default=str)), text=str(text))


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


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value
    )


def _load(config: SourceConfig) -> datasets.Dataset:
    # What it logs on the way to an exception, the exception says too.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
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
            f"the dataset {config.dataset!r} could not be found: {first_line(error)}. Check its "
            f"name, or use one of {', '.join(_LOCAL_FORMATS)} with data_files for local files."
        ) from error
    except (ConnectionError, OSError) as error:
        raise JaxplainError(
            f"the dataset {config.dataset!r} could not be fetched: {first_line(error)}. "
            "Check the network, or the access token for a gated dataset."
        ) from error
    except Exception as error:  # each of the readers behind `datasets` has errors of its own
        raise JaxplainError(
            f"the dataset {config.name!r} could not be read: {first_line(error.__cause__ or error)}."
        ) from error
