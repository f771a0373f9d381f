"""A local server that speaks the Gemini protocol, batches included."""

import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.explainers.faults import Fault, Plan, Reply, Request, client_error, text
from tests.explainers.servers import Server, running

# HTTP status: (google.rpc name, google.rpc number). HTTP errors carry the first, batch items the second.
RPC = {
    400: ("INVALID_ARGUMENT", 3),
    401: ("UNAUTHENTICATED", 16),
    403: ("PERMISSION_DENIED", 7),
    404: ("NOT_FOUND", 5),
    409: ("ABORTED", 10),
    429: ("RESOURCE_EXHAUSTED", 8),
    500: ("INTERNAL", 13),
    503: ("UNAVAILABLE", 14),
    504: ("DEADLINE_EXCEEDED", 4),
}
LOST = ("hang", "dropped", "cut_off", "malformed")  # the server did its part, the answer gets lost


@contextmanager
def gemini_server(
    plan: Plan,
    *,
    batch_polls: int = 2,
    calls: Callable[[Request, int], Fault | None] | None = None,
    port: int = 0,
) -> Iterator[Server]:
    """Serves generateContent, and batches that end at the `batch_polls`-th look at them.

    The plan answers the items of a batch when it ends. `calls` may spoil the batch API's own calls; one
    whose answer merely gets lost (dropped, cut off, ...) has taken effect all the same.
    """
    with running(Server(plan, batch_polls, calls), _route_gemini, port, "") as server:
        yield server


def _route_gemini(server: Server, request: Request) -> tuple[Reply | Fault, Any]:
    path = re.sub(r"^/v1(beta|alpha)?/", "", urlsplit(request.path).path)  # google-genai 3 asks for v1
    if request.method == "POST" and (match := re.fullmatch(r"(models/[^/:]+):generateContent", path)):
        outcome = server.decide(request)
        if outcome.status != 200:
            return outcome, _gemini_error(outcome)
        return outcome, _content(outcome, match[1], server.planned)
    fault = None
    if server.calls is not None:
        fault = server.calls(request, server.called)
        server.called += 1
    if fault is not None:
        request.fault = fault.kind
        if fault.kind not in LOST:
            return fault, _gemini_error(fault) if fault.status != 200 else {}
    answer = _batch_call(server, request, path)
    if isinstance(answer, Fault):
        return answer, _gemini_error(answer)
    return fault or text(""), answer


def _gemini_error(fault: Fault) -> dict[str, Any]:
    name = RPC.get(fault.status, ("UNKNOWN", 2))[0]
    error = {"code": fault.status, "message": fault.message, "status": name}
    return {"error": error | _details(fault)}


def _details(fault: Fault) -> dict[str, Any]:
    details = []
    kind = "type.googleapis.com/google.rpc."
    if fault.retry_delay is not None:
        details.append({"@type": kind + "RetryInfo", "retryDelay": f"{fault.retry_delay:g}s"})
    if fault.kind == "client_error" and fault.code is not None:
        info = {"reason": fault.code, "domain": "googleapis.com", "metadata": {}}
        details.append({"@type": kind + "ErrorInfo"} | info)
    return {"details": details} if details else {}


def _content(outcome: Reply | Fault, model: str, number: int) -> dict[str, Any]:
    if outcome.kind == "wrong_shape":
        return {}
    usage = {"promptTokenCount": outcome.input_tokens, "totalTokenCount": outcome.input_tokens}
    version = model.removeprefix("models/")
    body: dict[str, Any] = {"usageMetadata": usage, "modelVersion": version, "responseId": f"r{number}"}
    ratings = [{"category": "HARM_CATEGORY_DANGEROUS_CONTENT", "probability": "HIGH"}]
    if outcome.kind == "refused" and outcome.in_candidate:
        return {"candidates": [{"finishReason": outcome.reason, "index": 0, "safetyRatings": ratings}]} | body
    if outcome.kind == "refused":
        return {"promptFeedback": {"blockReason": outcome.reason, "safetyRatings": ratings}} | body
    if outcome.kind == "empty":
        return {"candidates": []} | body
    usage |= {
        "candidatesTokenCount": outcome.output_tokens,
        "totalTokenCount": outcome.input_tokens + outcome.output_tokens,
    }
    content: dict[str, Any] = {"role": "model", "parts": [{"text": outcome.text}]}
    finish = "STOP"
    if outcome.kind == "truncated":
        finish = "MAX_TOKENS"
        if not outcome.text:
            del content["parts"]
    return {"candidates": [{"content": content, "finishReason": finish, "index": 0}]} | body


