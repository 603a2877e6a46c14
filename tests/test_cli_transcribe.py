"""`tinyaudio transcribe` as a Unix tool: where text goes, what is skipped, exit codes."""

import functools
import http.server
import json
import threading

import numpy as np
import pytest
import soundfile
import torch
from conftest import with_pauses
from typer.testing import CliRunner

from tinyaudio.cli.app import app
from tinyaudio.model.errors import MissingModelError
from tinyaudio.model.recognize import Recognizer
from tinyaudio.transcribe import Transcriber

FEW = ["--num-beams", "1", "--max-new-tokens", "4"]


@pytest.fixture(name="run")
def run_transcribe(checkpoint):
    """Run the command; stdin is no terminal, as in a pipe."""
    start = ["transcribe", "-m", str(checkpoint), *FEW]
    return lambda *words, **options: CliRunner().invoke(app, [*start, *map(str, words)], **options)


@pytest.fixture
def expected(model, processor, spoken):
    text = Transcriber(model, processor).transcribe([spoken[0][0]], num_beams=1, max_new_tokens=4)[0].text
    assert text
    return text


def test_one_input_is_text_on_stdout_and_no_file(run, talk, expected):
    done = run(talk)
    assert (done.exit_code, done.stdout) == (0, expected + "\n")
    assert sorted(p.name for p in talk.parent.glob("talk*")) == ["talk.wav"]


def test_several_inputs_get_files_beside_them_and_lines_on_stdout(run, talk, expected):
    other = talk.with_name("other.wav")
    other.write_bytes(talk.read_bytes())
    done = run(talk, other)
    assert done.exit_code == 0
    assert done.stdout == f"{talk}: {expected}\n{other}: {expected}\n"
    assert talk.with_suffix(".txt").read_text() == other.with_suffix(".txt").read_text() == expected + "\n"


def test_bad_input_among_three_fails_alone(run, talk, expected):
    bad = talk.with_name("bad.wav")
    bad.write_text("no sound")
    done = run(talk, bad, talk.with_name("nowhere.wav"), "--output-dir", talk.parent / "out")
    assert done.exit_code == 1
    assert (talk.parent / "out/talk.txt").read_text() == expected + "\n"
    assert [p.name for p in (talk.parent / "out").iterdir()] == ["talk.txt"]
    assert "1 transcribed, 2 failed" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "bad.wav" in last
    assert "nowhere.wav" in last
    assert "Traceback" not in done.stderr


def test_silence_is_success(run, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(160_000), 16_000)
    done = run(tmp_path / "silence.wav")
    assert (done.exit_code, done.stdout) == (0, "\n")
    assert "no_speech" in done.stderr


def test_twenty_milliseconds_do_no_harm(run, tmp_path):
    soundfile.write(tmp_path / "click.wav", np.ones(320) * 0.5, 16_000)
    assert run(tmp_path / "click.wav").exit_code == 0


def test_stdin_is_an_input_named_stdin(run, talk, expected, tmp_path):
    done = run("-", input=talk.read_bytes())
    assert (done.exit_code, done.stdout) == (0, expected + "\n")
    done = run("-", "-o", tmp_path / "out", input=talk.read_bytes())
    assert (tmp_path / "out/stdin.txt").exists()
    assert run("-", input=b"").exit_code == 1


def test_json_is_one_object_per_input_failed_ones_too(run, talk, expected):
    done = run(talk, talk.with_name("nowhere.wav"), "--json")
    assert done.exit_code == 1
    good, bad = map(json.loads, done.stdout.splitlines())
    assert good["text"] == expected
    assert good["segments"][0]["text"] == expected
    assert {"duration", "model", "revision", "version", "warnings"} <= good.keys()
    assert "does not exist" in bad["error"]


def test_all_formats_at_once(run, talk):
    assert run(talk, "-f", "all", "-o", talk.parent / "out").stdout == ""
    assert {p.suffix for p in (talk.parent / "out").iterdir()} == {".txt", ".srt", ".vtt", ".tsv", ".json"}


