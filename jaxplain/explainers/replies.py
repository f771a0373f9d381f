"""What a language model is asked, what it answers, and the explanation in that answer."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

from jaxplain.configs.explanation import PromptConfig
from jaxplain.explainers.prompts import EXPLANATION, NEGATIVE, POSITIVE, Message
from jaxplain.store.explanations import Status


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One prompt about a neuron. `sign` is max for prompts about both signs."""

    layer: int
    index: int
    sign: str
    sample: int
    messages: Sequence[Message]
    seed: int
    sequences: dict[str, list[int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of a request.

    Attributes:
        outcome: answered, refused (by the model or a filter, with the reason in `detail`), or failed
            (nothing usable came back; to be asked again in a later run).
        text: The reply's text, whatever the outcome.
        detail: Why it was refused or failed, or that the reply was cut short.
        model: The model that answered, as it calls itself.
        cost_usd: By the config's prices.
        cached: Whether it was paid for earlier.
    """

    outcome: Literal["answered", "refused", "failed"]
    text: str = ""
    detail: str | None = None
    model: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    cached: bool = False


class LanguageModel(Protocol):
    """What answers requests."""

    def answers(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Reply]]:
        """Requests with their replies, in whatever order they are finished; takes requests as it goes."""
        ...


class UnparsableError(Exception):
    """A reply without an explanation in the form that was asked for."""


_QUOTES = "\"'`\u201c\u201d*_ \t"


def parse_reply(text: str, prompt: PromptConfig) -> dict[str, str]:
    """The explanations in a reply, by sign (`max` alone, or both). Raises UnparsableError."""
    if prompt.style == "highlighted_both_signs":
        return {"max": _after(text, POSITIVE), "min": _after(text, NEGATIVE)}
    if EXPLANATION.lower() in text.lower() or prompt.chain_of_thought:
        return {"max": _after(text, EXPLANATION)}
    # A model that answers with the bare phrase has understood all the same.
    first = next((line for line in text.splitlines() if line.strip(_QUOTES)), "")
    return {"max": _explanation(first)}


def _after(text: str, label: str) -> str:
    """The line after the last occurrence of a label."""
    pattern = re.escape(label.removesuffix(":")) + r"[*_\s]*:"
    if label == EXPLANATION:
        pattern = r"(?<!positive )(?<!negative )" + pattern
    matches = list(re.finditer(pattern, text, re.IGNORECASE))
    if not matches:
        raise UnparsableError(f'no line begins with "{label}"')
    rest = text[matches[-1].end() :].lstrip("*_ \t")
    return _explanation(next((line for line in rest.splitlines() if line.strip(_QUOTES)), ""))


def _explanation(line: str) -> str:
    explanation = line.strip().strip(_QUOTES)
    if not any(c.isalnum() for c in explanation):
        raise UnparsableError("the explanation is empty")
    return explanation


def status_of(reply: Reply) -> Status:
    """What a reply without an explanation counts as."""
    match reply.outcome:
        case "answered":
            return "unparsable"
        case "refused":
            return "refused"
        case "failed":
            return "failed"
