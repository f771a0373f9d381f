"""Explanations as a table, one row each."""

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxplain.errors import JaxplainError
from jaxplain.store.explanations import DATABASE_NAME, Explanation, open_explanations
from jaxplain.store.formats.output import new_file
from jaxplain.store.reader import open_store
from jaxplain.store.scores import Score, read_scores

FORMAT = "explanations"

_COLUMNS = [field.name for field in dataclasses.fields(Explanation)]
_ROWS_AT_ONCE = 10_000
_TYPES = {
    int: pa.int32(),
    int | None: pa.int32(),
    float: pa.float64(),
    str: pa.string(),
    str | None: pa.string(),
}


def export_explanations(run: str, out: Path, *, overwrite: bool = False) -> int:
    """Write all explanations to a file whose name says the format, and say how many.

    `run` is a run's folder, a store, or the database itself.

    Raises JaxplainError where there are none, the format is not known, or the file is there already. It
    appears whole or not at all.
    """
    write = _WRITERS.get(out.suffix)
    if write is None:
        raise JaxplainError(
            f"the table of explanations is {out}; its name must end in {', '.join(_WRITERS)}."
        )
    database = _database_of(run)
    rows = 0

    def counted(explanations: Iterable[Explanation]) -> Iterator[Explanation]:
        nonlocal rows
        for explanation in explanations:
            rows += 1
            yield explanation

    with open_explanations(database) as explanations, new_file(out, overwrite=overwrite) as partial:
        write(counted(explanations.each_explanation()), partial)
    return rows


def _database_of(run: str) -> Path:
    path = Path(run)
    if "://" not in run and not (path / "zarr.json").exists():
        return path / DATABASE_NAME if path.is_dir() else path
    beside = open_store(run).explanations_path
    if beside is None:
        raise JaxplainError(f"{run} is not on a local disk; name its database of explanations instead.")
    return beside


def write_parquet_tables(database: Path, folder: Path, *, fingerprint: str) -> dict[str, int]:
    """Write explanations.parquet and scores.parquet, and say how many rows they have.

    Raises JaxplainError where the database belongs to another store than that of the fingerprint.
    """
    with open_explanations(database, fingerprint=fingerprint) as opened:
        return {
            name: _write_table(rows, kind, folder / f"{name}.parquet")
            for name, rows, kind in (
                ("explanations", opened.each_explanation(), Explanation),
                ("scores", read_scores(opened), Score),
            )
        }


def _write_csv(explanations: Iterable[Explanation], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for explanation in explanations:
            writer.writerow(dataclasses.asdict(explanation))


def _write_jsonl(explanations: Iterable[Explanation], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for explanation in explanations:
            file.write(json.dumps(dataclasses.asdict(explanation), ensure_ascii=False) + "\n")


def _write_parquet(explanations: Iterable[Explanation], path: Path) -> None:
    _write_table(explanations, Explanation, path)


def _write_table(rows: Iterable[Explanation] | Iterable[Score], kind: type, path: Path) -> int:
    schema = pa.schema([(field.name, _TYPES[field.type]) for field in dataclasses.fields(kind)])
    pending: list[dict[str, object]] = []
    written = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for row in rows:
            pending.append(dataclasses.asdict(row))
            if len(pending) == _ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(pending, schema))
                written += len(pending)
                pending = []
        writer.write_table(pa.Table.from_pylist(pending, schema))
    return written + len(pending)


_WRITERS: dict[str, Callable[[Iterable[Explanation], Path], None]] = {
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
}