def test_skip_existing_checks_the_requested_formats(run, talk):
    out = talk.parent / "out"
    run(talk, "-f", "txt", "-o", out)
    before = (out / "talk.txt").stat().st_mtime_ns
    done = run(talk, "-f", "txt", "-o", out, "--skip-existing")
    assert "1 skipped" in done.stderr
    assert (out / "talk.txt").stat().st_mtime_ns == before
    run(talk, "-f", "txt,srt", "-o", out, "--skip-existing")
    assert (out / "talk.srt").exists()


def test_folders_are_read_sorted_and_deeper_only_if_asked(run, talk, tmp_path):
    deep = tmp_path / "in/b/c"
    deep.mkdir(parents=True)
    for path in (tmp_path / "in/a.wav", tmp_path / "in/b/a.wav", deep / "new\nline.WAV"):
        path.write_bytes(talk.read_bytes())
    (tmp_path / "in/notes.md").write_text("not audio")
    (deep / "loop").symlink_to(tmp_path / "in")
    out = tmp_path / "out"
    assert run(tmp_path / "in", "-o", out).exit_code == 0
    assert [p.name for p in out.iterdir()] == ["a.txt"]
    done = run(tmp_path / "in", "-o", out, "-r")
    assert done.exit_code == 0, done.stderr
    found = sorted(str(p.relative_to(out)) for p in out.rglob("*.txt"))
    assert found == ["a.txt", "b/a.txt", "b/c/new\nline.txt"]


def test_folder_without_audio_and_pattern_without_match_fail_in_one_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run(tmp_path / "empty", str(tmp_path / "*.wav"), "--json")
    assert done.exit_code == 1
    assert "contains no audio files" in done.stderr
    assert "matches no file" in done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_patterns_are_expanded_where_the_shell_did_not(run, talk):
    assert run(str(talk.parent / "t*.wav")).exit_code == 0


def test_two_inputs_never_share_an_output_and_the_way_out_works(run, talk, tmp_path):
    """And a name never depends on the company, or --skip-existing would not find it again."""
    twin = talk.with_suffix(".flac")
    soundfile.write(twin, soundfile.read(talk)[0], 16_000)
    out = tmp_path / "out"
    done = run(talk, twin, talk, "-o", out)
    assert done.exit_code == 2
    assert "would both be written to" in done.stderr
    assert "--keep-extension" in done.stderr
    assert run(talk, twin, talk, "-o", out, "--keep-extension").exit_code == 0
    assert sorted(p.name for p in out.iterdir()) == ["talk.flac.txt", "talk.wav.txt"]
    far = tmp_path / "far/talk.wav"
    far.parent.mkdir()
    far.write_bytes(talk.read_bytes())
    done = run(talk, far, "-o", out, "--keep-extension")
    assert done.exit_code == 2
    assert "its own --output-dir" in done.stderr


def test_unwritable_folder_is_found_before_a_model_is_loaded(run, talk, tmp_path, monkeypatch):
    monkeypatch.setattr(Transcriber, "load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").write_text("in the way")
    done = run(talk, "-o", tmp_path / "file" / "below")
    assert done.exit_code == 1
    assert f"{str(tmp_path / 'file' / 'below')!r} cannot be written: Not a directory" in done.stderr


