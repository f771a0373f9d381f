"""Progress bars of long steps: elapsed time, estimate to the end, and sequences per minute."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import datasets
import huggingface_hub.utils
from tqdm import tqdm

Item = TypeVar("Item")

Progress = Callable[..., "Bar"]
"""Called with `total=` (None where unknown), `desc=` and `unit=`, it gives a bar."""


_KNOWN = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {pace}]"
_UNKNOWN = "{desc}: {n_fmt} [{elapsed}, {pace}]"


class Bar(tqdm):
    """A tqdm bar that counts per minute. Without a total, or beyond it, there is no estimate."""

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the bar's format may name."""
        values = super().format_dict
        if values["initial"] is None:  # of a bar that is never shown
            return dict(values)
        values["bar_format"] = _KNOWN if values["total"] and values["n"] <= values["total"] else _UNKNOWN
        here = values["n"] - values["initial"]
        per_second = here / values["elapsed"] if values["elapsed"] else 0.0
        return {**values, "pace": self._pace(per_second)}

    def _pace(self, per_second: float) -> str:
        return f"{60 * per_second:,.0f} {self.unit}/min"

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each counted as it is taken."""
        for item in items:
            yield item
            self.update()


class ByteBar(Bar):
    """A bar that counts bytes, and gives millions of them per second."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options, unit_scale=True)

    def _pace(self, per_second: float) -> str:
        return f"{per_second / 1e6:,.0f} MB/s"


def hide_bars_of_libraries() -> None:
    """Show no bars of the libraries that download and convert, for the rest of the process."""
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()


def progress_bars(*, enabled: bool, kind: type[Bar] = Bar) -> Progress:
    """How to make bars, or bars that show nothing."""
    return functools.partial(kind, disable=not enabled, dynamic_ncols=True)
