"""Fifty clients at one server, a tenth of their requests bad: `python tests/load_server.py MODEL SECONDS [SEED]`.

Every good answer must be the text that `Transcriber` gives, every bad request must get the right status, and memory,
threads and file descriptors must stay where they were after the warm-up. Then SIGTERM under load: every request that
was accepted is answered, and the exit code is 0. Prints one JSON object; `test_server_load` runs the short version, and
600 seconds are the long one.
"""

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from audio_files import with_soundfile

ROOT = Path(__file__).parents[1]
NUM_CLIENTS, BAD_SHARE = 50, 0.1
KEY, BOUNDARY = "load-key", "load-boundary"
MAX_UPLOAD_BYTES, GRACE_S = 1 << 20, 2.0
HEAD = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="


def main() -> None:
    sys.path[:0] = [str(ROOT)]
    if sys.argv[1] == "--serve":
        _serve(sys.argv[2], Path(sys.argv[3]))
        return
    print(json.dumps(load(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)))


def _serve(model: str, metrics_file: Path) -> None:
    """Serve with limits that a test can reach, and write the metrics down at the end."""
    from tinyaudio.model.recognize import Options
    from tinyaudio.request_queue import RequestQueue
    from tinyaudio.server import Limits, bind, build_app, serve
    from tinyaudio.transcribe import Transcriber

    queue = RequestQueue(lambda: Transcriber.load(model, device="cpu"), Options(), max_duration_s=60)
    limits = Limits(max_upload_bytes=MAX_UPLOAD_BYTES, body_grace_s=GRACE_S)
    gate = build_app(queue, "load", api_key=KEY, limits=limits)
    listener = bind("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    assert serve(gate, queue, listener) == signal.SIGTERM
    metrics_file.write_bytes(gate.on_answer.__self__.text())


class Load:
    """What the clients send, and what came back.

    Args:
        port: of the server.
        good: (file, text) pairs.
    """

    def __init__(self, port: int, good: list[tuple[bytes, str]]) -> None:
        self.port, self.good = port, good
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    def note(self, kind: str, found: object, expected: object) -> None:
        with self._lock:
            self.answers[f"{kind}: {found if isinstance(found, int) else 'text'}"] += 1
            if found != expected:
                self.wrong.append(f"{kind}: expected {expected!r}, found {found!r}")

    def ask(self, body: bytes, key: str = KEY) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", "Authorization": f"Bearer {key}"}
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
                connection.request("POST", "/v1/audio/transcriptions", body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def one(self, chance: random.Random) -> None:
        """Send one request, good or bad, and check its answer."""
        file, text = chance.choice(self.good)
        if chance.random() >= BAD_SHARE:
            status, content = self.ask(form(file))
            self.note("good", json.loads(content)["text"] if status == 200 else status, text)
            return
        bad = {
            "empty": (lambda: self.ask(form(b""))[0], 400),
            "text": (lambda: self.ask(form(b"these are words and no sound\n" * 50))[0], 400),
            "truncated": (lambda: self.ask(form(file[: len(file) // 2])[:-40])[0], 400),
            "oversized": (lambda: self.ask(form(bytes(MAX_UPLOAD_BYTES)))[0], 413),
            "too long": (lambda: self.ask(form(SILENCE))[0], 413),
            "wrong key": (lambda: self.ask(form(file), key="other")[0], 401),
            "language": (lambda: self.ask(form(file, language="de"))[0], 400),
            "format": (lambda: self.ask(form(file, response_format="xml"))[0], 400),
            "model": (lambda: self.ask(form(file, model="gpt-5"))[0], 404),
            "slow": (lambda: self.slow(form(file)), 408),
            "hang up": (lambda: self.hang_up(form(file), chance.random()), 0),
        }
        kind = chance.choice(list(bad))
        send, expected = bad[kind]
        self.note(kind, send(), expected)

    def slow(self, body: bytes) -> int:
        """Send a byte a quarter second."""
        with self.open(body) as connection:
            until = time.monotonic() + 10 * GRACE_S
            connection.settimeout(0.25)
            for byte in body:
                assert time.monotonic() < until, "a slow sender was not stopped"
                with contextlib.suppress(ConnectionError):
                    connection.send(bytes([byte]))
                with contextlib.suppress(TimeoutError):
                    return int(connection.recv(100).split()[1])
        return 0

    def hang_up(self, body: bytes, share: float) -> int:
        """Send a part, or all of it, and go away."""
        with self.open(body) as connection:
            connection.sendall(body[: int(1.5 * share * len(body))])
            time.sleep(0.1 * share)
        return 0

    def open(self, body: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port))
        head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode())
        return connection


def form(file: bytes, **fields: str) -> bytes:
    written = "".join(f'{HEAD}"{name}"\r\n\r\n{value}\r\n' for name, value in {"model": "load", **fields}.items())
    return (f'{written}{HEAD}"file"; filename="a.wav"\r\n\r\n').encode() + file + f"\r\n--{BOUNDARY}--\r\n".encode()


SILENCE = with_soundfile(np.zeros(16_000 * 90, np.int16), format="FLAC")


def recordings() -> list[bytes]:
    """Sixty utterances of the demo's test set, and five joined ones that are cut into segments."""
    import pyarrow.parquet as pq

    from tinyaudio.model.audio import load_audio

    (path,) = (ROOT / "pipelines/demo/corpus").glob("test-0*.parquet")
    files = [row["wav"]["bytes"] for row in pq.read_table(path).slice(0, 60).to_pylist()]
    samples = [load_audio(file) for file in files]
    pause, kinds = np.zeros(12_000, np.float32), "FLAC OGG FLAC OGG FLAC".split()
    joined = [np.concatenate([p for s in samples[n : n + 4] for p in (s, pause)]) for n in range(0, 20, 4)]
    return [*files, *(with_soundfile(talk, format=kind) for talk, kind in zip(joined, kinds, strict=True))]


def load(model: str, duration_s: float, seed: int) -> dict[str, object]:
    from tinyaudio.transcribe import Transcriber

    files = recordings()
    texts = [t.text for t in Transcriber.load(model, device="cpu").transcribe(files)]
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.txt"
        command = [sys.executable, __file__, "--serve", model, str(metrics)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            return _run(
                Load(int(server.stdout.readline()), list(zip(files, texts, strict=True))),
                server,
                duration_s,
                seed,
                metrics,
            )
        finally:
            server.kill()
            server.wait()


def _run(load: Load, server: subprocess.Popen, duration_s: float, seed: int, metrics: Path) -> dict[str, object]:
    while _get(load.port, "/ready")[0] != 200:
        time.sleep(0.1)
    process, usage = psutil.Process(server.pid), []
    until = time.monotonic() + duration_s

    def client(number: int) -> None:
        chance = random.Random(seed * 1000 + number)
        try:
            while time.monotonic() < until:
                load.one(chance)
        except Exception as error:
            load.wrong.append(f"a client failed: {error!r}")

    _in_parallel(client, lambda: usage.append((process.memory_info().rss, process.num_threads(), process.num_fds())))
    time.sleep(2 * GRACE_S)  # the last slow senders are gone
    idle = process.num_threads(), process.num_fds(), _gauge(load.port, "tinyaudio_queue_depth")
    warm = usage[len(usage) // 4 :]
    part = max(1, len(warm) // 5)
    early, late = (statistics.median(rss for rss, _, _ in some) for some in (warm[:part], warm[-part:]))
    before = _statuses(_get(load.port, "/metrics")[1])

    finals: Counter[str] = Counter()

    def last_client(number: int) -> None:
        chance = random.Random(number)
        while True:
            file, text = chance.choice(load.good)
            try:
                status, content = load.ask(form(file))
            except (OSError, http.client.HTTPException):
                finals["not accepted"] += 1
                return
            finals[str(status)] += 1
            if status == 200 and json.loads(content)["text"] != text:
                load.wrong.append(f"after SIGTERM: expected {text!r}, found {content!r}")
            if status not in (200, 503):
                load.wrong.append(f"after SIGTERM: expected 200 or 503, found {status}: {content}")

    threading.Timer(2.0, server.send_signal, [signal.SIGTERM]).start()
    _in_parallel(last_client, lambda: None)
    code = server.wait(60)
    after = _statuses(metrics.read_text()) if metrics.exists() else Counter()
    lost = sum((after - before)[status] for status in ("499", "500"))
    return {
        "requests": sum(load.answers.values()),
        "answers": dict(sorted(load.answers.items())),
        "wrong": load.wrong[:20],
        "rss_early_bytes": round(early),
        "rss_late_bytes": round(late),
        "rss_growth": round(late / early - 1, 4),
        "threads": [usage[len(usage) // 4][1], idle[0]],
        "idle_fds": idle[1],
        "idle_queue": idle[2],
        "after_sigterm": dict(finals),
        "lost": lost,
        "exit_code": code,
        "stderr": server.stderr.read()[-2000:],
    }


def _in_parallel(work, sample) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with contextlib.suppress(psutil.Error):
            sample()
        time.sleep(0.5)


def _get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {KEY}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def _gauge(port: int, name: str) -> float:
    return float(re.search(rf"^{name} (\S+)$", _get(port, "/metrics")[1], re.MULTILINE)[1])


def _statuses(metrics: str) -> Counter[str]:
    pattern = r'tinyaudio_requests_total\{path="/v1/audio/transcriptions",status="(\d+)"\} (\S+)'
    return Counter({status: int(float(count)) for status, count in re.findall(pattern, metrics)})


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
