"""What a language model is asked, what it answers, and the explanation in that answer."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from jaxplain.configs.explanation import PromptConfig
from jaxplain.explainers.prompts import EXPLANATION, NEGATIVE, POSITIVE, Message
from jaxplain.store.explanations import Status


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One prompt about a neuron. `sign` is max for prompts about both signs.

    Remote models hold the reply to the JSON schema `schema`, if there is one. Keep it to what all providers
    know: objects whose properties are all required, without others; no bounds. Local models ignore it, and
    some servers do, so the messages must say it in words too.
    """

    layer: int
    index: int
    expert: int | None = None
    sign: str
    sample: int
    messages: Sequence[Message]
    seed: int
    sequences: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    schema: dict[str, Any] | None = None


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
    """A reply that is not in the form that was asked for."""


_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def replies_by_item(
    model: LanguageModel, asked: Iterator[tuple[_Item, Sequence[Request]]]
) -> Iterator[tuple[_Item, list[Reply]]]:
    """Items with the replies to their requests, in the requests' order, as soon as the last one is in.

    What the model leaves without an answer counts as failed.
    """
    unanswered = Reply(outcome="failed", detail="the model left it without an answer")
    under_way: dict[Request, tuple[_Item, list[Reply], int]] = {}
    nothing_asked: list[_Item] = []

    def requests() -> Iterator[Request]:
        for item, wanted in asked:
            replies = [unanswered] * len(wanted)
            under_way.update({request: (item, replies, place) for place, request in enumerate(wanted)})
            if not wanted:
                nothing_asked.append(item)
            yield from wanted

    for request, reply in model.answers(requests()):
        item, replies, place = under_way.pop(request)
        replies[place] = reply
        if all(reply is not unanswered for reply in replies):
            yield item, replies
    yield from {id(replies): (item, replies) for item, replies, _ in under_way.values()}.values()
    yield from ((item, []) for item in nothing_asked)


def answer_in(reply: Reply, parse: Callable[[str], _Answer]) -> _Answer:
    """What `parse` makes of a reply's text.

    Raises UnparsableError that says why there is nothing: the model refused, the request failed, or the
    text is not what was asked for, perhaps because it was cut short.
    """
    if reply.outcome != "answered":
        raise UnparsableError(f"{reply.outcome}: {reply.detail}")
    try:
        return parse(reply.text)
    except UnparsableError as error:
        raise UnparsableError(f"{error}; {reply.detail}" if reply.detail else str(error)) from error


_FENCED = re.compile(r"```(?:json)?(.*)```", re.DOTALL | re.IGNORECASE)


def parse_json(text: str) -> Any:
    """The JSON that a reply consists of, with or without Markdown's fence around it.

    Raises UnparsableError, also for what Python takes and JSON does not know (NaN), and for a key that
    comes twice.
    """
    fenced = _FENCED.fullmatch(text.strip())
    try:
        return json.loads(
            fenced[1] if fenced else text, parse_constant=_no_json, object_pairs_hook=_without_doubles
        )
    except (ValueError, RecursionError) as error:
        raise UnparsableError(f"the reply is not JSON ({error})") from error


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key of {', '.join(found)} comes twice")
    return found


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
