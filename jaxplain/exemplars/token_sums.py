"""Sums of activations by vocabulary token, over all tokens that count, for neurons that were chosen for it.

Every batch is summed by token first; its sums are added to the running ones in two float32 words (Knuth,
TAOCP 2, 4.2.2, theorem B), so that a token which occurs millions of times is summed as well as a rare one.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxplain.errors import JaxplainError
from jaxplain.exemplars.selection import Selection
from jaxplain.store.neuron_id import NeuronId


class TokenSums(NamedTuple):
    """The running sums of C chosen neurons; the sum proper is `sum_VC + carry_VC`.

    `neuron_C` are the neurons' places among those of the model shard. G is C, or 1 where the same tokens
    count for all neurons. In a `reduction.LayerReduction` the arrays have a leading axis P of data shards,
    and C is spread over `model`, as many on each shard.
    """

    neuron_C: Int[Array, "*P C"]
    count_VG: UInt[Array, "*P V G"]
    sum_VC: Float[Array, "*P V C"]
    carry_VC: Float[Array, "*P V C"]


def empty_token_sums(neuron_C: Int[np.ndarray, "C"], *, vocabulary: int, alike: bool = True) -> TokenSums:
    """Sums of nothing; `alike` where the same tokens count for all neurons."""
    shape = (vocabulary, len(neuron_C))
    return TokenSums(
        neuron_C=jnp.asarray(neuron_C, jnp.int32),
        count_VG=jnp.zeros((vocabulary, 1) if alike else shape, jnp.uint32),
        sum_VC=jnp.zeros(shape, jnp.float32),
        carry_VC=jnp.zeros(shape, jnp.float32),
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
    counted_BTG: Bool[Array, "B T G"],
    acts_BTF: Float[Array, "B T F"],
) -> TokenSums:
    """Fold a batch in; G is that of all neurons, F, or 1."""
    vocabulary, chosen = sums.sum_VC.shape
    nowhere = vocabulary  # what is scattered there is dropped
    if counted_BTG.shape[2] > 1:
        counted_BTG = counted_BTG[:, :, sums.neuron_C]
    counted_NG = counted_BTG.reshape((-1, counted_BTG.shape[2]))
    token_N = jnp.where(counted_NG.any(axis=1), tokens_BT.reshape(-1), nowhere)
    place_N = jnp.arange(token_N.shape[0], dtype=jnp.int32)
    # A token's first place in the batch stands for all of them.
    first_V = jnp.full(vocabulary, token_N.shape[0], jnp.int32).at[token_N].min(place_N, mode="drop")
    first_N = first_V.at[token_N].get(mode="fill", fill_value=token_N.shape[0])
    acts_NC = acts_BTF[:, :, sums.neuron_C].astype(jnp.float32).reshape((-1, chosen))
    if counted_NG.shape[1] > 1:
        acts_NC = jnp.where(counted_NG, acts_NC, 0)
    batch_NC = jnp.zeros_like(acts_NC).at[first_N].add(acts_NC, mode="drop")
    target_N = jnp.where(first_N == place_N, token_N, nowhere)

    before_NC = sums.sum_VC.at[target_N].get(mode="fill", fill_value=0.0)
    after_NC = before_NC + batch_NC
    added_NC = after_NC - before_NC
    lost_NC = (before_NC - (after_NC - added_NC)) + (batch_NC - added_NC)
    return TokenSums(
        neuron_C=sums.neuron_C,
        count_VG=sums.count_VG.at[token_N].add(counted_NG.astype(jnp.uint32), mode="drop"),
        sum_VC=sums.sum_VC.at[target_N].set(after_NC, mode="drop"),
        carry_VC=sums.carry_VC.at[target_N].add(lost_NC, mode="drop"),
    )


class TokenTable(NamedTuple):
    """Every vocabulary token's mean activation in N neurons, NaN where it never counted, and its count."""

    mean_NV: Float[np.ndarray, "N V"]
    count_NV: Int[np.ndarray, "N V"]


