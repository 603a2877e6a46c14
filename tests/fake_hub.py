"""A loopback hub with the endpoints that an upload needs: validate-yaml, repos/create, preupload, commit.

Files are taken inline or through the LFS batch endpoint, as the hub's own client sends them; `repos` holds them.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


@dataclass
class FakeHub:
    """The hub's state: files of each repository, and cards that were sent for validation."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    validated: list[str] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)
    refuses: bool = False
    url: str = ""

    def handle(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            self.validated.append(content)
            yaml.safe_load(content.split("---")[1])
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(filter(None, (request.get("organization"), request["name"])))
            if self.refuses:
                return 403, {"error": "You don't have the rights to create a model under this namespace"}
            self.repos.setdefault(name, {})
            return 200, {"url": f"{self.url}/{name}"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False}
                for one in files
            ]  # fmt: skip
            return 200, {"files": modes}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": one["oid"], "size": one["size"],
                 "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]  # fmt: skip
            return 200, {"transfer": "basic", "objects": objects}
        if "/commit/" in path:
            return 200, self._commit("/".join(path.split("/")[3:5]), body)
        return 404, {"error": f"no {path} here"}

    def _commit(self, repo: str, body: bytes) -> dict[str, str]:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                self.repos[repo][entry["value"]["path"]] = self.lfs[entry["value"]["oid"]]
        return {"commitOid": "0" * 40, "commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_POST(self) -> None:
        self._reply(*self.hub.handle(self.path.split("?")[0], self._body()))

    def do_PUT(self) -> None:
        self.hub.lfs[self.path.rsplit("/", 1)[1]] = self._body()
        self._reply(200, {})

    def do_GET(self) -> None:
        known = self.path.split("?")[0] == "/api/whoami-v2"
        self._reply(200 if known else 404, {"name": "someone", "type": "user"} if known else {"error": "not here"})

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _reply(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve on a free loopback port; `hub.url` is its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
