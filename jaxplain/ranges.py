"""Ranges as configs write them: start:stop:step, with the rules of Python's slices."""

import re

from jaxplain.errors import JaxplainError

_RANGE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?\d+))?")


def parse_range(text: str, field: str, length: int) -> range:
    """The numbers below `length` that a range, or a single number, names.

    Raises JaxplainError, naming the config's field, where the text is no range or the step is 0.
    """
    if text.strip().isdecimal() and int(text) < length:
        return range(int(text), int(text) + 1)
    match = _RANGE.fullmatch(text.strip())
    if match is None or (match[3] and int(match[3]) == 0):
        raise JaxplainError(
            f"{field} is {text!r}; write a range as start:stop or start:stop:step, such as 0:20."
        )
    start, stop, step = (None if part is None else int(part) for part in match.groups())
    return range(*slice(start, stop, step).indices(length))
