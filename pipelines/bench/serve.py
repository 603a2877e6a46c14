"""How fast the server is with 1, 8 and 50 clients, beside the batched command line on the same files, in one run.

The server is the command `tinyaudio serve`, in a process of its own; the clients are threads of this process, each with
one connection and one request at a time, so they take CPU time that the command line has for itself.
"""

import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import pyarrow.parquet as pq

from pipelines.bench.memory import measuring_resident
from pipelines.bench.models import DEMO
from pipelines.bench.race import median_ratio, race, seconds
from tinyaudio.model.audio import SAMPLING_RATE, load_audio
from tinyaudio.model.errors import TinyAudioError
from tinyaudio.transcribe import Transcriber, default_model

CLIENTS = (1, 8, 50)
START_S = 600  # how long the server may take to load its model
BOUNDARY = "tinyaudio-bench-7d1f"

NOTES = {
    "throughput_vs_cli": "at 50 clients, over that of the command line; goal: at least 0.8",
    "p50_s": "seconds from request to answer at 50 clients, median",
    "p95_s": "the same, 95th percentile",
    "peak_rss_bytes": "of the server's process",
    "same_text": "True: every answer equals the command line's text",
}


def bench_serve(*, device: str = "auto") -> dict[str, Any]:
    """Measure the default model ($TINYAUDIO_MODEL, else runs/latest).

    Returns:
        `throughput_vs_cli`, `p50_s`, `p95_s`, `peak_rss_bytes` at 50 clients, `same_text`, and `by_clients` with the
        same values for 1, 8 and 50 clients and `rtfx`, seconds of audio per second. Then what was measured.

    Raises:
        TinyAudioError: no model, or the server does not start.
    """
    return measure(default_model(), device)


def measure(
    model: str, device: str, *, num_requests: int = 300, batch_size: int = 16, repeats: int = 3
) -> dict[str, Any]:
    """Measure a model on the bundled test split.

    Args:
        num_requests: of each round, repeating the split's utterances as needed; one client sends a fifth of them.
    """
    (path,) = (DEMO / "corpus").glob("test-0*.parquet")
    files = [row["wav"]["bytes"] for row in pq.read_table(path).to_pylist()]
    files = [files[i % len(files)] for i in range(num_requests)]
    audio_s = [len(load_audio(data)) / SAMPLING_RATE for data in files]
    transcriber = Transcriber.load(model, device=device)
    expected: list[str] = []

    def command_line() -> float:
        def work() -> None:
            expected[:] = [t.text for t in transcriber.transcribe(files, batch_size=batch_size)]

        return sum(audio_s) / seconds(work)

    latencies: dict[int, list[float]] = {count: [] for count in CLIENTS}
    peaks = dict.fromkeys(CLIENTS, 0)
    is_same = True
    with _server(model, device, batch_size) as (port, pid):

        def clients(count: int) -> float:
            nonlocal is_same
            num_sent = num_requests if count > 1 else max(1, num_requests // 5)
            with measuring_resident(pid) as peak:
                began = time.perf_counter()
                answers = send_all(port, files[:num_sent], count)
                took_s = time.perf_counter() - began
            peaks[count] = max(peaks[count], peak.size_bytes)
            latencies[count] += [latency for _, latency in answers]
            is_same = is_same and [text for text, _ in answers] == expected[:num_sent]
            return sum(audio_s[:num_sent]) / took_s

        command_line()  # the first runs allocate, and load what stays loaded
        send_all(port, files[:20], 4)
        ways: dict[str, Callable[[], float]] = {
            "cli": command_line,
            **{str(count): partial(clients, count) for count in CLIENTS},
        }
        speeds = race(ways, repeats)
    by_clients = {
        str(count): {
            "throughput_vs_cli": round(median_ratio(speeds[str(count)], speeds["cli"]), 3),
            "rtfx": round(statistics.median(speeds[str(count)]), 2),
            "p50_s": round(_quantile(latencies[count], 0.50), 3),
            "p95_s": round(_quantile(latencies[count], 0.95), 3),
            "peak_rss_bytes": peaks[count],
        }
        for count in CLIENTS
    }
    most = by_clients[str(CLIENTS[-1])]
    return {
        **{name: most[name] for name in ("throughput_vs_cli", "p50_s", "p95_s", "peak_rss_bytes")},
        "same_text": is_same,
        "cli_rtfx": round(statistics.median(speeds["cli"]), 2),
        "model": model,
        "requests": num_requests,
        "audio_s": round(sum(audio_s), 1),
        "device": str(transcriber.model.device),
        "batch_size": batch_size,
        "repeats": repeats,
        "by_clients": by_clients,
    }


def send_all(port: int, files: Sequence[bytes], num_clients: int) -> list[tuple[str, float]]:
    """Send each file in a request of its own, by so many clients; return texts and latencies in seconds.

    Raises:
        TinyAudioError: an answer other than 200.
    """
    todo: SimpleQueue[int] = SimpleQueue()
    for number in range(len(files)):
        todo.put(number)
    answers: list[tuple[str, float]] = [("", 0.0)] * len(files)
    failures: list[str] = []

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        try:
            while not failures:
                number = todo.get_nowait()
                began = time.perf_counter()
                connection.request("POST", "/v1/audio/transcriptions", _form(files[number]), headers)
                answer = connection.getresponse()
                content = answer.read().decode()
                if answer.status != 200:
                    failures.append(f"expected status 200, found {answer.status}: {content[:200]}")
                    return
                answers[number] = (json.loads(content)["text"], time.perf_counter() - began)
        except Empty:
            pass
        except Exception as error:
            failures.append(f"a client failed: {error!r}")
        finally:
            connection.close()

    threads = [threading.Thread(target=work) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise TinyAudioError(failures[0])
    return answers


def _form(data: bytes) -> bytes:
    """Write a multipart form with a file and a model."""
    part = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
    model = f'{part}"model"\r\n\r\nwhisper-1\r\n'
    return f'{model}{part}"file"; filename="a"\r\n\r\n'.encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()


@contextmanager
def _server(model: str, device: str, batch_size: int) -> Iterator[tuple[int, int]]:
    """Run `tinyaudio serve`; yield its port and process id once the model is loaded."""
    command = [sys.executable, "-m", "tinyaudio", "serve", "--no-page", "--port", "0", "--model", model]
    command += ["--device", device, "--batch-size", str(batch_size)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
            if found is None:
                raise TinyAudioError(f"the server did not start: {line.strip().removeprefix('tinyaudio: ')}")
            port, until = int(found[1]), time.monotonic() + START_S
            while not _is_ready(port):
                if process.poll() is not None or time.monotonic() > until:
                    raise TinyAudioError(f"the server did not load {model!r}: {process.stderr.read().strip()}")
                time.sleep(0.1)
            yield port, process.pid
        finally:
            process.terminate()


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
