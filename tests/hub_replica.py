"""A replica of the hub on 127.0.0.1: the endpoints that huggingface_hub and datasets use, and the faults of a real one.

    with Hub(tmp_path) as hub:
        hub.add("models", "facebook/hubert-large-ls960-ft", {"config.json": path, ...})
        subprocess.run([...], env=hub.environment(tmp_path / "home"))

Serves files with ETags, commits, branches and byte ranges; keeps a log of every request; answers wrongly on demand:
`hub.faults.append(Fault("resolve", "disconnect", times=2))`. What the shipped recipes pin lies at the commits that they
pin, and `main` has moved on to other content, so that a request that forgets the revision shows. Also a script: `python
tests/hub_replica.py FOLDER` serves the bundled models of pipelines/demo under the real names until interrupted, to try
commands by hand.
"""

import dataclasses
import functools
import hashlib
import json
import os
import random
import re
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

DEMO = Path(__file__).parents[1] / "pipelines" / "demo"
ENCODER, DECODER = "facebook/hubert-large-ls960-ft", "HuggingFaceTB/SmolLM3-3B-Base"
CORPUS = "speechbrain/LoquaciousSet"
PINNED = {
    ENCODER: "ece5fabbf034c1073acae96d5401b25be96709d8",
    DECODER: "d78a42f79198603e614095753484a04c10c2b940",
    CORPUS: "2379d906037aa092052390308f6816fdc1a32273",
}
ROWS_PER_GROUP = 20
LARGE, CDN = (".parquet", ".safetensors"), "/cdn"  # files in large-file storage, and where that begins


@dataclass
class Repo:
    """One repository: at every commit its files by path; branches point to commits."""

    kind: str  # "models" or "datasets"
    name: str
    commit: str  # the one that the tests mean
    commits: dict[str, dict[str, Path]]
    branches: dict[str, str]

    @property
    def files(self) -> dict[str, Path]:
        return self.commits[self.commit]

    def resolve(self, revision: str) -> str | None:
        revision = unquote(revision)
        return revision if revision in self.commits else self.branches.get(revision)

    def push(self, files: dict[str, Path]) -> str:
        """Let `main` point to other files, at a commit of their own."""
        self.branches["main"] = commit = _commit_of(self.kind, self.name, files)
        self.commits[commit] = files
        return commit


def _commit_of(kind: str, name: str, files: dict[str, Path]) -> str:
    digest = hashlib.sha1(f"{kind}/{name}".encode())
    for path in sorted(files):
        digest.update(path.encode() + files[path].read_bytes())
    return digest.hexdigest()


@functools.cache  # nothing changes what it serves
def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _entry(path: str, file: Path) -> dict[str, object]:
    size, sha256 = file.stat().st_size, _sha256(file)
    entry: dict[str, object] = {"type": "file", "path": path, "size": size, "oid": sha256[:40]}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 130}
    return entry


@dataclass
class Fault:
    """A wrong answer: an HTTP status, "slow", "disconnect" (half of the body), "short" (fewer bytes than asked for).

    Faults of a file that lies behind a redirect happen where it leads to.
    """

    pattern: str  # searched in the request's path
    kind: int | str
    times: int = 1  # how often; -1: for ever
    share: float = 1.0  # of the matching requests
    method: str = "GET"
    retry_after: str = "0"
    slow_s: float = 0.5
    min_bytes: int = 0  # only of requests for a range of so many bytes: audio, say, and not footers
    hits: int = 0


@dataclass
class Request:
    """One line of the log."""

    method: str
    path: str
    range: tuple[int, int] | None
    status: int
    num_bytes: int
    has_token: bool = False


