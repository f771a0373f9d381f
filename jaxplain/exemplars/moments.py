"""Running statistics of every neuron over all tokens that count: count, mean, variance, fraction active.

Each batch is summed about its own mean and merged into what came before by the pairwise rule of
Chan, Golub & LeVeque (1979), so that float32 does not cancel.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt


class Moments(NamedTuple):
    """`deviation_F` is the sum of squared deviations from the mean; counts are of tokens.

    In a `reduction.LayerReduction` the arrays have a leading axis P of data shards.
    """

    token_count: UInt[Array, "*P"]
    mean_F: Float[Array, "*P F"]
    deviation_F: Float[Array, "*P F"]
    active_F: UInt[Array, "*P F"]


def empty_moments(*, neurons: int) -> Moments:
    """Moments of no tokens."""
    return Moments(
        token_count=jnp.zeros((), jnp.uint32),
        mean_F=jnp.zeros(neurons, jnp.float32),
        deviation_F=jnp.zeros(neurons, jnp.float32),
        active_F=jnp.zeros(neurons, jnp.uint32),
    )


def update_moments(
    moments: Moments, acts_BTF: Float[Array, "B T F"], counted_BT: Bool[Array, "B T"]
) -> Moments:
    """Fold a batch in; a token is active where its activation is above zero."""
    # Weighted sums as matrix products: on a CPU several times faster than masked reductions.
    weight_BT = counted_BT.astype(jnp.float32)

    def weighted_sum(x_BTF: Array) -> Array:
        return jnp.einsum("BT,BTF->F", weight_BT, x_BTF, precision="highest")

    acts_BTF = acts_BTF.astype(jnp.float32)
    here = counted_BT.sum(dtype=jnp.uint32)
    count = moments.token_count + here
    mean_here_F = weighted_sum(acts_BTF) / jnp.maximum(here, 1).astype(jnp.float32)
    shift_F = mean_here_F - moments.mean_F
    share_here = here.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)
    return Moments(
        token_count=count,
        mean_F=moments.mean_F + shift_F * share_here,
        deviation_F=moments.deviation_F
        + weighted_sum(jnp.square(acts_BTF - mean_here_F[None, None]))
        + jnp.square(shift_F) * share_here * moments.token_count.astype(jnp.float32),
        active_F=moments.active_F + weighted_sum((acts_BTF > 0).astype(jnp.float32)).astype(jnp.uint32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the store keeps of a layer; all are over the tokens that count.

    `variance` divides by the count. With no tokens all but `count_F` are NaN.
    """

    count_F: np.ndarray
    mean_F: np.ndarray
    variance_F: np.ndarray
    fraction_active_F: np.ndarray


def merge_moments(parts: Moments) -> Statistics:
    """Statistics of the union of parts that are stacked along a leading axis, in float64."""
    count_P1 = np.asarray(parts.token_count, np.float64)[:, None]
    mean_PF = np.asarray(parts.mean_F, np.float64)
    deviation_PF = np.asarray(parts.deviation_F, np.float64)
    count = count_P1.sum()
    with np.errstate(invalid="ignore"):
        mean_F = (count_P1 * mean_PF).sum(0) / count
        between_F = (count_P1 * np.square(mean_PF - mean_F)).sum(0)
        return Statistics(
            count_F=np.full(mean_F.shape, int(count), np.int64),
            mean_F=mean_F,
            variance_F=(deviation_PF.sum(0) + between_F) / count,
            fraction_active_F=np.asarray(parts.active_F, np.float64).sum(0) / count,
        )
