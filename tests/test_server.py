"""The server: OpenAI's own client, errors in its shape, keys, limits, bad clients, an orderly end."""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pysubs2
import pytest
from audio_files import with_av, with_soundfile
from conftest import with_pauses
from servers import running
from typer.testing import CliRunner

from tinyaudio.cli.app import app as cli
from tinyaudio.cli.serve import serve as serve_command
from tinyaudio.model.errors import MissingModelError, ModelError
from tinyaudio.model.recognize import Options
from tinyaudio.request_queue import RequestQueue
from tinyaudio.server import Limits, bind, build_app, is_loopback, public_name, serve
from tinyaudio.subtitles import Layout, to_srt, to_vtt
from tinyaudio.transcribe import Transcriber

FEW = {"max_new_tokens": 6, "num_beams": 1}
KEY = "correct-horse"


@pytest.fixture
def server(transcriber):
    with running(transcriber, options=Options(**FEW)) as server:
        yield server


@pytest.fixture
def three(spoken):
    """Three sentences with pauses, as a WAV file's bytes."""
    return with_soundfile(with_pauses(samples for samples, _ in spoken[:3]))


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0)


def test_the_official_client_gets_the_command_lines_text_in_every_format(client, transcriber, three):
    (expected,) = transcriber.transcribe([three], **FEW)
    assert len(expected.segments) == 3

    def create(**options):
        return client.audio.transcriptions.create(file=("talk.wav", three), model="whisper-1", **options)

    assert create().text == expected.text
    assert create(response_format="json", language="en", temperature=0).text == expected.text
    assert create(response_format="text") == expected.text + "\n"
    assert create(response_format="srt") == to_srt(expected, Layout())
    assert create(response_format="vtt") == to_vtt(expected, Layout())
    assert len(pysubs2.SSAFile.from_string(create(response_format="srt"), format_="srt")) >= 1
    verbose = create(response_format="verbose_json", timestamp_granularities=["segment"])
    assert (verbose.text, verbose.duration) == (expected.text, pytest.approx(expected.duration_s, abs=0.001))
    assert [(s.id, s.text) for s in verbose.segments] == [(s.id, s.text) for s in expected.segments]
    assert [s.start for s in verbose.segments] == pytest.approx([s.start for s in expected.segments], abs=0.001)


def test_the_official_client_streams_a_delta_for_each_segment(client, transcriber, three):
    (expected,) = transcriber.transcribe([three], **FEW)
    events = list(client.audio.transcriptions.create(file=("talk.wav", three), model="whisper-1", stream=True))
    *deltas, done = events
    assert [event.type for event in events] == ["transcript.text.delta"] * 3 + ["transcript.text.done"]
    assert "".join(event.delta for event in deltas) == done.text == expected.text


def test_the_official_client_chooses_an_audio_track(client, spoken):
    tracks = [np.repeat(samples, 3) for samples, _ in spoken[:2]]
    film = with_av("matroska", "flac", *tracks, rate=48_000)

    def create(**extra):
        return client.audio.transcriptions.create(
            file=("film.mkv", film), model="whisper-1", response_format="verbose_json", extra_body=extra
        )

    assert create(track=2).duration == pytest.approx(len(tracks[1]) / 48_000, abs=0.01)
    assert create(track=1).duration == create().duration == pytest.approx(len(tracks[0]) / 48_000, abs=0.01)
    with pytest.raises(openai.BadRequestError, match="has 2 audio tracks"):
        create(track=3)
    with pytest.raises(openai.BadRequestError, match="track"):
        create(track=0)


