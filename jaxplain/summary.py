"""What a command says on stdout: text for people, one JSON object, or nothing."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def summarised(options: Any) -> Iterator[dict[str, Any]]:
    """A command's work, whose prints are its text; with the option `json` or `quiet` they are not shown.

    With `json` the dict that it is given, which the command fills, is printed as JSON at the end, even if
    that is an error. Numbers that are not finite are null.
    """
    summary: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if options.json or options.quiet:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            yield summary
        finally:
            stack.close()
            if options.json and summary:
                print(json.dumps(_plain(summary), ensure_ascii=False))
                sys.stdout.flush()


def _plain(value: Any) -> Any:
    """The value in what JSON has."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
