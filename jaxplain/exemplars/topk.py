"""An exact running top-k over sequences, for one layer and one kind, as arrays that live on a device.

Every neuron keeps the R sequences of highest priority, each with its per-token activations. The
kinds differ only in what a sequence's priority is (see `reduction`); neurons that share one
priority (kind `random`) form one group.

Few sequences enter any top-k after a while, and the work shrinks with that: ranks are small arrays
kept sorted by insertion, and only the activations of a sequence that enters are copied, once, into
the slot of the one that it pushes out. Nothing here communicates between devices.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

EMPTY = -1
"""The sequence id of a rank that holds nothing; its priority is -inf."""

_ROWS_PER_COPY = 128
"""Rows copied at once: large enough for an accelerator, small enough that few copies are idle."""


class TopK(NamedTuple):
    """The running answer. G is F, or 1 where all neurons share one priority.

    Rank r of group g lies in slot `slot_RG[r, g]` of `activation_FRT`. Ranks are always sorted,
    strongest first, equal priorities by sequence id. In a `reduction.LayerReduction` the arrays
    have a leading axis P of data shards.
    """

    priority_RG: Float[Array, "*P R G"]
    sequence_RG: Int[Array, "*P R G"]
    slot_RG: Int[Array, "*P R G"]
    activation_FRT: Float[Array, "*P F R T"]


def empty_topk(*, groups: int, neurons: int, k: int, tokens: int, dtype: jnp.dtype) -> TopK:
    """A top-k that has seen nothing."""
    return TopK(
        priority_RG=jnp.full((k, groups), -jnp.inf, jnp.float32),
        sequence_RG=jnp.full((k, groups), EMPTY, jnp.int32),
        slot_RG=jnp.tile(jnp.arange(k, dtype=jnp.int32)[:, None], (1, groups)),
        activation_FRT=jnp.full((neurons, k, tokens), jnp.nan, dtype),
    )


def update_topk(
    top: TopK,
    priority_BG: Float[Array, "B G"],
    sequence_B: Int[Array, "B"],
    acts_BTF: Float[Array, "B T F"],
    counted_BT: Bool[Array, "B T"],
) -> TopK:
    """Fold a batch in. A priority of -inf never enters.

    Sequence ids must rise along the batch and from one batch to the next. Then a newcomer that
    equals an incumbent has the higher id and stays below it, which settles ties by lower id.
    Tokens that do not count are stored as NaN.
    """
    batch = priority_BG.shape[0]
    index_B1 = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def best_newcomer(priority_BG: Array, lowest_G: Array) -> tuple[Array, Array, Array]:
        best_G = priority_BG.max(axis=0)
        # The first of equals. (XLA's argmax is several times slower on a CPU.)
        index_G = jnp.where(priority_BG == best_G[None], index_B1, batch - 1).min(axis=0)
        return best_G, index_G, best_G > lowest_G

    def someone_enters(carry: tuple) -> Array:
        return carry[-1].any()

    def insert(carry: tuple) -> tuple:
        priority_RG, sequence_RG, slot_RG, acts_FRT, priority_BG, best_G, index_G, enters_G = carry
        freed_G = slot_RG[-1]
        acts_FRT = _copy_rows(acts_FRT, acts_BTF, counted_BT, index_G, freed_G, enters_G)

        stays_RG = priority_RG >= jnp.where(enters_G, best_G, -jnp.inf)[None]
        above_stays_RG = _shift_down(stays_RG).at[0].set(True)

        def inserted(ranked_RG: Array, newcomer_G: Array) -> Array:
            moved_RG = jnp.where(above_stays_RG, newcomer_G[None], _shift_down(ranked_RG))
            return jnp.where(stays_RG, ranked_RG, moved_RG)

        priority_RG = inserted(priority_RG, best_G)
        sequence_RG = inserted(sequence_RG, sequence_B[index_G])
        slot_RG = inserted(slot_RG, freed_G)
        priority_BG = jnp.where(index_B1 == index_G[None], -jnp.inf, priority_BG)
        newcomer = best_newcomer(priority_BG, priority_RG[-1])
        return priority_RG, sequence_RG, slot_RG, acts_FRT, priority_BG, *newcomer

    carry = (top.priority_RG, top.sequence_RG, top.slot_RG, top.activation_FRT, priority_BG)
    carry = (*carry, *best_newcomer(priority_BG, top.priority_RG[-1]))
    priority_RG, sequence_RG, slot_RG, acts_FRT, *_ = lax.while_loop(someone_enters, insert, carry)
    return TopK(
        priority_RG=priority_RG,
        sequence_RG=sequence_RG,
        slot_RG=slot_RG,
        activation_FRT=acts_FRT,
    )


def _shift_down(ranked_RG: Array) -> Array:
    return jnp.concatenate([ranked_RG[:1], ranked_RG[:-1]])


def _copy_rows(
    acts_FRT: Array,
    acts_BTF: Array,
    counted_BT: Array,
    index_G: Array,
    slot_G: Array,
    enters_G: Array,
) -> Array:
    """Copy sequence `index_G` of the batch into slot `slot_G`, for the groups where one enters."""
    neurons = acts_FRT.shape[0]
    if enters_G.shape[0] == 1 != neurons:
        row_TF = _masked(acts_BTF[index_G[0]], counted_BT[index_G[0]][:, None], acts_FRT.dtype)
        return lax.dynamic_update_slice(acts_FRT, row_TF.T[:, None], (0, slot_G[0], 0))

    blocks = -(-neurons // _ROWS_PER_COPY)
    entering_N = jnp.nonzero(enters_G, size=blocks * _ROWS_PER_COPY, fill_value=neurons)[0]

    def copy_block(block: Array, acts_FRT: Array) -> Array:
        neuron_N = lax.dynamic_slice_in_dim(entering_N, block * _ROWS_PER_COPY, _ROWS_PER_COPY)
        index_N = index_G.at[neuron_N].get(mode="clip")
        slot_N = slot_G.at[neuron_N].get(mode="clip")
        row_NT = acts_BTF.at[index_N, :, neuron_N].get(mode="clip")
        row_NT = _masked(row_NT, counted_BT[index_N], acts_FRT.dtype)
        return acts_FRT.at[neuron_N, slot_N].set(row_NT, mode="drop", unique_indices=True)

    used_blocks = -(-enters_G.sum() // _ROWS_PER_COPY)
    return lax.fori_loop(0, used_blocks, copy_block, acts_FRT)


def _masked(acts: Array, counted: Array, dtype: jnp.dtype) -> Array:
    return jnp.where(counted, stored(acts, dtype), jnp.nan)


def stored(acts: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Activations as the store keeps them: a float16 saturates instead of becoming infinite."""
    limit = jnp.finfo(dtype).max.astype(acts.dtype)
    return jnp.clip(acts, -limit, limit).astype(dtype)
