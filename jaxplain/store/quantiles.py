"""Quantiles of every neuron over all tokens that count, from what a run keeps anyway.

The tails are exact: every token beyond the last-ranked sequence's extreme lies in a stored sequence, so that
its rank among all tokens is known. (Exact in the stored activations' dtype, whose rounding keeps the order.)
The body comes from a random sample of the tokens, the same for all neurons. With M sampled tokens, the share
of tokens below a body quantile is off by more than sqrt(log(2 / d) / (2 M)) with a probability of d at most
(Dvoretzky, Kiefer & Wolfowitz, 1956; Massart, 1990): for M = 2,048 by more than 0.03 once in twenty times,
anywhere. At one level q its standard error is sqrt(q (1 - q) / M).
That bound knows M alone, not how many tokens there are, so what a run fixes is M, and the rate of sampling is
M over the tokens that count. Where the tails meet the body, ranks go on counting: the sampled tokens between
the two thresholds are spread over the ranks that the tails leave, so that there is no jump.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Tail(NamedTuple):
    """The furthest tokens in one direction.

    Attributes:
        threshold_F: No token beyond it is missing; infinite where none is missing at all.
        count_F: How many are beyond it, and the one that it is itself.
        value_FN: Their activations, the furthest first; NaN after the last.
    """

    threshold_F: Float[np.ndarray, "F"]
    count_F: np.ndarray
    value_FN: Float[np.ndarray, "F N"]


def upper_tail(score_FR: Float[np.ndarray, "F R"], activation_FRT: Float[np.ndarray, "F R T"]) -> Tail:
    """What the sequences of kind max know of the highest activations; NaN where nothing is ranked."""
    largest = np.finfo(activation_FRT.dtype).max  # what is beyond it is stored as that
    last_F = np.clip(score_FR[:, -1], -largest, largest).astype(activation_FRT.dtype).astype(np.float32)
    threshold_F = np.where(np.isnan(last_F), -np.inf, last_F)
    # numpy compares float32 many times as fast as float16.
    flat_FN = activation_FRT.astype(np.float32).reshape((len(activation_FRT), -1))
    neuron_N, place_N = np.nonzero(flat_FN > threshold_F[:, None])
    value_N = flat_FN[neuron_N, place_N]
    order = np.lexsort((-value_N, neuron_N))
    count_F = np.bincount(neuron_N, minlength=len(flat_FN))
    rank_N = np.arange(len(neuron_N)) - np.repeat(np.cumsum(count_F) - count_F, count_F)
    value_FN = np.full((len(flat_FN), count_F.max(initial=0) + 1), np.nan, np.float32)
    value_FN[neuron_N, rank_N] = value_N[order]  # neurons come in order, before and after sorting
    bounded_F = np.flatnonzero(np.isfinite(threshold_F))
    value_FN[bounded_F, count_F[bounded_F]] = threshold_F[bounded_F]
    count_F[bounded_F] += 1
    return Tail(threshold_F, count_F, value_FN)


def lower_tail(score_FR: Float[np.ndarray, "F R"], activation_FRT: Float[np.ndarray, "F R T"]) -> Tail:
    """The same for the sequences of kind min and the lowest activations."""
    mirrored = upper_tail(-score_FR, -activation_FRT)
    return Tail(-mirrored.threshold_F, mirrored.count_F, -mirrored.value_FN)


TAILS = {"max": upper_tail, "min": lower_tail}
"""By kind of exemplars, the tail that they know."""


def quantiles(
    levels: Float[np.ndarray, "Q"],
    count: int,
    sample_FM: Float[np.ndarray, "F M"],
    *,
    upper: Tail | None,
    lower: Tail | None,
) -> Float[np.ndarray, "F Q"]:
    """The activation below which a share of the `count` tokens lies, linear between neighbours; float32.

    `sample_FM` are the activations at sampled tokens, NaN where there is none. NaN where there are no tokens.
    """
    neurons = len(sample_FM)
    if count == 0 or len(levels) == 0:
        return np.full((neurons, len(levels)), np.nan, np.float32)
    place_Q = levels.astype(np.float64) * (count - 1)
    below_Q = np.floor(place_Q).astype(np.int64)
    order = _OrderStatistics(count, sample_FM, upper, lower)
    value_FQ, next_FQ = order.at(below_Q), order.at(np.minimum(below_Q + 1, count - 1))
    return (value_FQ + (next_FQ - value_FQ) * (place_Q - below_Q)).astype(np.float32)


def quantiles_by_count(
    levels: Float[np.ndarray, "Q"],
    count_F: Int[np.ndarray, "F"],
    sample_FM: Float[np.ndarray, "F M"],
    tails: Mapping[str, Tail],
) -> Float[np.ndarray, "F Q"]:
    """Quantiles of neurons whose tokens may be of different numbers, as those of several experts are.

    `tails` are of the kinds in `TAILS` that are known. NaN where the count is negative, of neurons that were
    not asked for.
    """
    found_FQ = np.full((len(count_F), len(levels)), np.nan, np.float32)
    for count in np.unique(count_F[count_F >= 0]):
        alike_F = count_F == count
        upper, lower = (
            Tail(*(values[alike_F] for values in tails[kind])) if kind in tails else None for kind in TAILS
        )
        found_FQ[alike_F] = quantiles(levels, int(count), sample_FM[alike_F], upper=upper, lower=lower)
    return found_FQ


class _OrderStatistics:
    """The tokens' activations by rank, from 0 for the lowest: exact in the tails, estimated in the body."""

    def __init__(self, count: int, sample_FM: np.ndarray, upper: Tail | None, lower: Tail | None):
        self._count, self._upper, self._lower = count, upper, lower
        sample_FM = np.pad(sample_FM.astype(np.float32), ((0, 0), (0, 1)), constant_values=np.nan)
        unbounded_F = np.full(len(sample_FM), np.inf)
        self._highest_F = unbounded_F if upper is None else upper.threshold_F
        self._lowest_F = -unbounded_F if lower is None else lower.threshold_F
        outside = (sample_FM > self._highest_F[:, None]) | (sample_FM < self._lowest_F[:, None])
        self._body_FM = np.sort(np.where(outside, np.nan, sample_FM), axis=1)  # NaN last
        self._sampled_F = (~np.isnan(self._body_FM)).sum(axis=1)

    def at(self, rank_Q: np.ndarray) -> np.ndarray:
        """Activations [F, Q]."""
        found = np.stack([self._body(rank) for rank in rank_Q.tolist()], axis=1)
        for tail, place_Q in ((self._lower, rank_Q), (self._upper, self._count - 1 - rank_Q)):
            if tail is not None:
                value_FQ = tail.value_FN[:, np.minimum(place_Q, tail.value_FN.shape[1] - 1)]
                found = np.where(place_Q[None] < tail.count_F[:, None], value_FQ, found)
        return found

    def _body(self, rank: int) -> np.ndarray:
        """The rank's activation in each neuron by its place among the sampled tokens between the tails."""
        before_F = 0 if self._lower is None else self._lower.count_F
        beyond_F = 0 if self._upper is None else self._upper.count_F
        share_F = (rank - before_F + 0.5) / np.maximum(self._count - before_F - beyond_F, 1)
        # Sampled token m stands at (m + 1/2) / M; the thresholds stand at 0 and 1.
        place_F = np.clip(share_F, 0, 1) * self._sampled_F - 0.5
        left_F = np.floor(place_F).astype(np.int64)
        weight_F = place_F - left_F
        low_F, high_F = self._sampled(left_F), self._sampled(left_F + 1)
        # Half a step separates a threshold from the outermost token.
        first_F, last_F = left_F < 0, left_F >= self._sampled_F - 1
        weight_F = np.where(first_F, np.where(last_F, share_F, 2 * weight_F - 1), weight_F)
        weight_F = np.where(last_F & ~first_F, 2 * weight_F, weight_F)
        return low_F + (high_F - low_F) * np.clip(weight_F, 0, 1)

    def _sampled(self, place_F: np.ndarray) -> np.ndarray:
        """The sampled token at a place; before the first and after the last, the threshold or that token."""
        neurons = np.arange(len(place_F))
        last_F = np.maximum(self._sampled_F - 1, 0)
        inside_F = self._body_FM[neurons, np.clip(place_F, 0, last_F)]
        low_F = np.where(np.isfinite(self._lowest_F), self._lowest_F, inside_F)
        high_F = np.where(np.isfinite(self._highest_F), self._highest_F, inside_F)
        found_F = np.where(place_F < 0, low_F, np.where(place_F >= self._sampled_F, high_F, inside_F))
        return np.where(np.isnan(found_F), np.where(np.isnan(low_F), high_F, low_F), found_F)
