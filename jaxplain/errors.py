"""The one exception type that a user is meant to read."""


class JaxplainError(Exception):
    """Something the user can put right: one sentence that names the thing, its value, and what to do.

    Commands print the sentence and exit with status 2, without a traceback.
    """
