"""The server under load, short version (`load_server.py` runs the long one), and five hundred fuzzed requests."""

import json
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
from audio_files import with_soundfile
from hypothesis import HealthCheck, given, settings
from servers import running

from tinyaudio.model.recognize import Options
from tinyaudio.server import Limits

SCRIPT = Path(__file__).with_name("load_server.py")
DURATION_S = 8


def test_fifty_clients_a_tenth_of_them_bad_get_right_answers(model, checkpoint):
    model.config.window_s = 4.0
    model.config.save_pretrained(checkpoint)
    model.generation_config.update(num_beams=1, max_new_tokens=4)
    model.generation_config.save_pretrained(checkpoint)
    command = [sys.executable, str(SCRIPT), str(checkpoint), str(DURATION_S)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["requests"] > 100
    assert (found["exit_code"], found["lost"], found["idle_queue"]) == (0, 0, 0)
    assert found["threads"][1] <= found["threads"][0]
    assert found["idle_fds"] < 40
    assert found["after_sigterm"]["200"] > 0
    assert "Traceback" not in found["stderr"]


NAMES = ["file", "model", "language", "prompt", "response_format", "temperature", "stream", "timestamp_granularities[]"]
VALUES = ["whisper-1", "tiny", "en", "json", "text", "srt", "verbose_json", "0", "1e999", "true", "segment", "word", ""]
names = st.one_of(st.sampled_from(NAMES), st.text(max_size=20))
values = st.one_of(st.sampled_from(VALUES), st.text(max_size=60), st.binary(max_size=60))
dispositions = st.sampled_from(
    [
        'form-data; name="{name}"',
        'form-data; name="{name}"; filename="{value}"',
        "form-data; name={name}; filename*=utf-8''%ff",
        'attachment; filename="a.wav"',
        "form-data",
        "",
    ]
)
parts = st.tuples(
    names, values, dispositions, st.sampled_from(["", "text/plain; charset=nonsense", "audio/wav", "\x00"])
)
PLAIN = 'form-data; name="{name}"'
plain_parts = st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES), st.just(PLAIN), st.just(""))
kinds = st.sampled_from(
    [
        "multipart/form-data; boundary=x",
        'multipart/form-data; boundary="x"; charset=utf-16',
        "multipart/form-data; boundary=x; charset=nonsense",
        "multipart/form-data; boundary=y",
        "multipart/form-data",
        "multipart/mixed; boundary=x",
        "application/x-www-form-urlencoded",
        "",
    ]
)


def as_bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "replace")


@pytest.fixture(scope="module")
def talk_bytes(spoken):
    return with_soundfile(spoken[0][0], format="FLAC")


@pytest.fixture
def server(transcriber):
    options = Options(num_beams=1, max_new_tokens=2)
    with running(transcriber, options=options, limits=Limits(max_upload_bytes=1 << 20, body_grace_s=2)) as server:
        yield server


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Starlette leaves a torn part's file
@pytest.mark.parametrize("num_requests", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_fuzzed_requests_never_fail_the_server_and_never_hang_it(server, talk_bytes, num_requests):
    statuses = set()

    @settings(max_examples=num_requests, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.one_of(parts, plain_parts), max_size=6),
        kinds,
        st.sampled_from([b"", b"--x--\r\n", b"--x\r\n", b"--x"]),
        st.booleans(),
        st.sampled_from(["wild", "with a file", "a good form", "a good form"]),
    )
    def fuzz(items, kind, ending, is_cut, shape):
        with_file = shape != "wild"
        if shape == "a good form":
            items = [item for item in items if item[2] == PLAIN and item[0] not in ("file", "model")]
            kind, ending, is_cut = "multipart/form-data; boundary=x", b"--x--\r\n", False
        items = [*items, ("model", "tiny", PLAIN, "")] if with_file else items
        body = b""
        for name, value, disposition, part_kind in items:
            head = disposition.replace("{name}", name).replace("{value}", str(value)[:30])
            body += b"--x\r\nContent-Disposition: " + as_bytes(head) + b"\r\n"
            body += b"Content-Type: " + as_bytes(part_kind) + b"\r\n" if part_kind else b""
            body += b"\r\n" + as_bytes(value) + b"\r\n"
        if with_file:
            body += b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + talk_bytes + b"\r\n"
        body = (body + ending)[: -7 if is_cut else None]
        answer = server.client.post(
            "/v1/audio/transcriptions", content=body, headers={"Content-Type": kind}, timeout=20
        )
        statuses.add(answer.status_code)
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    fuzz()
    assert {200, 400} <= statuses
    assert server.queue.num_requests == 0