def test_the_official_client_lists_the_model(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("whisper-1").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_the_official_client_sees_errors_as_its_own(client, three):
    with pytest.raises(openai.BadRequestError, match="not readable as audio") as raised:
        client.audio.transcriptions.create(file=("talk.wav", b"only words\n" * 100), model="whisper-1")
    assert (raised.value.code, raised.value.param, raised.value.type) == (
        "invalid_audio",
        "file",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
        client.audio.transcriptions.create(file=("talk.wav", three), model="other-model")
    with pytest.raises(openai.BadRequestError, match="English only"):
        client.audio.transcriptions.create(file=("talk.wav", three), model="tiny", language="de")
    with pytest.raises(openai.BadRequestError, match="not readable"):
        client.audio.transcriptions.create(file=("a.wav", b"words\n" * 100), model="whisper-1", stream=True)


def test_a_prompt_is_accepted_and_said_to_be_unused(server, three):
    answer = server.post(three, prompt="names: Oliver")
    assert answer.status_code == 200
    assert answer.headers["x-tinyaudio-ignored"] == "prompt"
    assert "x-tinyaudio-ignored" not in server.post(three).headers


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"language": "fr"}, 400, "language"),
        ({"temperature": "0.7"}, 400, "temperature"),
        ({"temperature": "warm"}, 400, "temperature"),
        ({"temperature": "nan"}, 400, "temperature"),
        ({"response_format": "xml"}, 400, "response_format"),
        ({"stream": "perhaps"}, 400, "stream"),
        ({"stream": "true", "response_format": "srt"}, 400, "response_format"),
        ({"timestamp_granularities": "segment"}, 400, "timestamp_granularities[]"),
        ({"timestamp_granularities": "letter", "response_format": "verbose_json"}, 400, "timestamp_granularities[]"),
        ({"vad_filter": "true"}, 400, "vad_filter"),
        ({"model": "gpt-5"}, 404, "model"),
        ({"model": ""}, 404, "model"),
        ({"prompt": "x" * 70_000}, 400, None),
    ],
)
def test_a_bad_parameter_is_named(server, three, fields, status, param):
    answer = server.post(three, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_word_times_are_refused_where_the_encoder_has_no_head(server, three):
    answer = server.post(three, response_format="verbose_json", timestamp_granularities="word")
    assert answer.status_code == 400
    assert "word times" in answer.json()["error"]["message"]


def test_word_times_are_those_of_the_command_line(transcriber, with_head, three):
    (expected,) = transcriber.transcribe([three], word_timestamps=True, **FEW)
    with running(transcriber, options=Options(**FEW)) as server:
        words = server.post(three, response_format="verbose_json", timestamp_granularities="word").json()["words"]
        verbose = server.post(three, response_format="verbose_json").json()
        assert "words" not in verbose
    said = [word for segment in expected.segments for word in segment.words]
    assert [word["word"] for word in words] == [word.word for word in said] != []
    assert [word["start"] for word in words] == pytest.approx([word.start for word in said], abs=0.001)
    for name in ("avg_logprob", "no_speech_prob"):
        scores = [getattr(segment, name) for segment in expected.segments]
        assert [segment[name] for segment in verbose["segments"]] == pytest.approx(scores, abs=1e-3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"RIFF", "not readable"),
        (b"#EXTM3U\n#EXTINF:10,\nhttp://192.0.2.1/secret.wav\n#EXT-X-ENDLIST\n", "not readable"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not readable"),
        (b"cos\nsystem\n(S'touch /tmp/x'\ntR.", "not readable"),
        (with_soundfile(np.zeros(0)), "no samples"),
        (with_soundfile(np.zeros(16_000), format="FLAC")[:60], "file"),
    ],
    ids=["empty", "head", "playlist", "concat", "pickle", "no samples", "truncated"],
)
def test_a_bad_recording_is_400_without_a_path_of_the_server(server, content, reason):
    answer = server.post(content)
    assert answer.status_code == 400, answer.text
    assert reason in answer.json()["error"]["message"]
    assert "/tmp" not in answer.text
    assert "Spooled" not in answer.text


def test_a_file_name_is_never_a_path(server, three, tmp_path):
    for name in (str(tmp_path / "x.wav"), "../../../etc/passwd", "a\x00b", "http://192.0.2.1/x.wav", "x" * 500, "."):
        answer = server.post(three, name=name)
        assert answer.status_code == 200, (name, answer.text)
    assert list(tmp_path.iterdir()) == []


def test_a_body_that_is_no_form_is_400(server):
    url = "/v1/audio/transcriptions"
    for content, kind in [
        (b"{}", "application/json"),
        (b"model=x&file=y", "application/x-www-form-urlencoded"),
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x"),
        (b"nonsense", "multipart/form-data; boundary=x"),
        (b"nonsense", "multipart/form-data"),
        (b"", "multipart/form-data; boundary="),
    ]:
        answer = server.client.post(url, content=content, headers={"Content-Type": kind})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), (kind, answer)
    assert server.client.post(url).status_code == 400
    assert server.client.get(url).status_code == 405
    assert server.client.get("/v1/nothing").status_code == 404


