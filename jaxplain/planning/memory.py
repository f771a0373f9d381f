"""Memory of each device in an extraction: exact for weights and state, an estimate for temporaries."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jaxplain.exemplars.reduction import partition_specs
from jaxplain.planning.demand import Demand
from jaxplain.subjects.loading import partition

_LANES, _SUBLANES = 128, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device."""

    weights: int
    state: int
    temporaries: int

    @property
    def total(self) -> int:
        """Everything that is there while a step runs."""
        return self.weights + self.state + self.temporaries


def memory(demand: Demand, *, data: int, model: int, batch: int, tiled: bool) -> Memory:
    """What each device of a mesh of `data` x `model` holds; `tiled` is how TPUs lay arrays out."""
    return Memory(
        weights=weight_bytes(demand, model=model, tiled=tiled),
        state=state_bytes(demand, model=model, tiled=tiled),
        temporaries=temporary_bytes(demand, rows=batch // data, model=model),
    )


def weight_bytes(demand: Demand, *, model: int, tiled: bool, unread: bool = True) -> int:
    """Of the parameters, of which each device holds those that `loading.partition` gives it.

    Without `unread`, of those that the step reads.
    """
    mesh = AbstractMesh((1, model), ("data", "model"))
    return sum(
        _bytes(shape, partition(name.rsplit(".", 1)[-1], shape.shape, mesh), model, tiled)
        for name, shape in demand.weights.items()
        if unread or demand.is_read(name)
    )


def state_bytes(demand: Demand, *, model: int, tiled: bool) -> int:
    """Of the reductions. Each device holds one data shard's, so the size of axis `data` does not matter."""
    layers = collections.Counter(demand.padded_neurons(layer, model) for layer in demand.selection.indices)
    total = 0
    for neurons, count in layers.items():
        state = demand.layer_state(neurons)
        leaves = zip(jax.tree.leaves(state), jax.tree.leaves(partition_specs(state)), strict=True)
        total += count * sum(_bytes(shape, spec, model, tiled) for shape, spec in leaves)
    return total


def temporary_bytes(demand: Demand, *, rows: int, model: int) -> int:
    """What a step needs besides, for `rows` sequences per data shard: an estimate, in proportion to them.

    Layers come one after another, so that it is the residual stream, and the larger of what an attention
    layer and an MLP with its reduction hold.
    """
    arch, size = demand.arch, demand.dtype.itemsize
    heads = arch.query_heads // model if arch.query_heads % model == 0 else arch.query_heads
    neurons = arch.neurons // model
    stream = arch.width * (2 * size + 4)
    projections = heads * arch.head_width * (2 * size + 4)
    logits = demand.tokens * heads * 4 * 2
    # Gate, up and their product, then the activations and the sums of their powers in float32.
    mlp = neurons * (2 * 4 + size + 4)
    return rows * demand.tokens * (stream + max(projections + logits, mlp))


def _bytes(shape: jax.ShapeDtypeStruct, spec: P, model: int, tiled: bool) -> int:
    """Of one device's part of an array whose axes on `model` are divided."""
    local = list(shape.shape)
    for axis, name in enumerate(spec):
        if name == "model":
            local[axis] //= model
    if tiled and local:
        local[-1] = _padded(local[-1], _LANES)
        if len(local) > 1:
            local[-2] = _padded(local[-2], min(_SUBLANES, 2 ** math.ceil(math.log2(max(local[-2], 1)))))
    return math.prod(local) * jnp.dtype(shape.dtype).itemsize


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
