"""A server in a thread of the test, over any model, and raw requests to it."""

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Iterator

import httpx

from tinyaudio.request_queue import RequestQueue
from tinyaudio.server import bind, build_app, new_server


class Running:
    """A running server: `url`, `port`, its queue, and a client of httpx."""

    def __init__(self, queue: RequestQueue, port: int, headers: dict[str, str]) -> None:
        self.queue, self.port, self.url = queue, port, f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def post(self, content: bytes | None = None, name: str = "talk.wav", **fields: str) -> httpx.Response:
        files = {} if content is None else {"file": (name, content)}
        data = {
            "model": "whisper-1",
            **{name.replace("granularities", "granularities[]"): v for name, v in fields.items()},
        }
        return self.client.post("/v1/audio/transcriptions", files=files or {"x": (None, "y")}, data=data)

    def raw(self, data: bytes, wait_s: float = 10.0) -> bytes:
        """Send bytes and return everything that comes back until the connection closes, or nothing more comes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait_s) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            answer = b""
            with contextlib.suppress(TimeoutError, ConnectionError):
                while part := connection.recv(65_536):
                    answer += part
            return answer


@contextlib.contextmanager
def running(transcriber, *, options=None, max_requests=64, max_duration_s=60.0, **settings) -> Iterator[Running]:
    """Serve until the block ends, then check that no thread of the queue is left."""
    queue = RequestQueue(lambda: transcriber, options, max_requests=max_requests, max_duration_s=max_duration_s)
    queue.wait_until_ready()
    if "mount_page" in settings:
        settings["mount_page"] = functools.partial(settings["mount_page"], queue=queue)
    app = build_app(queue, "tiny", **settings)
    listener = bind("127.0.0.1", 0)
    server = new_server(app, queue)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    key = settings.get("api_key")
    server_headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        until = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        yield Running(queue, listener.getsockname()[1], server_headers)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        queue.stop()
    assert not thread.is_alive()
    assert not [t for t in threading.enumerate() if t.name.startswith(("tinyaudio-model", "tinyaudio-request"))]
