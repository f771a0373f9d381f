"""Memory of each device in an extraction: exact for weights and state, an estimate for temporaries."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jaxplain.exemplars.reduction import partition_specs
from jaxplain.planning.demand import Demand
from jaxplain.subjects.loading import partition, spread_over_data

_LANES, _SUBLANES = 128, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device.

    Attributes:
        snapshot: Of a checkpoint, between two steps, while a layer goes to the host; 0 where none are saved.
        temporaries: Of a step.
    """

    weights: int
    state: int
    snapshot: int
    temporaries: int

    @property
    def total(self) -> int:
        """The most that is there at once."""
        return self.weights + self.state + max(self.snapshot, self.temporaries)


def memory(demand: Demand, *, data: int, model: int, batch: int, tiled: bool) -> Memory:
    """What each device of a mesh of `data` x `model` holds; `tiled` is how TPUs lay arrays out."""
    layers = _layer_bytes(demand, model=model, tiled=tiled)
    return Memory(
        weights=weight_bytes(demand, data=data, model=model, tiled=tiled),
        state=sum(layers),
        # The layer as it is kept, and once more while it is put in order.
        snapshot=2 * max(layers) if demand.saves else 0,
        temporaries=temporary_bytes(demand, rows=batch // data, model=model)
        + gathered_bytes(demand, data=data, model=model, tiled=tiled),
    )


def weight_bytes(demand: Demand, *, data: int, model: int, tiled: bool, unread: bool = True) -> int:
    """Of the parameters, of which each device holds those that `loading.load_decoder` gives it.

    Without `unread`, of those that the step reads.
    """
    mesh = AbstractMesh((data, model), ("data", "model"))
    total = 0
    for name, shape in demand.weights.items():
        if unread or demand.is_read(name):
            spec = partition(name.rsplit(".", 1)[-1], shape.shape, mesh)
            if demand.config.run.shard_weights:
                spec = spread_over_data(spec, shape.shape, mesh)
            total += _bytes(shape, spec, mesh, tiled)
    return total


def gathered_bytes(demand: Demand, *, data: int, model: int, tiled: bool) -> int:
    """Of the weights of two layers, the one at work and the next, where they are gathered in a step."""
    if not demand.config.run.shard_weights or data == 1:
        return 0
    mesh = AbstractMesh((data, model), ("data", "model"))
    layers: dict[str, int] = {}
    for name, shape in demand.weights.items():
        if name.startswith("layers.") and demand.is_read(name):
            layer = name.split(".")[1]
            spec = partition(name.rsplit(".", 1)[-1], shape.shape, mesh)
            layers[layer] = layers.get(layer, 0) + _bytes(shape, spec, mesh, tiled)
    return sum(sorted(layers.values())[-2:])


def state_bytes(demand: Demand, *, model: int, tiled: bool) -> int:
    """Of the reductions. Each device holds one data shard's, so the size of axis `data` does not matter."""
    return sum(_layer_bytes(demand, model=model, tiled=tiled))


def _layer_bytes(demand: Demand, *, model: int, tiled: bool) -> list[int]:
    """Of each layer's reduction."""
    mesh = AbstractMesh((1, model), ("data", "model"))
    states = [demand.layer_state(layer, model) for layer in demand.selection.indices]
    of_state: dict[int, int] = {}
    for state in {id(state): state for state in states}.values():  # layers that are alike share one
        leaves = zip(jax.tree.leaves(state), jax.tree.leaves(partition_specs(state)), strict=True)
        of_state[id(state)] = sum(_bytes(shape, spec, mesh, tiled) for shape, spec in leaves)
    return [of_state[id(state)] for state in states]


def temporary_bytes(demand: Demand, *, rows: int, model: int) -> int:
    """What a step needs besides, for `rows` sequences per data shard: an estimate, in proportion to them.

    Layers come one after another, so that it is the residual stream, and the larger of what an attention
    layer and an MLP with its reduction hold.
    """
    arch, size = demand.arch, demand.dtype.itemsize
    heads = arch.query_heads // model if arch.query_heads % model == 0 else arch.query_heads
    neurons = max(demand.widths[: demand.selection.depth]) // model
    stream = arch.width * (2 * size + 4)
    projections = heads * arch.head_width * (2 * size + 4)
    logits = demand.tokens * heads * 4 * 2
    # Gate, up and their product, then the activations and the sums of their powers in float32. Of experts
    # also the activations that go on, by their weights, and which of them count.
    mlp = neurons * (2 * 4 + size + 4 + (size + 1 if arch.experts else 0))
    return rows * demand.tokens * (stream + max(projections + logits, mlp))


def _bytes(shape: jax.ShapeDtypeStruct, spec: P, mesh: AbstractMesh, tiled: bool) -> int:
    """Of one device's part of an array whose axes are divided by those of the mesh."""
    local = list(shape.shape)
    for axis, name in enumerate(spec):
        if name is not None:
            local[axis] //= mesh.shape[name]
    if tiled and local:
        local[-1] = _padded(local[-1], _LANES)
        if len(local) > 1:
            local[-2] = _padded(local[-2], min(_SUBLANES, 2 ** math.ceil(math.log2(max(local[-2], 1)))))
    return math.prod(local) * jnp.dtype(shape.dtype).itemsize


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
