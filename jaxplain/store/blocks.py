"""Merging a block of neurons: their exemplars of every kind, statistics and quantiles."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorstore as ts
from jaxtyping import Float, Int

from jaxplain.exemplars.quantiles import Tail, lower_tail, quantiles, upper_tail
from jaxplain.store import schema
from jaxplain.store.files import Files
from jaxplain.store.pooling import pooled_statistics
from jaxplain.store.strongest import Strongest, place_winners, strongest
from jaxplain.store.writer import SplitWriter

_TAILS = {"max": upper_tail, "min": lower_tail}
_TABLE = "sequences/"


def _unchanged(sequence: np.ndarray) -> np.ndarray:
    return sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """One of the splits that are merged: its arrays by name, and the new numbers of its sequences."""

    files: Files
    arrays: dict[str, ts.TensorStore]
    renumber: Callable[[np.ndarray], np.ndarray] = _unchanged

    @property
    def table(self) -> dict[str, ts.TensorStore]:
        """The arrays of the token table, by the names in `schema.sequence_arrays`."""
        return {
            name.removeprefix(_TABLE): array for name, array in self.arrays.items() if name.startswith(_TABLE)
        }

    @property
    def bytes(self) -> int:
        """Bytes of all arrays, before compression."""
        return sum(map(_bytes, self.arrays.values()))

    @property
    def table_bytes(self) -> int:
        """Bytes of the token table, before compression."""
        return sum(map(_bytes, self.table.values()))


class Block(NamedTuple):
    """Neurons that are merged at once: a layer's place on its axis, and a span of the neuron axis."""

    layer: int
    neurons: slice

    @property
    def columns(self) -> Int[np.ndarray, "N"]:
        """The neurons' places on their axis."""
        return np.arange(self.neurons.start, self.neurons.stop)


class Draws(NamedTuple):
    """Which tokens are drawn for quantiles; see `schema.sample_arrays` and `Strongest`."""

    lottery_M: Float[np.ndarray, "M"]
    sequence_M: Int[np.ndarray, "M"]
    source_M: Int[np.ndarray, "M"]


def merge_draws(slices: Sequence[Slice]) -> Draws:
    """The tokens with the highest numbers of all that the slices drew."""

    def drawn(part: Slice) -> tuple[np.ndarray, np.ndarray]:
        lottery_M, sequence_M = part.files.read(
            *(part.arrays[f"{schema.SAMPLE}/{name}"] for name in ("lottery", "sequence"))
        )
        return lottery_M[None], part.renumber(sequence_M)[None]

    return Draws(*(array[0] for array in strongest(map(drawn, slices))))


def merge_block(
    block: Block,
    *,
    slices: Sequence[Slice],
    out: SplitWriter,
    kinds: Sequence[str],
    levels: Sequence[float],
    draws: Draws | None,
) -> dict[str, np.ndarray]:
    """Write the exemplars and the sample of a block's neurons; their statistics and quantiles."""
    tails = {}
    for kind in kinds:
        ranked = _ranks(block, kind, slices)
        activation_NRT = _activations(block, kind, slices, ranked)
        out.write_exemplars(
            kind,
            block.layer,
            block.columns,
            score_NR=ranked.score_NR,
            sequence_NR=ranked.sequence_NR,
            activation_NRT=activation_NRT,
        )
        if levels and kind in _TAILS:
            tails[kind] = _TAILS[kind](ranked.score_NR, activation_NRT)
    statistics = pooled_statistics(
        [
            dict(
                zip(
                    schema.STATISTICS,
                    part.files.read(*(part.arrays[f"stats/{name}"][block] for name in schema.STATISTICS)),
                    strict=True,
                )
            )
            for part in slices
        ]
    )
    if draws is None:
        return statistics
    sample_NM = _sample(block, slices, draws)
    out.write_sample(block.layer, block.columns, sample_NM)
    return statistics | {schema.QUANTILE: _quantiles(levels, statistics["count"], sample_NM, tails)}


def _ranks(block: Block, kind: str, slices: Sequence[Slice]) -> Strongest:
    def ranked(part: Slice) -> tuple[np.ndarray, np.ndarray]:
        score_NR, sequence_NR = part.files.read(
            *(part.arrays[f"{kind}/{name}"][block] for name in ("score", "sequence"))
        )
        return score_NR, part.renumber(sequence_NR)

    return strongest(map(ranked, slices), lowest=kind == "min")


def _activations(block: Block, kind: str, slices: Sequence[Slice], ranked: Strongest) -> np.ndarray:
    """The activations of the strongest sequences, [N, R, T]; NaN where there are none."""
    neurons, ranks = ranked.sequence_NR.shape
    array = slices[0].arrays[f"{kind}/activation"]
    out_NRT = np.full((neurons, ranks, array.shape[-1]), np.nan, array.dtype.numpy_dtype)
    source_M = np.where(ranked.sequence_NR < 0, -1, ranked.source_NR).reshape(-1)
    for number, part in enumerate(slices):
        [found_NRT] = part.files.read(part.arrays[f"{kind}/activation"][block])
        place_winners(
            out_NRT.reshape((neurons * ranks, -1)),
            found_NRT.reshape((neurons * ranks, -1)),
            source_M,
            number,
            ranks=ranks,
        )
    return out_NRT


def _sample(block: Block, slices: Sequence[Slice], draws: Draws) -> np.ndarray:
    """The activations at the drawn tokens, [N, M]; NaN where there are none."""
    array = slices[0].arrays[f"{schema.SAMPLE}/activation"]
    tokens = len(draws.source_M)
    out_NM = np.full((len(block.columns), tokens), np.nan, array.dtype.numpy_dtype)
    for number, part in enumerate(slices):
        [found_NM] = part.files.read(part.arrays[f"{schema.SAMPLE}/activation"][block])
        won_W = np.flatnonzero((draws.source_M // tokens == number) & (draws.sequence_M >= 0))
        out_NM[:, won_W] = found_NM[:, draws.source_M[won_W] % tokens]
    return out_NM


def _quantiles(
    levels: Sequence[float],
    count_N: Int[np.ndarray, "N"],
    sample_NM: Float[np.ndarray, "N M"],
    tails: dict[str, Tail],
) -> Float[np.ndarray, "N Q"]:
    """Quantiles of neurons; NaN for those that were not asked for."""
    found_NQ = np.full((len(count_N), len(levels)), np.nan, np.float32)
    for count in np.unique(count_N[count_N >= 0]):
        mine_N = np.flatnonzero(count_N == count)
        upper, lower = (
            Tail(*(array[mine_N] for array in tails[kind])) if kind in tails else None for kind in _TAILS
        )
        found_NQ[mine_N] = quantiles(
            np.array(levels), int(count), sample_NM[mine_N], upper=upper, lower=lower
        )
    return found_NQ


def _bytes(array: ts.TensorStore) -> int:
    return array.size * array.dtype.numpy_dtype.itemsize
