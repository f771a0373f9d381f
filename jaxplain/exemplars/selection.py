"""Which neurons a run keeps: from the config's choice to indices per layer, checked."""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxplain.configs.extraction import NeuronsConfig
from jaxplain.errors import JaxplainError
from jaxplain.ranges import parse_range
from jaxplain.subjects.architecture import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Chosen neurons. `indices[layer]` are ascending; `neurons` is the store's axis, their union."""

    indices: dict[int, Int[np.ndarray, "N"]]

    @property
    def layers(self) -> Int[np.ndarray, "L"]:
        """The chosen layers, ascending."""
        return np.array(sorted(self.indices), np.int32)

    @property
    def neurons(self) -> Int[np.ndarray, "F"]:
        """Every neuron index that is chosen in some layer, ascending."""
        return np.unique(np.concatenate(list(self.indices.values()))).astype(np.int32)

    @property
    def depth(self) -> int:
        """How many layers of the subject must run."""
        return int(max(self.indices)) + 1

    def columns(self, layer: int) -> Int[np.ndarray, "N"]:
        """Where on the store's neuron axis a layer's neurons stand."""
        return np.searchsorted(self.neurons, self.indices[layer])


def select_neurons(config: NeuronsConfig, arch: Architecture) -> Selection:
    """The config's choice. Raises JaxplainError for a layer or neuron that the subject lacks."""
    if config.file is not None:
        pairs = read_pairs(config.file)
        _check("layer", pairs[:, 0], arch.layers, f"neurons.file {config.file}")
        _check("neuron", pairs[:, 1], arch.neurons, f"neurons.file {config.file}")
        layers = np.unique(pairs[:, 0])
        return Selection(indices={int(layer): np.unique(pairs[pairs[:, 0] == layer, 1]) for layer in layers})
    layers = _numbers(config.layers, arch.layers, "neurons.layers")
    indices = _numbers(config.indices, arch.neurons, "neurons.indices")
    _check("layer", layers, arch.layers, "neurons.layers")
    _check("neuron", indices, arch.neurons, "neurons.indices")
    return Selection(indices={int(layer): np.unique(indices) for layer in np.unique(layers)})


def _numbers(chosen: str | list[int], length: int, field: str) -> np.ndarray:
    if isinstance(chosen, str):
        return np.array(parse_range(":" if chosen == "all" else chosen, field, length), np.int64)
    return np.array(chosen)


def read_pairs(file: str) -> Int[np.ndarray, "N 2"]:
    """The (layer, neuron) pairs of a .npy file. Raises JaxplainError where it holds anything else."""
    if not Path(file).is_file():
        raise JaxplainError(f"neurons.file: no such file: {file}.")
    try:
        pairs = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise JaxplainError(f"neurons.file {file} is not a .npy file of numbers: {error}.") from error
    if not isinstance(pairs, np.ndarray):
        raise JaxplainError(f"neurons.file {file} holds several arrays; save the pairs alone as .npy.")
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise JaxplainError(
            f"neurons.file {file} has shape {pairs.shape} and dtype {pairs.dtype}; "
            "it must hold integers [N, 2], each row a layer and a neuron."
        )
    return pairs.astype(np.int64)


def _check(what: str, values: np.ndarray, limit: int, where: str) -> None:
    if values.size == 0:
        raise JaxplainError(f"{where} names no {what}.")
    for value in values[(values < 0) | (values >= limit)][:1]:
        raise JaxplainError(f"{where} names {what} {value}, but the subject's {what}s are 0 to {limit - 1}.")
