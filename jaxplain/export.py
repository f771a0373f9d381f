"""python -m jaxplain.export RUN --explanations FILE: explanations as a table for other tools."""

import argparse
import csv
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxplain.commands import run
from jaxplain.errors import JaxplainError
from jaxplain.store.explanations import DATABASE_NAME, Explanation, open_explanations

_COLUMNS = [field.name for field in dataclasses.fields(Explanation)]
_ROWS_AT_ONCE = 10_000


def main(arguments: Sequence[str]) -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxplain.export",
        description="Write explanations as a table, one row each.",
    )
    parser.add_argument("run", help="a run's folder, or an explanations.sqlite")
    parser.add_argument(
        "--explanations", required=True, metavar="FILE", help="ends in .parquet, .jsonl or .csv"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    options = parser.parse_args(list(arguments))
    rows = export_explanations(Path(options.run), Path(options.explanations))
    print(f"{rows:,} explanations are in {options.explanations}")


def export_explanations(run_folder: Path, out: Path) -> int:
    """Write all explanations of a run to a file whose name says the format, and say how many.

    Raises JaxplainError where there are none, or the format is not known. The file appears whole or not
    at all.
    """
    write = _WRITERS.get(out.suffix)
    if write is None:
        raise JaxplainError(f"--explanations is {out}; its name must end in {', '.join(_WRITERS)}.")
    database = run_folder / DATABASE_NAME if run_folder.is_dir() else run_folder
    partial = out.with_name(f".{out.name}.partial")
    rows = 0

    def counted(explanations: Iterable[Explanation]) -> Iterator[Explanation]:
        nonlocal rows
        for explanation in explanations:
            rows += 1
            yield explanation

    try:
        with open_explanations(database) as explanations:
            write(counted(explanations.each_explanation()), partial)
        os.replace(partial, out)
    except OSError as error:
        raise JaxplainError(f"{out} cannot be written: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)
    return rows


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
    types = {int: pa.int32(), int | None: pa.int32(), str: pa.string(), str | None: pa.string()}
    schema = pa.schema([(field.name, types[field.type]) for field in dataclasses.fields(Explanation)])
    pending: list[dict[str, object]] = []
    with pq.ParquetWriter(path, schema) as writer:
        for explanation in explanations:
            pending.append(dataclasses.asdict(explanation))
            if len(pending) == _ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(pending, schema))
                pending = []
        writer.write_table(pa.Table.from_pylist(pending, schema))


_WRITERS: dict[str, Callable[[Iterable[Explanation], Path], None]] = {
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
}


if __name__ == "__main__":
    run(main)
