"""Whether a run that goes on is the one that was begun."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxplain.errors import JaxplainError


def require_same(kept: Mapping[str, Any], now: Mapping[str, Any], output: object) -> None:
    """Raise JaxplainError, naming the field and both its values, where two descriptions of a run differ."""
    difference = first_difference(kept, now)
    if difference is not None:
        name, before, after = difference
        raise JaxplainError(
            f"output {output} holds a run with {name.removeprefix('config.')} {before!r}, "
            f"and it is {after!r} now; name another output, or start anew with --overwrite."
        )


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The dotted name and both values of the first field that differs; a field that is not there is None."""
    before, after = dict(_leaves(one)), dict(_leaves(other))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            return name, before.get(name), after.get(name)
    return None


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
