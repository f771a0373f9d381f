"""Mean activation of vocabulary tokens, estimated from the sequences that a store keeps.

The stored sequences are two samples of all that were seen: the extreme ones, of which none is missing, and
the random ones. Taken as two strata, the random ones standing for all that are not extreme, they
estimate the mean without another pass and without bias towards what is extreme (the estimator of
Horvitz & Thompson, 1952).
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenMean:
    """A vocabulary token in the eyes of a neuron.

    Attributes:
        token: Its id.
        text: Its bytes as text.
        mean: The neuron's mean activation at it.
        count: Over how many of its occurrences; of all that count where `exact`, else of those in stored
            sequences.
        exact: Whether all tokens of the split that count were seen for it; else the mean is an estimate.
    """

    token: int
    text: str
    mean: float
    count: int
    exact: bool


@runtime_checkable
class StoredSequence(Protocol):
    """A sequence that a store keeps for a neuron; see `exemplar.Exemplar`."""

    @property
    def sequence(self) -> int:
        """Its row in the token table."""
        ...

    @property
    def tokens(self) -> np.ndarray:
        """Token ids, int32 [T]."""
        ...

    @property
    def activations(self) -> np.ndarray:
        """The neuron's activations, float32 [T]; NaN where a token does not count."""
        ...


def estimated_means(
    extreme: Sequence[StoredSequence],
    random: Sequence[StoredSequence],
    sequence_count: int,
    *,
    token_count: int | None = None,
) -> tuple[Int[np.ndarray, "N"], Float[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Token ids, ascending, with their mean activations and how often they occur in the stored sequences.

    `sequence_count` is how many sequences the split has. How many of them have tokens for an expert is not
    known, but how many tokens those are is: for its neurons give that as `token_count`.
    """
    inside = {exemplar.sequence for exemplar in extreme}
    others = [exemplar for exemplar in random if exemplar.sequence not in inside]
    if token_count is None:
        unseen, drawn = sequence_count - len(extreme), len(others)
    else:
        unseen, drawn = token_count - _counted(extreme), _counted(others)
    weights = [1.0] * len(extreme) + [unseen / max(drawn, 1)] * len(others)
    exemplars = [*extreme, *others]
    token_N = np.concatenate([np.zeros(0, np.int32), *(exemplar.tokens for exemplar in exemplars)])
    act_N = np.concatenate([np.zeros(0), *(exemplar.activations for exemplar in exemplars)])
    weight_N = np.repeat(weights, np.array([len(exemplar.tokens) for exemplar in exemplars], np.int64))
    counted_N = ~np.isnan(act_N)
    tokens, place_N, counts = np.unique(token_N[counted_N], return_inverse=True, return_counts=True)
    total = np.bincount(place_N, weight_N[counted_N] * act_N[counted_N])
    weight = np.bincount(place_N, weight_N[counted_N])
    return tokens, total / weight, counts


def _counted(sequences: Sequence[StoredSequence]) -> int:
    return sum(int((~np.isnan(sequence.activations)).sum()) for sequence in sequences)
