"""Which neurons of a store to explain."""

import numpy as np

from jaxplain.configs.explanation import ChosenNeuronsConfig
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.selection import check_experts_named, read_neurons
from jaxplain.ranges import parse_range
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.reader import Split


def choose_neurons(config: ChosenNeuronsConfig, split: Split) -> list[NeuronId]:
    """The chosen neurons, in order of layer, expert and index.

    Raises JaxplainError for a layer, expert or neuron that the store does not hold.
    """
    has_experts = split.experts is not None
    check_experts_named(config, has_experts=has_experts)
    held = held_neurons(split)
    if config.file is not None:
        wanted = set(map(NeuronId, read_neurons(config.file, has_experts=has_experts).tolist()))
        missing = min(wanted - set(held), default=None)
        if missing is not None:
            of_expert = "" if missing.expert is None else f"of expert {missing.expert} "
            raise JaxplainError(
                f"neurons.file {config.file} names neuron {missing.index} {of_expert}of layer "
                f"{missing.layer}, which is not among the {len(held):,} neurons in the store."
            )
        held = [neuron for neuron in held if neuron in wanted]
    else:
        layers = _chosen(config.layers, split.layers, "layer", "neurons.layers")
        indices = _chosen(config.indices, split.neurons, "neuron", "neurons.indices")
        held = [neuron for neuron in held if neuron.layer in layers and neuron.index in indices]
        if split.experts is not None:
            named = "all" if config.experts is None else config.experts
            experts = _chosen(named, split.experts, "expert", "neurons.experts")
            held = [neuron for neuron in held if neuron.expert in experts]
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
        order = np.argsort([-values[neuron] for neuron in held], kind="stable")
    return sorted(held[i] for i in order[: config.count])


def held_neurons(split: Split) -> list[NeuronId]:
    """Every neuron that the store holds, in order."""
    return [neuron for place in range(len(split.layers)) for neuron, _ in split.neurons_of(place)]


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


def _statistic(split: Split, name: str) -> dict[NeuronId, float]:
    values = {}
    for place in range(len(split.layers)):
        (of_layer,) = split.layer_arrays(place, f"stats/{name}")
        values |= {neuron: float(of_layer[at]) for neuron, at in split.neurons_of(place)}
    return values
