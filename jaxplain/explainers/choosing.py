"""Which neurons of a store to explain."""

import numpy as np

from jaxplain.configs.explanation import ChosenNeuronsConfig
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.selection import read_pairs
from jaxplain.ranges import parse_range
from jaxplain.store.reader import Split


def choose_neurons(config: ChosenNeuronsConfig, split: Split) -> list[tuple[int, int]]:
    """The chosen (layer, neuron) pairs, in order of layer and neuron.

    Raises JaxplainError for a layer or neuron that the store does not hold.
    """
    held = held_neurons(split)
    if config.file is not None:
        wanted = {(int(layer), int(neuron)) for layer, neuron in read_pairs(config.file)}
        missing = min(wanted - set(held), default=None)
        if missing is not None:
            raise JaxplainError(
                f"neurons.file {config.file} names neuron {missing[1]} of layer {missing[0]}, which is not "
                f"among the {len(held):,} neurons in the store."
            )
        held = [pair for pair in held if pair in wanted]
    else:
        layers = _chosen(config.layers, split.layers, "layer", "neurons.layers")
        neurons = _chosen(config.indices, split.neurons, "neuron", "neurons.indices")
        held = [(layer, neuron) for layer, neuron in held if layer in layers and neuron in neurons]
    if not held:
        raise JaxplainError("neurons: none of those chosen is in the store.")
    if config.by is None or config.count is None:
        return held
    if config.count > len(held):
        raise JaxplainError(
            f"neurons.count is {config.count}, but {len(held)} neurons are there to take from."
        )
    if config.by == "random":
        order = np.random.default_rng(config.seed).permutation(len(held))
    else:
        values = _statistic(split, config.by)
        # NaN, of neurons that never vary, goes last.
        order = np.argsort([-values[pair] for pair in held], kind="stable")
    return sorted(held[i] for i in order[: config.count])


def held_neurons(split: Split) -> list[tuple[int, int]]:
    """Every (layer, neuron) that the store holds."""
    held = []
    for place, layer in enumerate(split.layers.tolist()):
        (counts,) = split.layer_arrays(place, "stats/count")
        held += [(layer, int(neuron)) for neuron in split.neurons[counts >= 0]]
    return held


def _chosen(chosen: str | list[int], axis: np.ndarray, what: str, field: str) -> set[int]:
    held = set(axis.tolist())
    if isinstance(chosen, str):
        return held & set(parse_range(":" if chosen == "all" else chosen, field, int(axis[-1]) + 1))
    for value in chosen:
        if value not in held:
            raise JaxplainError(
                f"{field} names {what} {value}, but the store holds {len(held)} {what}s from {axis[0]} to "
                f"{axis[-1]}."
            )
    return set(chosen)


def _statistic(split: Split, name: str) -> dict[tuple[int, int], float]:
    values = {}
    for place, layer in enumerate(split.layers.tolist()):
        (row,) = split.layer_arrays(place, f"stats/{name}")
        values |= {
            (layer, neuron): float(value)
            for neuron, value in zip(split.neurons.tolist(), row.tolist(), strict=True)
        }
    return values
