"""Reading prompts with the sequences that follow each, in training and in simulation alike.

A prompt is read once; its sequences go on from its keys and values, and do not see each other.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxplain.subjects.decoder import Cache, Decoder

NO_TOKEN = -1
"""Fills prompts and sequences that are shorter than others up, on the right."""


def read_sequences(
    decoder: Decoder,
    prompts_EP: Int[Array, "E P"],
    tokens_EST: Int[Array, "E S T"],
    shared: Cache | None = None,
    *,
    remat: bool = False,
) -> Float[Array, "B T D"]:
    """The residual stream at every token of the sequences, whose rows are E times S.

    `shared` is what every prompt begins with, read before; what comes out where there is no token means
    nothing. With `remat`, a backward pass computes what is inside the layers again instead of keeping it.
    """
    prompts, together, length = tokens_EST.shape
    offset = 0 if shared is None else shared.used
    lengths_E = (prompts_EP >= 0).sum(1, dtype=jnp.int32)
    positions_EP = _positions(prompts_EP, jnp.full((prompts, 1), offset, jnp.int32))
    empty = decoder.empty_cache(*prompts_EP.shape)
    _, read = decoder.extend(jnp.maximum(prompts_EP, 0), positions_EP, empty, shared, remat=remat)

    def for_each_sequence(array: Array, slots: int, fill: int = 0) -> Array:
        """Rows repeated for a prompt's sequences, with room for the tokens of those on axis `slots`."""
        widths = [(0, 0)] * array.ndim
        widths[slots] = (0, length)
        return jnp.repeat(jnp.pad(array, widths, constant_values=fill), together, axis=0)

    cache = Cache(
        tuple(for_each_sequence(keys, 3) for keys in read.keys),
        tuple(for_each_sequence(values, 2) for values in read.values),
        for_each_sequence(read.positions_BS, 1, NO_TOKEN),
        read.used,
    )
    tokens_BT = tokens_EST.reshape((prompts * together, length))
    positions_BT = _positions(tokens_BT, (offset + jnp.repeat(lengths_E, together))[:, None])
    x_BTD, _ = decoder.extend(jnp.maximum(tokens_BT, 0), positions_BT, cache, shared, remat=remat)
    return x_BTD


def _positions(tokens_BT: Int[Array, "B T"], first_B1: Int[Array, "B 1"]) -> Int[Array, "B T"]:
    """Where tokens stand, -1 for none."""
    at_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    return jnp.where(tokens_BT >= 0, first_B1 + at_T[None], -1)
