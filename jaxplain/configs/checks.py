"""How a config's values are refused."""

from jaxplain.errors import JaxplainError


def require(holds: bool, field: str, value: object, remedy: str) -> None:
    """Raise JaxplainError, naming field, value and remedy, unless a condition holds."""
    if not holds:
        raise JaxplainError(f"{field} is {value!r}; {remedy}.")
