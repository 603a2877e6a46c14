"""The server: OpenAI's audio API over one request queue, metrics, and the page at `/`.

`Gate` checks every request before its body is read: API key, or host and origin where there is none; then size and time
of the body while it arrives. Recordings are spooled to anonymous temporary files and read in place; nothing in a
request is used as a path or a URL. Errors are in OpenAI's shape. Requires the optional extra `serve`.
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import math
import socket
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tinyaudio.model.errors import TinyAudioError
from tinyaudio.model.transcript import Transcript
from tinyaudio.request_queue import NotReadyError, QueueFullError, RequestQueue, Ticket, Update
from tinyaudio.subtitles import WRITERS, Layout
from tinyaudio.version import __version__

ALIASES = ("tinyaudio", "whisper-1", "gpt-4o-transcribe", "gpt-4o-mini-transcribe")  # names that clients have built in
MAX_FIELDS, MAX_FIELD_BYTES = 32, 64 << 10  # of a form, beside its file
DRAIN_S = 3.0  # how long the rest of a refused body is read and dropped, so that the client sees the answer
STREAM_END_S = 10  # seconds that open connections may take after the last request is done, at shutdown
OPEN_PATHS = ("/health", "/ready")  # need no key: probes of containers send none, and nothing is revealed

Asgi = Callable[[Any, Any, Any], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may send.

    Args:
        max_upload_bytes: of a body.
        body_grace_s: seconds to send a body in, beside those at the lowest rate.
        min_body_rate: bytes per second, the lowest rate of a sender.
    """

    max_upload_bytes: int = 200 << 20
    body_grace_s: float = 30.0
    min_body_rate: float = 32_000.0


class Refusal(HTTPException):
    """A request that is answered with an error in OpenAI's shape.

    Args:
        message: one line: what was expected, what was found.
        code: a word for programs.
        param: the field of the form that is wrong.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    def response(self) -> JSONResponse:
        return error_response(self.status_code, self.detail, self.code, self.param, self.headers)


def error_response(
    status: int, message: str, code: str | None = None, param: str | None = None, headers: Any = None
) -> JSONResponse:
    """Return an error in OpenAI's shape."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


class Parameters(BaseModel):
    """The fields of a transcription request, beside `file`."""

    model_config = ConfigDict(extra="forbid", populate_by_name=False)

    model: str = Field(max_length=500, description="The model's id, or one of: " + ", ".join(ALIASES))
    language: str | None = Field(None, description="en, or omit it: the model transcribes English only.")
    prompt: str | None = Field(None, description="Accepted and not used; the answer says so in X-Tinyaudio-Ignored.")
    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] = "json"
    temperature: float = Field(0.0, description="Must be 0: the model does not sample.")
    stream: bool = Field(False, description="Send server-sent events; response_format json or text.")
    timestamp_granularities: list[Literal["segment", "word"]] = Field(
        [], alias="timestamp_granularities[]", description="Needs response_format=verbose_json."
    )
    track: int | None = Field(None, ge=1, description="Audio track of a file with several, from 1. Not OpenAI's.")
    chunking_strategy: Literal["auto"] = Field("auto", description="auto: recordings are always cut at pauses.")

    @field_validator("language")
    @classmethod
    def _is_english(cls, value: str | None) -> str | None:
        if value and value.strip().lower().replace("_", "-").split("-")[0] not in ("en", "english"):
            raise ValueError("expected en: the model transcribes English only")
        return value

    @field_validator("temperature")
    @classmethod
    def _is_zero(cls, value: float) -> float:
        if value != 0:
            raise ValueError("expected 0: the model does not sample")
        return value


