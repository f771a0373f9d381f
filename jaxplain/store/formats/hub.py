"""Stores and explanations as a dataset repository of the Hugging Face hub.

    README.md               a card: what it is of, what made it, how to read it
    exemplars.zarr/...      the store
    explanations.sqlite     the database beside it, and of it the tables
    explanations.parquet, scores.parquet

A store that was there is taken away first, and what makes a store complete is sent last, so that a push that
was cut off leaves none that is taken for whole.
"""

import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import disable_progress_bars

from jaxplain.errors import JaxplainError, first_line
from jaxplain.progress import Progress
from jaxplain.store.explanations import DATABASE_NAME
from jaxplain.store.formats.explanations import write_parquet_tables
from jaxplain.store.reader import Store
from jaxplain.store.repeats import spans
from jaxplain.store.schema import STORE_NAME

FORMAT = "huggingface"
PARTS = ("all", "store", "explanations")

_FILES_PER_COMMIT = 200
# With the errors of the library that it talks HTTP by, whichever that is.
_OF_NETWORK = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
_LAST = f"{STORE_NAME}/zarr.json"
_TABLES = ("explanations.parquet", "scores.parquet")


def push(
    store: Store,
    repository: str,
    progress: Progress,
    *,
    part: str = "all",
    private: bool = False,
    endpoint: str | None = None,
) -> str:
    """Push a store and its explanations, and give the repository's address.

    Args:
        store: The store, on a local disk.
        repository: Its name on the hub, user/name; made where there is none.
        progress: Makes bars.
        part: `all` of it, or the `store` or the `explanations` alone.
        private: Whether a repository that is made is private.
        endpoint: The hub's address, where it is not huggingface.co.

    Raises JaxplainError where the store is not on a local disk, there are no explanations and these are asked
    for, or the hub refuses.
    """
    database = store.explanations_path
    if database is None:
        raise JaxplainError(f"{store.zarr_path} is not on a local disk; copy it to one to push it.")
    has_explanations = part != "store" and database.exists()
    if part == "explanations" and not has_explanations:
        raise JaxplainError(
            f"there are no explanations at {database}; make some with python -m jaxplain.explain."
        )
    disable_progress_bars()
    api = HfApi(endpoint=endpoint)
    with tempfile.TemporaryDirectory() as folder:
        tables: dict[str, int | None] = {}
        files: list[tuple[str, Path]] = []
        if has_explanations:
            tables |= write_parquet_tables(database, Path(folder), fingerprint=store.fingerprint)
            files += [(f"{name}.parquet", Path(folder) / f"{name}.parquet") for name in tables]
            files.append((DATABASE_NAME, _copied(database, Path(folder))))
        if part != "explanations":
            files += _store_files(store)
        files.sort(key=lambda file: file[0] == _LAST)
        try:
            url = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
            known = (_LAST, DATABASE_NAME, *_TABLES)
            there = {name for name in known if api.file_exists(repository, name, repo_type="dataset")}
            if part != "explanations" and _LAST in there:
                api.delete_folder(f"{STORE_NAME}/", repository, repo_type="dataset")
            stale = [name for name in (DATABASE_NAME, *_TABLES) if name in there]
            if part == "all" and not has_explanations and stale:
                api.create_commit(
                    repository,
                    [CommitOperationDelete(path_in_repo=name) for name in stale],
                    commit_message="Delete the explanations of another store",
                    repo_type="dataset",
                )
            if part == "store":  # the explanations that are there stay
                tables = {name.removesuffix(".parquet"): None for name in _TABLES if name in there}
            card = Path(folder) / "README.md"
            with_store = part != "explanations" or _LAST in there
            card.write_text(card_of(store, repository, tables, with_store=with_store), encoding="utf-8")
            files.insert(0, ("README.md", card))
            total = sum(path.stat().st_size for _, path in files)
            with progress(total=total, desc=f"push to {repository}", unit="B") as bar:
                first = len(files) - (files[-1][0] == _LAST)
                for span in [*spans(first, _FILES_PER_COMMIT), slice(first, len(files))]:
                    _commit(api, repository, files[span], bar)
        except LocalTokenNotFoundError as error:
            raise JaxplainError(
                "the hub asks for a token; log in with hf auth login, and push again."
            ) from error
        except (*_OF_NETWORK, HFValidationError, OSError, RuntimeError) as error:
            raise JaxplainError(f"{repository} could not be pushed: {first_line(error)}.") from error
    return str(url)


