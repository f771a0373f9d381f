"""A split's neurons in blocks, with all that is stored of them, in little memory."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxplain.store import schema
from jaxplain.store.exemplar import Exemplar
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.reader import Split
from jaxplain.store.repeats import spans

_BLOCK_BYTES = 2**25
_MOST_NEURONS = 64
_NOT_ASKED_FOR = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked:
    """Exemplars of one kind, of N neurons; see `schema.kind_arrays`."""

    score_NR: Float[np.ndarray, "N R"]
    sequence_NR: Int[np.ndarray, "N R"]
    activation_NRT: Float[np.ndarray, "N R T"]
    stratum_NR: Int[np.ndarray, "N R"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronBlock:
    """N neurons of one layer or expert, those that were extracted.

    Attributes:
        split: Where they are from.
        names: What they are called.
        statistics: Arrays [N] by the names in `schema.STATISTICS`, and [N, Q] of `schema.QUANTILE` in stores
            with quantiles.
        kinds: Their exemplars.
        rows: The token table of the sequences that are among these, by the names in `schema.sequence_arrays`;
            `sequence` are their numbers, ascending.
    """

    split: Split
    names: list[NeuronId]
    statistics: dict[str, np.ndarray]
    kinds: dict[str, Ranked]
    rows: dict[str, np.ndarray]

    def exemplars(self, number: int, kind: str) -> list[Exemplar]:
        """The exemplars of one of the neurons; none of a kind that was not asked for."""
        ranked = self.kinds.get(kind)
        if ranked is None:
            return []
        filled = np.flatnonzero(ranked.sequence_NR[number] >= 0)
        return [self._exemplar(ranked, number, int(rank)) for rank in filled]

    def strings(self, exemplar: Exemplar) -> list[str]:
        """The texts of an exemplar's tokens, see `Exemplar.token_strings`."""
        return self._strings_of(exemplar.sequence)

    def places(self, sequence: Int[np.ndarray, "*S"]) -> Int[np.ndarray, "*S"]:
        """Where sequences stand in `rows`."""
        return np.searchsorted(self.rows["sequence"], sequence)

    @functools.cached_property
    def _known_strings(self) -> dict[int, list[str]]:
        return {}

    def _row(self, sequence: int) -> int:
        return int(np.searchsorted(self.rows["sequence"], sequence))

    def _strings_of(self, sequence: int) -> list[str]:
        if sequence not in self._known_strings:
            tokens_T = self.rows["token"][self._row(sequence)]
            self._known_strings[sequence] = self.split.store.vocabulary.strings(tokens_T[tokens_T >= 0])
        return self._known_strings[sequence]

    def _exemplar(self, ranked: Ranked, number: int, rank: int) -> Exemplar:
        sequence = int(ranked.sequence_NR[number, rank])
        row = self._row(sequence)
        tokens_T = self.rows["token"][row]
        tokens_T = tokens_T[tokens_T >= 0]
        store = self.split.store
        stratum = None if ranked.stratum_NR is None else self.split.strata[ranked.stratum_NR[number, rank]]
        return Exemplar(
            rank=rank,
            score=float(ranked.score_NR[number, rank]),
            sequence=sequence,
            tokens=tokens_T,
            activations=ranked.activation_NRT[number, rank, : len(tokens_T)].astype(np.float32),
            corpus=store.corpora[self.rows["corpus"][row]],
            document=int(self.rows["document"][row]),
            start=int(self.rows["start"][row]),
            stratum=stratum,
            vocabulary=store.vocabulary,
        )


def neuron_blocks(
    split: Split, *, kinds: Sequence[str], layers: Sequence[int] | None = None, limit: int | None = None
) -> Iterator[NeuronBlock]:
    """All extracted neurons of a split, by layer (and expert) and index, in blocks.

    Args:
        split: The split.
        kinds: Which of its kinds of exemplars to read.
        layers: Which of its layers, as far as it has them; all where None.
        limit: The most exemplars of each kind; of kind quantile all.
    """
    size = _neurons_at_once(split, kinds)
    for layer in layers_of(split, layers):
        place = int(np.searchsorted(split.layers, layer))
        for expert in [None] if split.experts is None else range(len(split.experts)):
            for span in spans(len(split.neurons), size):
                block = _block(split, place, expert, span, kinds, limit)
                if block.names:
                    yield block


def layers_of(split: Split, layers: Sequence[int] | None) -> list[int]:
    """Those of some layers that a split has; all of its own where None. Splits of an import may differ."""
    held = split.layers.tolist()
    return held if layers is None else [layer for layer in layers if layer in held]


def neuron_count(split: Split, layers: Sequence[int] | None = None) -> int:
    """How many neurons `neuron_blocks` gives."""
    places = np.searchsorted(split.layers, np.array(layers_of(split, layers), np.int64))
    counts = (split.layer_arrays(int(place), "stats/count")[0] for place in places)
    return sum(int((count > _NOT_ASKED_FOR).sum()) for count in counts)


def _block(
    split: Split, place: int, expert: int | None, span: slice, kinds: Sequence[str], limit: int | None
) -> NeuronBlock:
    within = (span,) if expert is None else (expert, span)
    levels = [schema.QUANTILE] if split.quantile_levels else []
    statistics = dict(
        zip(
            names := [*schema.STATISTICS, *levels],
            split.layer_arrays(place, *(f"stats/{name}" for name in names), within=within),
            strict=True,
        )
    )
    asked_N = np.flatnonzero(statistics["count"] > _NOT_ASKED_FOR)
    number = None if expert is None or split.experts is None else int(split.experts[expert])
    layer = int(split.layers[place])
    found = {kind: _ranked(split, place, within, kind, asked_N, limit) for kind in kinds}
    sequences = [ranked.sequence_NR.ravel() for ranked in found.values()]
    sequence_U = np.unique(np.concatenate([*sequences, np.zeros(0, np.int32)]))
    sequence_U = sequence_U[sequence_U >= 0]
    if not len(sequence_U):
        sequence_U = np.zeros(1, np.int32)  # so that `rows` has a row, whatever place is asked for
    return NeuronBlock(
        split=split,
        names=[NeuronId.of(layer, number, int(split.neurons[span.start + n])) for n in asked_N],
        statistics={name: values[asked_N] for name, values in statistics.items()},
        kinds=found,
        rows={"sequence": sequence_U, **split.sequences(sequence_U)},
    )


def _ranked(
    split: Split,
    place: int,
    within: tuple[int | slice, ...],
    kind: str,
    asked_N: np.ndarray,
    limit: int | None,
) -> Ranked:
    names = ["score", "sequence", "activation", *(["stratum"] if kind == "quantile" else [])]
    arrays = split.layer_arrays(place, *(f"{schema.group_of(kind)}/{name}" for name in names), within=within)
    # Of kind quantile the strongest are not the ones to keep: each stratum has its own.
    ranks = slice(None) if kind == "quantile" else slice(limit)
    return Ranked(
        **{f"{n}_{_AXES[n]}": array[asked_N, ranks] for n, array in zip(names, arrays, strict=True)}
    )


_AXES = {"score": "NR", "sequence": "NR", "activation": "NRT", "stratum": "NR"}


def _neurons_at_once(split: Split, kinds: Sequence[str]) -> int:
    bytes_per_neuron = sum(split.bytes_per_neuron(kind) for kind in kinds)
    return max(1, min(_MOST_NEURONS, _BLOCK_BYTES // max(1, bytes_per_neuron)))
