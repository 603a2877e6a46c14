"""From recordings to transcripts: one way for all, the guard at work, bounded memory, nothing lost between inputs."""

import io
import threading
import time

import numpy as np
import pytest
import soundfile

from tinyaudio.errors import AudioError, MissingModelError, ModelError
from tinyaudio.guard import EVENTS
from tinyaudio.recognize import Options, Recognizer, batches_by_length
from tinyaudio.segments import Piece
from tinyaudio.transcribe import Transcriber, default_model, pick_device

FEW = {"max_new_tokens": 3, "num_beams": 1}


@pytest.fixture
def transcriber(model, processor):
    return Transcriber(model, processor, name="tiny")


class ScriptedDecoder:
    """Stands in for the decoder: writes scripted texts, by the length of the audio, and notes what it was asked."""

    def __init__(self, model, tokenizer, script):
        self.config, self.generation_config, self.device = model.config, model.generation_config, model.device
        self.encode, self._tokenizer, self._script, self.asked = model.encode, tokenizer, script, []

    def generate(self, features, num_frames, generation_config, stopping_criteria, **kwargs):
        import torch

        self.asked.append((num_frames.tolist(), generation_config))
        rows = []
        for frames in num_frames.tolist():
            text, ends = self._script(frames, generation_config)
            rows.append(torch.tensor(self._tokenizer(text)["input_ids"] + ([0] if ends else [])))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)


def scripted(model, processor, script):
    fake = ScriptedDecoder(model, processor.tokenizer, script)
    return fake, Recognizer(fake, processor.feature_extractor, processor.tokenizer)


def is_retry(config):
    return config.repetition_penalty not in (None, 1.0)


def test_one_transcript_per_input_in_order_whatever_its_length(transcriber, spoken):
    sources = [samples for samples, _ in spoken[:5]] + [np.zeros(320, np.float32)]
    transcripts = list(transcriber.stream(sources, batch_size=2, **FEW))
    assert [t.duration_s for t in transcripts] == pytest.approx([len(s) / 16_000 for s in sources])
    assert transcripts[-1].text == ""
    assert transcripts[-1].warnings == ("no_speech",)
    assert transcripts[0].model == "tiny"


def test_bad_input_is_a_transcript_in_a_stream_and_an_error_in_a_list(transcriber, spoken, tmp_path):
    good = spoken[0][0]
    first, bad, last = transcriber.stream([good, tmp_path / "nowhere.wav", good], **FEW)
    assert first.error is None
    assert first.text == last.text
    assert "does not exist" in bad.error
    assert bad.segments == ()
    with pytest.raises(AudioError, match="does not exist"):
        transcriber.transcribe([good, tmp_path / "nowhere.wav"], **FEW)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_batch_size_changes_no_transcript(transcriber, spoken, num_beams):
    sources = [samples for samples, _ in spoken[:6]]
    options = {"max_new_tokens": 6, "num_beams": num_beams}
    expected = [t.to_dict() for t in transcriber.transcribe(sources, batch_size=1, **options)]
    for batch_size in (4, 16):
        assert [t.to_dict() for t in transcriber.transcribe(sources, batch_size=batch_size, **options)] == expected


def test_token_budget_of_a_row_is_its_own_in_any_company(model, processor, spoken):
    """A short recording beside a long one stops where it stops alone (the random model never ends by itself)."""
    recognizer = Recognizer(model, processor.feature_extractor, processor.tokenizer)
    short, long = spoken[0][0][:8000], np.tile(spoken[1][0], 3)
    options = Options(num_beams=1, max_new_tokens=60)
    (alone,) = recognizer.decode([short], options)
    together, _ = recognizer.decode([short, long], options)
    assert together == alone


