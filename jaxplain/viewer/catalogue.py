"""The numbers of all neurons of a split: what charts are drawn of, and what searches look through.

An array is read when it is first asked for, and stays in memory: 4 bytes for every neuron.
"""

import functools
import threading
from collections.abc import Collection

import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxplain.errors import JaxplainError
from jaxplain.store import schema
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.reader import Split

_QUANTILE = "quantile "
_STRONGEST = {"highest": "max", "lowest": "min"}
LABELS = {
    "count": "tokens counted",
    "mean": "mean",
    "variance": "variance",
    "skewness": "skewness",
    "kurtosis": "kurtosis",
    "fraction_active": "fraction active",
    "highest": "highest activation",
    "lowest": "lowest activation",
}


class Catalogue:
    """All neurons of a split that a store holds, or those of them that are `chosen`, in order.

    Attributes:
        place_N: Where each stands in the store's arrays of neurons, flattened; int64 [N].
        name_NA: What each is called: layer (, expert) and index; int32 [N, 2 or 3].
    """

    def __init__(self, split: Split, chosen: Collection[NeuronId] | None = None):
        self.split = split
        counts = split.whole_array("stats/count")
        self._shape, self._lock = counts.shape, threading.Lock()
        self.place_N: Int[np.ndarray, "N"] = np.flatnonzero(counts >= 0)
        axes = [split.layers, split.neurons]
        if split.experts is not None:
            axes.insert(1, split.experts)
        self._axes = axes
        places = np.unravel_index(self.place_N, self._shape)
        self.name_NA: Int[np.ndarray, "N A"] = np.stack(
            [axis[place] for axis, place in zip(axes, places, strict=True)], axis=1
        ).astype(np.int32)
        if chosen is not None:
            rows = self.rows_of(np.array(sorted(chosen), np.int64).reshape(-1, len(axes)))
            rows = rows[rows >= 0]  # a neuron may be in another split alone
            self.place_N, self.name_NA = self.place_N[rows], self.name_NA[rows]
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.place_N)

    @functools.cached_property
    def labels(self) -> dict[str, str]:
        """The columns that there are, and what a page calls them."""
        kinds = self.split.kinds
        known = {n: t for n, t in LABELS.items() if n not in _STRONGEST or _STRONGEST[n] in kinds}
        return known | {f"{_QUANTILE}{level}": f"quantile {level:g}" for level in self.split.quantile_levels}

    def column(self, name: str) -> Shaped[np.ndarray, "N"]:
        """One number of every neuron.

        Raises JaxplainError for a name that `labels` does not have.
        """
        if name not in self.labels:
            raise JaxplainError(f"{name!r} is no statistic; there are {', '.join(self.labels)}.")
        with self._lock:
            if name not in self._columns:
                self._columns[name] = self._read(name).reshape(-1)[self.place_N]
        return self._columns[name]

    def _read(self, name: str) -> np.ndarray:
        if name in _STRONGEST:
            return self.split.whole_array(f"{_STRONGEST[name]}/score", last=0)
        if name.startswith(_QUANTILE):
            levels = [f"{_QUANTILE}{level}" for level in self.split.quantile_levels]
            return self.split.whole_array(f"stats/{schema.QUANTILE}", last=levels.index(name))
        return self.split.whole_array(f"stats/{name}")

    def neuron(self, row: int) -> NeuronId:
        """What the neuron in a row is called."""
        return NeuronId(self.name_NA[row].tolist())

    def rows_of(self, name_MA: Int[np.ndarray, "M A"]) -> Int[np.ndarray, "M"]:
        """The rows of neurons by their names; -1 for those that are not there."""
        if not len(name_MA) or not len(self.place_N):
            return np.full(len(name_MA), -1)
        there_M, places = np.ones(len(name_MA), bool), []
        for axis, value_M in zip(self._axes, name_MA.T, strict=True):
            place_M = np.minimum(np.searchsorted(axis, value_M), len(axis) - 1)
            there_M &= axis[place_M] == value_M
            places.append(place_M)
        place_M = np.ravel_multi_index(places, self._shape)
        row_M = np.minimum(np.searchsorted(self.place_N, place_M), len(self.place_N) - 1)
        return np.where(there_M & (self.place_N[row_M] == place_M), row_M, -1)

    def row_of(self, neuron: NeuronId) -> int | None:
        """The row of one neuron; None where it is not there."""
        if len(neuron) != len(self._axes):
            return None
        row = int(self.rows_of(np.array([neuron], np.int64))[0])
        return None if row < 0 else row

    def beside(self, neuron: NeuronId) -> tuple[NeuronId | None, NeuronId | None]:
        """The neurons before and after one; None at the ends."""
        row = self.row_of(neuron)
        if row is None:
            return None, None
        before = self.neuron(row - 1) if row else None
        return before, self.neuron(row + 1) if row + 1 < len(self) else None


def in_range(values_N: Shaped[np.ndarray, "N"], low: float | None, high: float | None) -> np.ndarray:
    """Which values are at least `low` and below `high`; NaN never is."""
    values_N = values_N.astype(np.float64)
    kept_N = ~np.isnan(values_N)
    if low is not None:
        kept_N &= values_N >= low
    if high is not None:
        kept_N &= values_N < high
    return kept_N


def no_value(catalogue: Catalogue) -> Float[np.ndarray, "N"]:
    """A column without any values."""
    return np.full(len(catalogue), np.nan)
