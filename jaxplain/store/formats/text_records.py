"""Making a store of records whose tokens are strings, as several tools keep them.

The source is read twice: first for the vocabulary, the sequences and how many of them neurons have, then for
the activations. Memory holds one chunk of neurons, the vocabulary, and 150 bytes for each sequence.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from jaxplain.errors import JaxplainError
from jaxplain.progress import Progress
from jaxplain.store.formats.imported import (
    Imported,
    imported_attributes,
    new_store,
    statistics_of,
    write_ranked,
)
from jaxplain.store.formats.sequence_table import SequenceTable
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.writer import StoreWriter
from jaxplain.subjects.vocabulary import piece_bytes

TokenForm = Literal["auto", "text", "byte-level", "sentencepiece"]

_MARKS = {"byte-level": "\u0120", "sentencepiece": "\u2581"}
"""What a tokenizer's own tokens have in place of a space."""
_MARKED_SHARE = 0.05
_SPLIT = "train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRecord:
    """An excerpt: the texts of its tokens, and the activation at each, NaN where it is not known.

    `stratum` is the number of the stratum that it is a sample of, if it is one.
    """

    tokens: Sequence[str]
    activations: Sequence[float]
    stratum: int | None = None

    def score(self, kind: str) -> float:
        """The extreme activation; NaN for random records, and where no activation is known."""
        known = [value for value in self.activations if not math.isnan(value)]
        if kind == "random" or not known:
            return math.nan
        return min(known) if kind == "min" else max(known)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextNeuron:
    """A neuron's records by kind, and what is known of its statistics."""

    name: NeuronId
    records: Mapping[str, Sequence[TextRecord]]
    statistics: Mapping[str, int | float]


@runtime_checkable
class TextSource(Protocol):
    """What a tool left."""

    @property
    def form(self) -> str:
        """What its form is called."""
        ...

    @property
    def paths(self) -> Sequence[Path]:
        """Where it lies."""
        ...

    @property
    def neurons(self) -> int | None:
        """How many there are, where that is known before they are read."""
        ...

    @property
    def corpus(self) -> str:
        """What the texts are from."""
        ...

    @property
    def strata(self) -> Sequence[float]:
        """The levels that part the strata of kind quantile; asked after it was read."""
        ...

    def chunks(self) -> Iterator[list[TextNeuron]]:
        """All neurons, some of one layer or expert at a time, the same every time."""
        ...

    def not_known(self) -> list[str]:
        """What the source does not tell, in words; asked after it was read."""
        ...


