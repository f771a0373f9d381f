"""Local servers for the real client libraries, which talk to them over 127.0.0.1.

    with openai_server(faulty(str.upper, 0.1, [rate_limited(0.1), dropped()], seed=0)) as server:
        client = openai.AsyncOpenAI(base_url=server.url, api_key="x", max_retries=0)

Here is what the protocols share; `openai_server` and `gemini_server` have modules of their own.
"""

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.explainers.faults import Fault, Plan, Reply, Request, server_error

NOT_JSON = b"<html><body>upstream says no</body></html>"


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
def running(state: Server, route: Callable, port: int, suffix: str) -> Iterator[Server]:
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
