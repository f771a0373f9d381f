"""Exemplars of kind `quantile`: for every neuron, sequences from each part of the distribution of its maxima.

Strata lie between levels of the distribution of the per-sequence maximum. For a stratum from level a to level
b, and n sequences wanted, D = 4 n / (b - a) sequences are drawn from the split (all of them, where there are
fewer), the same for all neurons, and of these every neuron keeps those ranked above level a: a top-k like any
other, whose newcomers are the drawn sequences. In the end the n that come first in the draw remain of those
that rank between a and b among the D. Strata with the same D share their draw.

So a stratum's sequences are a fair sample of those between two levels of a draw of D. That draw's level q
stands in for the split's with a standard error of sqrt(q (1 - q) / D): with n = 5 and levels 0.25, 0.5, 0.75,
0.9 and 0.99 of a quarter of the stratum's width at most, and with four times as many of half of that. Where
the draw is of the whole split there is no error. The form of such samples goes back to Bills et al. (2023).
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

    def holds(self, rank_R: Int[np.ndarray, "R"]) -> np.ndarray:
        """Which ranks among the drawn sequences, 0 for the strongest, are the stratum's."""
        level_R = _level(rank_R, self.drawn)
        return (level_R >= self.low) & (level_R < self.high)


class RankedSequences(NamedTuple):
    """A layer's sequences of one draw, strongest first; see `merging.Ranked`."""

    score_NR: Float[np.ndarray, "N R"]
    sequence_NR: Int[np.ndarray, "N R"]
    activation_NRT: Float[np.ndarray, "N R T"]


def plan_strata(levels: Sequence[float], *, wanted: int, rows: int | None = None) -> tuple[Stratum, ...]:
    """The strata between ascending levels, the weakest first; `rows` is how many sequences can be drawn."""
    edges = [0.0, *levels, 1.0]
    drawn = [
        math.ceil(_DRAWN_PER_WANTED * wanted / (high - low) - 1e-6) for low, high in itertools.pairwise(edges)
    ]
    return tuple(
        Stratum(low, high, count if rows is None else min(count, rows))
        for low, high, count in zip(edges[:-1], edges[1:], drawn, strict=True)
    )


def kept_of_draws(strata: Sequence[Stratum]) -> dict[int, int]:
    """How many of the strongest sequences to keep of each draw, by the size of the draw."""
    kept: dict[int, int] = {}
    for low, _, drawn in strata:
        above = int(np.count_nonzero(_level(np.arange(drawn), drawn) >= low))
        kept[drawn] = max(kept.get(drawn, 1), above)
    return kept


def choose(
    strata: Sequence[Stratum],
    ranked: Mapping[int, RankedSequences],
    turns: Callable[[np.ndarray], np.ndarray],
    *,
    wanted: int,
) -> tuple[Int[np.ndarray, "R"], RankedSequences]:
    """The exemplars of a layer, strongest first, and the stratum of each rank, -1 after the last.

    `turns` gives the places of sequences in the draw.
    """
    parts, stratum_R = [], np.full(len(strata) * wanted, -1, np.int32)
    filled = 0
    for number, stratum in reversed(list(enumerate(strata))):
        score_NR, sequence_NR, _ = found = ranked[stratum.drawn]
        inside_R = np.flatnonzero(stratum.holds(np.arange(min(score_NR.shape[1], stratum.drawn))))
        turn_NR = turns(sequence_NR[:, inside_R])
        rank_NR = inside_R[np.sort(np.argsort(turn_NR, axis=1, kind="stable")[:, :wanted], axis=1)]
        neuron_N1 = np.arange(len(score_NR))[:, None]
        parts.append(RankedSequences(*(array[neuron_N1, rank_NR] for array in found)))
        stratum_R[filled : filled + rank_NR.shape[1]] = number
        filled += rank_NR.shape[1]
    missing = (0, len(stratum_R) - filled)
    joined = RankedSequences(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)))
    return stratum_R, RankedSequences(
        score_NR=np.pad(joined.score_NR, ((0, 0), missing), constant_values=np.nan),
        sequence_NR=np.pad(joined.sequence_NR, ((0, 0), missing), constant_values=-1),
        activation_NRT=np.pad(joined.activation_NRT, ((0, 0), missing, (0, 0)), constant_values=np.nan),
    )


def _level(rank_R: np.ndarray, drawn: int) -> np.ndarray:
    """Each rank stands in the middle of its share of the draw."""
    return 1 - (rank_R + 0.5) / drawn
