"""The exceptions that end a command, and what they quote of others."""


class JaxplainError(Exception):
    """Something the user can put right: one sentence that names the thing, its value, and what to do.

    Commands print the sentence and exit with status 2, without a traceback. It is empty where another
    process of the run says it.
    """


class Stopped(BaseException):
    """SIGTERM came, and what the run needs to go on is saved: one sentence that says so.

    Not an Exception, so that nothing takes it for an error of its own.
    """


def first_line(error: BaseException) -> str:
    """What another library's exception says, cut to its first line, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
