"""How well predicted activations agree with true ones, over all tokens at once or within sequences.

Every metric takes non-negative token weights of many resamples at a time and gives one value per resample;
weight 2 is the token twice. Without weights there is one value. What cannot be computed is NaN.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

_ROUNDING = 1e-6
"""Values that differ by less than this part of the largest are taken for one: float32 is no more exact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A value; or NaN, and the reason why there is none."""

    value: float
    reason: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Counted:
    """The tokens that can be compared, in their order.

    Attributes:
        truth_N: True activations, float64, all finite.
        predicted_N: Predicted activations, float64, all finite.
        counted_M: Which of the tokens given these are, to select their weights and sequence ids.
        left_out: How many of the tokens given are missing here.
    """

    truth_N: Float[np.ndarray, "N"]
    predicted_N: Float[np.ndarray, "N"]
    counted_M: Bool[np.ndarray, "M"]
    left_out: int


def leave_out_missing(truth_M: Float[np.ndarray, "M"], predicted_M: Float[np.ndarray, "M"]) -> Counted:
    """Leave out tokens at which the truth or the prediction is NaN, or infinite as float16 may overflow."""
    counted_M = np.isfinite(truth_M) & np.isfinite(predicted_M)
    return Counted(
        truth_N=truth_M[counted_M].astype(np.float64),
        predicted_N=predicted_M[counted_M].astype(np.float64),
        counted_M=counted_M,
        left_out=int((~counted_M).sum()),
    )


def is_constant(x_N: Float[np.ndarray, "N"]) -> bool:
    """Whether values are the same but for rounding; no values are, too."""
    return not _varies(x_N.astype(np.float64), np.ones((1, len(x_N))))[0]


def correlation(
    truth_N: Float[np.ndarray, "N"],
    predicted_N: Float[np.ndarray, "N"],
    weight_RN: Float[np.ndarray, "R N"] | None = None,
) -> Float[np.ndarray, "R"]:
    """Pearson's correlation; NaN where the truth or the prediction is constant.

    The score of Bills et al. (2023), who take it over all tokens of a neuron's sequences, as here.
    """
    truth_N, predicted_N, weight_RN = _float64(truth_N, predicted_N, weight_RN)
    truth_RN = truth_N - _mean(truth_N, weight_RN)[:, None]
    predicted_RN = predicted_N - _mean(predicted_N, weight_RN)[:, None]
    covariance_R, truth_R, predicted_R = (
        np.einsum("RN,RN,RN->R", weight_RN, a_RN, b_RN)
        for a_RN, b_RN in (
            (truth_RN, predicted_RN),
            (truth_RN, truth_RN),
            (predicted_RN, predicted_RN),
        )
    )
    vary_R = _varies(truth_N, weight_RN) & _varies(predicted_N, weight_RN)
    return np.clip(_ratio(covariance_R, np.sqrt(truth_R) * np.sqrt(predicted_R), vary_R), -1, 1)


def r2_centred(
    truth_N: Float[np.ndarray, "N"],
    predicted_N: Float[np.ndarray, "N"],
    weight_RN: Float[np.ndarray, "R N"] | None = None,
) -> Float[np.ndarray, "R"]:
    """1 - sum (y - p)**2 / sum (y - mean y)**2: 0 is as good as the mean. NaN where the truth is constant."""
    truth_N, predicted_N, weight_RN = _float64(truth_N, predicted_N, weight_RN)
    deviation_RN = truth_N - _mean(truth_N, weight_RN)[:, None]
    return 1 - _ratio(
        weight_RN @ (truth_N - predicted_N) ** 2,
        np.einsum("RN,RN,RN->R", weight_RN, deviation_RN, deviation_RN),
        _varies(truth_N, weight_RN),
    )


def r2_uncentred(
    truth_N: Float[np.ndarray, "N"],
    predicted_N: Float[np.ndarray, "N"],
    weight_RN: Float[np.ndarray, "R N"] | None = None,
) -> Float[np.ndarray, "R"]:
    """1 - sum (y - p)**2 / sum y**2: 0 is as good as predicting 0. NaN where the truth is 0 everywhere."""
    truth_N, predicted_N, weight_RN = _float64(truth_N, predicted_N, weight_RN)
    squares_R = weight_RN @ truth_N**2
    return 1 - _ratio(weight_RN @ (truth_N - predicted_N) ** 2, squares_R, squares_R > 0)


def absolute_deviation_explained_mean(
    truth_N: Float[np.ndarray, "N"],
    predicted_N: Float[np.ndarray, "N"],
    weight_RN: Float[np.ndarray, "R N"] | None = None,
) -> Float[np.ndarray, "R"]:
    """1 - sum |y - p| / sum |y - mean y|. NaN where the truth is constant."""
    truth_N, predicted_N, weight_RN = _float64(truth_N, predicted_N, weight_RN)
    return _deviation_explained(truth_N, predicted_N, weight_RN, _mean(truth_N, weight_RN))


def absolute_deviation_explained_median(
    truth_N: Float[np.ndarray, "N"],
    predicted_N: Float[np.ndarray, "N"],
    weight_RN: Float[np.ndarray, "R N"] | None = None,
) -> Float[np.ndarray, "R"]:
    """1 - sum |y - p| / sum |y - median y|, with each resample's own median. NaN where the truth is constant.

    Where the middle lies between two values, either gives the same sum.
    """
    truth_N, predicted_N, weight_RN = _float64(truth_N, predicted_N, weight_RN)
    return _deviation_explained(truth_N, predicted_N, weight_RN, _median(truth_N, weight_RN))


Metric = Callable[
    [Float[np.ndarray, "N"], Float[np.ndarray, "N"], Float[np.ndarray, "R N"] | None],
    Float[np.ndarray, "R"],
]

METRICS: Mapping[str, Metric] = {
    "correlation": correlation,
    "r2_centred": r2_centred,
    "r2_uncentred": r2_uncentred,
    "absolute_deviation_explained_mean": absolute_deviation_explained_mean,
    "absolute_deviation_explained_median": absolute_deviation_explained_median,
}
"""Metrics over all tokens at once, by the names under which scores are stored."""


def correlation_per_sequence(
    truth_N: Float[np.ndarray, "N"],
    predicted_N: Float[np.ndarray, "N"],
    sequence_N: Int[np.ndarray, "N"],
    weight_RN: Float[np.ndarray, "R N"] | None = None,
) -> Float[np.ndarray, "R"]:
    """The mean, over sequences, of the correlation within each; sequences that have none are left out.

    Weights are of whole sequences, as documents are resampled: weight 2 is the sequence twice.

    Raises:
        ValueError: If tokens of one sequence differ in weight.
    """
    truth_N, predicted_N, weight_RN = _float64(truth_N, predicted_N, weight_RN)
    sequence_S, first_S, place_N = np.unique(sequence_N, return_index=True, return_inverse=True)
    weight_RS = weight_RN[:, first_S]
    if (weight_RN != weight_RS[:, place_N]).any():
        raise ValueError("tokens of one sequence differ in weight")
    order_N = np.argsort(place_N, kind="stable")
    ends_S = np.cumsum(np.bincount(place_N, minlength=len(sequence_S)))
    value_S = np.array(
        [
            correlation(truth_N[tokens], predicted_N[tokens])[0]
            for tokens in np.split(order_N, ends_S[:-1])[: len(sequence_S)]
        ],
        np.float64,
    )
    computed_S = ~np.isnan(value_S)
    return _mean(value_S[computed_S], weight_RS[:, computed_S])


def measure(name: str, truth_M: Float[np.ndarray, "M"], predicted_M: Float[np.ndarray, "M"]) -> Measured:
    """A metric of `METRICS` over the tokens at which there is both truth and prediction."""
    tokens = leave_out_missing(truth_M, predicted_M)
    value = float(METRICS[name](tokens.truth_N, tokens.predicted_N, None)[0])
    if not np.isnan(value):
        return Measured(value=value)
    if not len(tokens.truth_N):
        return _missing("no token counts")
    if name == "r2_uncentred":
        return _missing("the truth is 0 everywhere")
    if len(tokens.truth_N) == 1:
        return _missing("only one token")
    return _missing("the truth is constant" if is_constant(tokens.truth_N) else "the prediction is constant")


def measure_per_sequence(
    truth_M: Float[np.ndarray, "M"], predicted_M: Float[np.ndarray, "M"], sequence_M: Int[np.ndarray, "M"]
) -> Measured:
    """`correlation_per_sequence` over the tokens at which there is both truth and prediction."""
    tokens = leave_out_missing(truth_M, predicted_M)
    sequence_N = sequence_M[tokens.counted_M]
    value = float(correlation_per_sequence(tokens.truth_N, tokens.predicted_N, sequence_N)[0])
    if not np.isnan(value):
        return Measured(value=value)
    if not len(tokens.truth_N):
        return _missing("no token counts")
    return _missing("the truth or the prediction is constant in every sequence")


def _missing(reason: str) -> Measured:
    return Measured(value=float("nan"), reason=reason)


def _float64(
    truth_N: np.ndarray, predicted_N: np.ndarray, weight_RN: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if weight_RN is None:
        weight_RN = np.ones((1, len(truth_N)))
    truth_N, predicted_N, weight_RN = (
        x.astype(np.float64, copy=False) for x in (truth_N, predicted_N, weight_RN)
    )
    return truth_N, predicted_N, weight_RN


def _varies(x_N: np.ndarray, weight_RN: np.ndarray) -> np.ndarray:
    """Whether values of weight above 0 differ by more than rounding.

    Sums of squares cannot tell: about a mean that is rounded, 0.1 repeated has a variance.
    """
    x_RN, present_RN = np.broadcast_to(x_N, weight_RN.shape), weight_RN > 0
    low_R = np.min(x_RN, axis=1, where=present_RN, initial=np.inf)
    high_R = np.max(x_RN, axis=1, where=present_RN, initial=-np.inf)
    return high_R - low_R > _ROUNDING * np.maximum(np.abs(low_R), np.abs(high_R))


def _ratio(above_R: np.ndarray, below_R: np.ndarray, computable_R: np.ndarray) -> np.ndarray:
    # Squares of values below 1e-160 are 0.
    return np.divide(above_R, below_R, out=np.full(len(above_R), np.nan), where=computable_R & (below_R > 0))


def _mean(x_N: np.ndarray, weight_RN: np.ndarray) -> np.ndarray:
    total_R = weight_RN.sum(1)
    return _ratio(weight_RN @ x_N, total_R, total_R > 0)


def _median(x_N: np.ndarray, weight_RN: np.ndarray) -> np.ndarray:
    """The lowest value up to which there is half of the weight."""
    if not len(x_N):
        return np.full(len(weight_RN), np.nan)
    order_N = np.argsort(x_N, kind="stable")
    below_RN = np.cumsum(weight_RN[:, order_N], axis=1)
    return x_N[order_N][(below_RN < below_RN[:, -1:] / 2).sum(1)]


def _deviation_explained(
    truth_N: np.ndarray, predicted_N: np.ndarray, weight_RN: np.ndarray, centre_R: np.ndarray
) -> np.ndarray:
    deviation_RN = np.abs(truth_N - centre_R[:, None])
    return 1 - _ratio(
        weight_RN @ np.abs(truth_N - predicted_N),
        np.einsum("RN,RN->R", weight_RN, deviation_RN),
        _varies(truth_N, weight_RN),
    )
