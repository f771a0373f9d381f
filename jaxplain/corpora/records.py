"""The records of a source in blocks, which are what is read, tokenised and cut at a time."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import grain

from jaxplain.errors import JaxplainError

BLOCK = 256
"""Records in a block: so many that what is done once per block costs little, so few that long texts fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordBlock:
    """Successive records: their row numbers and, of a stream alone, what its column holds there."""

    rows: list[int]
    values: list[Any] | None = None


def row_blocks(rows: int, *, seed: int, first: int = 0) -> Iterator[RecordBlock]:
    """The blocks of all rows from number `first` on, in an order drawn by the seed."""
    order = grain.MapDataset.range(rows).seed(seed).shuffle()
    for start in range(first * BLOCK, rows, BLOCK):
        yield RecordBlock(rows=[int(order[place]) for place in range(start, min(start + BLOCK, rows))])


def stream_blocks(
    stream: datasets.IterableDataset,
    column: str,
    *,
    failed: Callable[[Exception], JaxplainError],
    first: int = 0,
) -> Iterator[RecordBlock]:
    """The blocks of a stream from number `first` on; those before are read again and left out.

    What was read before the stream breaks is given first; then `failed` says what is raised.
    """
    read = first * BLOCK
    records = iter(stream.skip(read) if read else stream)
    broken: Exception | None = None
    while broken is None:
        values = []
        try:
            for record in itertools.islice(records, BLOCK):
                values.append(record.get(column))
        except Exception as error:
            broken = error
        if values:
            yield RecordBlock(rows=list(range(read, read + len(values))), values=values)
        if broken is None and len(values) < BLOCK:
            return
        read += len(values)
    raise failed(broken) from broken
