"""Sums of activations by vocabulary token, over all tokens that count, for neurons that were chosen for it.

Every batch is summed by token first; its sums are added to the running ones in two float32 words (Knuth,
TAOCP 2, 4.2.2, theorem B), so that a token which occurs millions of times is summed as well as a rare one.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxplain.errors import JaxplainError


class TokenSums(NamedTuple):
    """The running sums of C chosen neurons; the sum proper is `sum_VC + carry_VC`.

    `neuron_C` are the neurons' places among those of the model shard. In a `reduction.LayerReduction` the
    arrays have a leading axis P of data shards, and C is spread over `model`, as many on each shard.
    """

    neuron_C: Int[Array, "*P C"]
    count_V: UInt[Array, "*P V"]
    sum_VC: Float[Array, "*P V C"]
    carry_VC: Float[Array, "*P V C"]


def empty_token_sums(neuron_C: Int[np.ndarray, "C"], *, vocabulary: int) -> TokenSums:
    """Sums of nothing."""
    zeros_VC = jnp.zeros((vocabulary, len(neuron_C)), jnp.float32)
    return TokenSums(
        neuron_C=jnp.asarray(neuron_C, jnp.int32),
        count_V=jnp.zeros(vocabulary, jnp.uint32),
        sum_VC=zeros_VC,
        carry_VC=zeros_VC,
    )


def spread_over_shards(
    place_N: Int[np.ndarray, "N"], *, neurons: int, shards: int
) -> tuple[Int[np.ndarray, "C"], Int[np.ndarray, "N"]]:
    """Where chosen neurons are summed up: `neuron_C` of `TokenSums`, and each neuron's column in C.

    `place_N` are their places among the layer's `neurons`, which the mesh spreads evenly over model shards.
    Shards with fewer of them sum up their first neuron in vain.
    """
    shard_N, local_N = np.divmod(place_N, neurons // shards)
    each = np.bincount(shard_N, minlength=shards)
    width = int(each.max())
    rank_N = np.zeros(len(place_N), np.int64)
    rank_N[np.argsort(shard_N, kind="stable")] = np.concatenate([np.arange(n) for n in each])
    column_N = shard_N * width + rank_N
    neuron_C = np.zeros(shards * width, np.int32)
    neuron_C[column_N] = local_N
    return neuron_C, column_N


def update_token_sums(
    sums: TokenSums,
    tokens_BT: Int[Array, "B T"],
    counted_BT: Bool[Array, "B T"],
    acts_BTF: Float[Array, "B T F"],
) -> TokenSums:
    """Fold a batch in."""
    vocabulary, chosen = sums.sum_VC.shape
    nowhere = vocabulary  # what is scattered there is dropped
    token_N = jnp.where(counted_BT, tokens_BT, nowhere).reshape(-1)
    place_N = jnp.arange(token_N.shape[0], dtype=jnp.int32)
    # A token's first place in the batch stands for all of them.
    first_V = jnp.full(vocabulary, token_N.shape[0], jnp.int32).at[token_N].min(place_N, mode="drop")
    first_N = first_V.at[token_N].get(mode="fill", fill_value=token_N.shape[0])
    acts_NC = acts_BTF[:, :, sums.neuron_C].astype(jnp.float32).reshape((-1, chosen))
    batch_NC = jnp.zeros_like(acts_NC).at[first_N].add(acts_NC, mode="drop")
    target_N = jnp.where(first_N == place_N, token_N, nowhere)

    before_NC = sums.sum_VC.at[target_N].get(mode="fill", fill_value=0.0)
    after_NC, lost_NC = _two_words(before_NC, batch_NC)
    return TokenSums(
        neuron_C=sums.neuron_C,
        count_V=sums.count_V.at[token_N].add(1, mode="drop"),
        sum_VC=sums.sum_VC.at[target_N].set(after_NC, mode="drop"),
        carry_VC=sums.carry_VC.at[target_N].add(lost_NC, mode="drop"),
    )


def add_token_sums(one: TokenSums, other: TokenSums) -> TokenSums:
    """Sums of the tokens of both, of the same neurons."""
    sum_VC, lost_VC = _two_words(one.sum_VC, other.sum_VC)
    return TokenSums(
        neuron_C=one.neuron_C,
        count_V=one.count_V + other.count_V,
        sum_VC=sum_VC,
        carry_VC=one.carry_VC + other.carry_VC + lost_VC,
    )


def _two_words(one: Float[Array, "N C"], other: Float[Array, "N C"]) -> tuple[Array, Array]:
    """A sum, and what was lost of it to rounding."""
    total = one + other
    added = total - one
    return total, (one - (total - added)) + (other - added)


class TokenTable(NamedTuple):
    """Every vocabulary token's mean activation in N neurons, NaN where it never counted, and its count."""

    mean_NV: Float[np.ndarray, "N V"]
    count_V: Int[np.ndarray, "V"]


