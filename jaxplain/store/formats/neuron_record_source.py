"""Reading trees of NeuronRecords, of OpenAI's neuron-explainer and of extractors in its form.

Several trees, as of shards of a corpus, are taken together: of all their strongest records the strongest, and
of random ones as many as one tree has, in turn from each. Moments of several can be pooled only where it is
known how many tokens each tree has seen. (Trees that were merged before state moments of the records that
they kept, which are not those of all tokens; nothing in them says so.)
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxplain.errors import JaxplainError, first_line
from jaxplain.store import schema
from jaxplain.store.formats.imported import NOT_STATED
from jaxplain.store.formats.neuron_records import BY_QUANTILE, FOLDER, FORMAT, LISTS, MOMENTS
from jaxplain.store.formats.text_records import TextNeuron, TextRecord
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.pooling import pooled_statistics
from jaxplain.store.repeats import spans

_NEURONS_AT_ONCE = 64
_LOOKED_AT = 5
"""Neurons of each layer in which to look for the levels between samples by quantile."""


def is_neuron_records(path: Path) -> bool:
    """Whether a folder is such a tree, or the `neurons` of one."""
    return path.is_dir() and any(True for _ in _layers(path))


class NeuronRecordSource:
    """One tree, or several that are taken together; see `text_records.TextSource`.

    Args:
        paths: The folders that hold `neurons`, or these themselves.
        tokens_seen: How many tokens each of them is of, where that is known.
        strata: The levels between the samples by quantile, where the records do not say them as levels.

    Raises JaxplainError where the numbers of tokens are not one for each tree.
    """

    form = FORMAT
    corpus = "unknown"

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        tokens_seen: Sequence[int] | None = None,
        strata: Sequence[float] | None = None,
    ):
        if tokens_seen is not None and len(tokens_seen) != len(paths):
            raise JaxplainError(
                f"--tokens-seen has {len(tokens_seen)} numbers, but {len(paths)} folders are imported; give "
                "one for each."
            )
        self.paths: Sequence[Path] = list(paths)
        self._tokens_seen, self._given = tokens_seen, strata
        self._trees = [dict(_layers(path)) for path in paths]
        self._found: set[tuple[float, ...]] = set()
        self._several_unpooled = False
        self._samples_dropped = 0

    @property
    def neurons(self) -> int:
        """How many there are in all trees together."""
        return self._neuron_count

    @functools.cached_property
    def _neuron_count(self) -> int:
        return sum(len(self._indices(layer)) for layer in self._all_layers)

    @property
    def strata(self) -> Sequence[float]:
        """The levels between the samples by quantile."""
        return self._given if self._given is not None else list(*self._found)

    @property
    def _keeps_samples(self) -> bool:
        return self._given is not None or len(self._found) == 1

    def not_known(self) -> list[str]:
        """What the records do not tell."""
        found = ["fraction_active"]
        if self._tokens_seen is None:
            found.append("count: how many tokens were seen")
        if self._several_unpooled:
            found.append(
                "moments of neurons that are in several trees, whose numbers of tokens are not known"
            )
        if self._samples_dropped:
            found.append(
                f"samples by quantile of {self._samples_dropped:,} neurons, which are left out: their "
                "boundaries are no levels"
            )
        return found

    def chunks(self) -> Iterator[list[TextNeuron]]:
        """Neurons of one layer, some at a time."""
        self._settle_strata()
        for layer in self._all_layers:
            indices = self._indices(layer)
            for span in spans(len(indices), _NEURONS_AT_ONCE):
                yield [self._neuron(layer, index) for index in indices[span]]

    @functools.cached_property
    def _all_layers(self) -> list[int]:
        return sorted(set().union(*self._trees))

    @functools.lru_cache(maxsize=2)  # noqa: B019 - as long-lived as the source itself
    def _indices(self, layer: int) -> list[int]:
        found: set[int] = set()
        for tree in self._trees:
            if layer in tree:
                found |= {int(p.stem) for p in tree[layer].iterdir() if _is_record(p)}
        return sorted(found)

    def _settle_strata(self) -> None:
        """Take the boundaries of the first record with samples for levels, where they can be that."""
        if self._found or self._given is not None:
            return
        for layer in self._all_layers:
            for index in self._indices(layer)[:_LOOKED_AT]:
                for record in self._read(layer, index).values():
                    levels = record.get("quantile_boundaries")
                    if record.get(BY_QUANTILE) and levels:
                        self._found.add(tuple(levels) if _are_levels(levels) else ())
        if () in self._found:  # values of activations, for one, differ between neurons
            self._found = set()

    def _read(self, layer: int, index: int) -> dict[int, dict[str, Any]]:
        """The records of a neuron by the numbers of the trees that have one."""
        found = {}
        for number, tree in enumerate(self._trees):
            path = tree[layer] / f"{index}.json" if layer in tree else None
            if path is not None and path.exists():
                found[number] = _record(path, layer, index)
        return found

    def _neuron(self, layer: int, index: int) -> TextNeuron:
        found = self._read(layer, index)
        records = {
            kind: _in_turn([_excerpts(record.get(field) or []) for record in found.values()])
            for kind, field in LISTS.items()
        }
        records["random"] = _distinct(records["random"])[: max(_lengths(found, LISTS["random"]), default=0)]
        if len(found) > 1:
            # Of the union, no more are known to be the strongest than the shortest full list has.
            strongest = sorted(_distinct(records["max"]), key=_falling)
            records["max"] = strongest[: max(_lengths(found, LISTS["max"]), default=0)]
        if not self._keeps_samples:
            self._samples_dropped += any(record.get(BY_QUANTILE) for record in found.values())
        else:
            records["quantile"] = [
                one for record in found.values() for one in self._samples(record, layer, index)
            ]
        return TextNeuron(
            name=NeuronId.of(layer, None, index), records=records, statistics=self._statistics(found)
        )

    def _samples(self, record: Mapping[str, Any], layer: int, index: int) -> Iterator[TextRecord]:
        samples = record.get(BY_QUANTILE) or []
        stated = record.get("quantile_boundaries")
        if samples and self._given is None and stated and tuple(stated) != tuple(self.strata):
            raise JaxplainError(
                f"neuron {index} of layer {layer} has quantile_boundaries {stated}, and others "
                f"{list(self.strata)}; name the levels between the samples with --strata."
            )
        if samples and len(samples) != len(self.strata) + 1:
            raise JaxplainError(
                f"neuron {index} of layer {layer} has samples of {len(samples)} quantiles, but there are "
                f"{len(self.strata)} levels between them; name one fewer than quantiles with --strata."
            )
        for number, excerpts in enumerate(samples):
            for excerpt in _excerpts(excerpts):
                yield dataclasses.replace(excerpt, stratum=number)

    def _statistics(self, found: Mapping[int, Mapping[str, Any]]) -> dict[str, int | float]:
        parts = [
            {name: _number(record.get(name)) for name in MOMENTS}
            | {"count": self._tokens_seen[tree] if self._tokens_seen else NOT_STATED}
            for tree, record in found.items()
        ]
        if len(parts) == 1:
            return parts[0]
        if self._tokens_seen is None:
            self._several_unpooled = True
            return {"count": NOT_STATED}
        arrays = [
            {name: np.array([part.get(name, math.nan)]) for name in schema.STATISTICS} for part in parts
        ]
        pooled = {name: float(value[0]) for name, value in pooled_statistics(arrays).items()}
        # A moment takes part in those above it.
        known = list(itertools.takewhile(lambda name: all(not math.isnan(p[name]) for p in parts), MOMENTS))
        return {name: pooled[name] for name in ("count", *known)}


def _layers(path: Path) -> Iterator[tuple[int, Path]]:
    inside = path / FOLDER
    for folder in (inside if inside.is_dir() else path).iterdir():
        if folder.name.isdecimal() and folder.is_dir() and any(map(_is_record, folder.iterdir())):
            yield int(folder.name), folder


def _is_record(path: Path) -> bool:
    return path.suffix == ".json" and path.stem.isdecimal()


def _record(path: Path, layer: int, index: int) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise JaxplainError(f"{path} could not be read: {first_line(error)}.") from error
    name = record.get("neuron_id") if isinstance(record, dict) else None
    if not isinstance(name, dict):
        raise JaxplainError(f"{path} is no NeuronRecord: it has no neuron_id.")
    if (name.get("layer_index"), name.get("neuron_index")) != (layer, index):
        raise JaxplainError(
            f"{path} is of neuron {name.get('neuron_index')} of layer {name.get('layer_index')}, but lies "
            f"where neuron {index} of layer {layer} should."
        )
    return record


def _excerpts(records: Sequence[Any]) -> list[TextRecord]:
    try:
        return [
            TextRecord(tokens=record["tokens"], activations=[_number(a) for a in record["activations"]])
            for record in records
        ]
    except (TypeError, KeyError, ValueError) as error:
        raise JaxplainError(
            "a record's excerpts must have tokens and activations, lists of texts and of numbers; "
            f"one is {str(records)[:100]}..."
        ) from error


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _lengths(found: Mapping[int, Mapping[str, Any]], field: str) -> list[int]:
    return [len(record.get(field) or []) for record in found.values()]


def _in_turn(lists: Sequence[Sequence[TextRecord]]) -> list[TextRecord]:
    return [record for turn in itertools.zip_longest(*lists) for record in turn if record is not None]


def _distinct(records: Sequence[TextRecord]) -> list[TextRecord]:
    return list({tuple(record.tokens): record for record in reversed(records)}.values())[::-1]


def _falling(record: TextRecord) -> tuple[bool, float]:
    """By falling score, those without one last."""
    score = record.score("max")
    return math.isnan(score), -score


def _are_levels(values: Sequence[float]) -> bool:
    return all(0 < a < 1 for a in values) and all(a < b for a, b in itertools.pairwise(values))