def card_of(store: Store, repository: str, tables: Mapping[str, int | None], *, with_store: bool) -> str:
    """The repository's card: metadata for the hub, then text. `tables` have rows, if that is known."""
    subject = store.attributes["subject"]
    metadata: dict[str, Any] = {
        "pretty_name": f"Neurons of {subject['id']}",
        "tags": ["interpretability", "neurons", "jaxplain"],
    }
    if tables:
        metadata["configs"] = [{"config_name": t, "data_files": f"{t}.parquet"} for t in tables]
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# Neurons of {subject['id']}", "", *_facts(store, tables), ""]
    if with_store:
        lines += [
            "## The store",
            "",
            f"`{STORE_NAME}` is a Zarr v3 group of neurons' exemplars and statistics, made by jaxplain "
            f"{store.attributes.get('jaxplain_version')}:",
            "",
            "```python",
            "import huggingface_hub, jaxplain",
            "",
            f'folder = huggingface_hub.snapshot_download("{repository}", repo_type="dataset")',
            "store = jaxplain.open_store(folder)",
            f'store["{store.splits[0]}"]',
            "```",
            "",
        ]
    if tables:
        lines += [
            "## Explanations",
            "",
            *(f"- `{name}.parquet`" + (f": {rows:,} rows" if rows else "") for name, rows in tables.items()),
            f"- `{DATABASE_NAME}`: the same with prompts and replies, beside the store where `open_store` "
            "finds it",
            "",
        ]
    return "\n".join(lines)


def _facts(store: Store, tables: Mapping[str, int | None]) -> Iterator[str]:
    subject, config = store.attributes["subject"], store.config
    revision = f", revision `{subject['revision']}`" if subject.get("revision") else ""
    yield f"- Subject: `{subject['id']}`{revision}"
    yield f"- Corpora: {', '.join(dict.fromkeys(store.corpora)) or 'unknown'}"
    exemplars = config["exemplars"]
    yield f"- Exemplars: kinds {', '.join(exemplars['kinds'])}, at most {exemplars['k']} of each"
    for name in store.splits:
        split = store[name]
        experts = "" if split.experts is None else f"{len(split.experts)} experts x "
        yield (
            f"- Split `{name}`: {split.sequence_count:,} sequences, {len(split.layers)} layers x {experts}"
            f"{len(split.neurons):,} neurons"
        )
    imported = store.attributes.get("imported")
    if imported:
        yield f"- Imported from {imported['format']}; not known: {'; '.join(imported['not_known'])}"
    if count := tables.get("explanations"):
        yield f"- Explanations: {count:,}"


def _store_files(store: Store) -> list[tuple[str, Path]]:
    folder = Path(store.zarr_path)
    return [
        (f"{STORE_NAME}/{path.relative_to(folder).as_posix()}", path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def _copied(database: Path, folder: Path) -> Path:
    """The database as one file at rest, whoever writes to it."""
    out = folder / DATABASE_NAME
    with (
        sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True) as source,
        sqlite3.connect(out) as target,
    ):
        source.backup(target)
    for connection in (source, target):
        connection.close()
    return out


def _commit(api: HfApi, repository: str, files: Sequence[tuple[str, Path]], bar: Any) -> None:
    if not files:
        return
    api.create_commit(
        repository,
        [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files],
        commit_message=f"Add {files[0][0] if len(files) == 1 else f'{len(files)} files'}",
        repo_type="dataset",
    )
    bar.update(sum(path.stat().st_size for _, path in files))
