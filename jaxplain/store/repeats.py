"""Windows that several token tables hold: the same tokens from the same place of the same document.

Slices of a corpus that overlap, or that hold copies of a document, have such windows. A table may hold a
window several times itself; then its occurrences are counted, and the n-th one in a table is the same as the
n-th one in another. So of all tables together, each window is there as often as in the table that has it most
often, whichever comes first.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

ROWS_PER_PASS = 2**22
"""How many rows are compared at once, at some 100 bytes each; more rows take more passes."""

_ROWS_PER_READ = 2**20
_TOKEN_BYTES_PER_READ = 2**26

Table = Mapping[str, Any]
"""The arrays of a split's token table, by their names in `schema.sequence_arrays`."""

Read = Callable[..., list[np.ndarray]]
"""Reads parts of arrays; `Files.read`."""


def repeated_rows(tables: Sequence[Table], read: Read) -> list[Int[np.ndarray, "_"]]:
    """For each table, the rows that an earlier table has too, ascending.

    Where a window comes from is compared first, so that of tables that share nothing no tokens are read.
    Documents are taken in groups by their hash, so that memory depends on `ROWS_PER_PASS`, and on how many
    rows are repeated, rather than on the tables.
    """
    passes = -(-sum(table["document"].shape[0] for table in tables) // ROWS_PER_PASS)
    found: list[list[np.ndarray]] = [[] for _ in tables]
    for part in range(passes):
        document_N, start_N, table_N, row_N = _origins(tables, read, part, passes)
        order = np.lexsort((row_N, table_N, start_N, document_N))
        first_N = _changes(document_N[order], start_N[order])
        # A place that only one table has repeats nothing.
        shared_N = _several_tables(first_N, table_N[order])
        table_N, row_N = table_N[order][shared_N], row_N[order][shared_N]
        place_N = np.cumsum(first_N)[shared_N]
        digest_N2 = _token_digests(tables, read, table_N, row_N)
        order = np.lexsort((row_N, table_N, digest_N2[:, 1], digest_N2[:, 0], place_N))
        table_N, row_N = table_N[order], row_N[order]
        repeated_N = _repeated(_changes(place_N[order], *digest_N2[order].T), table_N)
        for number, rows in enumerate(found):
            rows.append(row_N[repeated_N & (table_N == number)])
    return [np.sort(np.concatenate([*rows, np.zeros(0, np.int64)])).astype(np.int64) for rows in found]


def _origins(tables: Sequence[Table], read: Read, part: int, passes: int) -> tuple[np.ndarray, ...]:
    """Document, start, table and row of all windows of the documents that this pass looks at."""
    parts = []
    for number, table in enumerate(tables):
        for rows in spans(table["document"].shape[0], _ROWS_PER_READ):
            document_N, start_N = read(table["document"][rows], table["start"][rows])
            mine_N = np.flatnonzero(document_N % passes == part)
            table_N = np.full(len(mine_N), number, np.int32)
            parts.append((document_N[mine_N], start_N[mine_N], table_N, rows.start + mine_N))
    return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


def _token_digests(
    tables: Sequence[Table], read: Read, table_N: np.ndarray, row_N: np.ndarray
) -> Int[np.ndarray, "N 2"]:
    """128 bits of a hash of each row's tokens."""
    digest_N2 = np.zeros((len(row_N), 2), np.int64)
    for number, table in enumerate(tables):
        mine_N = np.flatnonzero(table_N == number)
        if not len(mine_N):
            continue
        mine_N = mine_N[np.argsort(row_N[mine_N])]
        for span in spans(len(mine_N), max(1, _TOKEN_BYTES_PER_READ // (4 * table["token"].shape[1]))):
            [token_NT] = read(table["token"][row_N[mine_N[span]]])
            digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in token_NT)
            digest_N2[mine_N[span]] = np.frombuffer(digests, np.int64).reshape((-1, 2))
    return digest_N2


def _repeated(first_N: np.ndarray, table_N: np.ndarray) -> np.ndarray:
    """Which rows an earlier table has too: `first_N` begins each window's rows, sorted by table and row."""
    if not len(first_N):
        return first_N
    window_N = np.cumsum(first_N)
    run_N = _changes(window_N, table_N)
    starts_M = np.flatnonzero(run_N)
    count_M = np.diff(starts_M, append=len(run_N))
    occurrence_N = np.arange(len(run_N)) - np.repeat(starts_M, count_M)
    # Counts are raised by so much for each window that the running maximum begins anew with it.
    raised_M = window_N[starts_M] * (len(run_N) + 1)
    most_M = np.maximum.accumulate(count_M + raised_M)
    before_M = np.concatenate([[0], most_M[:-1]]) - raised_M
    return occurrence_N < np.repeat(before_M, count_M)


def _several_tables(first_N: np.ndarray, table_N: np.ndarray) -> np.ndarray:
    """Which rows belong to groups with rows of more than one table; rows are sorted by group and table."""
    if not len(first_N):
        return first_N
    starts_M = np.flatnonzero(first_N)
    count_M = np.diff(starts_M, append=len(first_N))
    return np.repeat(table_N[starts_M] != table_N[starts_M + count_M - 1], count_M)


def _changes(*columns: np.ndarray) -> np.ndarray:
    """Which rows differ from the row before; the first one does."""
    changed_N = np.ones(len(columns[0]), bool)
    changed_N[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return changed_N


def spans(length: int, size: int) -> Iterator[slice]:
    """From 0 to `length` in steps of `size`."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
