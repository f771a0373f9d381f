"""Split expressions such as `train[10%:20%]+test[:100]` for streams, for which `datasets` has no slices."""

import dataclasses
import re

import datasets

from jaxplain.errors import JaxplainError

_PART = re.compile(r"(?P<split>\w[\w.-]*)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """A run of a split's records: bounds as in Python, or percent of all records where they end in %."""

    split: str
    start: str | None
    stop: str | None


def slices(expression: str) -> list[Slice]:
    """The parts of a split expression. Raises JaxplainError where it is none."""
    found = []
    for part in expression.split("+"):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise JaxplainError(
                f"corpus.sources.split is {expression!r}; write a split's name, or slices such as "
                "train[1000:2000] or train[10%:20%], joined by +."
            )
        found.append(Slice(**match.groupdict()))
    return found


def cut_stream(stream: datasets.IterableDataset, part: Slice, name: str) -> datasets.IterableDataset:
    """The records of a stream of the whole split that the slice names; the same ones as without streaming.

    Raises JaxplainError where the slice needs the number of records, and the dataset does not state it.
    """
    known = (stream.info.splits or {}).get(part.split)
    records = known.num_examples if known is not None and known.num_examples else None

    def place(bound: str | None) -> int | None:
        if bound is None:
            return None
        number = int(bound.removesuffix("%"))
        if not bound.endswith("%") and number >= 0:
            return number
        if records is None:
            raise JaxplainError(
                f"the slice {part.split}[{part.start or ''}:{part.stop or ''}] of {name} cannot be streamed, "
                "since that needs the number of records, which the dataset does not state; give counts from "
                f"the start, such as {part.split}[1000:2000], or set streaming to false."
            )
        number = round(number * records / 100) if bound.endswith("%") else number
        return max(number + records, 0) if number < 0 else number

    start, stop = place(part.start) or 0, place(part.stop)
    if start:
        stream = stream.skip(start)
    return stream if stop is None else stream.take(max(stop - start, 0))