def test_too_many_parts_are_400(server, three):
    many = [(f"f{i}", (None, "x")) for i in range(100)]
    answer = server.client.post("/v1/audio/transcriptions", files=many)
    assert answer.status_code == 400
    two = [("file", ("a.wav", three)), ("file", ("b.wav", three))]
    assert server.client.post("/v1/audio/transcriptions", files=two, data={"model": "tiny"}).status_code == 400


def test_too_large_a_body_is_413_before_it_is_read(transcriber, three, monkeypatch):
    monkeypatch.setattr("tinyaudio.server.DRAIN_S", 0.3)
    with running(transcriber, limits=Limits(max_upload_bytes=len(three) // 2)) as server:
        answer = server.post(three)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        head = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n"
        begun = time.monotonic()
        assert b" 413 " in server.raw(head)
        assert time.monotonic() - begun < 8
        part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        chunk = b"%x\r\n" % len(part) + part + b"\r\n" + (b"10000\r\n" + bytes(65_536) + b"\r\n") * 8
        kind = b"Content-Type: multipart/form-data; boundary=x\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert b" 413 " in server.raw(head.replace(b"Content-Length: 9999999999\r\n\r\n", kind) + chunk)


def test_too_long_a_recording_is_413_whatever_its_size(transcriber):
    hours = with_soundfile(np.zeros(16_000 * 1200, np.int16), format="FLAC")
    assert len(hours) < 1 << 20
    with running(transcriber, max_duration_s=60) as server:
        answer = server.post(hours)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "audio_too_long")


def test_a_slow_sender_is_408(transcriber):
    with running(transcriber, limits=Limits(body_grace_s=0.5)) as server:
        head = (
            b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
        assert b" 408 " in server.raw(head)
        assert server.queue.num_requests == 0


def test_a_full_queue_is_429_and_says_when_to_try_again(transcriber, three):
    with running(transcriber, options=Options(**FEW), max_requests=1) as server:
        ticket = server.queue.enter()
        answer = server.post(three)
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(answer.headers["retry-after"]) >= 1
        ticket.leave()
        assert server.post(three).status_code == 200


def test_a_client_that_goes_away_frees_its_place(transcriber, three):
    decode = transcriber.recognizer.decode

    def slow(pieces, options):
        time.sleep(0.3)
        return decode(pieces, options)

    transcriber.recognizer.decode = slow
    with running(transcriber, options=Options(batch_size=1, **FEW)) as server:
        for fields in ({}, {"stream": "true"}):
            request = server.client.build_request(
                "POST",
                "/v1/audio/transcriptions",
                files={"file": ("a.wav", three * 1)},
                data={"model": "tiny", **fields},
            )
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                head = f"POST {request.url.path} HTTP/1.1\r\nHost: localhost\r\n".encode()
                for name in ("content-type", "content-length"):
                    head += f"{name}: {request.headers[name]}\r\n".encode()
                connection.sendall(head + b"\r\n" + request.read())
                until = time.monotonic() + 10
                while server.queue.num_requests == 0:
                    assert time.monotonic() < until
                    time.sleep(0.01)
            until = time.monotonic() + 2
            while server.queue.num_requests:
                assert time.monotonic() < until, "the place is still taken"
                time.sleep(0.01)


def test_nothing_is_answered_without_the_key_but_the_probes(transcriber, three):
    with running(transcriber, options=Options(**FEW), api_key=KEY) as server:
        assert server.post(three).status_code == 200
        basic = base64.b64encode(f"anybody:{KEY}".encode()).decode()
        for path in ("/v1/models", "/metrics", "/docs", "/openapi.json"):
            assert server.client.get(path).status_code == 200
            assert server.client.get(path, headers={"Authorization": f"Basic {basic}"}).status_code == 200
            keys = f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY
            for wrong in ("", "Bearer", "Basic ====", *keys):
                answer = server.client.get(path, headers={"Authorization": wrong})
                assert answer.status_code == 401, (path, wrong)
                assert KEY not in answer.text
        assert server.client.get("/", headers={"Authorization": ""}).headers["www-authenticate"].startswith("Basic")
        assert server.client.get("/health", headers={"Authorization": ""}).status_code == 200
        wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.audio.transcriptions.create(file=("a.wav", three), model="tiny")
        assert server.client.get("/metrics", headers={"Host": "a.name.elsewhere"}).status_code == 200


def test_without_a_key_other_hosts_and_pages_of_other_sites_are_refused(server, three):
    assert server.client.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200
    assert server.client.get("/v1/models", headers={"Host": "[::1]:8000"}).status_code == 200
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        assert server.client.get("/v1/models", headers={"Host": host}).status_code == 403, host
    answer = server.client.post(
        "/v1/audio/transcriptions", files={"file": ("a.wav", three)}, headers={"Origin": "https://evil.example"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_origin")
    assert server.client.get("/v1/models", headers={"Origin": server.url}).status_code == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.org", False),
    ],
)
def test_loopback_is_this_machine_only(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "Set $TINYAUDIO_API_KEY or --api-key"),
        (["--api-key", ""], "is empty"),
        (["--api-key", "\u00e9t\u00e9"], "printable ASCII"),
    ],
)
def test_the_command_refuses_a_host_without_a_key_and_a_bad_key(arguments, words, monkeypatch):
    monkeypatch.delenv("TINYAUDIO_API_KEY", raising=False)
    done = CliRunner().invoke(cli, ["serve", "--no-page", "-m", "/nonexistent", *arguments])
    assert done.exit_code == 2
    assert words in done.stderr