class Hub:
    """The replica, running while its `with` block does."""

    def __init__(self, seed: int = 0) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.redirects = False  # send requests for large files on to another host, as the hub does
        self.signature = 0  # of the addresses there; those with an earlier one are refused, as after an hour
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            replica = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, name="hub", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, kind: str, name: str, files: dict[str, Path], commit: str | None = None) -> Repo:
        """Serve files as a repository whose `main` they are, at a given commit or at one that is a digest of them."""
        commit = commit or _commit_of(kind, name, files)
        repo = self.repos[kind, name] = Repo(kind, name, commit, {commit: files}, {"main": commit})
        return repo

    def environment(self, home: Path) -> dict[str, str]:
        """Give the environment of a fresh machine whose hub is this one."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_OFFLINE"))}
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "no_proxy": "127.0.0.1,localhost",
        }

    def take_fault(self, method: str, path: str, num_bytes: int = 0) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                is_meant = fault.times and fault.method == method and num_bytes >= fault.min_bytes
                if is_meant and re.search(fault.pattern, path) and self.random.random() < fault.share:
                    fault.times -= 1
                    fault.hits += 1
                    return dataclasses.replace(fault)
        return None


class _Server(ThreadingHTTPServer):
    """Threads that say nothing when a client was killed."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    replica: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body)

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        signature = parse_qs(urlsplit(self.path).query).get("Signature", ["0"])[0]
        if path.startswith(CDN) and signature != str(self.replica.signature):
            return self._send(403, b"<Error><Code>AccessDenied</Code></Error>", {})
        if self.replica.redirects and "/resolve/" in path and path.endswith(LARGE) and not path.startswith(CDN):
            return self._redirect()
        span = _span(self.headers.get("Range"), sys.maxsize)
        fault = self.replica.take_fault(self.command, self.path, span[1] - span[0] if span else 0)
        if fault is not None and isinstance(fault.kind, int):
            return self._send(fault.kind, b"not now", {"Retry-After": fault.retry_after})
        if fault is not None and fault.kind == "slow":
            time.sleep(fault.slow_s)
        path = path.removeprefix(CDN)
        match = re.match(r"^/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", path)
        if match:
            kind = "datasets" if match[1] else "models"
            return self._file(self.replica.repos.get((kind, match[2])), match[3], match[4], fault)
        match = re.match(
            r"^/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/([^/]+)(/.*)?)?)?$", path
        )
        if match:
            repo = self.replica.repos.get((match[1], match[2]))
            return self._api(repo, match[3], match[4] or "main", (match[5] or "").strip("/"), body)
        return self._missing("EntryNotFound")

    def _redirect(self) -> None:
        """Answer as the hub does for what lies in its large-file storage: elsewhere, with what it knows of the file."""
        there = f"http://localhost:{self.replica.endpoint.rpartition(':')[2]}{CDN}{self.path}"
        there += f"?Signature={self.replica.signature}" if self.replica.signature else ""
        match = re.match(r"^/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", unquote(urlsplit(self.path).path))
        repo = match and self.replica.repos.get(("datasets" if match[1] else "models", match[2]))
        commit = repo and match and repo.resolve(match[3])
        file = commit and repo.commits[commit].get(match[4])
        if not file:
            self._missing("EntryNotFound")
            return
        known = {"X-Linked-Size": str(file.stat().st_size), "X-Linked-ETag": f'"{_sha256(file)}"'}
        span = _span(self.headers.get("Range"), file.stat().st_size)
        self._send(302, b"", {"Location": there, "X-Repo-Commit": str(commit), **known}, span=span)

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not here"})

    def _api(self, repo: Repo | None, what: str | None, revision: str, folder: str, body: bytes) -> None:
        if repo is None:
            return self._missing("RepoNotFound")
        commit = repo.resolve(revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        if what == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
            return self._json({"branches": branches, "tags": [], "converts": []})
        files = repo.commits[commit]
        if what == "tree":
            return self._json(self._tree(files, folder))
        if what == "paths-info":
            return self._json([entry for path in _paths(body) for entry in _info(files, path)])
        siblings = [{"rfilename": path, **_entry(path, files[path])} for path in sorted(files)]
        info = {"_id": "0" * 24, "id": repo.name, "sha": commit, "private": False, "gated": False, "disabled": False}
        return self._json({**info, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings, "cardData": {}})

    def _tree(self, files: dict[str, Path], folder: str) -> list[dict[str, object]]:
        is_recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in sorted(files) if path.startswith(prefix)]
        entries = [_entry(path, files[path]) for path in inside if is_recursive or "/" not in path[len(prefix) :]]
        folders = {prefix + path[len(prefix) :].split("/")[0] for path in inside if "/" in path[len(prefix) :]}
        return [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)] + entries

    def _file(self, repo: Repo | None, revision: str, path: str, fault: Fault | None) -> None:
        if repo is None:
            return self._missing("RepoNotFound")
        commit = repo.resolve(revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        served = repo.commits[commit].get(path)
        if served is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        size = served.stat().st_size
        headers = {"ETag": f'"{_sha256(served)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        span = _span(self.headers.get("Range"), size)
        start, end = span or (0, size)
        with served.open("rb") as file:
            file.seek(start)
            body = file.read(end - start)
        if span:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        if fault is not None and fault.kind == "short":
            body = body[: len(body) // 2]
        half = fault is not None and fault.kind == "disconnect"
        return self._send(206 if span else 200, body, headers, span=span, half=half)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str],
        span: tuple[int, int] | None = None,
        half: bool = False,
    ) -> None:
        has_token = "Authorization" in self.headers
        self.replica.log.append(Request(self.command, self.path, span, status, len(body), has_token))
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if half else body)
            if half:
                self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):  # the client was killed
            self.close_connection = True


