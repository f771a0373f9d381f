"""What a language model is asked, what it answers, and the explanation in that answer."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

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


@runtime_checkable
class LanguageModel(Protocol):
    """What answers requests."""

    def answers(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Reply]]:
        """Requests with their replies, in whatever order they are finished; takes requests as it goes."""
        ...


_LONGEST_EXPLANATION = 500  # characters; what is longer does not explain


class UnparsableError(Exception):
    """A reply without an explanation in the form that was asked for."""


_LABEL = re.compile(r"((?:positive |negative )?explanation)[*_\s]*:[*_]*", re.IGNORECASE)
_QUOTED = re.compile(r"([\"'`_])((?:(?!\1).)*)\1|\u201c([^\u201c\u201d]*)\u201d")


def parse_reply(text: str, prompt: PromptConfig) -> dict[str, str]:
    """The explanations in a reply, by sign (`max` alone, or both). Raises UnparsableError."""
    labelled = _labelled(text)
    if prompt.style == "highlighted_both_signs":
        return {"max": _after(labelled, POSITIVE), "min": _after(labelled, NEGATIVE)}
    if labelled or prompt.chain_of_thought:
        return {"max": _after(labelled, EXPLANATION)}
    # A model that answers with the bare phrase has understood all the same.
    return {"max": _explanation(text)}


def _labelled(text: str) -> dict[str, str]:
    """The text from each label to the next; of a label that comes twice, the last."""
    labels = list(_LABEL.finditer(text))
    stops = [*(label.start() for label in labels[1:]), len(text)]
    return {
        f"{label[1].capitalize()}:": text[label.end() : stop]
        for label, stop in zip(labels, stops, strict=False)
    }


def _after(labelled: dict[str, str], label: str) -> str:
    if label not in labelled:
        raise UnparsableError(f'no line begins with "{label}"')
    return _explanation(labelled[label])


def _explanation(text: str) -> str:
    """The first line with words on it, without bold marks, and without quotes around the whole."""
    lines = (line.strip("* \t") for line in text.splitlines())
    explanation = next((line for line in lines if any(c.isalnum() for c in line)), None)
    if explanation is None:
        raise UnparsableError("the explanation is empty")
    while quoted := _QUOTED.fullmatch(explanation):
        explanation = (quoted[2] or quoted[3]).strip("* \t")
    if len(explanation) > _LONGEST_EXPLANATION:
        raise UnparsableError(f"the line is longer than {_LONGEST_EXPLANATION} characters")
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