def test_metrics_count_answers_audio_and_batches(server, three):
    server.post(three)
    server.post(b"")
    text = server.client.get("/metrics").text
    values = dict(re.findall(r"^(tinyaudio_\S+) (\S+)$", text, re.MULTILINE))
    path = 'path="/v1/audio/transcriptions"'
    assert float(values[f'tinyaudio_requests_total{{{path},status="200"}}']) == 1
    assert float(values[f'tinyaudio_requests_total{{{path},status="400"}}']) == 1
    assert 4 < float(values["tinyaudio_audio_seconds_total"]) < 12
    assert float(values["tinyaudio_batch_size_sum"]) == 3
    assert float(values["tinyaudio_rtfx"]) > 0
    assert float(values["tinyaudio_queue_depth"]) == 0
    assert float(values["tinyaudio_request_seconds_count"]) == 1


def test_the_docs_describe_the_form(server):
    described = server.client.get("/openapi.json").json()["paths"]["/v1/audio/transcriptions"]["post"]
    schema = described["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"file", "model", "response_format", "timestamp_granularities[]", "stream"} <= set(schema["properties"])
    assert "429" in described["responses"]
    assert server.client.get("/docs").status_code == 200


def test_a_folders_name_is_shown_without_its_path(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "latest").symlink_to("mine")
    assert public_name(str(tmp_path / "latest")) == "mine"
    assert public_name("owner/model") == "owner/model"


def test_beams_and_drafts_reach_the_queue_and_are_checked_when_the_model_is_loaded(checkpoint, monkeypatch, capsys):
    given = []

    class Queue:
        def __init__(self, load, options, max_requests):
            given.append((load, options))
            raise KeyboardInterrupt

    monkeypatch.setattr("tinyaudio.request_queue.RequestQueue", Queue)
    monkeypatch.setattr("tinyaudio.server.bind", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        serve_command(model=str(checkpoint), num_beams=1, draft="encoder", device="cpu", batch_size=3, no_page=True)
    ((load, options),) = given
    assert options == Options(num_beams=1, draft="encoder", batch_size=3)
    with pytest.raises(ModelError, match="expected an encoder with a CTC head"):
        load()
    with pytest.raises(SystemExit):
        serve_command(model=str(checkpoint), num_beams=4, draft="encoder", no_page=True)
    assert "expected --num-beams 1, found 4" in capsys.readouterr().err


@pytest.fixture
def started(model, checkpoint):
    """Start the command on a free port; yields a function that returns the process and its address."""
    model.generation_config.update(num_beams=1, max_new_tokens=6)
    model.generation_config.save_pretrained(checkpoint)
    processes = []

    def start(*arguments):
        command = [sys.executable, "-m", "tinyaudio", "serve", "--no-page", "--port", "0", "-m", str(checkpoint)]
        process = subprocess.Popen(
            [*command, *arguments], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
        )
        processes.append(process)
        return process, re.search(r"http://\S+?(?=/ )", process.stderr.readline())[0]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


def wait_ready(url):
    until = time.monotonic() + 120
    while httpx.get(f"{url}/ready").status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_sigterm_finishes_what_runs_refuses_what_is_new_and_exits_0(started, spoken):
    process, url = started("--batch-size", "1")
    assert httpx.get(f"{url}/health").status_code == 200
    wait_ready(url)
    long = with_soundfile(with_pauses((samples for samples, _ in spoken[:10]), 2.25))
    answers = []

    def ask(content=long):
        files = {"file": ("a", content)}
        return httpx.post(f"{url}/v1/audio/transcriptions", files=files, data={"model": "whisper-1"}, timeout=120)

    threads = [threading.Thread(target=lambda: answers.append(ask())) for _ in range(3)]
    for thread in threads:
        thread.start()
    while "tinyaudio_queue_depth 3.0" not in httpx.get(f"{url}/metrics").text:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    statuses = []
    with contextlib.suppress(httpx.TransportError):  # it has ended
        while True:
            statuses += [httpx.get(f"{url}/ready").status_code, ask(b"x").status_code]
            time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.text for answer in answers}) == 1
    assert 503 in statuses
    assert process.wait(30) == 0
    assert process.stderr.read() == ""