def merge_token_sums(sums: TokenSums, column_N: Int[np.ndarray, "N"]) -> TokenTable:
    """Means over parts that are stacked along a leading axis, in float64."""
    count_V = np.asarray(sums.count_V).sum(axis=0, dtype=np.int64)
    total_VC = sum(np.asarray(x).sum(axis=0, dtype=np.float64) for x in (sums.sum_VC, sums.carry_VC))
    with np.errstate(invalid="ignore"):
        return TokenTable((total_VC[:, column_N] / count_V[:, None]).T, count_V)


def strongest_tokens(
    table: TokenTable, *, kept: int, min_count: int, lowest: bool = False
) -> tuple[Int[np.ndarray, "N R"], Float[np.ndarray, "N R"], Int[np.ndarray, "N R"]]:
    """The tokens with the highest (or lowest) means, of those that counted often enough, and mean and count.

    After the last are -1, NaN and 0. Ties go to the lower token.
    """
    sign = 1 if lowest else -1
    order_NV = np.where((table.count_V >= max(min_count, 1))[None], sign * table.mean_NV, np.inf)
    width = min(kept, order_NV.shape[1])
    token_NR = np.argsort(order_NV, axis=1, kind="stable")[:, :width]
    missing = ((0, 0), (0, kept - width))
    empty_NR = np.pad(np.isinf(np.take_along_axis(order_NV, token_NR, 1)), missing, constant_values=True)
    token_NR = np.pad(token_NR, missing)
    mean_NR = np.take_along_axis(table.mean_NV, token_NR, 1)
    return (
        np.where(empty_NR, -1, token_NR).astype(np.int32),
        np.where(empty_NR, np.nan, mean_NR).astype(np.float32),
        np.where(empty_NR, 0, table.count_V[token_NR]),
    )


def choose_neurons(
    wanted: int | list[list[int]],
    kept: dict[int, np.ndarray],
    *,
    seed: int,
) -> dict[int, Int[np.ndarray, "N"]]:
    """The neurons of each layer that get a table: those named, or as many drawn from `kept`.

    Raises JaxplainError for a neuron that is not kept.
    """
    held = [(layer, int(index)) for layer in sorted(kept) for index in kept[layer]]
    if isinstance(wanted, int):
        drawn = np.random.default_rng(seed).choice(len(held), min(wanted, len(held)), replace=False)
        pairs = [held[place] for place in np.sort(drawn)]
    else:
        pairs = sorted({(layer, index) for layer, index in wanted})
        for pair in sorted(set(pairs) - set(held))[:1]:
            raise JaxplainError(
                f"statistics.tokens.neurons names neuron {pair[1]} of layer {pair[0]}, which is not among "
                "those extracted; name others, or extract it too."
            )
    layers = {layer: np.array([i for at, i in pairs if at == layer], np.int64) for layer, _ in pairs}
    return dict(sorted(layers.items()))
