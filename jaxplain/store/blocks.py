"""Merging a block of neurons: their exemplars of every kind, statistics and quantiles."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorstore as ts
from jaxtyping import Float, Int

from jaxplain.store import schema
from jaxplain.store.files import Files
from jaxplain.store.pooling import pooled_statistics
from jaxplain.store.quantiles import TAILS, quantiles_by_count
from jaxplain.store.strongest import Strongest, place_winners, strongest
from jaxplain.store.writer import SplitWriter

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Neurons that are merged at once.

    Attributes:
        layer: The layer's place on its axis.
        spans: Of the axis of neurons, or of those of experts and neurons.
        axes: How long these axes are.
    """

    layer: int
    spans: tuple[slice, ...]
    axes: tuple[int, ...]

    @property
    def columns(self) -> Int[np.ndarray, "N"]:
        """The neurons' places on their axis, or on those of experts and neurons, flattened."""
        places = np.meshgrid(*(np.arange(span.start, span.stop) for span in self.spans), indexing="ij")
        return np.ravel_multi_index([place.ravel() for place in places], self.axes)

    def read(self, part: Slice, *names: str) -> list[np.ndarray]:
        """The block's neurons in arrays of a slice, each [N, ...]."""
        found = part.files.read(*(part.arrays[name][(self.layer, *self.spans)] for name in names))
        return [array.reshape((-1, *array.shape[len(self.spans) :])) for array in found]


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
        if levels and kind in TAILS:
            tails[kind] = TAILS[kind](ranked.score_NR, activation_NRT)
    statistics = pooled_statistics(
        [
            dict(
                zip(
                    schema.STATISTICS,
                    block.read(part, *(f"stats/{name}" for name in schema.STATISTICS)),
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
    return statistics | {
        schema.QUANTILE: quantiles_by_count(
            np.array(levels, np.float64), statistics["count"], sample_NM, tails
        )
    }


def _ranks(block: Block, kind: str, slices: Sequence[Slice]) -> Strongest:
    def ranked(part: Slice) -> tuple[np.ndarray, np.ndarray]:
        score_NR, sequence_NR = block.read(part, f"{kind}/score", f"{kind}/sequence")
        return score_NR, part.renumber(sequence_NR)

    return strongest(map(ranked, slices), lowest=kind == "min")


def _activations(block: Block, kind: str, slices: Sequence[Slice], ranked: Strongest) -> np.ndarray:
    """The activations of the strongest sequences, [N, R, T]; NaN where there are none."""
    neurons, ranks = ranked.sequence_NR.shape
    array = slices[0].arrays[f"{kind}/activation"]
    out_NRT = np.full((neurons, ranks, array.shape[-1]), np.nan, array.dtype.numpy_dtype)
    source_M = np.where(ranked.sequence_NR < 0, -1, ranked.source_NR).reshape(-1)
    for number, part in enumerate(slices):
        [found_NRT] = block.read(part, f"{kind}/activation")
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
        [found_NM] = block.read(part, f"{schema.SAMPLE}/activation")
        won_W = np.flatnonzero((draws.source_M // tokens == number) & (draws.sequence_M >= 0))
        out_NM[:, won_W] = found_NM[:, draws.source_M[won_W] % tokens]
    return out_NM


def _bytes(array: ts.TensorStore) -> int:
    return array.size * array.dtype.numpy_dtype.itemsize