def _info(files: dict[str, Path], path: str) -> list[dict[str, object]]:
    if path in files:
        return [_entry(path, files[path])]
    if any(file.startswith(f"{path}/") for file in files):
        return [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0}]
    return []


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    match = re.match(r"bytes=(\d*)-(\d*)$", header or "")
    if match is None:
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size
    return int(match[1]), min(size, int(match[2]) + 1 if match[2] else size)


def _paths(body: bytes) -> list[str]:
    try:
        paths = json.loads(body)["paths"]
    except (ValueError, KeyError):
        paths = parse_qs(body.decode()).get("paths", [])
    return [paths] if isinstance(paths, str) else list(paths)


CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train*}
  - {split: dev, path: dev/dev*}
  - {split: test, path: test/test*}
- config_name: medium
  data_files:
  - {split: train, path: medium/train*}
  - {split: dev, path: dev/dev*}
  - {split: test, path: test/test*}
dataset_info:
- config_name: small
  features:
  - {name: ID, dtype: string}
  - {name: duration, dtype: float32}
  - name: wav
    dtype: {audio: {sample_rate: 16000, decode: false}}
  - {name: spk_id, dtype: string}
  - {name: sex, dtype: string}
  - {name: text, dtype: string}
---
# A replica of LoquaciousSet's layout, filled with the bundled synthetic speech
"""


def loquacious_files(folder: Path, num_train: int = 120, num_other: int = 48) -> dict[str, Path]:
    """Write the bundled corpus in LoquaciousSet's file layout: two training files, six of dev, six of test."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(CARD)
    files = {"README.md": folder / "README.md"}
    layout = {
        "small/train": ("train", num_train, 2),
        "dev/dev": ("dev", num_other, 6),
        "test/test": ("test", num_other, 6),
    }
    for prefix, (split, count, parts) in layout.items():
        table = pq.read_table(DEMO / "corpus" / f"{split}-00000-of-00001.parquet").slice(0, count)
        for part in range(parts):
            first, last = part * count // parts, (part + 1) * count // parts
            name = f"{prefix}-{part:05}-of-{parts:05}.parquet"
            files[name] = write_rows(folder / name, table.slice(first, last - first))
    return files


def write_rows(path: Path, table: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=ROWS_PER_GROUP)
    return path


def model_files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.name != "README.md"}


def fill(hub: Hub, folder: Path, num_train: int = 120, num_other: int = 48) -> Hub:
    """Serve the bundled models and corpus under the real names, at the commits that recipes pin."""
    encoder = hub.add("models", ENCODER, model_files(DEMO / "encoder"), PINNED[ENCODER])
    encoder.push({**encoder.files, "model.safetensors": other_weights(folder / "moved", encoder.files)})
    hub.add("models", DECODER, model_files(DEMO / "decoder"), PINNED[DECODER])
    corpus = hub.add("datasets", CORPUS, loquacious_files(folder, num_train, num_other), PINNED[CORPUS])
    first = next(path for path in corpus.files if "train" in path)
    fewer = write_rows(folder / "moved" / "train.parquet", pq.read_table(corpus.files[first]).slice(1))
    corpus.push({**corpus.files, first: fewer})
    return hub


def other_weights(folder: Path, files: dict[str, Path]) -> Path:
    """Write an encoder's weights with one of them changed."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(files["model.safetensors"])
    weights[min(weights)] = weights[min(weights)] + 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


if __name__ == "__main__":
    with fill(Hub(), Path(sys.argv[1]), 2400, 120) as served:
        print(f"export HF_ENDPOINT={served.endpoint} HF_HUB_DISABLE_XET=1 HF_HOME=$(mktemp -d)", flush=True)
        threading.Event().wait()