def test_file_that_cannot_be_written_is_named_with_its_reason(run, talk, tmp_path):
    (tmp_path / "out/talk.txt").mkdir(parents=True)
    done = run(talk, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert f"{str(tmp_path / 'out/talk.txt')!r} cannot be written: Is a directory" in done.stderr


def test_existing_transcript_beside_the_audio_is_never_replaced_unasked(run, talk, expected):
    other, reference = talk.with_name("other.wav"), talk.with_suffix(".txt")
    other.write_bytes(talk.read_bytes())
    reference.write_text("what was really said")
    done = run(talk, other)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert all(word in done.stderr for word in ("talk.txt", "--skip-existing", "--output-dir", "--overwrite"))
    assert run(talk, other, "--json").exit_code == 0
    assert not other.with_suffix(".txt").exists(), "--json writes no file unless asked"
    assert run(talk, other, "--skip-existing").exit_code == 0
    assert reference.read_text() == "what was really said"
    assert other.with_suffix(".txt").read_text() == expected + "\n"
    assert run(talk, other, "--overwrite").exit_code == 0
    assert reference.read_text() == expected + "\n"


def test_folder_of_one_recording_is_a_folder(run, talk, expected):
    assert run(talk.parent).stdout == f"{talk}: {expected}\n"
    assert talk.with_suffix(".txt").exists()


def test_pattern_of_folders_is_what_the_shell_makes_of_it(run, talk, tmp_path):
    for name in ("in1", "in2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.wav").write_bytes(talk.read_bytes())
    done = run(str(tmp_path / "in*"), "-o", tmp_path / "out")
    assert done.exit_code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["in1.txt", "in2.txt"]
    (tmp_path / "empty").mkdir()
    done = run(str(tmp_path / "empt*"))
    assert done.exit_code == 1
    assert "contains no audio files" in done.stderr


def test_text_of_several_segments_is_a_line_each(run, spoken, tmp_path):
    soundfile.write(tmp_path / "long.wav", with_pauses(samples for samples, _ in spoken[:3]), 16_000)
    done = run(tmp_path / "long.wav", "--chunk-length", "4")
    assert len(done.stdout.splitlines()) == 3
    assert run(tmp_path / "long.wav", "--chunk-length", "4", "-f", "txt").exit_code == 0
    assert (tmp_path / "long.txt").read_text() == done.stdout


def test_output_dir_dash_is_stdout(run, talk, expected):
    done = run(talk, "-f", "srt", "-o", "-")
    assert done.stdout.startswith("1\n00:00:00,")
    assert expected in done.stdout
    assert sorted(p.name for p in talk.parent.glob("talk*")) == ["talk.wav"]
    assert run(talk, "-f", "srt,txt", "-o", "-").exit_code == 2


def test_formats_given_one_by_one_add_up(run, talk):
    assert run(talk, "-f", "txt", "-f", "srt", "-o", talk.parent / "out").exit_code == 0
    assert {p.suffix for p in (talk.parent / "out").iterdir()} == {".txt", ".srt"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-f", "mp9"], "expected some of txt,srt,vtt,tsv,json"),
        (["--num-beams", "0"], "--num-beams"),
        (["--language", "fr"], "transcribes English only"),
        (["--task", "translate"], "does not translate; expected transcribe"),
        (["--temperature", "0.7"], "does not sample"),
        (["--highlight-words"], "expected --word-timestamps with it"),
        (["--chunk-length", "-1"], "expected at least 1 second"),
        (["--chunk-length", "0.1"], "expected at least 1 second"),
        (["--chunk-length", "nan"], "expected at least 1 second"),
        (["--chunk-length", "inf"], "expected at least 1 second"),
        (["--length-penalty", "nan"], "expected a number"),
        (["--dtype", "int8"], "float32, bfloat16, float16"),
        (["--no-such"], "--no-such"),
        ([], "Missing argument"),
    ],
)
def test_usage_errors_leave_with_2_and_say_what_was_expected(run, talk, words, said):
    done = run(*([talk, *words] if words else []))
    assert done.exit_code == 2
    assert said in done.stderr


def test_command_line_made_for_whisper_works(run, talk, expected):
    done = run(
        *(talk, "--language", "English", "--task", "transcribe", "--verbose", "False", "--fp16", "False"),
        *("--temperature", "0", "--word_timestamps", "False", "--threads", torch.get_num_threads()),
    )
    assert (done.exit_code, done.stdout) == (0, expected + "\n")
    assert "truncated" not in done.stderr, "--verbose False is --quiet"
    assert run("-h").exit_code == 0


