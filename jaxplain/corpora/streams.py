"""A stream of records as the start of a Grain pipeline."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import grain

from jaxplain.errors import JaxplainError


class RecordStream(grain.IterDataset[tuple[int, Any]]):
    """The records of a stream, each with its number.

    An iterator's state is the number of records that it gave: to go back to it, they are read over again,
    which is slow but exact whatever the stream does inside. `failed` makes a JaxplainError of others.
    """

    def __init__(self, records: datasets.IterableDataset, failed: Callable[[Exception], JaxplainError]):
        super().__init__()
        self.records, self.failed = records, failed

    def __iter__(self) -> grain.DatasetIterator[tuple[int, Any]]:
        return _RecordStreamIterator(self)


class _RecordStreamIterator(grain.DatasetIterator[tuple[int, Any]]):
    def __init__(self, stream: RecordStream):
        super().__init__()
        self._stream = stream
        self._given = 0
        self._records: Iterator[Any] | None = None

    def __next__(self) -> tuple[int, Any]:
        try:
            if self._records is None:
                records = self._stream.records
                self._records = iter(records.skip(self._given) if self._given else records)
            record = next(self._records)
        except StopIteration:
            raise
        except Exception as error:
            raise self._stream.failed(error) from error
        self._given += 1
        return self._given - 1, record

    def get_state(self) -> dict[str, Any]:
        return {"given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        self._given, self._records = state["given"], None
