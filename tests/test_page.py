"""The page: its answers to good, broken and silent recordings; in a browser, a file is transcribed."""

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tinyaudio.model.errors import TinyAudioError
from tinyaudio.page import build_page, describe_recording, follow_recording, open_page
from tinyaudio.transcribe import Transcriber

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SPACE = Path(__file__).parent.parent / "pipelines" / "space"


@pytest.fixture
def transcriber(model, processor):
    model.config.window_s = 4.0
    model.generation_config.update(num_beams=1, max_new_tokens=6)
    return Transcriber(model, processor, name="tiny")


@pytest.fixture
def files(tmp_path, spoken):
    soundfile.write(tmp_path / "talk.wav", spoken[0][0], 16_000, subtype="FLOAT")
    parts = [part for samples, _ in spoken[:3] for part in (samples, np.zeros(12_000, np.float32))]
    soundfile.write(tmp_path / "three.wav", np.concatenate(parts), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "silence.wav", np.zeros(48_000), 16_000)
    (tmp_path / "broken.wav").write_text("no sound here, only words\n" * 20)
    return tmp_path


def test_recording_gives_text_segments_and_warnings_in_words(transcriber, files, spoken):
    text, rows, notes = describe_recording(transcriber, str(files / "talk.wav"))
    assert text
    assert rows == [[rows[0][0], rows[0][1], text]]
    assert rows[0][1] == pytest.approx(len(spoken[0][0]) / 16_000, abs=0.15)
    assert "token budget" in notes, "the random model never ends by itself"


def test_silence_is_explained(transcriber, files):
    assert describe_recording(transcriber, str(files / "silence.wav"))[:2] == ("", [])
    assert "no speech was found" in describe_recording(transcriber, str(files / "silence.wav"))[2]


def test_broken_file_is_explained_without_the_servers_folders(transcriber, files):
    text, rows, notes = describe_recording(transcriber, str(files / "broken.wav"))
    assert (text, rows) == ("", [])
    assert "could not be read" in notes
    assert "'broken.wav'" in notes
    assert str(files) not in notes


def test_no_recording_asks_for_one(transcriber):
    assert "Record something" in describe_recording(transcriber, None)[2]


def test_page_without_gradio_names_the_extra_to_install(transcriber, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(TinyAudioError, match=r"tinyaudio\[serve\]"):
        build_page(transcriber)


def test_command_asks_for_gradio_before_it_loads_a_model(monkeypatch):
    """A missing extra is found before gigabytes are loaded (here: a missing model would be reported first)."""
    import sys

    from typer.testing import CliRunner

    from tinyaudio.cli.app import app

    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(app, ["serve", "-m", "/nonexistent/model"])
    assert "tinyaudio[serve]" in str(done.exception)


def test_taken_port_is_one_line():
    class Page:
        def launch(self, **_):
            raise OSError("Cannot find empty port in range: 7860-7860.")

    with pytest.raises(TinyAudioError, match=r"port 7860 of 127\.0\.0\.1 .* --port"):
        open_page(Page(), "127.0.0.1", 7860)


def test_stopped_transcription_ends_its_work_and_a_finished_one_yields_its_answer(transcriber, files):
    *progress, last = follow_recording(transcriber, str(files / "three.wav"))
    assert last == describe_recording(transcriber, str(files / "three.wav"))
    assert progress[-1][2] == f"{soundfile.info(files / 'three.wav').duration:.0f} s of audio done"
    batches = []
    decode = transcriber.recognizer.decode

    def slow(pieces, options):
        batches.append(len(pieces))
        time.sleep(0.3)
        return decode(pieces, options)

    transcriber.recognizer.decode = slow
    spoken, rate = soundfile.read(files / "talk.wav", dtype="float32")
    soundfile.write(files / "long.wav", np.tile(np.concatenate([spoken, np.zeros(12_000)]), 100), rate)
    answers = follow_recording(transcriber, str(files / "long.wav"))
    next(answers)
    answers.close()
    time.sleep(1.0)
    assert len(batches) <= 3
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
def tab(transcriber, files):
    """The page in a browser; its console is ignored."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    page = build_page(transcriber, [files / "talk.wav"])
    page.launch(server_port=None, quiet=True, prevent_thread_lock=True)
    try:
        with playwright.sync_playwright() as driver:
            flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
            tab = browser.new_page(viewport={"width": 1100, "height": 1000})
            tab.set_default_timeout(120_000)
            tab.goto(page.local_url)
            yield tab
            browser.close()
    finally:
        page.close()


def put_in(tab, path, answer):
    """Upload a file, press the button, and wait for words in the notes."""
    tab.reload()
    tab.locator("#recording input[type=file]").first.set_input_files(str(path))
    tab.wait_for_timeout(3000)
    tab.locator("#go").click()
    tab.locator("#notes", has_text=answer).wait_for()
    tab.wait_for_timeout(1000)
    tab.screenshot(path=str(path.with_suffix(".png")), full_page=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs the Debian package chromium")
def test_in_a_browser_a_file_is_transcribed(tab, transcriber, files):
    put_in(tab, files / "talk.wav", "audio")
    text = describe_recording(transcriber, str(files / "talk.wav"))[0]
    assert tab.locator("#transcript textarea").input_value() == text
    put_in(tab, files / "silence.wav", "no speech")
    assert tab.locator("#transcript textarea").input_value() == ""
    put_in(tab, files / "broken.wav", "could not be read")
    assert str(files) not in tab.locator("#notes").inner_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs the Debian package chromium")
def test_in_a_browser_a_click_on_a_segment_plays_from_there(tab, transcriber, files):
    put_in(tab, files / "three.wav", "audio")
    starts = [row[0] for row in describe_recording(transcriber, str(files / "three.wav"))[1]]
    assert len(starts) == 3
    tab.locator("#segments").get_by_text(f"{starts[2]:g}", exact=True).last.click()
    roots = "[...document.querySelectorAll('#recording *')].map(e => e.shadowRoot).filter(root => root)"
    player = f"{roots}.flatMap(root => [...root.querySelectorAll('audio')])[0]"
    tab.wait_for_function(f"{player}.currentTime > {starts[2]}")
    assert tab.evaluate(f"!{player}.paused || {player}.ended")
