"""From simulated levels, 0 to 10, to activations: maps fitted on other sequences than those they score."""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from jaxplain.errors import JaxplainError
from jaxplain.scoring.metrics import is_constant, leave_out_missing
from jaxplain.simulators.simulation import LEVELS

CalibrationMethod = Literal["none", "linear", "percentile"]


@runtime_checkable
class Calibration(Protocol):
    """A map from expected levels to activations, float64; NaN stays NaN."""

    def __call__(self, predicted_N: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """The activations that levels stand for."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A straight line, which may lead beyond the activations seen."""

    slope: float
    intercept: float

    def __call__(self, predicted_N: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """The activations that levels stand for."""
        return predicted_N.astype(np.float64) * self.slope + self.intercept


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Quantiles:
    """Levels go to their quantile, quantiles to the activation there; both linear in between, clipped beyond.

    Attributes:
        level_K: Distinct levels, ascending, float64.
        quantile_K: The share of tokens below each level, and half of those at it.
        activation_N: Activations, ascending, float64; the n-th of N is the quantile (n + 1/2) / N.
    """

    level_K: Float[np.ndarray, "K"]
    quantile_K: Float[np.ndarray, "K"]
    activation_N: Float[np.ndarray, "N"]

    def __call__(self, predicted_N: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """The activations that levels stand for."""
        quantile_N = np.interp(predicted_N, self.level_K, self.quantile_K)
        mapped_N = np.interp(quantile_N, _mid_ranks(len(self.activation_N)), self.activation_N)
        return np.where(np.isnan(predicted_N), np.nan, mapped_N)  # with one point np.interp loses NaN


def fit_calibration(
    method: CalibrationMethod,
    predicted_N: Float[np.ndarray, "N"],
    truth_N: Float[np.ndarray, "N"],
    *,
    extreme: float,
) -> Calibration:
    """Fit a map on tokens that are not scored with it; where either is NaN the token is left out.

    Args:
        method: "none" takes a level for tenths of `extreme`, whatever the truth. "linear" is least squares;
            where the prediction is constant, the mean of the truth. "percentile" gives a level the truth
            of the same quantile, tied levels sharing the middle one of theirs (both: Bills et al., 2023).
        predicted_N: Expected levels, 0 to 10.
        truth_N: True activations.
        extreme: The activation that level 10 stands for where nothing is fitted.

    Raises:
        JaxplainError: If there is nothing to fit a map on.
    """
    if method == "none":
        return Line(slope=extreme / (LEVELS - 1), intercept=0.0)
    tokens = leave_out_missing(truth_N, predicted_N)
    if not len(tokens.truth_N):
        raise JaxplainError(
            f"calibration is {method!r}, but at none of {len(truth_N)} tokens outside the scored sequences "
            "is there both an activation and a prediction; simulate more sequences or set it to 'none'."
        )
    return {"linear": _line, "percentile": _quantiles}[method](tokens.predicted_N, tokens.truth_N)


def _line(predicted_N: np.ndarray, truth_N: np.ndarray) -> Line:
    if is_constant(predicted_N):
        return Line(slope=0.0, intercept=float(truth_N.mean()))
    deviation_N = predicted_N - predicted_N.mean()
    slope = (deviation_N @ (truth_N - truth_N.mean())) / (deviation_N @ deviation_N)
    return Line(slope=float(slope), intercept=float(truth_N.mean() - slope * predicted_N.mean()))


def _quantiles(predicted_N: np.ndarray, truth_N: np.ndarray) -> Quantiles:
    if is_constant(predicted_N):
        predicted_N = np.full(len(predicted_N), predicted_N.mean())  # ties but for rounding
    level_K, count_K = np.unique(predicted_N, return_counts=True)
    return Quantiles(
        level_K=level_K,
        quantile_K=(np.cumsum(count_K) - count_K / 2) / len(predicted_N),
        activation_N=np.sort(truth_N),
    )


def _mid_ranks(count: int) -> np.ndarray:
    return (np.arange(count) + 0.5) / count