def _batch_call(server: Server, request: Request, path: str) -> dict[str, Any] | Fault:
    if request.method == "POST" and (match := re.fullmatch(r"(models/[^/:]+):batchGenerateContent", path)):
        return _create_job(server, match[1], request.body["batch"])
    if request.method == "GET" and path == "batches":
        query = dict(parse_qsl(urlsplit(request.path).query))
        start, size = int(query.get("pageToken", 0)), int(query.get("pageSize", 100))
        operations = [job["operation"] for job in reversed(server.jobs.values())]
        page = {"operations": operations[start : start + size]}
        return page | ({"nextPageToken": str(start + size)} if start + size < len(operations) else {})
    name, _, verb = path.partition(":")
    job = server.jobs.get(name)
    if job is None:
        return client_error(404, f"Requested entity was not found: {request.method} {path}")
    if (request.method, verb) == ("GET", ""):
        job["polls"] += 1
        _advance(server, job)
        return job["operation"]
    if (request.method, verb) == ("POST", "cancel"):
        if not job["operation"].get("done"):
            job["ends"] = "CANCELLED"
            _end(server, job)
        return {}
    if (request.method, verb) == ("DELETE", ""):
        del server.jobs[name]
        return {}
    return client_error(404, f"No such method: {request.method} {path}")


def _create_job(server: Server, model: str, batch: dict[str, Any]) -> dict[str, Any] | Fault:
    items = batch.get("inputConfig", {}).get("requests", {}).get("requests")
    if not items:
        return client_error(400, "Only batches with inlined requests are served here.")
    name = f"batches/job{len(server.jobs)}x{random.randrange(10**6):06d}"
    now = _now()
    metadata = {
        "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
        "name": name,
        "model": model,
        "displayName": batch.get("displayName", ""),
        "createTime": now,
        "updateTime": now,
        "batchStats": {"requestCount": str(len(items)), "pendingRequestCount": str(len(items))},
        "state": "BATCH_STATE_PENDING",
    }
    job = {
        "operation": {"name": name, "metadata": metadata},
        "requests": items,
        "polls": 0,
        "ends": server.fail_next_batch or "SUCCEEDED",
    }
    server.fail_next_batch = None
    server.jobs[name] = job
    created = json.loads(json.dumps(job["operation"]))
    if server.batch_polls == 0:
        _advance(server, job)
        return job["operation"]
    return created


def _advance(server: Server, job: dict[str, Any]) -> None:
    if job["operation"].get("done"):
        return
    if job["polls"] >= server.batch_polls:
        _end(server, job)
    else:
        job["operation"]["metadata"] |= {"state": "BATCH_STATE_RUNNING", "updateTime": _now()}


def _end(server: Server, job: dict[str, Any]) -> None:
    operation = job["operation"]
    metadata = operation["metadata"]
    now = _now()
    metadata |= {"state": f"BATCH_STATE_{job['ends']}", "updateTime": now, "endTime": now}
    operation["done"] = True
    if job["ends"] != "SUCCEEDED":
        operation["error"] = {"code": 13, "message": f"The batch has {job['ends'].lower()}."}
        return
    responses = [_inlined_response(server, metadata["model"], item) for item in job["requests"]]
    failed = sum(response is None or "error" in response for response in responses)
    responses = [response for response in responses if response is not None]
    if server.shuffle:
        random.Random(operation["name"]).shuffle(responses)
    output = {"inlinedResponses": {"inlinedResponses": responses}}
    total = len(job["requests"])
    counts = {"requestCount": total, "successfulRequestCount": total - failed, "failedRequestCount": failed}
    metadata["batchStats"] = {key: str(count) for key, count in counts.items() if count}
    metadata["output"] = output
    kind = metadata["@type"] + "Output"
    operation["response"] = {"@type": kind} | output


def _inlined_response(server: Server, model: str, item: dict[str, Any]) -> dict[str, Any] | None:
    body, metadata = item["request"], item.get("metadata")
    model = body.get("model", model)
    request = Request(f"/v1/{model}:generateContent", {}, body, metadata=metadata)
    server.inlined.append(request)
    outcome = server.decide(request)
    if outcome.kind == "dropped":
        return None
    echo = {"metadata": metadata} if metadata and server.echo_metadata else {}
    if isinstance(outcome, Fault) and (outcome.status != 200 or outcome.kind in LOST):
        status = outcome.status if outcome.status != 200 else 504 if outcome.kind == "hang" else 500
        error = {"code": RPC.get(status, ("UNKNOWN", 2))[1], "message": outcome.message or "Internal error."}
        return {"error": error | _details(outcome)} | echo
    return {"response": _content(outcome, model, server.planned)} | echo


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
