"""A local server that speaks the OpenAI protocol."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.explainers.faults import Fault, Plan, Reply, Request, client_error
from tests.explainers.servers import Server, running

OPENAI_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


@contextmanager
def openai_server(plan: Plan, *, port: int = 0) -> Iterator[Server]:
    """Serves POST /v1/chat/completions."""
    with running(Server(plan, 0, None), _route_openai, port, "/v1") as server:
        yield server


def _route_openai(server: Server, request: Request) -> tuple[Reply | Fault, Any]:
    if (request.method, request.path) != ("POST", "/v1/chat/completions"):
        outcome = client_error(404, f"Unknown request URL: {request.method} {request.path}")
    else:
        outcome = server.decide(request)
    if outcome.status != 200:
        return outcome, _openai_error(outcome)
    return outcome, _completion(outcome, request.body["model"], server.planned)


def _openai_error(fault: Fault) -> dict[str, Any]:
    code = fault.code or OPENAI_CODES.get(fault.status)
    kind = "server_error" if fault.status >= 500 else "invalid_request_error"
    if fault.status == 429:
        kind = "insufficient_quota" if code == "insufficient_quota" else "requests"
    return {"error": {"message": fault.message, "type": kind, "param": None, "code": code}}


def _completion(outcome: Reply | Fault, model: str, number: int) -> dict[str, Any]:
    if outcome.kind == "wrong_shape":
        return {}
    content: str | None = outcome.text
    refusal, finish = None, "stop"
    if outcome.kind == "refused":
        content, refusal, finish = None, outcome.message or None, outcome.code
    elif outcome.kind == "truncated":
        finish = "length"
    message = {"role": "assistant", "content": content, "refusal": refusal, "annotations": []}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [] if outcome.kind == "empty" else [choice],
        "usage": {
            "prompt_tokens": outcome.input_tokens,
            "completion_tokens": outcome.output_tokens,
            "total_tokens": outcome.input_tokens + outcome.output_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
        "system_fingerprint": None,
    }
