"""Exemplars of kind `quantile`: for every neuron, sequences from each part of the distribution of its maxima.

Strata lie between levels of the distribution of the per-sequence maximum. For a stratum from level a to level
b, of which n sequences are wanted, D = 4 n / (b - a) sequences are drawn from the split (all of them, where
there are fewer), the same for all neurons, and of these every neuron keeps those ranked above level a: a
top-k like any other, into which only drawn sequences come. The draws of several strata are nested, and strata
with the same D share one.

In the end the lowest that ranks above a in its own draw is the stratum's lower edge, and the next stratum's
lower edge is its upper one. Of the sequences between them, the n that were drawn first remain. They are a
fair sample of those between the edges. An edge stands in for the split's own quantile q with a standard error
of sqrt(q (1 - q) / D) of all sequences: with n = 5 and levels 0.25, 0.5, 0.75, 0.9 and 0.99, of a quarter of
the stratum's width at most, and with four times as many of half of that. Where the draw is of the whole split
there is no error. The form of such samples goes back to Bills et al. (2023).
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

_DRAWN_PER_WANTED = 4


class Stratum(NamedTuple):
    """From one level up to the next, and how many sequences are drawn for it."""

    low: float
    high: float
    drawn: int

    @property
    def above(self) -> int:
        """How many of the drawn sequences rank above `low`, each in the middle of its share of the draw."""
        level_R = 1 - (np.arange(self.drawn) + 0.5) / max(self.drawn, 1)
        return int(np.count_nonzero(level_R >= self.low))


class RankedSequences(NamedTuple):
    """A layer's sequences of one draw, strongest first; after the last are NaN, -1 and NaN."""

    score_NR: Float[np.ndarray, "N R"]
    sequence_NR: Int[np.ndarray, "N R"]
    activation_NRT: Float[np.ndarray, "N R T"]


def plan_strata(levels: Sequence[float], *, wanted: int, rows: int | None = None) -> tuple[Stratum, ...]:
    """The strata between ascending levels, the weakest first; `rows` is how many sequences can be drawn."""
    strata = []
    for low, high in itertools.pairwise([0.0, *levels, 1.0]):
        drawn = math.ceil(_DRAWN_PER_WANTED * wanted / (high - low) - 1e-6)
        strata.append(Stratum(low, high, drawn if rows is None else min(drawn, rows)))
    return tuple(strata)


def kept_of_draws(strata: Sequence[Stratum]) -> dict[int, int]:
    """How many of the strongest sequences to keep of each draw, by the size of the draw."""
    kept: dict[int, int] = {}
    for stratum in strata:
        kept[stratum.drawn] = max(kept.get(stratum.drawn, 1), stratum.above)
    return kept


def choose(
    strata: Sequence[Stratum],
    ranked: Mapping[int, RankedSequences],
    turns: Callable[[Int[np.ndarray, "N R"]], Int[np.ndarray, "N R"]],
    *,
    wanted: int,
) -> tuple[Int[np.ndarray, "N R"], RankedSequences]:
    """A layer's exemplars, strongest first, and each one's stratum, -1 after the last.

    `ranked` has the sequences of each draw by its size; `turns` gives the places of sequences in the draws.
    Equal maxima are in one stratum, the highest that holds them.
    """
    edge_SN = [
        ranked[stratum.drawn].score_NR[:, stratum.above - 1]
        if stratum.above
        else np.full(len(ranked[stratum.drawn].score_NR), np.inf)
        for stratum in strata
    ]
    edge_SN = np.maximum.accumulate([*edge_SN, np.full_like(edge_SN[0], np.inf)])
    parts = []
    for number in reversed(range(len(strata))):
        found = ranked[strata[number].drawn]
        low_N1, high_N1 = edge_SN[number][:, None], edge_SN[number + 1][:, None]
        inside_NR = (found.score_NR >= low_N1) & (found.score_NR < high_N1)
        turn_NR = np.where(inside_NR, turns(found.sequence_NR), np.iinfo(np.int64).max)
        rank_NR = np.sort(np.argsort(turn_NR, axis=1, kind="stable")[:, :wanted], axis=1)
        neuron_N1 = np.arange(len(rank_NR))[:, None]
        stratum_NR = np.where(inside_NR[neuron_N1, rank_NR], number, -1)
        parts.append((stratum_NR, *(array[neuron_N1, rank_NR] for array in found)))
    missing = len(strata) * wanted - sum(part[0].shape[1] for part in parts)
    stratum_NR, score_NR, sequence_NR, activation_NRT = (
        np.pad(np.concatenate(arrays, axis=1), ((0, 0), (0, missing), *((0, 0),) * (arrays[0].ndim - 2)))
        for arrays in zip(*parts, strict=True)
    )
    stratum_NR[:, stratum_NR.shape[1] - missing :] = -1
    order_NR = np.argsort(stratum_NR < 0, axis=1, kind="stable")
    filled_NR = np.take_along_axis(stratum_NR, order_NR, axis=1) >= 0
    rows_N1 = np.arange(len(order_NR))[:, None]
    return np.where(filled_NR, stratum_NR[rows_N1, order_NR], -1).astype(np.int32), RankedSequences(
        score_NR=np.where(filled_NR, score_NR[rows_N1, order_NR], np.float32(np.nan)),
        sequence_NR=np.where(filled_NR, sequence_NR[rows_N1, order_NR], np.int32(-1)),
        activation_NRT=np.where(
            filled_NR[:, :, None],
            activation_NRT[rows_N1, order_NR],
            activation_NRT.dtype.type(np.nan),
        ),
    )