def import_text_records(
    source: TextSource,
    out: str,
    progress: Progress,
    *,
    subject: str,
    k: int | None = None,
    activation_dtype: str = "float16",
    token_form: TokenForm = "auto",
    overwrite: bool = False,
) -> Imported:
    """Make a store with a split `train` of a source.

    Args:
        source: What is read.
        out: The folder that gets the store.
        progress: Makes bars.
        subject: The model's name.
        k: The most exemplars of each kind; by default as many as the longest list has.
        activation_dtype: Of the stored activations.
        token_form: How tokens are written: as text, or as a byte-level or SentencePiece tokenizer has them;
            `auto` looks for the marks that these have in place of spaces.
        overwrite: Whether to replace a store in `out`.

    Raises JaxplainError where the source cannot be read or holds nothing, or `out` holds a store already.
    """
    target = new_store(out, overwrite=overwrite)
    with SequenceTable(Path(out)) as table:
        survey = _Survey(table)
        with progress(total=source.neurons, desc="sequences", unit="neurons") as bar:
            for chunk in source.chunks():
                survey.add(chunk)
                bar.update(len(chunk))
        survey.require_something(source)
        ranks = survey.ranks(k)
        kinds = [kind for kind in ("max", "min", "random", "quantile") if survey.longest.get(kind)]
        exemplars: dict[str, Any] = {"kinds": kinds, "k": ranks, "activation_dtype": activation_dtype}
        if "quantile" in kinds:
            exemplars |= {"strata": list(source.strata), "samples_per_quantile": survey.longest["quantile"]}
        missing = [kind for kind in ("max", "min", "random") if kind not in kinds]
        not_known = [
            *(f"exemplars of kind {kind}" for kind in missing),
            *source.not_known(),
            "token ids: tokens are told apart by their texts",
        ]
        form = survey.token_form() if token_form == "auto" else token_form
        vocabulary = [piece_bytes(text, form) for text in survey.vocabulary]
        attributes = imported_attributes(
            subject=subject,
            corpora=[source.corpus],
            splits=[_SPLIT],
            exemplars=exemplars,
            tokens=table.longest,
            sequences=table.digest(vocabulary),
            form=source.form,
            sources=source.paths,
            not_known=not_known,
        )
        writer = StoreWriter(target, attributes)
        writer.write_vocabulary(vocabulary)
        writer.write_sequences(_SPLIT, table.blocks(), tokens=table.longest)
        with progress(total=source.neurons, desc="activations", unit="neurons") as bar:
            _write_neurons(writer, source, survey, exemplars, bar.update)
        writer.finish_split(_SPLIT)
        writer.finish()
    neurons = sum(map(len, survey.indices.values()))
    return Imported(
        path=target,
        neurons=neurons,
        sequences=len(table),
        not_known=tuple(attributes["imported"]["not_known"]),
    )


class _Survey:
    """What is in a source, as far as its chunks have been added."""

    def __init__(self, table: SequenceTable):
        self.table = table
        self.vocabulary: dict[str, int] = {}
        self.longest: dict[str, int] = {}
        self.indices: dict[tuple[int, int | None], set[int]] = defaultdict(set)

    def add(self, chunk: Sequence[TextNeuron]) -> None:
        """Take in some neurons."""
        for neuron in chunk:
            known = self.indices[neuron.name.layer, neuron.name.expert]
            if neuron.name.index in known:
                raise JaxplainError(f"{neuron.name} is in the source twice; import what holds it once.")
            known.add(neuron.name.index)
            for kind, records in neuron.records.items():
                self.longest[kind] = max(self.longest.get(kind, 0), _list_length(kind, records))
                for record in records:
                    if len(record.tokens) != len(record.activations):
                        raise JaxplainError(
                            f"{neuron.name} has a record of {len(record.tokens)} tokens and "
                            f"{len(record.activations)} activations; a record has one activation per token."
                        )
                    for text in record.tokens:
                        self.vocabulary.setdefault(text, len(self.vocabulary))
                    self.table.add(self.ids(record))

    def ids(self, record: TextRecord) -> np.ndarray:
        """A record's tokens by their numbers."""
        return np.array([self.vocabulary[text] for text in record.tokens], np.int32)

    def require_something(self, source: TextSource) -> None:
        """Raise JaxplainError where there are no records."""
        if not len(self.table) or not self.table.longest:
            raise JaxplainError(f"{', '.join(map(str, source.paths))} holds no records of neurons.")

    def ranks(self, k: int | None) -> int:
        """How many ranks the kinds other than quantile have."""
        longest = max((n for kind, n in self.longest.items() if kind != "quantile"), default=1)
        return longest if k is None else min(k, longest)

    def token_form(self) -> str:
        """How the tokens are written, by the marks in them."""
        for form, mark in _MARKS.items():
            marked = sum(mark in text for text in self.vocabulary)
            if marked >= _MARKED_SHARE * len(self.vocabulary):
                return form
        return "text"

    @property
    def layers(self) -> np.ndarray:
        return np.array(sorted({layer for layer, _ in self.indices}), np.int32)

    @property
    def experts(self) -> np.ndarray | None:
        found = sorted({expert for _, expert in self.indices if expert is not None})
        return np.array(found, np.int32) if found else None

    @property
    def neurons(self) -> np.ndarray:
        return np.array(sorted(set().union(*self.indices.values())), np.int32)


