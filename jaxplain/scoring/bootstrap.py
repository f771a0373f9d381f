"""Confidence intervals by resampling documents, and neurons where a mean over neurons is asked for.

Documents, not tokens, are drawn anew, since tokens of one document are not independent. In the Poisson
bootstrap (Chamandy et al., 2012) each document's weight is drawn for itself, so it needs no list of all
documents: a hash decides it, the same for every neuron and in every process, and the values of
many neurons can be averaged resample by resample.
"""

import math

import numpy as np
from jaxtyping import Float, Int

from jaxplain.corpora.hashing import lottery, text_hash

_LARGEST_WEIGHT = 12  # a larger one has a chance below 1e-10, less than the hash resolves
_POISSON_CDF = np.cumsum([math.exp(-1) / math.factorial(weight) for weight in range(_LARGEST_WEIGHT)])


def document_weights(document_N: Int[np.ndarray, "N"], resamples: int, seed: int) -> Float[np.ndarray, "R N"]:
    """How often each resample holds the document of each token (or sequence): Poisson of mean 1, float64.

    A weight depends on the seed, the document's id and the number of the resample alone.
    """
    document_D, place_N = np.unique(document_N, return_inverse=True)
    uniform_M = lottery(
        # Not the seed itself, with which the lottery chooses random exemplars.
        text_hash(f"bootstrap {seed}"),
        np.tile(document_D.astype(np.int64), resamples),
        np.repeat(np.arange(resamples), len(document_D)),
    )
    weight_M = np.searchsorted(_POISSON_CDF, uniform_M.astype(np.float64), side="right")
    return weight_M.reshape(resamples, len(document_D)).astype(np.float64)[:, place_N]


def interval(values_R: Float[np.ndarray, "R"], level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled values; NaN where fewer than half of them could be computed."""
    finite = values_R[np.isfinite(values_R)]
    if not len(finite) or 2 * len(finite) < len(values_R):
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(
    values_FR: Float[np.ndarray, "F R"], *, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """The interval of the mean over neurons, whose values were all resampled with the same weights.

    Neurons are resampled too, as they stand for others: the pigeonhole bootstrap of Owen (2007), which
    errs towards wide intervals. A neuron's NaN are left out, and so are neurons without any.
    """
    computed_FR = np.isfinite(values_FR)
    given_F = computed_FR.any(1)
    if not given_F.any():
        return math.nan, math.nan
    values_FR, computed_FR = values_FR[given_F].astype(np.float64), computed_FR[given_F]
    neurons, resamples = values_FR.shape
    times_FR = np.random.default_rng(seed).multinomial(neurons, np.full(neurons, 1 / neurons), resamples).T
    weight_FR = times_FR * computed_FR
    total_R = weight_FR.sum(0)
    sum_R = (weight_FR * np.where(computed_FR, values_FR, 0)).sum(0)
    mean_R = np.divide(sum_R, total_R, out=np.full(resamples, np.nan), where=total_R > 0)
    return interval(mean_R, level)