@pytest.fixture
def run_with_head(run, checkpoint, ctc_folder):
    """`run`, after the checkpoint got an encoder with a CTC head."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "encoder_id": str(ctc_folder)}))
    return run


def test_word_timestamps_are_in_json_and_subtitles(run_with_head, talk):
    out = talk.parent / "out"
    done = run_with_head(talk, "--word-timestamps", "--highlight-words", "-f", "json,vtt,srt", "-o", out)
    assert done.exit_code == 0, done.stderr
    (segment,) = json.loads((out / "talk.json").read_text())["segments"]
    assert [word["word"].strip() for word in segment["words"]] == segment["text"].split()
    assert all(0 < word["probability"] < 1 for word in segment["words"])
    assert (out / "talk.vtt").read_text().count("<u>") == len(segment["words"]) > 0
    assert (out / "talk.srt").read_text().count("<u>") == len(segment["words"])


@pytest.mark.parametrize(
    ("words", "has_words"),
    [
        (["--word-timestamps"], True),
        (["--word_timestamps", "True"], True),
        (["--word_timestamps", "False"], False),
        (["--word_timestamps", "True", "--highlight_words", "False"], True),
        ([], False),
    ],
)
def test_word_timestamps_take_the_values_of_whisper(run_with_head, talk, words, has_words):
    done = run_with_head(*words, talk, "--json")
    assert done.exit_code == 0, done.stderr
    assert ("words" in json.loads(done.stdout)["segments"][0]) == has_words


@pytest.mark.parametrize(
    ("options", "is_scored"),
    [
        (["--json"], True),
        (["-f", "srt,json"], True),
        (["-f", "json", "-o", "-"], True),
        (["-f", "txt"], False),
        ([], False),
    ],
)
def test_scores_are_computed_for_json_only(run_with_head, talk, monkeypatch, options, is_scored):
    asked, stream = [], Recognizer.stream
    monkeypatch.setattr(Recognizer, "stream", lambda *args: asked.append(args[2].confidence) or stream(*args))
    done = run_with_head(talk, *options)
    assert done.exit_code == 0, done.stderr
    assert asked == [is_scored]
    written = [*talk.parent.glob("*.json"), *([done.stdout] if done.stdout.startswith("{") else [])]
    assert bool(written) == is_scored
    for one in written:
        (segment,) = json.loads(one if isinstance(one, str) else one.read_text())["segments"]
        assert segment["avg_logprob"] < 0 <= segment["no_speech_prob"] <= 1
        assert "words" not in segment


def test_word_timestamps_without_a_head_are_one_line(run, talk):
    done = run(talk, "--word-timestamps")
    assert done.exit_code == 1
    assert "expected an encoder with a CTC head" in str(done.exception)


def test_names_too_long_for_any_output_are_one_line(run, talk, tmp_path):
    long = tmp_path / f"{'x' * 251}.wav"
    long.write_bytes(talk.read_bytes())
    done = run(long, "-f", "json", "--skip-existing", "-q")
    assert done.exit_code == 1
    assert "cannot be written: File name too long" in done.stderr


def test_another_copy_of_a_part_may_name_its_revision(run, talk, monkeypatch):
    """And without one it does not inherit the original's, which is a commit of another repository."""
    asked = {}

    def load(model, **settings):
        asked.update(settings)
        raise MissingModelError("enough")

    monkeypatch.setattr(Transcriber, "load", load)
    run(talk, "--encoder-id", "me/hubert@abc", "--decoder-id", "me/smollm")
    assert asked["encoder_id"] == "me/hubert"
    assert asked["encoder_revision"] == "abc"
    assert asked["decoder_id"] == "me/smollm"
    assert "decoder_revision" not in asked


def test_underscores_are_hyphens_and_whispers_names_work(run, talk, expected):
    done = run(
        talk, "--output_format", "txt", "--output_dir", talk.parent / "out", "--beam_size", "1", "--skip_existing"
    )
    assert done.exit_code == 0
    assert (talk.parent / "out/talk.txt").read_text() == expected + "\n"


def test_missing_model_says_the_next_step(talk, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYAUDIO_MODEL", "")
    done = CliRunner().invoke(app, ["transcribe", str(talk)])
    assert isinstance(done.exception, MissingModelError)  # one line and exit 1 in cli.main
    assert all(word in str(done.exception) for word in ("--model", "make demo"))


def test_an_address_is_a_recording(run, talk, expected, monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(talk.parent))
    (talk.parent / "empty").mkdir()
    monkeypatch.chdir(talk.parent / "empty")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        host = f"http://127.0.0.1:{server.server_port}"
        one = run(f"{host}/talk.wav?x=1")
        more = run(f"{host}/talk.wav", f"{host}/gone.wav", f"{host}/", "http://[::", talk)
        server.shutdown()
    assert (one.exit_code, one.stdout) == (0, expected + "\n")
    assert more.exit_code == 1
    assert f"'{host}/gone.wav' cannot be fetched: the server answered 404" in more.stderr
    assert "'http://[::' cannot be fetched" in more.stderr
    assert "5 inputs: 2 transcribed, 3 failed" in more.stderr
    assert [path.name for path in (talk.parent / "empty").iterdir()] == ["talk.txt"]
