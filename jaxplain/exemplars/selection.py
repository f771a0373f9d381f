"""Which neurons a run keeps: from the config's choice to indices per layer, checked."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from jaxplain.configs.extraction import NeuronsConfig
from jaxplain.errors import JaxplainError
from jaxplain.ranges import parse_range
from jaxplain.store.neuron_id import NeuronId
from jaxplain.subjects.architecture import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Chosen neurons.

    Attributes:
        indices: For each layer the numbers of its neurons, ascending; in a layer of experts those of an
            expert follow those of the experts before it.
        arch: The subject's.
    """

    indices: dict[int, Int[np.ndarray, "N"]]
    arch: Architecture

    @property
    def layers(self) -> Int[np.ndarray, "L"]:
        """The chosen layers, ascending."""
        return np.array(sorted(self.indices), np.int32)

    @functools.cached_property
    def neurons(self) -> Int[np.ndarray, "F"]:
        """Every neuron index that is chosen in some layer and expert, ascending."""
        return np.unique(np.concatenate([self._of_experts(layer) for layer in self.indices])).astype(np.int32)

    @functools.cached_property
    def experts(self) -> Int[np.ndarray, "E"] | None:
        """Every expert of which some neuron is chosen, ascending; None where the subject has none."""
        if not self.arch.experts:
            return None
        return np.unique(np.concatenate([self.expert_of(layer) for layer in self.indices])).astype(np.int32)

    @property
    def shared(self) -> Bool[np.ndarray, "L E"] | None:
        """Which of the store's experts read every token."""
        if self.experts is None:
            return None
        first = [self.arch.routed_experts(int(layer)) for layer in self.layers]
        there = [len(self.arch.expert_widths(int(layer))) for layer in self.layers]
        return (self.experts >= np.array(first)[:, None]) & (self.experts < np.array(there)[:, None])

    @property
    def depth(self) -> int:
        """How many layers of the subject must run."""
        return int(max(self.indices)) + 1

    def width(self, layer: int) -> int:
        """How many neurons the subject has in a layer."""
        return sum(self.arch.expert_widths(layer))

    def expert_of(self, layer: int) -> Int[np.ndarray, "N"]:
        """The expert of each of a layer's neurons; 0 in a plain MLP."""
        return np.searchsorted(_ends(self.arch, layer), self.indices[layer], side="right")

    @property
    def tokens_per_read(self) -> int:
        """How many tokens there are for one that an expert reads on average, rounded up.

        1 where no neuron of an expert that tokens are routed to is chosen.
        """
        arch = self.arch
        routed = any((self.expert_of(layer) < arch.routed_experts(layer)).any() for layer in self.indices)
        return -(-arch.experts // arch.experts_per_token) if routed else 1

    def names(self, layer: int, numbers: Int[np.ndarray, "N"]) -> list[NeuronId]:
        """What neurons of a layer are called."""
        ends = _ends(self.arch, layer)
        experts = np.searchsorted(ends, numbers, side="right")
        first = ends - self.arch.expert_widths(layer)
        return [
            NeuronId.of(layer, expert if self.arch.experts else None, index)
            for expert, index in zip(experts.tolist(), (numbers - first[experts]).tolist(), strict=True)
        ]

    def number_of(self, neuron: NeuronId) -> int | None:
        """A neuron's number in its layer; None where it is not among those chosen."""
        if neuron.layer not in self.indices or (neuron.expert is None) == bool(self.arch.experts):
            return None
        widths, expert = self.arch.expert_widths(neuron.layer), neuron.expert or 0
        if not (0 <= expert < len(widths) and 0 <= neuron.index < widths[expert]):
            return None
        number = sum(widths[:expert]) + neuron.index
        return number if number in self.indices[neuron.layer] else None

    def columns(self, layer: int) -> Int[np.ndarray, "N"]:
        """Where on the store's axis of neurons (or on those of experts and neurons, flattened) they stand."""
        columns = np.searchsorted(self.neurons, self._of_experts(layer))
        if self.experts is None:
            return columns
        return np.searchsorted(self.experts, self.expert_of(layer)) * len(self.neurons) + columns

    def _of_experts(self, layer: int) -> np.ndarray:
        """The neurons' numbers within their experts."""
        first = _ends(self.arch, layer) - self.arch.expert_widths(layer)
        return self.indices[layer] - first[self.expert_of(layer)]


def _ends(arch: Architecture, layer: int) -> np.ndarray:
    """The number after that of each expert's last neuron."""
    return np.cumsum(arch.expert_widths(layer))


def select_neurons(config: NeuronsConfig, arch: Architecture) -> Selection:
    """The config's choice. Raises JaxplainError for a layer, expert or neuron that the subject lacks."""
    check_experts_named(config, has_experts=arch.experts > 0)
    layers = range(arch.layers)
    widest = max(max(arch.expert_widths(layer)) for layer in layers)
    most_experts = max(len(arch.expert_widths(layer)) for layer in layers)
    if config.file is not None:
        rows = read_neurons(config.file, has_experts=arch.experts > 0)
        where = f"neurons.file {config.file}"
        _check("layer", rows[:, 0], arch.layers, where)
        if arch.experts:
            _check("expert", rows[:, 1], most_experts, where)
        _check("neuron", rows[:, -1], widest, where)
        return Selection(indices=_numbered(rows, arch, where), arch=arch)
    chosen = _numbers(config.layers, arch.layers, "neurons.layers")
    experts = _numbers("all" if config.experts is None else config.experts, most_experts, "neurons.experts")
    indices = _numbers(config.indices, widest, "neurons.indices")
    _check("layer", chosen, arch.layers, "neurons.layers")
    _check("expert", experts, most_experts, "neurons.experts")
    _check("neuron", indices, widest, "neurons.indices")
    found: dict[int, np.ndarray] = {}
    for layer in np.unique(chosen).tolist():
        widths = arch.expert_widths(layer)
        ends = _ends(arch, layer)
        parts = [
            ends[expert] - widths[expert] + np.unique(indices[indices < widths[expert]])
            for expert in np.unique(experts).tolist()
            if expert < len(widths)
        ]
        if parts and (numbers := np.concatenate(parts)).size:
            found[layer] = numbers
    if not found:
        raise JaxplainError("neurons: none of the chosen layers has the chosen experts and indices.")
    return Selection(indices=found, arch=arch)


def check_experts_named(config: NeuronsConfig, *, has_experts: bool) -> None:
    """Raise JaxplainError where a choice of neurons is ambiguous, or of experts that there are not."""
    if not has_experts and config.experts is not None:
        raise JaxplainError(
            f"neurons.experts is {config.experts!r}, but the subject is no mixture of experts; leave it out."
        )
    if has_experts and config.experts is None and config.indices != "all":
        raise JaxplainError(
            f"neurons.indices is {config.indices!r}, but the subject is a mixture of experts, each of which "
            "has neurons of these numbers; say of which ones with neurons.experts (all for every one)."
        )


def _numbered(rows: np.ndarray, arch: Architecture, where: str) -> dict[int, np.ndarray]:
    """Rows of (layer, neuron), or (layer, expert, neuron), as the numbers of each layer's neurons."""
    found: dict[int, set[int]] = {}
    for layer, *experts, neuron in rows.tolist():
        expert = experts[0] if experts else 0
        widths = arch.expert_widths(layer)
        if expert >= len(widths) or neuron >= widths[expert]:
            raise JaxplainError(
                f"{where} names neuron {neuron} of expert {expert} in layer {layer}, which has "
                f"{len(widths)} experts, of {' or '.join(map(str, sorted(set(widths))))} neurons each."
            )
        found.setdefault(layer, set()).add(sum(widths[:expert]) + neuron)
    return {layer: np.array(sorted(found[layer])) for layer in sorted(found)}


def _numbers(chosen: str | Sequence[int], length: int, field: str) -> np.ndarray:
    if isinstance(chosen, str):
        return np.array(parse_range(":" if chosen == "all" else chosen, field, length), np.int64)
    return np.array(chosen)


def read_neurons(file: str, *, has_experts: bool) -> Int[np.ndarray, "N _"]:
    """The (layer, neuron) pairs of a .npy file, or (layer, expert, neuron) for a mixture of experts.

    Raises JaxplainError where it holds anything else.
    """
    if not Path(file).is_file():
        raise JaxplainError(f"neurons.file: no such file: {file}.")
    try:
        rows = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise JaxplainError(f"neurons.file {file} is not a .npy file of numbers: {error}.") from error
    if not isinstance(rows, np.ndarray):
        raise JaxplainError(f"neurons.file {file} holds several arrays; save the neurons alone as .npy.")
    width, names = (3, "a layer, an expert and a neuron") if has_experts else (2, "a layer and a neuron")
    if rows.ndim != 2 or rows.shape[1] != width or not np.issubdtype(rows.dtype, np.integer):
        mixture = ", since the subject is a mixture of experts" if has_experts else ""
        raise JaxplainError(
            f"neurons.file {file} has shape {rows.shape} and dtype {rows.dtype}; "
            f"it must hold integers [N, {width}], each row {names}{mixture}."
        )
    return rows.astype(np.int64)


def _check(what: str, values: np.ndarray, limit: int, where: str) -> None:
    if values.size == 0:
        raise JaxplainError(f"{where} names no {what}.")
    for value in values[(values < 0) | (values >= limit)][:1]:
        raise JaxplainError(f"{where} names {what} {value}, but the subject's {what}s are 0 to {limit - 1}.")