def test_ctrl_c_ends_with_130_and_sigterm_with_0(monkeypatch, checkpoint):
    for number, code in [(signal.SIGINT, 130), (signal.SIGTERM, 0)]:
        monkeypatch.setattr("tinyaudio.server.serve", lambda app, queue, listener, n=number: (queue.stop(), n)[1])
        assert CliRunner().invoke(cli, ["serve", "--no-page", "-m", str(checkpoint), "--port", "0"]).exit_code == code


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error():
    def fail():
        raise MissingModelError("no such model")

    queue = RequestQueue(fail)
    with pytest.raises(MissingModelError, match="no such model"):
        serve(build_app(queue, "tiny"), queue, bind("127.0.0.1", 0))


def test_a_taken_port_is_one_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["serve", "--no-page", "-m", "any", "--port", str(taken.getsockname()[1])]
        done = CliRunner().invoke(cli, arguments)
    assert re.fullmatch(r"port \d+ of 127\.0\.0\.1 is in use.*--port.*", str(done.exception))


def test_the_answers_are_json_that_names_no_model_folder(server, three):
    text = server.post(three, response_format="verbose_json").text
    assert "warnings" in json.loads(text)
    assert "source" not in json.loads(text)


@pytest.mark.slow
def test_the_demos_test_set_gets_the_command_lines_texts_from_the_official_client():
    """On the demo's trained run, $TINYAUDIO_TRAINED or runs/demo, by eight clients at a time."""
    from concurrent.futures import ThreadPoolExecutor

    import pyarrow.parquet

    root = Path(__file__).parent.parent
    run = Path(os.environ.get("TINYAUDIO_TRAINED", root / "runs" / "demo"))
    if not (run / "config.json").is_file():
        pytest.skip(f"needs a trained run, and {str(run)!r} holds none; `make demo` makes it")
    (path,) = (root / "pipelines/demo/corpus").glob("test-0*.parquet")
    files = [row["wav"]["bytes"] for row in pyarrow.parquet.read_table(path).to_pylist()]
    transcriber = Transcriber.load(run, device="cpu")
    expected = [transcript.text for transcript in transcriber.transcribe(files)]
    with running(transcriber) as server, ThreadPoolExecutor(8) as clients:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0)

        def text(file):
            return client.audio.transcriptions.create(file=("talk", file), model="whisper-1").text

        assert list(clients.map(text, files)) == expected
    print(f"{len(files)} utterances, every text equal")
