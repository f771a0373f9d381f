"""Which mesh and batch fit into the devices' memory."""

import dataclasses
import math
from collections.abc import Iterator

from jaxplain.planning.demand import Demand
from jaxplain.planning.hardware import Target
from jaxplain.planning.memory import Memory, memory, temporary_bytes

_ENOUGH_ROWS, _MOST_ROWS = 16, 256
"""Sequences per data shard from which on a step is of a good size, and the most that are proposed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A mesh and a batch, and what each device holds with them."""

    data: int
    model: int
    batch: int
    memory: Memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """A run as several ones, each over some of the layers, with a choice that fits all of them."""

    layers: list[list[int]]
    choice: Choice

    @property
    def hardest(self) -> list[int]:
        """As many layers as the first run keeps, which none exceeds, up to the last, with all the weights."""
        return [layer for part in self.layers for layer in part][-len(self.layers[0]) :]


def chosen(demand: Demand, target: Target, *, data: int, model: int, batch: int) -> Choice:
    """A mesh and batch that are given."""
    found = memory(demand, data=data, model=model, batch=batch, tiled=target.tiled)
    return Choice(data=data, model=model, batch=batch, memory=found)


def largest_batch(demand: Demand, target: Target, *, data: int, model: int) -> Choice | None:
    """The most sequences per step that fit on a mesh; None where none do."""
    idle = chosen(demand, target, data=data, model=model, batch=0).memory
    if idle.total > target.memory:
        return None
    left = target.memory - idle.weights - idle.state - idle.temporaries
    rows = left // temporary_bytes(demand, rows=1, model=model)
    return chosen(demand, target, data=data, model=model, batch=rows * data) if rows > 0 else None


def propose(demand: Demand, target: Target) -> Choice | None:
    """The mesh with the smallest `model` axis on which a step can be of a good size.

    Along `data` devices need not talk to each other at all. Where no step can be of a good size, it is the
    mesh with the largest that fits; None where nothing fits.
    """
    fitting = [found for mesh in _meshes(demand, target) if (found := largest_batch(demand, target, **mesh))]
    for choice in fitting:
        if choice.batch >= _ENOUGH_ROWS * choice.data:
            rows = min(2 ** int(math.log2(choice.batch // choice.data)), _MOST_ROWS)
            return chosen(demand, target, data=choice.data, model=choice.model, batch=rows * choice.data)
    return max(fitting, key=lambda choice: choice.batch, default=None)


def propose_runs(demand: Demand, target: Target) -> Runs | None:
    """The fewest runs over parts of the layers that fit, each with as many layers; None where not even one.

    Every run reads the corpus anew.
    """
    layers = [int(layer) for layer in demand.selection.layers]
    for count in range(1, len(layers) + 1):
        size = math.ceil(len(layers) / count)
        parts = [layers[start : start + size] for start in range(0, len(layers), size)]
        if len(parts) == count and (choice := propose(demand.of_layers(layers[-size:]), target)):
            return Runs(layers=parts, choice=choice)
    return None


def _meshes(demand: Demand, target: Target) -> Iterator[dict[str, int]]:
    for model in range(1, target.devices + 1):
        if target.devices % model == 0 and all(width % model == 0 for width in demand.widths):
            yield {"data": target.devices // model, "model": model}
