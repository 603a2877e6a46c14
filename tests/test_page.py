"""The page: its answers to good, broken and silent recordings; in a browser, a file is transcribed."""

import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import with_pauses
from servers import running

from tinyaudio.model.errors import TinyAudioError
from tinyaudio.page import _uploads_only, build_page, follow_recording, mount_page
from tinyaudio.request_queue import RequestQueue

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SPACE = Path(__file__).parent.parent / "pipelines" / "space"


@pytest.fixture
def transcriber(transcriber):
    transcriber.model.generation_config.update(num_beams=1, max_new_tokens=6)
    return transcriber


@pytest.fixture
def queue(transcriber):
    queue = RequestQueue(lambda: transcriber)
    queue.wait_until_ready()
    yield queue
    queue.stop()


def last(queue, path):
    """What the page shows in the end."""
    *_, answer = follow_recording(queue, None if path is None else str(path))
    return answer


@pytest.fixture
def files(tmp_path, spoken):
    soundfile.write(tmp_path / "talk.wav", spoken[0][0], 16_000, subtype="FLOAT")
    three = with_pauses(samples for samples, _ in spoken[:3])
    soundfile.write(tmp_path / "three.wav", three, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "silence.wav", np.zeros(48_000), 16_000)
    (tmp_path / "broken.wav").write_text("no sound here, only words\n" * 20)
    return tmp_path


def test_recording_gives_text_segments_and_warnings_in_words(queue, files, spoken):
    answer = last(queue, files / "talk.wav")
    assert answer.text
    ((start, end, text),) = answer.rows
    assert answer.words == [], "this encoder has no CTC head"
    assert (start, text) == (answer.rows[0][0], answer.text)
    assert end == pytest.approx(len(spoken[0][0]) / 16_000, abs=0.15)
    assert "token budget" in answer.notes, "the random model never ends by itself"


def test_words_are_shown_with_their_doubts(transcriber, queue, files, with_head):
    answer = last(queue, files / "three.wav")
    (expected,) = transcriber.transcribe([files / "three.wav"], word_timestamps=True)
    said = [word for segment in expected.segments for word in segment.words]
    assert [word for word, _ in answer.words] == [word.word for word in said] == answer.text.split() != []
    assert answer.starts == pytest.approx([word.start for word in said], abs=0.01)
    marks = {word: mark for (_, mark), word in zip(answer.words, said, strict=True)}
    assert all((mark == "unheard") == word.is_unheard for word, mark in marks.items())
    assert all((mark is None) == (word.probability >= 0.5 and not word.is_unheard) for word, mark in marks.items())
    assert "probability" in answer.files["json"]


def test_downloads_are_the_command_lines_formats_without_the_servers_folders(queue, files):
    saved = last(queue, files / "three.wav").files
    assert saved["name"] == "three"
    assert saved["srt"].startswith("1\n00:00:0")
    assert saved["vtt"].startswith("WEBVTT\n")
    assert len(saved["txt"].splitlines()) == 3
    assert json.loads(saved["json"])["source"] == "three.wav"
    assert str(files) not in "".join(saved.values())


def test_silence_is_explained(queue, files):
    answer = last(queue, files / "silence.wav")
    assert (answer.text, answer.rows) == ("", [])
    assert "no speech was found" in answer.notes


def test_broken_file_is_explained_without_the_servers_folders(queue, files):
    answer = last(queue, files / "broken.wav")
    assert (answer.text, answer.rows, answer.files) == ("", [], None)
    assert "could not be read" in answer.notes
    assert "'broken.wav'" in answer.notes
    assert str(files) not in answer.notes


def test_no_recording_asks_for_one(queue):
    assert "Record something" in last(queue, None).notes


def test_a_full_queue_is_explained(transcriber, files):
    queue = RequestQueue(lambda: transcriber, max_requests=1)
    queue.wait_until_ready()
    ticket = queue.enter()
    assert "Not now" in last(queue, files / "talk.wav").notes
    ticket.leave()
    queue.stop()


def test_page_without_gradio_names_the_extra_to_install(queue, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(TinyAudioError, match=r"tinyaudio\[serve\]"):
        build_page(queue, "tiny")


def test_command_asks_for_gradio_before_it_loads_a_model(monkeypatch):
    """A missing extra is found before gigabytes are loaded (here: a missing model would be reported first)."""
    from typer.testing import CliRunner

    from tinyaudio.cli import serve
    from tinyaudio.cli.app import app

    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "gradio" else name)
    done = CliRunner().invoke(app, ["serve", "-m", "/nonexistent/model"])
    assert "tinyaudio[serve]" in str(done.exception)
    assert "--no-page" in str(done.exception)


def test_stopped_transcription_does_no_more_work(queue, transcriber, files):
    batches = []
    decode = transcriber.recognizer.decode

    def slow(pieces, options):
        batches.append(len(pieces))
        time.sleep(0.3)
        return decode(pieces, options)

    transcriber.recognizer.decode = slow
    spoken, rate = soundfile.read(files / "talk.wav", dtype="float32")
    soundfile.write(files / "long.wav", np.tile(with_pauses([spoken]), 100), rate)
    answers = follow_recording(queue, str(files / "long.wav"))
    while not next(answers).rows:
        pass
    answers.close()
    assert queue.num_requests == 0
    begun = len(batches)
    time.sleep(1.0)
    assert len(batches) <= begun + 1
    queue.stop()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tinyaudio-")]


