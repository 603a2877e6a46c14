"""Every scenario of the paid provider, through the official SDK against a loopback server."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from evaluations import run_eval
from fake_assemblyai import FakeAssemblyAI, Reply, error, serving

from pipelines.errors import EvaluationError
from pipelines.evaluate.eval_sets import Clip, Utterance
from pipelines.evaluate.predictions import Prediction, read_predictions, write_predictions
from pipelines.evaluate.providers import assemblyai as module
from pipelines.evaluate.providers.assemblyai import JOBS_FILE, AssemblyAIProvider
from pipelines.evaluate.providers.base import ProviderOptions
from pipelines.evaluate.providers.paid_jobs import Ledger, quote

HTML = b"<html><body>Maintenance</body></html>"
ATTEMPTS = 4


def hear(wav: bytes) -> str:
    """Transcribe a test clip: its length in tenths of a second, so that every answer can be told from the others."""
    samples, rate = soundfile.read(io.BytesIO(wav))
    assert rate == 16_000
    assert samples.ndim == 1
    return f"clip of {round(10 * len(samples) / rate)}"


def clip(tenths: int) -> Clip:
    rng = np.random.default_rng(tenths)
    samples = (0.1 * rng.standard_normal(1_600 * tenths)).astype(np.float32)
    return Clip(utterance=Utterance(utterance_id=f"utt-{tenths}", source_id=""), samples=samples)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAssemblyAI]:
    """The service, and a provider that waits for it in hundredths of a second."""
    monkeypatch.setenv("ASSEMBLYAI_POLLING_INTERVAL", "0.01")
    monkeypatch.setattr("pipelines.retry.MIN_WAIT_S", 0.01)
    monkeypatch.setattr("pipelines.retry.MAX_WAIT_S", 0.05)
    for name, value in {"ATTEMPTS": ATTEMPTS, "MAX_POLL_S": 0.02, "JOB_TIMEOUT_S": 5.0}.items():
        monkeypatch.setattr(module, name, value)
    with serving(FakeAssemblyAI(hear=hear)) as service:
        monkeypatch.setenv("ASSEMBLYAI_BASE_URL", service.url)
        yield service


def provider(folder: Path, key: str = "fake-key", **changes: Any) -> AssemblyAIProvider:
    return AssemblyAIProvider(ProviderOptions(output=folder, api_key=key, **changes))


def answer_one(folder: Path, tenths: int = 10, **changes: Any) -> Prediction:
    [answer] = provider(folder, **changes).transcribe([clip(tenths)])
    return answer


def test_a_queued_job_is_polled_until_it_is_completed(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    answer = answer_one(tmp_path)
    assert (answer.pred_text, answer.error, answer.warnings) == ("clip of 10", None, ())
    assert answer.provider_id in fake.jobs
    assert [endpoint for endpoint, *_ in fake.requests] == ["upload", "create", "poll", "poll", "poll"]


def test_a_job_that_is_completed_at_once_is_polled_once(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    fake.statuses = ["completed"]
    assert answer_one(tmp_path).pred_text == "clip of 10"
    assert [endpoint for endpoint, *_ in fake.requests] == ["upload", "create", "poll"]


def test_requests_have_the_form_that_the_service_expects(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    answer_one(tmp_path, model="universal-2")
    [post] = fake.posts
    assert post == {"audio_url": post["audio_url"], "speech_models": ["universal-2"], "language_code": "en"}
    upload = fake.requests[0][2]
    assert upload["authorization"] == "fake-key"
    assert "content-type" not in upload
    [wav] = fake.uploads.values()
    info = soundfile.info(io.BytesIO(wav))
    assert (info.samplerate, info.channels, info.format, info.subtype) == (16_000, 1, "WAV", "PCM_16")
    assert wav == clip(10).to_wav()


def test_a_job_with_status_error_is_a_failure_with_its_reason(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    fake.statuses = ["processing", "error"]
    answer = answer_one(tmp_path)
    assert (answer.pred_text, answer.error) == (None, "Download error, unable to download the file")


def test_a_clip_under_160_ms_is_the_services_failure(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    answer = answer_one(tmp_path, tenths=1)
    assert (answer.pred_text, answer.error) == (None, "Audio duration is too short.")


@pytest.mark.parametrize("text", ["", None])
def test_a_completed_job_without_text_is_an_empty_answer(
    fake: FakeAssemblyAI, tmp_path: Path, text: str | None
) -> None:
    fake.hear = lambda _: text
    answer = answer_one(tmp_path)
    assert (answer.pred_text, answer.error) == ("", None)


def test_a_wrong_key_stops_the_evaluation(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"refused the key .*check --api-key or ASSEMBLYAI_API_KEY"):
        answer_one(tmp_path, key="wrong")
    assert fake.posts == []


def test_an_empty_account_stops_the_evaluation(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    message = "Your current account balance is negative. Please top up to continue using the API."
    fake.trouble = {"create": [error(400, message)]}
    with pytest.raises(EvaluationError, match=r"balance is negative.*no clip is paid for twice"):
        answer_one(tmp_path)


def test_no_key_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASSEMBLYAI_API_KEY", raising=False)
    with pytest.raises(EvaluationError, match="needs a key; pass --api-key or set ASSEMBLYAI_API_KEY"):
        AssemblyAIProvider(ProviderOptions(output=tmp_path))


def test_a_refused_request_is_a_failure_of_its_clip_alone(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    fake.trouble = {"create": [error(400, "format_text must be a Boolean")]}
    answers = list(provider(tmp_path, concurrency=1).transcribe([clip(10), clip(12)]))
    assert sorted(str(answer.error) for answer in answers) == [
        "HTTP 400: failed to transcribe url " + next(iter(fake.uploads)) + ": format_text must be a Boolean",
        "None",
    ]


@pytest.mark.parametrize("endpoint", ["upload", "create", "poll"])
def test_429_is_waited_out_as_the_server_says(
    fake: FakeAssemblyAI, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.retry.MAX_WAIT_S", 60.0)
    fake.trouble = {endpoint: [error(429, "Too Many Requests", Retry_After="1")]}
    started = time.monotonic()
    assert answer_one(tmp_path).pred_text == "clip of 10"
    assert time.monotonic() - started >= 1.0
    assert len(fake.posts) == 1


@pytest.mark.parametrize("endpoint", ["upload", "create", "poll"])
@pytest.mark.parametrize(
    "replies",
    [
        [error(500, "Server error, developers have been alerted.")] * 2,
        [Reply(503)],
        [Reply(504)],
        [Reply(502, b"<html><body>Bad Gateway</body></html>", {"Content_Type": "text/html"})],
        [Reply(drop="before")],
        [Reply(drop="after")],
        [Reply(200, HTML)],
        [Reply(200, HTML, takes_effect=True)],
        [Reply(200, b"{}")],
    ],
    ids=[
        "500 twice",
        "503 empty",
        "504 empty",
        "502 HTML",
        "dropped before",
        "dropped after",
        "200 HTML",
        "200 HTML after the fact",
        "200 without fields",
    ],
)
def test_passing_trouble_is_survived_and_an_answered_clip_is_never_paid_for_again(
    fake: FakeAssemblyAI, tmp_path: Path, endpoint: str, replies: list[Reply]
) -> None:
    fake.trouble = {endpoint: list(replies)}
    assert answer_one(tmp_path).pred_text == "clip of 10"
    # a job whose id never arrived is not searched for: its clip, still without an answer, gets another
    is_lost = endpoint == "create" and (replies[0].drop == "after" or replies[0].takes_effect)
    assert len(fake.posts) == (2 if is_lost else 1)
    assert answer_one(tmp_path).pred_text == "clip of 10"
    assert len(fake.posts) == (2 if is_lost else 1)


def test_lasting_trouble_is_a_failure_and_not_an_empty_text(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    fake.trouble = {"create": [Reply(502, b"<html>Bad Gateway</html>")] * 10}
    answer = answer_one(tmp_path)
    assert (answer.pred_text, answer.error) == (None, "HTTP 502 with a body that is not JSON")


@pytest.mark.parametrize("endpoint", ["upload", "create", "poll"])
def test_a_page_of_html_that_stays_is_a_failure_of_its_clip_alone(
    fake: FakeAssemblyAI, tmp_path: Path, endpoint: str
) -> None:
    fake.trouble = {endpoint: [Reply(200, HTML)] * ATTEMPTS}
    answers = list(provider(tmp_path, concurrency=1).transcribe([clip(10), clip(12)]))
    assert [answer.pred_text for answer in answers] == [None, "clip of 12"]
    assert answers[0].error == "HTTP 200 with a body that is not the service's JSON"


@pytest.mark.parametrize("status", ["processing", "completed", "error"])
def test_a_creation_may_answer_with_any_status(fake: FakeAssemblyAI, tmp_path: Path, status: str) -> None:
    fake.created_as = status
    assert answer_one(tmp_path).pred_text == "clip of 10"
    assert len(fake.posts) == 1


def test_a_job_that_never_ends_is_given_up_and_can_be_fetched_later(
    fake: FakeAssemblyAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.statuses = ["processing"]
    monkeypatch.setattr(module, "JOB_TIMEOUT_S", 0.1)
    answer = answer_one(tmp_path)
    assert answer.pred_text is None
    assert "is processing after 0.1 s" in str(answer.error)
    fake.statuses = ["completed"]
    assert answer_one(tmp_path).pred_text == "clip of 10"
    assert len(fake.posts) == 1


def test_an_unknown_id_is_a_failure_with_the_services_words(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    Ledger(tmp_path / JOBS_FILE).note("utt-10", "gone")
    answer = answer_one(tmp_path)
    assert "transcript id not found" in str(answer.error)
    assert fake.posts == []


class KilledError(BaseException):
    """Stands for kill -9."""


def test_a_job_whose_id_was_lost_is_submitted_once_more(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    killed = provider(tmp_path)

    def die(*_: object) -> None:
        raise KilledError

    killed.ledger.note = die  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        list(killed.transcribe([clip(10)]))
    for _ in range(2):
        assert answer_one(tmp_path).pred_text == "clip of 10"
        assert len(fake.posts) == 2


def test_a_ledger_of_an_earlier_version_is_read(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    first = answer_one(tmp_path)
    lines = [{"utterance_id": "utt-10", "upload": "https://x", "job_id": job} for job in (None, first.provider_id)]
    (tmp_path / JOBS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert answer_one(tmp_path).provider_id == first.provider_id
    assert len(fake.posts) == 1


def test_a_failed_job_is_submitted_anew_when_tried_again(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    fake.statuses = ["error"]
    assert answer_one(tmp_path).pred_text is None
    fake.statuses = ["completed"]
    assert answer_one(tmp_path).pred_text == "clip of 10"
    assert len(fake.posts) == 2


def test_another_model_than_asked_for_is_warned_about(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    original = fake._transcript

    def swapped(job: dict[str, Any], status: str) -> dict[str, Any]:
        made = original(job, status)
        return {**made, "speech_model_used": "universal-2"} if "speech_model_used" in made else made

    fake._transcript = swapped  # type: ignore[method-assign]
    assert answer_one(tmp_path).warnings == ("other_model:universal-2",)


def test_no_more_jobs_are_in_flight_than_allowed(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    clips = [clip(tenths) for tenths in range(10, 30)]
    answers = list(provider(tmp_path, concurrency=5).transcribe(clips))
    assert {answer.utterance_id: answer.pred_text for answer in answers} == {
        f"utt-{tenths}": f"clip of {tenths}" for tenths in range(10, 30)
    }
    assert fake.most_in_flight <= 5


def test_jobs_beyond_the_services_own_limit_queue_and_finish(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    fake.max_running = 2
    answers = list(provider(tmp_path, concurrency=8).transcribe([clip(tenths) for tenths in range(10, 20)]))
    assert all(answer.error is None for answer in answers)
    assert fake.most_running <= 2


def test_the_price_is_computed_from_dated_list_prices(tmp_path: Path) -> None:
    one = quote("assemblyai", "universal-3-5-pro", [3_600.0] * 24)
    assert str(one) == "24 clips, 24.00 h: about $5.04 (list price of 2026-10-07)"
    assert quote("assemblyai", "universal-9", [60.0]).usd is None
    Ledger(tmp_path / JOBS_FILE).note("utt-10", "known")
    assert provider(tmp_path).quote([("utt-10", 1.0), ("utt-11", 1.1)]).clips == 1


def test_an_unknown_speech_model_is_refused_before_anything_is_sent(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no speech model 'runs/latest'; expected one of universal-3-5-pro, univ"):
        provider(tmp_path, model="runs/latest")
    assert provider(tmp_path, model="universal-3-pro").quote([("a", 60.0)]).usd is None
    assert fake.requests == []


def test_what_another_process_has_paid_meanwhile_is_not_paid_again(fake: FakeAssemblyAI, tmp_path: Path) -> None:
    first, second = provider(tmp_path), provider(tmp_path)
    list(first.transcribe([clip(10)]))
    assert second.quote([("utt-10", 1.0)]).clips == 0
    [answer] = second.transcribe([clip(10)])
    assert (answer.pred_text, len(fake.posts)) == ("clip of 10", 1)


def test_a_ledger_torn_by_a_kill_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    Ledger(tmp_path / "jobs").note("a", "1")
    with (tmp_path / "jobs").open("a") as stream:
        stream.write('{"utterance_id": "b", "job')
    ledger = Ledger(tmp_path / "jobs")
    ledger.read()
    assert (ledger.job_id("a"), ledger.job_id("b")) == ("1", None)
    ledger.note("c", "3")
    again = Ledger(tmp_path / "jobs")
    again.read()
    assert (again.job_id("a"), again.job_id("c")) == ("1", "3")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Sixteen clips of 1.0 to 2.5 s; each one's text is what `hear` makes of it."""
    split = tmp_path / "corpus" / "test"
    split.mkdir(parents=True)
    rows = ["file_name,text"]
    for tenths in range(10, 26):
        soundfile.write(split / f"{tenths}.wav", clip(tenths).samples, 16_000)
        rows.append(f"{tenths}.wav,clip of {tenths}")
    (split / "metadata.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "corpus"


def command_line(corpus: Path, *options: str) -> list[str]:
    start = [sys.executable, "-m", "tinyaudio", "eval", "--provider", "assemblyai", "--corpus", str(corpus)]
    return [*start, "--split", "test", *options]


def environment() -> dict[str, str]:
    settings = {"ASSEMBLYAI_API_KEY": "fake-key", "ASSEMBLYAI_POLLING_INTERVAL": "0.05", "PYTHONPATH": str(Path.cwd())}
    return os.environ | settings


def test_a_clip_that_has_a_job_is_never_paid_for_again_however_often_the_evaluation_is_killed(
    fake: FakeAssemblyAI, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = command_line(corpus, "--output", str(tmp_path / "out"), "--yes", "--json")
    fake.statuses = ["processing"] * 4 + ["completed"]
    monkeypatch.setenv("ASSEMBLYAI_API_KEY", "fake-key")
    kills = []
    for num_posts in (6, 12):  # 5 are in flight, so the id of at least one is noted
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 240
        while len(fake.posts) < num_posts and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        ledger = Ledger(tmp_path / "out" / JOBS_FILE)
        ledger.read()
        known = {f"clip of {n}" for n in range(10, 26) if ledger.job_id(f"test/{n}.wav")}
        kills.append((len(fake.posts), known))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert '"utterances": 16' in done.stdout.splitlines()[-1]
    assert '"failed": 0' in done.stdout.splitlines()[-1]
    clips = [hear(fake.uploads[post["audio_url"]]) for post in fake.posts]
    assert set(clips) == {f"clip of {n}" for n in range(10, 26)}
    for num_posts, known in kills:
        assert known, "killed before anything was paid for"
        assert known.isdisjoint(clips[num_posts:])
    assert len(clips) <= 16 + 5 * len(kills), "at most what was in flight at each kill"
    again = run_eval(*command[4:])
    assert (again.exit_code, len(fake.posts)) == (0, len(clips))


@pytest.mark.parametrize(("typed", "code", "paid"), [("n", 1, 0), ("y", 0, 16)])
def test_a_user_at_a_terminal_is_asked_before_anything_is_sent(
    fake: FakeAssemblyAI, corpus: Path, tmp_path: Path, typed: str, code: int, paid: int
) -> None:
    fake.statuses = ["completed"]
    ours, theirs = pty.openpty()
    command = command_line(corpus, "--output", str(tmp_path / "out"))
    process = subprocess.Popen(command, env=environment(), stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.write(ours, f"{typed}\n".encode())
    _, told = process.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == code, told
    assert b"16 clips, 0.01 h: about $0.00" in told
    assert b"Pay for this?" in told
    assert len(fake.posts) == paid
    assert bool(fake.uploads) == bool(paid)


def test_a_run_names_what_to_score_and_fetching_paid_answers_asks_nothing(
    fake: FakeAssemblyAI, corpus: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSEMBLYAI_API_KEY", "fake-key")
    monkeypatch.setenv("ASSEMBLYAI_POLLING_INTERVAL", "0.05")
    fake.statuses = ["completed"]
    command = [str(checkpoint), "--provider", "assemblyai", "--corpus", str(corpus)]
    first = run_eval(*command, "--yes")
    assert first.exit_code == 0, first.output
    assert {model for post in fake.posts for model in post["speech_models"]} == {"universal-3-5-pro"}
    folder = checkpoint / "eval" / "corpus-test-assemblyai"
    lost = [replace(one, pred_text=None, error="late") for one in read_predictions(folder / "predictions.jsonl")]
    write_predictions(folder / "predictions.jsonl", lost)
    again = run_eval(*command, "--retry-failed")
    assert again.exit_code == 0, again.output
    assert "0 clips, 0.00 h" in again.output
    assert len(fake.posts) == 16