def test_loop_is_decoded_again_and_the_clean_output_stands(model, processor, spoken):
    fake, recognizer = scripted(
        model, processor, lambda _, c: ("the cat sat", True) if is_retry(c) else ("cat " * 12, True)
    )
    (transcript,) = recognizer.stream([spoken[0][0]], Options())
    assert transcript.text == "the cat sat"
    assert transcript.warnings == ("repetition_retried",)
    assert [is_retry(config) for _, config in fake.asked] == [False, True]


def test_loop_that_stays_is_cut_and_reported(model, processor, spoken):
    _, recognizer = scripted(model, processor, lambda *_: ("the dog and " + "cat " * 12, False))
    (transcript,) = recognizer.stream([spoken[0][0]], Options())
    assert transcript.text == "the dog and cat"
    assert transcript.warnings == ("repetition",)
    assert transcript.segments[0].warnings == ("repetition",)


@pytest.mark.parametrize(
    ("text", "ends", "code"),
    [
        ("I'm an AI language model and I cannot transcribe", True, "refusal"),
        ("the cat sat on the", False, "truncated"),
        ("the cat sat on the mat " * 2 + "a dog and a cat " * 9, True, "repetition"),
        (
            "abc def ghi jkl mno pqr stu vwx yz " * 2 + "entirely other words follow here for a long while",
            True,
            "implausible_rate",
        ),
    ],
)
def test_every_fault_is_in_the_warnings(model, processor, spoken, text, ends, code):
    fake, recognizer = scripted(model, processor, lambda *_: (text, ends))
    (transcript,) = recognizer.stream([spoken[0][0][:16_000]], Options())
    assert transcript.warnings == (code,)
    assert len(fake.asked) == 2


def test_the_codes_that_eval_counts_are_those_that_transcription_emits(model, processor, spoken):
    faulty = {
        "repetition": ("cat " * 12, True),
        "refusal": ("as an AI I will not", True),
        "truncated": ("the cat sat", False),
        "implausible_rate": ("abc def ghi jkl mno pqr stu vwx yz " * 2, True),
    }
    seen = set()
    for first in faulty.values():
        for second in (first, ("the cat sat", True)):
            _, recognizer = scripted(model, processor, lambda _, c, a=first, b=second: b if is_retry(c) else a)
            (transcript,) = recognizer.stream([spoken[0][0][:16_000]], Options())
            seen.update(transcript.warnings)
    _, recognizer = scripted(model, processor, lambda frames, _: (f"w{frames}", True))
    talk = np.concatenate([samples for samples, _ in spoken[:4]])
    for transcript in recognizer.stream([talk, np.zeros(16_000, np.float32)], Options(window_s=3.0)):
        seen.update(transcript.warnings)
    assert seen == EVENTS


@pytest.mark.parametrize("sound", ["silence", "noise", "hum", "tones"])
def test_the_decoder_is_never_asked_about_what_is_not_speech(model, processor, noise, sound):
    t = np.arange(160_000) / 16_000
    sounds = {
        "silence": np.zeros(160_000),
        "noise": noise(10),
        "hum": 0.3 * np.sin(2 * np.pi * 60 * t),
        "tones": sum(0.1 * np.sin(2 * np.pi * f * t) for f in (262, 330, 392)),
    }
    fake, recognizer = scripted(model, processor, lambda *_: ("an invented sentence", True))
    (transcript,) = recognizer.stream([sounds[sound].astype(np.float32)], Options())
    assert (transcript.text, transcript.warnings) == ("", ("no_speech",))
    assert fake.asked == []


def test_long_recording_comes_out_in_segments_with_true_times(model, processor, spoken):
    _, recognizer = scripted(model, processor, lambda frames, _: (f"w{frames}", True))
    parts, starts = [], []
    for samples, _ in spoken[:6]:
        starts.append(sum(map(len, parts)) / 16_000)
        parts += [samples, np.zeros(9600, np.float32)]
    (transcript,) = recognizer.stream([np.concatenate(parts)], Options(window_s=4.0, batch_size=3))
    assert [segment.id for segment in transcript.segments] == list(range(6))
    assert [segment.start for segment in transcript.segments] == pytest.approx(starts, abs=0.15)
    assert transcript.text == " ".join(segment.text for segment in transcript.segments)


