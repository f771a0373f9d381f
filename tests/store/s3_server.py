"""A local S3: moto's server, and in front of it a door that can be shut after so many writes."""

import contextlib
import http.client
import http.server
import socket
import subprocess
import sys
import threading
import time
import urllib.request

BUCKET = "bucket"


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@contextlib.contextmanager
def moto():
    """The port of a server with an empty bucket."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(request).close()
                break
            except OSError:
                assert process.poll() is None, "moto's server ended"
                assert time.monotonic() < deadline, "moto's server does not answer"
                time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


class Door:
    """`url` passes requests on. Once `writes_left` is used up, every further one fails; None is no limit."""

    def __init__(self, port):
        self.writes_left = None
        door = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.command == "PUT" and door.writes_left is not None:
                    door.writes_left -= 1
                    if door.writes_left < 0:
                        self.answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
                        return
                inner = http.client.HTTPConnection("127.0.0.1", port)
                with contextlib.closing(inner):
                    inner.request(self.command, self.path, body, dict(self.headers))
                    response = inner.getresponse()
                    self.answer(response.status, response.getheaders(), response.read())

            def answer(self, status, headers, body):
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