async def read_form(request: Request, model_name: str) -> tuple[Parameters, UploadFile]:
    """Read the body: the file is spooled to disk while it arrives.

    Raises:
        Refusal: a form that is not as `Parameters` describes it, or without a file.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refusal(400, "expected multipart/form-data with a file", "invalid_content_type")
    form = await request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    try:
        return check_form(form, model_name)
    except Refusal:
        await form.close()
        raise


def check_form(form: FormData, model_name: str) -> tuple[Parameters, UploadFile]:
    """Return the parameters and the file of a form; errors as `read_form`."""
    values: dict[str, Any] = {}
    upload: UploadFile | None = None
    for name, value in form.multi_items():
        if name == "file" and isinstance(value, UploadFile):
            upload = value
        elif isinstance(value, UploadFile):
            raise Refusal(400, f"expected the recording in the field 'file', found it in {name[:100]!r}", "no_file")
        elif name in ("timestamp_granularities", "timestamp_granularities[]"):
            values.setdefault("timestamp_granularities[]", []).append(value)
        elif name in values:
            raise Refusal(400, f"{name[:100]!r} is given twice; expected it once", "duplicate_parameter", name[:100])
        else:
            values[name] = value
    if upload is None:
        raise Refusal(400, "expected a recording in the field 'file', with a file name", "no_file", "file")
    try:
        parameters = Parameters.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        name = str(problem["loc"][0])[:100]
        if problem["type"] == "extra_forbidden":
            known = ", ".join(field.alias or name for name, field in Parameters.model_fields.items())
            raise Refusal(400, f"unknown field {name!r}; expected file, {known}", "unknown_parameter", name) from error
        if problem["type"] == "missing":
            raise Refusal(400, f"expected the field {name!r}", "missing_parameter", name) from error
        reason = str(problem["msg"]).removeprefix("Value error, ").replace("Input should be", "expected")
        raise Refusal(400, f"{name} is {str(values.get(name))[:100]!r}: {reason}", "invalid_value", name) from error
    if parameters.model not in (model_name, *ALIASES):
        message = f"model {parameters.model[:100]!r} is not served here; expected {model_name!r}"
        raise Refusal(404, message, "model_not_found", "model")
    granularities = parameters.timestamp_granularities
    if granularities and parameters.response_format != "verbose_json":
        message = "timestamp_granularities[] needs response_format=verbose_json"
        raise Refusal(400, message, "invalid_value", "timestamp_granularities[]")
    if parameters.stream and parameters.response_format not in ("json", "text"):
        message = f"stream=true needs response_format json or text, found {parameters.response_format}"
        raise Refusal(400, message, "invalid_value", "response_format")
    return parameters, upload


FORM_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    **(schema := Parameters.model_json_schema()),
                    "properties": {"file": {"type": "string", "format": "binary"}, **schema["properties"]},
                    "required": ["file", "model"],
                }
            }
        },
    }
}


def render(transcript: Transcript, parameters: Parameters) -> Response:
    """Write a transcript in the requested format."""
    kind = parameters.response_format
    if kind == "text":
        return PlainTextResponse(transcript.text + "\n")
    if kind in ("srt", "vtt"):
        media = "text/vtt" if kind == "vtt" else "text/plain"
        return Response(WRITERS[kind](transcript, Layout()), media_type=f"{media}; charset=utf-8")
    usage = {"type": "duration", "seconds": math.ceil(transcript.duration_s)}
    if kind == "json":
        return JSONResponse({"text": transcript.text, "usage": usage})
    written = transcript.to_dict()
    answer = {
        "task": "transcribe",
        "language": "english",
        "duration": written["duration"],
        "text": transcript.text,
        "segments": [_verbose(segment) for segment in written["segments"]],
        "warnings": written["warnings"],
        "usage": usage,
    }
    if "word" in parameters.timestamp_granularities:
        answer["words"] = [
            {"word": word["word"].strip(), "start": word["start"], "end": word["end"]}
            for segment in written["segments"]
            for word in segment["words"]
        ]
    return JSONResponse(answer)


def _verbose(segment: dict[str, Any]) -> dict[str, Any]:
    """Add what clients of OpenAI's API require of a segment, where it can be said without inventing numbers."""
    text = segment["text"].encode()
    ratio = round(len(text) / len(zlib.compress(text)), 3)  # as openai/whisper computes it
    return {"seek": round(segment["start"] * 100), "temperature": 0.0, "compression_ratio": ratio, "tokens": []} | {
        name: value for name, value in segment.items() if name != "words"
    }


def _event(**content: Any) -> str:
    return f"data: {json.dumps(content)}\n\n"


