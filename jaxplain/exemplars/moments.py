"""Running statistics of every neuron over all tokens that count: count, first four moments, fraction active.

Each batch is summed about its own mean and merged into what came before by the pairwise rule of
Chan, Golub & LeVeque (1979), which Pébay (2008) carries to higher powers, so that float32 does not
cancel.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt

_MOST_SLICES = 8
"""More slices gain nothing, and make kernels of many operands."""


class PowerSums(NamedTuple):
    """Sums of x, x**2, x**3 and x**4, where x is the deviation of an activation from a centre."""

    first_F: Float[Array, "*P F"]
    second_F: Float[Array, "*P F"]
    third_F: Float[Array, "*P F"]
    fourth_F: Float[Array, "*P F"]


class Moments(NamedTuple):
    """`sums` are about `mean_F`; the first is not 0, but what rounding the mean left. Counts are of tokens.

    In a `reduction.LayerReduction` the arrays have a leading axis P of data shards.
    """

    token_count: UInt[Array, "*P"]
    mean_F: Float[Array, "*P F"]
    sums: PowerSums
    active_F: UInt[Array, "*P F"]


def empty_moments(*, neurons: int) -> Moments:
    """Moments of no tokens."""
    return Moments(
        token_count=jnp.zeros((), jnp.uint32),
        mean_F=jnp.zeros(neurons, jnp.float32),
        sums=PowerSums(*(jnp.zeros(neurons, jnp.float32) for _ in PowerSums._fields)),
        active_F=jnp.zeros(neurons, jnp.uint32),
    )


def update_moments(
    moments: Moments,
    acts_BTF: Float[Array, "B T F"],
    counted_BT: Bool[Array, "B T"],
    *,
    active_above: float = 0.0,
) -> Moments:
    """Fold a batch in; a token is active where its activation is above `active_above`."""
    slices = max(n for n in range(1, _MOST_SLICES + 1) if acts_BTF.shape[0] % n == 0)
    acts_SBTF = [x_BTF.astype(jnp.float32) for x_BTF in jnp.split(acts_BTF, slices)]
    weight_SBT1 = [x_BT.astype(jnp.float32)[:, :, None] for x_BT in jnp.split(counted_BT, slices)]
    ones_BT = jnp.ones(weight_SBT1[0].shape[:2], jnp.float32)

    def weighted_sum(function: Callable[[Array], Array]) -> Array:
        # Slices of the batch are added up first, in one kernel with the function and the weights; a
        # matrix product sums the little that is left. On a CPU this takes half the time of a product
        # over the whole batch, whose operand has to be written out, and masked reductions take longer.
        terms = (w_BT1 * function(x_BTF) for w_BT1, x_BTF in zip(weight_SBT1, acts_SBTF, strict=True))
        return jnp.einsum("BT,BTF->F", ones_BT, functools.reduce(operator.add, terms), precision="highest")

    here = counted_BT.sum(dtype=jnp.uint32)
    centre_F = weighted_sum(lambda x_BTF: x_BTF) / jnp.maximum(here, 1).astype(jnp.float32)

    def deviations(power: int) -> Array:
        return weighted_sum(lambda x_BTF: (x_BTF - centre_F[None, None]) ** power)

    batch = Moments(
        token_count=here,
        mean_F=centre_F,
        # The first sum is what rounding the mean left. Without it a neuron that does not vary would seem to,
        # and a skewness beside a large mean would be wrong in the third digit.
        sums=PowerSums(deviations(1), deviations(2), deviations(3), deviations(4)),
        active_F=weighted_sum(lambda x_BTF: x_BTF > active_above).astype(jnp.uint32),
    )
    return add_moments(moments, batch)


def add_moments(one: Moments, other: Moments) -> Moments:
    """Moments of the tokens of both, in float32."""
    count = one.token_count + other.token_count
    divisor = jnp.maximum(other.token_count, 1).astype(jnp.float32)
    share = other.token_count.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)
    shift_F = other.mean_F - one.mean_F + other.sums.first_F / divisor
    mean_F = one.mean_F + shift_F * share
    sums = (
        _recentred(part.sums, part.token_count.astype(jnp.float32), by_F=mean_F - part.mean_F)
        for part in (one, other)
    )
    return Moments(
        token_count=count,
        mean_F=mean_F,
        sums=jax.tree.map(operator.add, *sums),
        active_F=one.active_F + other.active_F,
    )


def _recentred(sums: PowerSums, count: Any, *, by_F: Any) -> PowerSums:
    """The sums of powers of x - by, from those of x. With no tokens they stay 0, however far the shift."""
    first_F, second_F, third_F, fourth_F = sums
    one_F = first_F - count * by_F
    two_F = second_F - (first_F + one_F) * by_F
    return PowerSums(
        first_F=one_F,
        second_F=two_F,
        third_F=third_F - 3 * second_F * by_F + (2 * first_F + one_F) * by_F * by_F,
        fourth_F=fourth_F
        - 4 * third_F * by_F
        + 6 * second_F * by_F * by_F
        - (3 * first_F + one_F) * by_F * by_F * by_F,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the store keeps of a layer; all are over the tokens that count.

    `variance_F` divides by the count. `skewness_F` and `kurtosis_F` are the third and fourth standardised
    moments of the population, m3 / m2**1.5 and m4 / m2**2; kurtosis is not the excess: a Gaussian has 3.
    Both are NaN where the variance is 0. With no tokens all but `count_F` are NaN.
    """

    count_F: np.ndarray
    mean_F: np.ndarray
    variance_F: np.ndarray
    skewness_F: np.ndarray
    kurtosis_F: np.ndarray
    fraction_active_F: np.ndarray


def merge_moments(parts: Moments) -> Statistics:
    """Statistics of the union of parts that are stacked along a leading axis, in float64."""
    parts = jax.tree.map(lambda x: np.asarray(x, np.float64), parts)
    count_P1 = parts.token_count[:, None]
    count = count_P1.sum()
    with np.errstate(invalid="ignore"):
        mean_F = np.sum(count_P1 * parts.mean_F + parts.sums.first_F, axis=0) / count
        sums = _recentred(parts.sums, count_P1, by_F=mean_F - parts.mean_F)
        _, variance_F, third_F, fourth_F = (np.sum(sum_PF, axis=0) / count for sum_PF in sums)
        # What does not vary has sums of 0 or, by rounding, next to it.
        deviation_F = np.sqrt(np.where(variance_F > 0, variance_F, np.nan))
        return Statistics(
            count_F=np.full(mean_F.shape, int(count), np.int64),
            mean_F=mean_F,
            variance_F=np.maximum(variance_F, 0),
            skewness_F=third_F / deviation_F**3,
            kurtosis_F=fourth_F / deviation_F**4,
            fraction_active_F=np.sum(parts.active_F, axis=0) / count,
        )
