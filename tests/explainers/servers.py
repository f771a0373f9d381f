"""Local servers that speak the OpenAI and the Gemini protocol, with faults to order.

A *plan*, `plan(request, number)`, says what becomes of each prompt: a `Reply`, or a `Fault` made by one of
the functions below. It is called under a lock; `number` counts its calls from 0. The real client libraries
talk to these servers over 127.0.0.1:

    with openai_server(faulty(str.upper, 0.1, [rate_limited(0.1), dropped()], seed=0)) as server:
        client = openai.AsyncOpenAI(base_url=server.url, api_key="x", max_retries=0)
"""

import hashlib
import json
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

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
OPENAI_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
LOST = ("hang", "dropped", "cut_off", "malformed")  # the server did its part, the answer gets lost
NOT_JSON = b"<html><body>upstream says no</body></html>"


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


class Server:
    """A running server: what it was sent, and what a test may change while it runs."""

    def __init__(self, plan: Plan, batch_polls: int, calls: Callable[[Request, int], Fault | None] | None):
        self.plan = plan
        self.calls = calls
        self.batch_polls = batch_polls
        self.url = ""
        self.requests: list[Request] = []  # over HTTP, in order of arrival
        self.inlined: list[Request] = []  # items of batches, in the order the plan saw them
        self.jobs: dict[str, dict[str, Any]] = {}  # by name: operation, requests, polls, ends
        self.fail_next_batch: str | None = None  # "FAILED", "EXPIRED" or "CANCELLED"
        self.echo_metadata = True  # the service has been seen to leave metadata out,
        self.shuffle = False  # and to return the items of a batch out of order
        self.errors: list[BaseException] = []  # raised by plans
        self.peak = 0  # the most requests ever in hand at once
        self.busy = 0
        self.planned = 0
        self.called = 0
        self.lock = threading.RLock()
        self.stopped = threading.Event()

    def decide(self, request: Request) -> Reply | Fault:
        """Asks the plan about one prompt."""
        outcome = self.plan(request, self.planned)
        self.planned += 1
        request.fault = outcome.kind
        return outcome


@contextmanager
def openai_server(plan: Plan, *, port: int = 0) -> Iterator[Server]:
    """Serves POST /v1/chat/completions."""
    with _running(Server(plan, 0, None), _route_openai, port, "/v1") as server:
        yield server


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
    with _running(Server(plan, batch_polls, calls), _route_gemini, port, "") as server:
        yield server


# ---- OpenAI ----


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


# ---- Gemini ----


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


# ---- HTTP ----


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int, state: Server, route: Callable[[Server, Request], tuple[Any, Any]]):
        self.state = state
        self.route = route
        self.connections: set[socket.socket] = set()
        self.changed = threading.Condition()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.changed:
            self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self.changed:
            self.connections.discard(request)
            self.changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keeps silent about connections that clients cut, and keeps other errors."""
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):
            self.state.errors.append(error)

    def stop(self) -> None:
        self.state.stopped.set()
        self.shutdown()
        self.server_close()
        with self.changed:
            for connection in self.connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self.changed.wait_for(lambda: not self.connections, timeout=5)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together
    disable_nagle_algorithm = True
    server: _HttpServer

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        state = self.server.state
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with state.lock:
            state.busy += 1
            state.peak = max(state.peak, state.busy)
        try:
            with state.lock:
                request = Request(self.path, headers, json.loads(raw) if raw else None, method=self.command)
                state.requests.append(request)
                outcome, body = self.server.route(state, request)
                sent = json.dumps(body).encode()
        except Exception as error:
            state.errors.append(error)
            outcome, sent = server_error(), json.dumps({"error": {"message": repr(error)}}).encode()
        try:
            self.transmit(outcome, sent)
        finally:
            with state.lock:
                state.busy -= 1

    do_GET = do_POST = do_DELETE = answer

    def transmit(self, outcome: Reply | Fault, body: bytes) -> None:
        if outcome.kind in ("hang", "dropped", "cut_off"):
            self.close_connection = True
        if outcome.kind == "hang":
            self.connection.settimeout(outcome.seconds)
            with suppress(TimeoutError):
                self.connection.recv(1, socket.MSG_PEEK)  # comes back when the client hangs up
            return
        if outcome.kind == "dropped":
            return
        if outcome.seconds:
            self.server.state.stopped.wait(outcome.seconds)
        kind = outcome.content_type if isinstance(outcome, Fault) else "application/json"
        body = NOT_JSON if outcome.kind == "malformed" or kind == "text/html" else body
        self.send_response(outcome.status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-request-id", f"req-{len(self.server.state.requests)}")
        if isinstance(outcome, Fault) and outcome.retry_after is not None:
            after = outcome.retry_after
            self.send_header("Retry-After", after if isinstance(after, str) else f"{after:g}")
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if outcome.kind == "cut_off" else body)


@contextmanager
def _running(state: Server, route: Callable, port: int, suffix: str) -> Iterator[Server]:
    http = _HttpServer(port, state, route)
    state.url = f"http://127.0.0.1:{http.server_port}{suffix}"
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        http.stop()
        thread.join()
    if state.errors:
        raise state.errors[0]
