"""Where in a checkpoint's tensor a parameter lies, as `Weight.axes` spells it."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.families import Weight

_Factors = list[tuple[str, ...]]
"""What an axis has flattened: for each of these, the letters that lie one after the other along it."""


def axes_of(weight: Weight) -> str:
    """The letters of the parameter's axes."""
    return weight.target.rsplit("_", 1)[1]


def source_shape(weight: Weight, arch: Architecture) -> tuple[int, ...]:
    """The shape of the whole tensor in the checkpoint."""
    return tuple(
        math.prod(_total(terms, arch.sizes) for terms in factors) for factors in _source_axes(weight)
    )


def parameter_shape(weight: Weight, arch: Architecture) -> tuple[int, ...]:
    """The shape of the parameter."""
    return tuple(arch.sizes[letter] for letter in _letters(weight))


def read_parameter(tensor: Any, weight: Weight, arch: Architecture, index: Sequence[slice]) -> np.ndarray:
    """The parameter's part at `index`, from a tensor that can be sliced; little else of it is read."""
    places = [_Place(factors, weight, arch, index) for factors in _source_axes(weight)]
    values = np.asarray(tensor[tuple(place.span for place in places)])
    for axis, place in enumerate(places):
        if not place.is_whole:
            values = np.take(values, place.within, axis)
    order = [letter for place in places for letter in place.letters]
    values = values.reshape([size for place in places for size in place.shape])
    return np.transpose(values, [order.index(letter) for letter in _letters(weight)])


def write_parameter(tensor: np.ndarray, weight: Weight, arch: Architecture, value: np.ndarray) -> None:
    """Put a whole parameter where it belongs in the checkpoint's tensor; the inverse of reading it."""
    everything = [slice(None)] * value.ndim
    places = [_Place(factors, weight, arch, everything) for factors in _source_axes(weight)]
    letters = _letters(weight)
    order = [letters.index(letter) for place in places for letter in place.letters]
    value = np.transpose(value, order).reshape([math.prod(place.shape) for place in places])
    if all(place.is_whole for place in places):
        tensor[tuple(place.span for place in places)] = value
    else:
        tensor[np.ix_(*(place.span.start + place.within for place in places))] = value


class _Place:
    """The indices along one of the source's axes that a part of a parameter takes.

    `letters` are the parameter's axes that lie along it, and `shape` how much of each is wanted. `span` holds
    all of the indices, `within` is where in it they are, and `is_whole` says that they are all of it, in
    order.
    """

    def __init__(self, factors: _Factors, weight: Weight, arch: Architecture, index: Sequence[slice]):
        sizes, letters = arch.sizes, _letters(weight)
        own = [terms[_part(terms, weight)] for terms in factors]
        self.letters = list(dict.fromkeys(_owner(letter, letters) for letter in own if letter != "1"))
        ranges = [np.arange(sizes[letter])[index[letters.index(letter)]] for letter in self.letters]
        self.shape = [len(each) for each in ranges]
        coordinates = dict(zip(self.letters, np.ix_(*ranges), strict=True))
        indices = np.zeros(self.shape, np.int64)
        for terms, letter in zip(factors, own, strict=True):
            before = _total(terms[: _part(terms, weight)], sizes)
            indices = indices * _total(terms, sizes) + before
            if letter in coordinates:
                indices = indices + coordinates[letter]
            elif letter == "K":
                indices = indices + coordinates["H"] // sizes["G"]
            elif letter == "G":
                indices = indices + coordinates["H"] % sizes["G"]
        flat = indices.reshape(-1)
        start, stop = (int(flat.min()), int(flat.max()) + 1) if flat.size else (0, 0)
        self.span = slice(start, stop)
        self.within = flat - start
        self.is_whole = np.array_equal(self.within, np.arange(stop - start))


def _part(terms: tuple[str, ...], weight: Weight) -> int:
    """Which of the terms that lie one after the other is the parameter's."""
    return weight.part if len(terms) > 1 else 0


def _letters(weight: Weight) -> str:
    """The parameter's axes, without that of experts where the tensor is of one expert."""
    letters = axes_of(weight)
    return letters if weight.expert is None else letters.replace("E", "")


def _owner(letter: str, letters: str) -> str:
    """The parameter's axis that a letter of the source belongs to."""
    return "H" if letter in "KG" and letter not in letters else letter


def _source_axes(weight: Weight) -> list[_Factors]:
    groups = re.findall(r"\(([^()]+)\)|(\S+)", weight.axes)
    return [[tuple(terms.split("+")) for terms in (many or one).split()] for many, one in groups]


def _total(terms: Sequence[str], sizes: dict[str, int]) -> int:
    return sum(1 if term == "1" else sizes[term] for term in terms)