def merge_token_sums(sums: TokenSums, column_N: Int[np.ndarray, "N"]) -> TokenTable:
    """Means over parts that are stacked along a leading axis, in float64."""
    count_VG = np.asarray(sums.count_VG).sum(axis=0, dtype=np.int64)
    sum_VC, carry_VC = (np.asarray(x).sum(axis=0, dtype=np.float64) for x in (sums.sum_VC, sums.carry_VC))
    total_VC = sum_VC + carry_VC
    count_VN = np.broadcast_to(count_VG, total_VC.shape)[:, column_N]
    with np.errstate(invalid="ignore"):
        return TokenTable((total_VC[:, column_N] / count_VN).T, count_VN.T)


def strongest_tokens(
    table: TokenTable, *, kept: int, min_count: int, lowest: bool = False
) -> tuple[Int[np.ndarray, "N R"], Float[np.ndarray, "N R"], Int[np.ndarray, "N R"]]:
    """The tokens with the highest (or lowest) means, of those that counted often enough, and mean and count.

    After the last are -1, NaN and 0. Ties go to the lower token.
    """
    sign = 1 if lowest else -1
    order_NV = np.where(table.count_NV >= max(min_count, 1), sign * table.mean_NV, np.inf)
    width = min(kept, order_NV.shape[1])
    token_NR = np.argsort(order_NV, axis=1, kind="stable")[:, :width]
    missing = ((0, 0), (0, kept - width))
    empty_NR = np.pad(np.isinf(np.take_along_axis(order_NV, token_NR, 1)), missing, constant_values=True)
    token_NR = np.pad(token_NR, missing)
    mean_NR = np.take_along_axis(table.mean_NV, token_NR, 1)
    return (
        np.where(empty_NR, -1, token_NR).astype(np.int32),
        np.where(empty_NR, np.nan, mean_NR).astype(np.float32),
        np.where(empty_NR, 0, np.take_along_axis(table.count_NV, token_NR, 1)),
    )


def choose_neurons(
    wanted: int | list[list[int]], selection: Selection, *, seed: int
) -> dict[int, Int[np.ndarray, "N"]]:
    """The numbers of each layer's neurons that get a table: those named, or as many drawn from a selection.

    Raises JaxplainError for a neuron that is not selected, and for a name without an expert, or with one,
    where that does not fit the subject.
    """
    if isinstance(wanted, int):
        layers = sorted(selection.indices)
        ends = np.cumsum([len(selection.indices[layer]) for layer in layers])
        drawn = np.random.default_rng(seed).choice(ends[-1], min(wanted, ends[-1]), replace=False)
        parts = np.split(np.sort(drawn), np.searchsorted(np.sort(drawn), ends[:-1]))
        starts = [0, *ends[:-1].tolist()]
        found = {
            layer: selection.indices[layer][part - start].astype(np.int64)
            for layer, part, start in zip(layers, parts, starts, strict=True)
        }
        return {layer: numbers for layer, numbers in found.items() if len(numbers)}
    numbers: dict[int, set[int]] = {}
    for neuron in map(NeuronId, wanted):
        if (neuron.expert is None) == bool(selection.arch.experts):
            names = "a layer, an expert and an index" if selection.arch.experts else "a layer and an index"
            raise JaxplainError(
                f"statistics.tokens.neurons names {list(neuron)}, but a neuron of this subject is called by "
                f"{names}."
            )
        number = selection.number_of(neuron)
        if number is None:
            of_expert = "" if neuron.expert is None else f"of expert {neuron.expert} "
            raise JaxplainError(
                f"statistics.tokens.neurons names neuron {neuron.index} {of_expert}of layer {neuron.layer}, "
                "which is not among those extracted; name others, or extract it too."
            )
        numbers.setdefault(neuron.layer, set()).add(number)
    return {layer: np.array(sorted(numbers[layer]), np.int64) for layer in sorted(numbers)}
