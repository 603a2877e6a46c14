"""A loopback server that speaks AssemblyAI's v2 API well enough for the official SDK.

Faithful in what matters to a client: paths, headers, status codes, error bodies, the transcript object's fields and
units. Strict where the service is: a wrong key, a body that is no audio, an unknown id or a missing
model is refused as the service refuses it. Tests script trouble with `trouble`, and read what was asked in `posts`.

Sources: AssemblyAI/assemblyai-api-spec @ 3fcf678 (OpenAPI 1.3.4); requests as SDK 1.8.2 sends them.
"""

import io
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

import soundfile

MODELS = {"universal-3-5-pro", "universal-3-pro", "universal-2"}
SHORTEST_S = 0.160


@dataclass
class Reply:
    """One scripted answer: a status with a body, or a dropped connection, before or after the request took effect."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    drop: str | None = None  # "before" or "after" the request is carried out
    takes_effect: bool = False  # the request is carried out, and this said of it all the same


def error(status: int, message: str, **headers: str) -> Reply:
    return Reply(status, json.dumps({"error": message}).encode(), headers)


@dataclass
class FakeAssemblyAI:
    """The service's state.

    Args:
        hear: turns the uploaded WAV bytes into text; None is a completed transcript without text.
        created_as: status in the answer to a creation. statuses: what polls of a job answer, one after the other; the
            last one stays.
        max_running: jobs beyond this number stay queued.
        trouble: scripted replies by endpoint ("upload", "create", "poll"), each used once, first come first.
        posts: bodies of all creations that took effect. requests: (method, path, headers) of everything.
    """

    hear: Callable[[bytes], str | None]
    created_as: str = "queued"
    statuses: list[str] = field(default_factory=lambda: ["queued", "processing", "completed"])
    max_running: int = 200
    key: str = "fake-key"
    error_message: str = "Download error, unable to download the file"
    trouble: dict[str, list[Reply]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    posts: list[dict[str, Any]] = field(default_factory=list)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    url: str = ""
    most_running: int = 0
    most_in_flight: int = 0

    def upload(self, content: bytes) -> Reply:
        address = f"https://cdn.assemblyai.com/upload/{uuid.uuid4()}"
        self.uploads[address] = content
        return _json({"upload_url": address})

    def create(self, request: dict[str, Any]) -> Reply:
        models = request.get("speech_models")
        if not models or set(models) - MODELS:
            return error(400, f"speech_models must be one or more of {', '.join(sorted(MODELS))}")
        if request.get("audio_url") not in self.uploads:
            return error(403, "Cannot access uploaded file")
        self.posts.append(request)
        job = {"id": str(uuid.uuid4()), "request": request, "polls": 0}
        self.jobs[job["id"]] = job
        self.most_in_flight = max(self.most_in_flight, self._unfinished())
        return _json(self._transcript(job, self.created_as))

    def poll(self, job_id: str) -> Reply:
        job = self.jobs.get(job_id)
        if job is None:
            return error(400, "Transcript lookup error, transcript id not found")
        running = self._running()
        if job["polls"] or len(running) < self.max_running:
            job["polls"] += 1
        self.most_running = max(self.most_running, len(self._running()))
        status = self._status(job) if job["polls"] else "queued"
        return _json(self._transcript(job, status))

    def _status(self, job: dict[str, Any]) -> str:
        if self._duration(job) < SHORTEST_S:
            return "error"
        return self.statuses[min(max(job["polls"], 1) - 1, len(self.statuses) - 1)]

    def _running(self) -> list[dict[str, Any]]:
        started = [job for job in self.jobs.values() if job["polls"]]
        return [job for job in started if self._status(job) in ("queued", "processing")]

    def _unfinished(self) -> int:
        return sum(not job["polls"] or self._status(job) in ("queued", "processing") for job in self.jobs.values())

    def _duration(self, job: dict[str, Any]) -> float:
        info = soundfile.info(io.BytesIO(self.uploads[job["request"]["audio_url"]]))
        return float(info.duration)

    def _transcript(self, job: dict[str, Any], status: str) -> dict[str, Any]:
        request = job["request"]
        made: dict[str, Any] = {
            "id": job["id"],
            "language_model": "assemblyai_default",
            "acoustic_model": "assemblyai_default",
            "speech_model": None,
            "speech_models": request["speech_models"],
            "language_code": request.get("language_code", "en_us"),
            "status": status,
            "audio_url": request["audio_url"],
            "text": None,
            "words": None,
            "confidence": None,
            "audio_duration": None,
            "webhook_auth": False,
            "auto_highlights": False,
            "redact_pii": False,
            "summarization": False,
            "language_confidence_threshold": None,
            "language_confidence": None,
        }
        if status == "error":
            short = self._duration(job) < SHORTEST_S
            made["error"] = "Audio duration is too short." if short else self.error_message
        if status == "completed":
            text = self.hear(self.uploads[request["audio_url"]])
            made |= {"text": text, "confidence": 0.97, "audio_duration": round(self._duration(job))}
            made["words"] = [
                {"text": word, "start": 250 * i, "end": 250 * i + 240, "confidence": 0.97, "speaker": None}
                for i, word in enumerate((text or "").split())
            ]
            made["speech_model_used"] = request["speech_models"][0]
        return made


def _json(content: dict[str, Any]) -> Reply:
    return Reply(200, json.dumps(content).encode())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeAssemblyAI

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/v2/upload":
            self._serve("upload", lambda: self.fake.upload(body))
        elif self.path == "/v2/transcript":
            self._serve("create", lambda: self.fake.create(json.loads(body)))
        else:
            self._send(error(404, "Not found"))

    def do_GET(self) -> None:
        parts = urlparse(self.path)
        if parts.path.startswith("/v2/transcript/"):
            self._serve("poll", lambda: self.fake.poll(parts.path.rsplit("/", 1)[1]))
        else:
            self._send(error(404, "Not found"))

    def _serve(self, endpoint: str, carry_out: Callable[[], Reply]) -> None:
        with self.fake.lock:
            headers = {key.lower(): value for key, value in self.headers.items()}
            self.fake.requests.append((endpoint, self.path, headers))
            if headers.get("authorization") != self.fake.key:
                self._send(error(401, "Authentication error, API token missing/invalid"))
                return
            scripted = self.fake.trouble.get(endpoint, [])
            reply = scripted.pop(0) if scripted else None
            if reply is None:
                self._send(carry_out())
            elif reply.drop:
                if reply.drop == "after":
                    carry_out()
                self.close_connection = True
                self.connection.close()
            else:
                if reply.takes_effect:
                    carry_out()
                self._send(reply)

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(fake: FakeAssemblyAI) -> Iterator[FakeAssemblyAI]:
    """Serve on a free loopback port; `fake.url` is its address."""
    handler = type("Handler", (_Handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
