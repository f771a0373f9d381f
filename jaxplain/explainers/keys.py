"""Keys of remote models: read from the environment, and kept out of everything that is written."""

import os
from collections.abc import Sequence

from jaxplain.configs.explanation import ExplainerConfig
from jaxplain.errors import JaxplainError

_MOST_QUOTED = 300


def key_of(config: ExplainerConfig, usual: Sequence[str], *, needed: bool) -> str | None:
    """The key, from the variable that the config names or the first of the usual ones that is set.

    Raises JaxplainError, naming the variables, where there is none and one is needed.
    """
    names = usual if config.key_variable is None else [config.key_variable]
    key = next((os.environ[name].strip() for name in names if os.environ.get(name, "").strip()), None)
    if key is None and (needed or config.key_variable is not None):
        raise JaxplainError(
            f"provider {config.provider} needs a key, and the environment variable {' or '.join(names)} "
            "is not set."
        )
    return key


def quoted(text: str, key: str | None) -> str:
    """What a server says, on one line, with the key taken out of it, and then cut."""
    text = text.replace(key, "[key]") if key else text
    return " ".join(text.split())[:_MOST_QUOTED].rstrip(".")
