"""python -m jaxplain: the commands, and what comes next after each."""

import difflib
from collections.abc import Sequence

from jaxplain.commands import run
from jaxplain.errors import JaxplainError
from jaxplain.guide import COMMANDS, overview, program


def main(arguments: Sequence[str]) -> None:
    """Print the commands."""
    if arguments and arguments[0] not in ("-h", "--help"):
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1, cutoff=0.5)
        hint = f"call {program(close[0])}" if close else f"the commands are {', '.join(COMMANDS)}"
        raise JaxplainError(f"python -m jaxplain takes no {arguments[0]!r}; {hint}.")
    print(overview())


if __name__ == "__main__":
    run(main)
