"""Every neuron's activations at the tokens that were drawn from a split, for quantiles.

Which tokens they are, and where each one's activations go, is known before the first step; see `draws`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxplain.exemplars.topk import stored

_TOKENS_PER_COPY = 32
"""Few enough that little is copied in vain: a batch has few of the drawn tokens."""


def update_sample(
    sample_MF: Float[Array, "M F"],
    acts_BTF: Float[Array, "B T F"],
    drawn_W: Int[Array, "W"],
    slot_W: Int[Array, "W"],
) -> Float[Array, "M F"]:
    """Copy tokens `drawn_W`, counted through the batch, to their slots; -1 after the last of them."""
    slots = sample_MF.shape[0]
    acts_NF = acts_BTF.reshape((-1, acts_BTF.shape[2]))
    missing = (0, -drawn_W.shape[0] % _TOKENS_PER_COPY)
    slot_W = jnp.pad(jnp.where(drawn_W < 0, slots, slot_W), missing, constant_values=slots)
    drawn_W = jnp.pad(drawn_W, missing, constant_values=-1)

    def copy(block: Array, sample_MF: Array) -> Array:
        drawn_N, slot_N = (
            lax.dynamic_slice_in_dim(x_W, block * _TOKENS_PER_COPY, _TOKENS_PER_COPY)
            for x_W in (drawn_W, slot_W)
        )
        row_NF = acts_NF.at[drawn_N].get(mode="clip")
        return sample_MF.at[slot_N].set(stored(row_NF, sample_MF.dtype), mode="drop")

    return lax.fori_loop(0, -(-(drawn_W >= 0).sum() // _TOKENS_PER_COPY), copy, sample_MF)


@functools.partial(jax.jit, static_argnames="mesh")
def merge_sample(sample_PMF: Float[Array, "P M F"], mesh: Mesh) -> Float[Array, "M F"]:
    """Join the data shards, each of which has zeros where another has copied a token."""
    merge = jax.shard_map(
        lambda sample_PMF: lax.psum(sample_PMF[0], "data"),
        mesh=mesh,
        in_specs=P("data", None, "model"),
        out_specs=P(None, "model"),
        check_vma=False,
    )
    return merge(sample_PMF)