def _list_length(kind: str, records: Sequence[TextRecord]) -> int:
    if kind != "quantile":
        return len(records)
    strata = [record.stratum for record in records]
    return max((strata.count(stratum) for stratum in set(strata)), default=0)


def _write_neurons(
    writer: StoreWriter, source: TextSource, survey: _Survey, exemplars: Mapping[str, Any], advance: Any
) -> None:
    layers, experts, neurons = survey.layers, survey.experts, survey.neurons
    strata = exemplars.get("strata", ())
    split = writer.create_split(
        _SPLIT,
        layers=layers,
        neurons=neurons,
        experts=experts,
        shared=None if experts is None else np.zeros((len(layers), len(experts)), bool),
        kinds=exemplars["kinds"],
        k=exemplars["k"],
        tokens=survey.table.longest,
        activation_dtype=exemplars["activation_dtype"],
        strata=strata,
        samples_per_quantile=exemplars.get("samples_per_quantile", 0),
    )
    ranks = {kind: int(exemplars["k"]) for kind in exemplars["kinds"]}
    ranks["quantile"] = (len(strata) + 1) * exemplars.get("samples_per_quantile", 0)
    statistics: dict[int, list[tuple[np.ndarray, dict[str, np.ndarray]]]] = defaultdict(list)
    for chunk in source.chunks():
        place = int(np.searchsorted(layers, chunk[0].name.layer))
        columns = np.searchsorted(neurons, [neuron.name.index for neuron in chunk])
        if experts is not None:
            columns += int(np.searchsorted(experts, chunk[0].name.expert or 0)) * len(neurons)
        for kind in exemplars["kinds"]:
            arrays = _arrays([neuron.records.get(kind, ()) for neuron in chunk], kind, survey)
            write_ranked(
                split,
                kind,
                place,
                columns,
                **arrays,
                ranks=ranks[kind],
                dtype=exemplars["activation_dtype"],
            )
        names = sorted(set().union(*(neuron.statistics for neuron in chunk)))
        known = {
            name: np.array([neuron.statistics.get(name, math.nan) for neuron in chunk]) for name in names
        }
        if "count" in known:
            known["count"] = known["count"].astype(np.int64)
        statistics[place].append((columns, statistics_of(len(chunk), **known)))
        advance(len(chunk))
    # A layer's statistics are one file, so they are written once.
    for place, parts in statistics.items():
        columns = np.concatenate([columns for columns, _ in parts])
        order = np.argsort(columns)
        values = {name: np.concatenate([found[name] for _, found in parts])[order] for name in parts[0][1]}
        split.write_statistics(place, columns[order], **values)


def _arrays(lists: Sequence[Sequence[TextRecord]], kind: str, survey: _Survey) -> dict[str, Any]:
    shape = (len(lists), max(1, *map(len, lists)) if lists else 1)
    score_NR = np.full(shape, np.nan, np.float32)
    sequence_NR = np.full(shape, -1, np.int32)
    activation_NRT = np.full((*shape, survey.table.longest), np.nan, np.float32)
    stratum_NR = np.full(shape, -1, np.int32) if kind == "quantile" else None
    for n, records in enumerate(lists):
        for rank, record in enumerate(records):
            score = record.score(kind)
            if kind != "random" and math.isnan(score):
                continue
            score_NR[n, rank] = score
            sequence_NR[n, rank] = survey.table.number(survey.ids(record))
            activation_NRT[n, rank, : len(record.activations)] = record.activations
            if stratum_NR is not None:
                stratum_NR[n, rank] = -1 if record.stratum is None else record.stratum
    arrays = {"score_NR": score_NR, "sequence_NR": sequence_NR, "activation_NRT": activation_NRT}
    return arrays if stratum_NR is None else arrays | {"stratum_NR": stratum_NR}
