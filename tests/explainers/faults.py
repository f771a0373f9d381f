"""Faults to order: what the local servers may answer, and plans that say when.

A *plan*, `plan(request, number)`, says what becomes of each prompt: a `Reply`, or a `Fault` made by one of
the functions below. It is called under a lock; `number` counts its calls from 0.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    """What a client sent; for an item of a batch, that item as if it had been sent alone."""

    path: str
    headers: dict[str, str]  # names in lower case
    body: Any  # parsed JSON, None without a body
    fault: str = ""  # the kind of fault that the plan chose
    method: str = "POST"
    metadata: dict[str, str] | None = None  # of an item of a batch
    time: float = field(default_factory=time.monotonic)  # when it arrived

    @property
    def prompt(self) -> str:
        """All messages' text, the system's first, one per line."""
        body = self.body or {}
        instruction = body.get("systemInstruction")
        contents = ([instruction] if instruction else []) + body.get("contents", [])
        parts = [content.get("parts", []) for content in contents]
        for message in body.get("messages", []):
            content = message.get("content") or []
            parts.append([{"text": content}] if isinstance(content, str) else content)
        return "\n".join(part["text"] for message in parts for part in message if "text" in part)


@dataclass(frozen=True)
class Reply:
    """A good answer."""

    text: str
    input_tokens: int = 100
    output_tokens: int = 10
    seconds: float = 0.0  # how long the server takes over it
    kind: str = ""
    status: int = 200


@dataclass(frozen=True)
class Fault:
    """Anything but a good answer; made by the functions below."""

    kind: str
    status: int = 200
    message: str = ""
    code: str | None = None
    text: str = ""
    seconds: float = 0.0
    retry_after: float | str | None = None
    retry_delay: float | None = None
    in_candidate: bool = False
    reason: str = ""
    content_type: str = "application/json"
    input_tokens: int = 100
    output_tokens: int = 10


Plan = Callable[[Request, int], Reply | Fault]


def text(string: str, *, input_tokens: int = 100, output_tokens: int = 10, seconds: float = 0.0) -> Reply:
    """A good reply, `seconds` after the request."""
    return Reply(string, input_tokens, output_tokens, seconds)


def rate_limited(retry_after: float | str | None = None, *, retry_delay: float | None = None) -> Fault:
    """429; `retry_after` goes into the header, `retry_delay` into Gemini's RetryInfo detail."""
    return Fault("rate_limited", 429, "Rate limit reached.", retry_after=retry_after, retry_delay=retry_delay)


def server_error(status: int = 500, *, retry_after: float | str | None = None, html: bool = False) -> Fault:
    """The server's own failure; with `html` a page, as proxies send, instead of the protocol's JSON."""
    kind = "text/html" if html else "application/json"
    return Fault(
        "server_error", status, "The server had an error.", retry_after=retry_after, content_type=kind
    )


def client_error(status: int, message: str, *, code: str | None = None) -> Fault:
    """The request's failure; `code` is OpenAI's error code or the reason in Gemini's ErrorInfo detail."""
    return Fault("client_error", status, message, code)


def hang(seconds: float) -> Fault:
    """No answer for `seconds`, then the connection closes."""
    return Fault("hang", seconds=seconds)


def dropped() -> Fault:
    """The connection closes without an answer; in a batch, the item has none."""
    return Fault("dropped")


def cut_off() -> Fault:
    """Headers, half of the body, and the connection closes."""
    return Fault("cut_off", text="This answer never arrives whole.")


def malformed(content_type: str = "application/json") -> Fault:
    """A body that is not JSON. The OpenAI client treats "text/html" differently."""
    return Fault("malformed", content_type=content_type)


def wrong_shape() -> Fault:
    """JSON without choices or candidates."""
    return Fault("wrong_shape")


def refused(
    *,
    in_candidate: bool = False,
    reason: str = "SAFETY",
    refusal: str = "I'm sorry, I can't help with that.",
    finish_reason: str = "stop",
) -> Fault:
    """No answer as a matter of policy.

    Gemini blocks the prompt, or with `in_candidate` the answer, for `reason`. OpenAI sends `refusal` (null
    where it is empty), null content, and `finish_reason`, which its filter makes "content_filter".
    """
    return Fault("refused", message=refusal, code=finish_reason, reason=reason, in_candidate=in_candidate)


def empty() -> Fault:
    """No choices or candidates in their list."""
    return Fault("empty", output_tokens=0)


def blank() -> Fault:
    """An answer of no characters that ends normally."""
    return Fault("blank", output_tokens=0)


def truncated(string: str) -> Fault:
    """The start of an answer that met the token limit; Gemini sends no parts at all for an empty one."""
    return Fault("truncated", text=string)


def answers(function: Callable[[str], str], *, seconds: float = 0.0) -> Plan:
    """Answers every prompt with `function` of its text."""
    return lambda request, number: text(function(request.prompt), seconds=seconds)


def faulty(function: Callable[[str], str], share: float, faults: Sequence[Fault], seed: int) -> Plan:
    """Like `answers`, but a `share` of the requests, which `seed` and number settle, meet one of `faults`."""

    def plan(request: Request, number: int) -> Reply | Fault:
        draw = hashlib.sha256(f"{seed}/{number}".encode()).digest()
        if int.from_bytes(draw[:8]) < share * 2**64:
            return faults[int.from_bytes(draw[8:16]) % len(faults)]
        return text(function(request.prompt))

    return plan
