"""The one exception type that a user is meant to read, and what it quotes of others."""


class JaxplainError(Exception):
    """Something the user can put right: one sentence that names the thing, its value, and what to do.

    Commands print the sentence and exit with status 2, without a traceback.
    """


def first_line(error: BaseException) -> str:
    """What another library's exception says, cut to its first line, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
