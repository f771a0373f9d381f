"""Histograms: the bars of all neurons and of every layer, each with the values that it stands for."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Shaped

_BINS = 24
# A layer's bars share their space with those of many others.
WIDTH, HEIGHT = 144, 36


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """Neurons with a value of at least `low` and below `high`; None where there is no such limit.

    `x`, `width` and `height` are in the chart's own units.
    """

    x: float
    width: float
    height: float
    count: int
    low: float | None
    high: float | None

    @property
    def says(self) -> str:
        """The range in words."""
        if self.low is None and self.high is None:
            return "any value"
        if self.low is None:
            return f"below {self.high:g}"
        return f"{self.low:g} or more" if self.high is None else f"{self.low:g} to {self.high:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Histogram:
    """The bars that are not empty, of all neurons or of one layer; `median` is NaN where there is none."""

    layer: int | None
    bars: Sequence[Bar]
    count: int
    median: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distribution:
    """How one number is distributed; `first` and `last` are where the axis begins and ends."""

    column: str
    label: str
    first: float
    last: float
    whole: Histogram
    layers: Sequence[Histogram]


def distribution(
    column: str,
    label: str,
    values_N: Shaped[np.ndarray, "N"],
    layer_N: Int[np.ndarray, "N"],
    *,
    edges: Sequence[float],
    by_layer: bool = True,
) -> Distribution:
    """Histograms with the bins between `edges`; values beyond them count in the outermost.

    Neurons come in the order of their layers.
    """
    values_N = values_N.astype(np.float64)
    known_N = ~np.isnan(values_N)
    values_N, layer_N = values_N[known_N], layer_N[known_N]
    bins = len(edges) - 1
    bin_N = np.clip(np.searchsorted(edges, values_N, side="right") - 1, 0, bins - 1)

    def histogram(layer: int | None) -> Histogram:
        ends = (0, len(layer_N)) if layer is None else np.searchsorted(layer_N, [layer, layer + 1])
        of_layer = slice(*ends)
        counts = np.bincount(bin_N[of_layer], minlength=bins).tolist()
        most = max(counts, default=0)
        width = WIDTH / bins
        bars = [
            Bar(
                x=round(at * width, 2),
                width=round(width, 2),
                # One neuron is to be seen, and found by the mouse, beside thousands.
                height=round(max(HEIGHT * count / most, 1.5), 2),
                count=count,
                low=edges[at] if at else None,
                high=edges[at + 1] if at < bins - 1 else None,
            )
            for at, count in enumerate(counts)
            if count
        ]
        of_them = values_N[of_layer]
        middle = float(np.median(of_them)) if len(of_them) else math.nan
        return Histogram(layer=layer, bars=bars, count=len(of_them), median=middle)

    layers = np.unique(layer_N).tolist() if by_layer else []
    return Distribution(
        column=column,
        label=label,
        first=edges[0],
        last=edges[-1],
        whole=histogram(None),
        layers=[histogram(layer) for layer in layers],
    )


def even_edges(first: float, last: float, bins: int = _BINS) -> list[float]:
    """Bins of equal widths."""
    return [round(first + (last - first) * i / bins, 6) for i in range(bins + 1)]


def edges_of(values_N: Shaped[np.ndarray, "N"]) -> list[float]:
    """Bins of equal ratios that reach from the lowest to nearly the highest of positive values."""
    values_N = values_N[np.isfinite(values_N) & (values_N > 0)]
    if not len(values_N):
        return even_edges(0.0, 1.0)
    low, high = (float(np.quantile(values_N, level)) for level in (0.0, 0.999))
    high = max(high, low * 1.1)
    edges = [float(f"{low * (high / low) ** (i / _BINS):.3g}") for i in range(_BINS + 1)]
    return sorted(set(edges)) if len(set(edges)) > 1 else even_edges(low, high)
