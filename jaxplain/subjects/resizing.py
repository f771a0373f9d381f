"""A decoder with more rows in its embedding, for tokens that its tokenizer gained, or with fewer layers."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jaxplain.subjects.decoder import Decoder


def grow_vocabulary(decoder: Decoder, rows: int, *, like: Mapping[int, int]) -> Decoder:
    """The decoder with `rows` rows in its embedding and, where that is its own, its unembedding.

    Row `new` of `like` is a copy of the old row `like[new]`; it may be one that the embedding had already,
    unused. Other new rows are the mean of the old ones, so that tokens which were never trained do not take
    over the softmax (Hewitt, 2021). Parameters keep their sharding, but for a vocabulary axis that no longer
    divides by its devices, which is replicated. All other arrays are those of the decoder given.

    Raises ValueError where `rows` are fewer than there are, or `like` names rows that there are not.
    """
    old = decoder.arch.vocabulary
    if rows < old:
        raise ValueError(f"the embedding has {old} rows, which cannot grow to {rows}")
    if wrong := [pair for pair in like.items() if not (0 <= pair[0] < rows and 0 <= pair[1] < old)]:
        raise ValueError(
            f"row {wrong[0][0]} cannot be like row {wrong[0][1]} in growing {old} to {rows} rows"
        )
    sources_V = np.concatenate([np.arange(old), np.full(rows - old, -1)]).astype(np.int32)
    for new, source in like.items():
        sources_V[new] = source
    arch = dataclasses.replace(decoder.arch, vocabulary=rows)
    grown = nnx.eval_shape(
        lambda: Decoder(
            arch,
            rngs=nnx.Rngs(0),
            dtype=decoder.embedding_VD[...].dtype,
            depth=len(decoder.layers),
            with_head=decoder.head is not None,
        )
    )
    values = {
        path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    }
    state = nnx.state(grown)
    for path, variable in nnx.to_flat_state(state):
        letters = str(path[-1]).rsplit("_", 1)[1]
        value = values[path]
        variable.set_value(_taken(value, sources_V, letters.index("V")) if "V" in letters else value)
    nnx.update(grown, state)
    return grown


def as_whole_model(decoder: Decoder) -> Decoder:
    """A decoder of the first layers of a checkpoint, as a model that has no others; its arrays are shared."""
    arch = decoder.arch.with_first_layers(len(decoder.layers))
    graph, state = nnx.split(decoder)
    whole = nnx.merge(graph, state)
    whole.arch = arch
    return whole


def _taken(table: jax.Array, sources_V: np.ndarray, axis: int) -> jax.Array:
    """The rows `sources_V` of a table, along an axis; where that is -1, the mean of all."""

    def take(table: jax.Array) -> jax.Array:
        mean = table.mean(axis, keepdims=True)
        known = (sources_V >= 0).reshape([-1 if number == axis else 1 for number in range(table.ndim)])
        return jnp.where(known, jnp.take(table, np.maximum(sources_V, 0), axis), mean)

    return jax.jit(take, out_shardings=_resized(table.sharding, table.ndim, axis, len(sources_V)))(table)


def _resized(sharding: Sharding, dimensions: int, axis: int, size: int) -> Sharding:
    """The sharding for another size of one axis."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = [*sharding.spec, *[None] * (dimensions - len(sharding.spec))]
    names = (spec[axis],) if isinstance(spec[axis], str) else spec[axis] or ()
    if size % int(np.prod([sharding.mesh.shape[name] for name in names], dtype=int)):
        spec[axis] = None
    return NamedSharding(sharding.mesh, P(*spec))
