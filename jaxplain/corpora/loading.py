"""Opening Hugging Face datasets and local files, whole or as streams; what fails is said in one sentence."""

import glob
from typing import Any

import datasets
import datasets.exceptions

from jaxplain.configs.extraction import SourceConfig
from jaxplain.corpora.slices import cut_stream, slices
from jaxplain.errors import JaxplainError, first_line

_LOCAL_FORMATS = ("json", "csv", "parquet", "text")


def load_records(config: SourceConfig) -> datasets.Dataset | datasets.IterableDataset:
    """The records of a source that is no preset.

    Raises JaxplainError where the dataset, its revision, split or files cannot be had.
    """
    # What it logs on the way to an exception, the exception says too.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    options: dict[str, Any] = {"name": config.config, "revision": config.revision} | _file_options(config)
    try:
        if not config.streaming:
            return datasets.load_dataset(str(config.dataset), split=config.split, **options)
        parts = slices(config.split)
        streams = [
            cut_stream(_stream(str(config.dataset), part.split, options), part, config.name) for part in parts
        ]
        return streams[0] if len(streams) == 1 else datasets.concatenate_datasets(streams)
    except JaxplainError:
        raise
    except Exception as error:
        raise explain_failure(error, config) from error


def _stream(dataset: str, split: str, options: dict[str, Any]) -> datasets.IterableDataset:
    return datasets.load_dataset(dataset, split=split, streaming=True, **options)


def _file_options(config: SourceConfig) -> dict[str, Any]:
    if config.data_files is None:
        if config.dataset in _LOCAL_FORMATS:
            raise JaxplainError(
                f"a {config.dataset} source needs corpus.sources.data_files, a path or a list of paths."
            )
        return {}
    if config.dataset not in _LOCAL_FORMATS:
        return {"data_files": config.data_files}
    patterns = [config.data_files] if isinstance(config.data_files, str) else config.data_files
    for pattern in patterns:
        if "://" not in pattern and not glob.glob(pattern, recursive=True):
            raise JaxplainError(f"corpus.sources.data_files: no such file: {pattern}.")
    return {"data_files": patterns} | ({"delimiter": config.delimiter} if config.dataset == "csv" else {})


def no_documents(name: str, split: str) -> JaxplainError:
    """What is to be said of a source without any record."""
    return JaxplainError(
        f"{name} holds no documents in split {split!r}; check the files, or choose another split or slice."
    )


def explain_failure(error: Exception, config: SourceConfig) -> JaxplainError:
    """What is to be said where `datasets`, or one of the readers behind it, raises an error."""
    reason = first_line(error)
    if isinstance(error, datasets.exceptions.DatasetNotFoundError) and config.dataset is not None:
        if "gated dataset" in reason:
            return JaxplainError(
                f"the dataset {config.dataset!r} needs an access token: accept its terms on "
                f"https://huggingface.co/datasets/{config.dataset}, then log in with `hf auth login` or set "
                "HF_TOKEN."
            )
        if reason.startswith("Revision"):
            return JaxplainError(
                f"the dataset {config.dataset!r} has no revision {config.revision!r}; give a branch, tag or "
                "commit of it, or leave corpus.sources.revision out."
            )
    if "corresponds to no data" in reason:
        return no_documents(config.name, config.split)
    if isinstance(error, FileNotFoundError):
        return JaxplainError(
            f"the dataset {config.dataset!r} could not be found: {reason}. Check its name (if it is private, "
            f"log in with `hf auth login`), or use one of {', '.join(_LOCAL_FORMATS)} with data_files for "
            "local files."
        )
    if isinstance(error, (ConnectionError, OSError)):
        return JaxplainError(
            f"the dataset {config.dataset!r} could not be fetched: {reason}. "
            "Check the network, or the access token for a gated dataset."
        )
    return JaxplainError(
        f"the dataset {config.name!r} could not be read: {first_line(error.__cause__ or error)}."
    )