class Answer:
    """The updates of one request, awaited; a client that goes away ends it."""

    def __init__(self, request: Request, ticket: Ticket, upload: UploadFile, parameters: Parameters) -> None:
        self.request, self.ticket = request, ticket
        self._updates: asyncio.Queue[Update] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def pass_on(update: Update) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._updates.put_nowait, update)

        ticket.submit(
            upload.file,
            pass_on,
            word_timestamps="word" in parameters.timestamp_granularities,
            confidence=parameters.response_format == "verbose_json",
            track=parameters.track,
        )

    async def __aiter__(self) -> AsyncIterator[Update]:
        """Yield updates, the one with the transcript last.

        Raises:
            ClientDisconnect: the client has gone away. Refusal: the recording cannot be transcribed.
        """
        gone = asyncio.ensure_future(self._wait_until_gone())
        try:
            while True:
                update = asyncio.ensure_future(self._updates.get())
                try:
                    await asyncio.wait({update, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if not update.done():
                        raise ClientDisconnect
                finally:
                    update.cancel()
                self._check(update.result())
                yield update.result()
                if update.result().transcript is not None:
                    return
        finally:
            gone.cancel()

    async def _wait_until_gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def _check(self, update: Update) -> None:
        if isinstance(update.failure, NotReadyError):
            raise Refusal(503, str(update.failure), "unavailable")
        if isinstance(update.failure, TinyAudioError):
            raise Refusal(500, str(update.failure), "model_error")
        if update.failure is not None:
            raise update.failure
        if update.transcript is not None and update.transcript.error is not None:
            reason = update.transcript.error.replace(update.transcript.source, "file")
            is_too_long = self.ticket.is_too_long
            raise Refusal(
                413 if is_too_long else 400, reason, "audio_too_long" if is_too_long else "invalid_audio", "file"
            )


async def stream_events(first: Update, rest: AsyncIterator[Update]) -> AsyncIterator[str]:
    """Send server-sent events: a `transcript.text.delta` for each segment, then `transcript.text.done`."""
    is_begun = False
    update = first
    try:
        while True:
            for segment in update.segments:
                if segment.text:
                    yield _event(type="transcript.text.delta", delta=" " * is_begun + segment.text)
                    is_begun = True
            if update.transcript is not None:
                yield _event(type="transcript.text.done", text=update.transcript.text)
                return
            update = await anext(rest)
    except Refusal as refusal:  # the status has been sent already
        yield "data: " + bytes(refusal.response().body).decode() + "\n\n"


class Gate:
    """Checks requests before anything else sees them, and their bodies while they arrive; counts the answers.

    Args:
        api_key: required in `Authorization: Bearer`, or as the password of HTTP Basic for browsers. None: no key, and
            only requests to `host` or a loopback name, from pages of this server, are accepted.
        host: where the server listens.
        on_answer: called with path, status and seconds after each answer.
    """

    def __init__(
        self, app: Asgi, *, api_key: str | None, host: str, limits: Limits, on_answer: Callable[[str, int, float], None]
    ) -> None:
        self.app, self.limits, self.on_answer = app, limits, on_answer
        self._key = api_key.encode() if api_key else None
        self._hosts = {host.lower(), "localhost", "127.0.0.1", "::1"}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise AssertionError(f"expected http, found {scope['type']}; the server accepts no web sockets")
        headers = Headers(scope=scope)
        started = time.monotonic()
        num_received, status = 0, 499  # nginx's code for a client that went away before it was answered
        is_complete = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"

        async def limited_receive() -> Any:
            nonlocal num_received, is_complete
            if is_complete:
                return await receive()
            limits = self.limits
            until = started + limits.body_grace_s + num_received / limits.min_body_rate
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise Refusal(408, "the body arrived too slowly. Send it again, or a shorter one", "timeout") from None
            num_received += len(message.get("body", b""))
            if num_received > limits.max_upload_bytes:
                raise self._too_large()
            is_complete = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def closing_send(message: Any) -> None:
            """Answer; where the body is not read to its end, drop the rest first and close the connection after."""
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                if not is_complete:
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            elif not message.get("more_body", False) and not is_complete:
                await send({**message, "more_body": True})
                try:
                    async with asyncio.timeout(DRAIN_S):
                        while not is_complete:
                            dropped = await receive()
                            is_complete = dropped["type"] != "http.request" or not dropped.get("more_body", False)
                except TimeoutError:
                    pass
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers)
            if refusal is not None:
                await refusal.response()(scope, limited_receive, closing_send)
            else:
                await self.app(scope, limited_receive, closing_send)
        finally:
            self.on_answer(scope["path"], status, time.monotonic() - started)

    def _refusal(self, path: str, headers: Headers) -> Refusal | None:
        """Decide from the head of a request whether it is refused."""
        if path in OPEN_PATHS:
            return None
        if self._key is not None:
            if not self._has_key(headers.get("authorization", "")):
                scheme = "Bearer" if path.startswith("/v1/") else 'Basic realm="tinyaudio", charset="UTF-8"'
                challenge = {"WWW-Authenticate": scheme}
                return Refusal(401, "expected the server's API key", "invalid_api_key", headers=challenge)
        else:
            host = _host_name(headers.get("host", ""))
            if host not in self._hosts:
                return Refusal(
                    403, f"expected a request to this machine, found the host {host[:100]!r}. Set an API key to serve "
                    "other names", "wrong_host",
                )  # fmt: skip
            origin = headers.get("origin")
            if origin is not None and origin.partition("://")[2] != headers.get("host"):
                return Refusal(403, "expected no request from a page of another site", "wrong_origin")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.limits.max_upload_bytes:
            return self._too_large()
        return None

    def _has_key(self, authorization: str) -> bool:
        assert self._key is not None
        scheme, _, given = authorization.partition(" ")
        found = given.strip().encode("latin-1", "replace")
        if scheme.lower() == "basic":  # what a browser sends after it has asked for a password: user:key
            try:
                found = base64.b64decode(found, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(found, self._key)

    def _too_large(self) -> Refusal:
        limit_mb = self.limits.max_upload_bytes / (1 << 20)
        return Refusal(413, f"expected at most {limit_mb:g} MiB, found more. Send it in parts", "too_large", "file")


def _host_name(host: str) -> str:
    """Return the name in a Host header, without the port and without the brackets of IPv6."""
    host = host.strip().lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Check whether an address is reachable from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Metrics:
    """What `/metrics` reports, in Prometheus' format."""

    PATHS = ("/v1/audio/transcriptions", "/v1/models", "/health", "/ready", "/metrics")

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "tinyaudio_requests", "Answers, by path and status.", ["path", "status"], registry=self.registry
        )
        self._audio = Counter("tinyaudio_audio_seconds", "Audio transcribed.", registry=self.registry)
        self._model = Counter("tinyaudio_model_seconds", "Time the model worked.", registry=self.registry)
        self._batches = Histogram(
            "tinyaudio_batch_size", "Segments in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self._latency = Histogram(
            "tinyaudio_request_seconds",
            "From the head of a transcription request to the end of its answer.",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
            registry=self.registry,
        )
        self._depth = Gauge(
            "tinyaudio_queue_depth", "Requests that are waiting or being transcribed.", registry=self.registry
        )
        rtfx = Gauge("tinyaudio_rtfx", "Seconds of audio per second of the model's work.", registry=self.registry)
        rtfx.set_function(lambda: self._audio_s / self._model_s if self._model_s else 0.0)
        self._audio_s = self._model_s = 0.0

    def watch(self, queue: RequestQueue) -> None:
        self._depth.set_function(lambda: queue.num_requests)
        queue.on_batch = self._add_batch

    def _add_batch(self, num_pieces: int, audio_s: float, took_s: float) -> None:
        self._batches.observe(num_pieces)
        self._audio.inc(audio_s)
        self._model.inc(took_s)
        self._audio_s += audio_s
        self._model_s += took_s

    def add_answer(self, path: str, status: int, took_s: float) -> None:
        self._requests.labels(path if path in self.PATHS else "other", str(status)).inc()
        if path == self.PATHS[0] and status == 200:
            self._latency.observe(took_s)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def build_app(
    queue: RequestQueue,
    model_name: str,
    *,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    limits: Limits | None = None,
    mount_page: Callable[[FastAPI], object] | None = None,
) -> Asgi:
    """Build the server's application.

    Args:
        model_name: in `GET /v1/models`.
        host: where the server listens; see `Gate`.
        api_key: see `Gate`.
        mount_page: mounts the page at `/`.
    """
    metrics = Metrics()
    metrics.watch(queue)

    app = FastAPI(title="tinyaudio", version=__version__, redoc_url=None)

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        if isinstance(error, Refusal):
            return error.response()
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    async def forget(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return error_response(500, "the server has failed; its log says why", "internal_error")

    async def take_place() -> AsyncIterator[Ticket]:
        try:
            ticket = queue.enter()
        except QueueFullError as error:
            raise Refusal(429, str(error), "queue_full", headers={"Retry-After": "2"}) from error
        except NotReadyError as error:
            raise Refusal(503, str(error), "unavailable", headers={"Retry-After": "5"}) from error
        try:
            yield ticket
        finally:
            ticket.leave()

    @app.post(
        "/v1/audio/transcriptions",
        openapi_extra=FORM_SCHEMA,
        responses={status: {"description": text} for status, text in ANSWERS.items()},
    )
    async def transcribe(request: Request, ticket: Annotated[Ticket, Depends(take_place)]) -> Response:
        """Transcribe a recording: OpenAI's `audio.transcriptions.create`."""
        parameters, upload = await read_form(request, model_name)
        if "word" in parameters.timestamp_granularities and not queue.has_word_times:
            await upload.close()
            message = "this model's encoder has no CTC head for word times; expected timestamp_granularities[]=segment"
            raise Refusal(400, message, "invalid_value", "timestamp_granularities[]")
        ignored = {"X-Tinyaudio-Ignored": "prompt"} if parameters.prompt else {}
        updates = aiter(Answer(request, ticket, upload, parameters))
        update = await anext(updates)
        if parameters.stream:
            events = stream_events(update, updates)
            headers = {**ignored, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        while update.transcript is None:
            update = await anext(updates)
        response = render(update.transcript, parameters)
        response.headers.update(ignored)
        return response

    model = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "tinyaudio"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name not in (model_name, *ALIASES):
            message = f"model {name[:100]!r} is not served here; expected {model_name!r}"
            raise Refusal(404, message, "model_not_found", "model")
        return model

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answer while the process is alive."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "Loading, or shutting down."}})
    async def ready() -> JSONResponse:
        """Answer 200 while requests are accepted."""
        return JSONResponse({"ready": queue.is_ready}, status_code=200 if queue.is_ready else 503)

    @app.get("/metrics")
    async def report() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.api_route(
        "/v1/{rest:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"], include_in_schema=False
    )
    async def unknown(rest: str) -> Response:
        message = f"/v1/{rest[:100]} is not served, or not by this method; see /docs"
        raise Refusal(405 if rest in ("audio/transcriptions", "models") else 404, message, "not_found")

    if mount_page is not None:
        mount_page(app)
    return Gate(app, api_key=api_key, host=host, limits=limits or Limits(), on_answer=metrics.add_answer)


ANSWERS: dict[int | str, str] = {
    200: "The transcript.",
    400: "A parameter or a recording that cannot be used.",
    401: "No API key, or a wrong one.",
    408: "The body arrived too slowly.",
    413: "The body is too large, or the recording too long.",
    429: "Every place of the queue is taken; see Retry-After.",
    503: "The model is being loaded, or the server is shutting down.",
}


def public_name(model: str) -> str:
    """Return what clients call a model: its hub id, or the name of its folder without the path."""
    folder = Path(model)
    return folder.resolve().name if folder.exists() else model


class _Server(uvicorn.Server):
    """A server that finishes every accepted request after SIGTERM or Ctrl-C; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, queue: RequestQueue) -> None:
        super().__init__(config)
        self.queue = queue
        self.signal: int | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.signal is not None:
            self.should_exit = self.force_exit = True
        self.signal = sig

    async def on_tick(self, counter: int) -> bool:
        if self.signal is not None:
            self.queue.close()
        if (self.queue.is_closed and not self.queue.num_requests) or self.queue.failure is not None:
            self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket; port 0 is any free port.

    Raises:
        TinyAudioError: the port is taken, or the host is not this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise TinyAudioError(
            f"port {port} of {host} is in use, or the host is not this machine. Choose another --port, 0 for any"
        ) from error


def new_server(app: Asgi, queue: RequestQueue) -> "_Server":
    """Return a server of uvicorn's that ends when its queue was closed and is empty."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STREAM_END_S,
    )
    return _Server(config, queue)


def serve(app: Asgi, queue: RequestQueue, listener: socket.socket) -> int | None:
    """Serve until a signal; return its number.

    Raises:
        TinyAudioError: the model cannot be loaded.
    """
    server = new_server(app, queue)
    with listener:
        server.run(sockets=[listener])
    queue.stop()
    if queue.failure is not None:
        raise queue.failure
    return server.signal