def test_space_folder_has_what_a_space_needs():
    header = (SPACE / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in header
    assert "app_file: app.py" in header
    assert (SPACE / "app.py").exists()
    assert "tinyaudio" in (SPACE / "requirements.txt").read_text()


def test_command_and_space_offer_the_same_examples():
    from tinyaudio.cli.serve import example_recordings

    assert [path.name for path in example_recordings()] == [
        "five-sentences.opus",
        "one-sentence.opus",
        "voice-never-heard.opus",
    ]
    assert all(path.parent == SPACE / "examples" for path in example_recordings())


@pytest.fixture
def server(transcriber, files):
    """The server with its page."""
    pytest.importorskip("gradio", reason="needs the extra serve")
    with running(
        transcriber, mount_page=lambda app, queue: mount_page(app, queue, "tiny", [files / "talk.wav"])
    ) as server:
        yield server


def test_page_and_api_are_one_server(server, files):
    page = server.client.get("/")
    assert page.status_code == 200
    assert '"title":"tinyaudio"' in page.text.replace('": "', '":"')
    assert server.post((files / "talk.wav").read_bytes()).status_code == 200
    assert server.client.get("/docs").status_code == 200


@pytest.mark.parametrize("path", ["http://192.0.2.1/talk.wav", "/etc/hostname", "file:///etc/hostname"])
def test_page_opens_no_link_and_no_file_of_the_server(server, path):
    data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
    begun = server.client.post("/gradio_api/call/transcribe", json=data)
    if begun.status_code == 200:
        events = server.client.get(f"/gradio_api/call/transcribe/{begun.json()['event_id']}")
        assert "event: error" in events.text
    assert server.client.get(f"/gradio_api/file={path}").status_code in (403, 404)
    assert server.queue.num_requests == 0


def test_a_link_is_refused_before_anything_is_fetched(tmp_path):
    import asyncio

    taken = []

    async def move(path):
        taken.append(path)

    only = _uploads_only(move, tmp_path / "uploads", [tmp_path / "example.wav"])
    for path in ("https://example.org/a.wav", "/etc/hostname", tmp_path / "uploads/../secret.wav"):
        with pytest.raises(ValueError, match="uploaded recording"):
            asyncio.run(only(path))
    asyncio.run(only(str(tmp_path / "uploads/a.wav")))
    asyncio.run(only(tmp_path / "example.wav"))
    assert len(taken) == 2


@pytest.fixture
def tab(server):
    """The page in a browser, in which every request to another host fails the test."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs the Debian package chromium")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        tab = browser.new_page(viewport={"width": 1100, "height": 1000})
        tab.set_default_timeout(120_000)
        elsewhere = []
        tab.on("request", lambda request: request.url.startswith("http") and elsewhere.append(request.url))
        tab.goto(server.url)
        yield tab
        browser.close()
    assert not [url for url in elsewhere if not url.startswith(server.url)]


def put_in(tab, path, answer):
    """Upload a file, press the button, and wait for words in the notes."""
    tab.reload()
    tab.locator("#recording input[type=file]").first.set_input_files(str(path))
    tab.locator("#recording audio, #recording [class*=waveform]").first.wait_for(state="attached")
    tab.wait_for_timeout(1500)
    tab.locator("#go").click()
    tab.locator("#notes", has_text=answer).wait_for()
    tab.wait_for_timeout(1000)


@pytest.mark.slow
def test_in_a_browser_a_file_is_transcribed(tab, server, files):
    put_in(tab, files / "talk.wav", "s of audio")
    tab.locator("#save-srt").wait_for()
    text = last(server.queue, files / "talk.wav").text
    assert tab.locator("#transcript textarea").input_value() == text
    with tab.expect_download() as download:
        tab.locator("#save-srt").click()
    assert download.value.suggested_filename == "talk.srt"
    assert text.split()[0] in Path(download.value.path()).read_text()
    put_in(tab, files / "silence.wav", "no speech")
    assert tab.locator("#transcript textarea").input_value() == ""
    put_in(tab, files / "broken.wav", "could not be read")
    assert str(files) not in tab.locator("#notes").inner_text()


@pytest.mark.slow
def test_in_a_browser_a_click_on_a_segment_plays_from_there(tab, server, files):
    put_in(tab, files / "three.wav", "s of audio")
    starts = [row[0] for row in last(server.queue, files / "three.wav").rows]
    assert len(starts) == 3
    tab.locator("#segments").get_by_text(f"{starts[2]:g}", exact=True).last.click()
    roots = "[...document.querySelectorAll('#recording *')].map(e => e.shadowRoot).filter(root => root)"
    player = f"{roots}.flatMap(root => [...root.querySelectorAll('audio')])[0]"
    tab.wait_for_function(f"{player}.currentTime > {starts[2]}")
    assert tab.evaluate(f"!{player}.paused || {player}.ended")


@pytest.mark.slow
def test_in_a_browser_a_click_on_a_word_plays_from_there(tab, server, with_head, files):
    put_in(tab, files / "three.wav", "s of audio")
    answer = last(server.queue, files / "three.wav")
    tab.locator("#words").get_by_text(answer.words[-1][0], exact=True).last.click()
    roots = "[...document.querySelectorAll('#recording *')].map(e => e.shadowRoot).filter(root => root)"
    player = f"{roots}.flatMap(root => [...root.querySelectorAll('audio')])[0]"
    tab.wait_for_function(f"{player}.currentTime > {answer.starts[-1]}")


@pytest.mark.slow
def test_page_fits_a_phone(tab, files):
    tab.set_viewport_size({"width": 390, "height": 844})
    put_in(tab, files / "three.wav", "s of audio")
    tab.wait_for_timeout(2000)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("#go", "#stop", "#save-srt", "#save-json", "#transcript", "#segments"):
        box = tab.locator(name).bounding_box()
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= 390, name
