"""A stand-in for the Hugging Face hub: what it is asked, and the files that it was given."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse


class Hub:
    """What the stand-in has.

    Attributes:
        files: The repository's files by their paths, None where there is no repository.
        private: Whether it was to be a private one.
        commits: The paths that each commit added.
        refuse: The path of a request, or a part of it, that is refused, and the status of that.
    """

    def __init__(self):
        self.files, self.private, self.commits = None, None, []
        self.refuse: tuple[str, int] | None = None
        self.objects = {}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, contents=None, status=200, **headers):
        data = b"" if contents is None else json.dumps(contents).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refused(self):
        if self.hub.refuse and self.hub.refuse[0] in self.path:
            self._body()
            self._answer({"error": "no"}, self.hub.refuse[1])
            return True
        return False

    def do_HEAD(self):
        name = urllib.parse.unquote(self.path).partition("/resolve/main/")[2]
        if name in (self.hub.files or {}):
            self._answer(None, 200, ETag='"abc"', X_Repo_Commit="0" * 40)
        else:
            self._answer(None, 404, X_Error_Code="EntryNotFound")

    def do_GET(self):
        self._answer({"error": "nothing"}, 404)

    def do_PUT(self):
        if not self._refused():
            data = self._body()
            self.hub.objects[hashlib.sha256(data).hexdigest()] = data
            self._answer({})

    def do_POST(self):
        if self._refused():
            return
        body = self._body()
        here = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.hub.private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.files = {} if self.hub.files is None else self.hub.files
            self._answer({"url": f"{here}/datasets/{asked['organization']}/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".parquet", ".sqlite")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{here}/object/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
            repository = self.path.removeprefix("/api").partition("/commit/")[0]
            self._answer({"commitUrl": f"{here}{repository}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._answer({"error": f"unknown {self.path}"}, 404)

    def _commit(self, lines):
        added = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
                added.append(value["path"])
            elif line["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.objects[value["oid"]]
                added.append(value["path"])
            elif line["key"] == "deletedFile":
                del self.hub.files[value["path"]]
            elif line["key"] == "deletedFolder":
                self.hub.files = {
                    name: data for name, data in self.hub.files.items() if not name.startswith(value["path"])
                }
        self.hub.commits.append(added)


@contextlib.contextmanager
def serve():
    """The address of a stand-in, and what it has."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