def test_windows_without_a_pause_are_joined_and_reported(model, processor, spoken):
    _, recognizer = scripted(model, processor, lambda *_: ("the cat", True))
    (transcript,) = recognizer.stream([np.concatenate([s for s, _ in spoken[:4]])], Options(window_s=3.0))
    num_seams = transcript.warnings.count("no_pause")
    assert num_seams > 0
    assert transcript.text == " ".join(["the cat"] * (len(transcript.segments) - num_seams))


def test_reading_runs_ahead_but_not_away(model, processor, spoken):
    """The reader stops a bounded number of pieces ahead of a consumer that rests."""
    taken = []

    def sources():
        for number in range(200):
            taken.append(number)
            yield spoken[0][0]

    _, recognizer = scripted(model, processor, lambda *_: ("the cat", True))
    stream = recognizer.stream(sources(), Options(batch_size=2))
    next(stream)
    time.sleep(0.5)
    assert len(taken) < 40
    stream.close()
    time.sleep(0.3)
    assert not any(thread.name == "tinyaudio-reader" for thread in threading.enumerate())


def test_bug_in_a_source_is_raised_where_it_can_be_seen(transcriber):
    def broken():
        raise RuntimeError("not an audio problem")
        yield

    with pytest.raises(RuntimeError, match="not an audio problem"):
        transcriber.transcribe(broken())


def test_progress_adds_up_to_the_audio(transcriber, spoken):
    seen = []
    sources = [samples for samples, _ in spoken[:4]]
    transcriber.transcribe(sources, on_progress=seen.append, batch_size=2, **FEW)
    assert seen[-1].done_s == pytest.approx(sum(map(len, sources)) / 16_000)
    assert [p.done_s for p in seen] == sorted(p.done_s for p in seen)


def test_batches_hold_pieces_of_like_length():
    pieces = [Piece(samples=np.zeros(n), start_s=0, end_s=0, advance_s=0) for n in (5, 1, 4, 2, 3)]
    assert [[len(p.samples) for p in batch] for batch in batches_by_length(pieces, 2)] == [[1, 2], [3, 4], [5]]
    long = [Piece(samples=np.zeros(16_000 * 30), start_s=0, end_s=30, advance_s=30) for _ in range(20)]
    assert max(len(batch) for batch in batches_by_length(long, 64)) == 16


@pytest.mark.parametrize("name", ["batch_size", "num_beams", "max_new_tokens", "window_s"])
def test_options_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=name):
        Options(**{name: 0})


def test_model_is_found_by_argument_variable_or_latest_run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINYAUDIO_MODEL", raising=False)
    with pytest.raises(MissingModelError, match="make demo"):
        default_model()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/latest").symlink_to(checkpoint)
    assert default_model() == "runs/latest"
    monkeypatch.setenv("TINYAUDIO_MODEL", "elsewhere")
    assert default_model() == "elsewhere"
    loaded = Transcriber.load(checkpoint, window_s=7, device="cpu")
    assert loaded.model.config.window_s == 7
    with pytest.raises(MissingModelError, match="no tinyaudio model"):
        Transcriber.load(tmp_path / "nothing")


def test_unknown_device_is_one_clear_line():
    with pytest.raises(ModelError, match="'warp' cannot be used"):
        pick_device("warp")


def test_encoded_bytes_and_file_objects_are_sources_too(transcriber, spoken):
    buffer = io.BytesIO()
    soundfile.write(buffer, spoken[0][0], 16_000, format="WAV", subtype="FLOAT")
    sources = [buffer.getvalue(), io.BytesIO(buffer.getvalue()), spoken[0][0], (spoken[0][0], 16_000)]
    assert len({t.text for t in transcriber.transcribe(sources, **FEW)}) == 1
