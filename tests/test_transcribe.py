"""From recordings to transcripts: order, bounded memory, nothing lost between inputs."""

import io
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from audio_files import with_av, with_soundfile
from scripted_decoder import is_retry, scripted
from transformers import GenerationConfig, SmolLM3Config, SmolLM3ForCausalLM

from tinyaudio.model import audio, recognize, source
from tinyaudio.model.configuration_tinyaudio import TinyAudioConfig
from tinyaudio.model.errors import AudioError, MissingModelError, ModelError
from tinyaudio.model.guard import EVENTS
from tinyaudio.model.reader import End
from tinyaudio.model.recognize import (
    GPU_MAX_BATCH_S,
    OpenInput,
    Options,
    Output,
    Recognizer,
    Scores,
    batches_by_length,
    cache_bytes,
    default_batch_size,
)
from tinyaudio.model.segments import Piece
from tinyaudio.model.transcript import Word
from tinyaudio.transcribe import Transcriber, default_model, pick_device

FEW = {"max_new_tokens": 3, "num_beams": 1}


def half_a_wav(samples):
    return with_soundfile(samples)[: len(samples)]


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


def test_token_budget_of_a_row_does_not_depend_on_its_batch(model, processor, spoken):
    """A short recording beside a long one stops where it stops alone (the random model never ends by itself)."""
    recognizer = Recognizer(model, processor.feature_extractor, processor.tokenizer)
    short, long = spoken[0][0][:8000], np.tile(spoken[1][0], 3)
    options = Options(num_beams=1, max_new_tokens=60)
    short, long = (Piece(samples=s, start_s=0, end_s=len(s) / 16_000, advance_s=0) for s in (short, long))
    (alone,) = recognizer.decode([short], options)
    together, _ = recognizer.decode([short, long], options)
    assert together == alone


def test_options_of_generate_may_be_those_of_the_retry(transcriber, spoken):
    """The random model trips the guard: the second decoding sets what the caller has set already."""
    generate = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "max_new_tokens": 50}
    (transcript,) = transcriber.transcribe([spoken[0][0]], generate=generate, **FEW)
    assert transcript.warnings


def test_the_codes_that_eval_counts_are_those_that_transcription_emits(model, processor, spoken):
    faulty = {
        "repetition": ("cat " * 12, True),
        "refusal": ("as an AI I will not", True),
        "truncated": ("the cat sat", False),
        "empty": ("", True),
        "implausible_rate": ("abc def ghi jkl mno pqr stu vwx yz " * 2, True),
    }
    seen = set()
    for first in faulty.values():
        for second in (first, ("the cat sat", True)):
            _, recognizer = scripted(model, processor, lambda _, c, a=first, b=second: b if is_retry(c) else a)
            (transcript,) = recognizer.stream([spoken[0][0][:20_000]], Options())
            seen.update(transcript.warnings)
    _, recognizer = scripted(model, processor, lambda frames, _: (f"w{frames}", True))
    talk = np.concatenate([samples for samples, _ in spoken[:4]])
    damaged = bytearray(with_soundfile(talk, format="FLAC"))
    damaged[len(damaged) // 2] ^= 0x55
    two_tracks = with_av("matroska", "flac", talk, talk, rate=16_000)
    sources = [
        talk,
        np.zeros(16_000, np.float32),
        half_a_wav(talk),
        np.stack([talk, -talk]),
        bytes(damaged),
        two_tracks,
    ]
    for transcript in recognizer.stream(sources, Options(window_s=3.0)):
        seen.update(transcript.warnings)
    piece = Piece(samples=talk, begin_s=0.0, start_s=0.0, end_s=1.0, advance_s=1.0)
    opened = OpenInput("talk")
    opened.add(piece)
    unheard = (Word(word="cat", start=0.0, end=1.0, is_unheard=True),)
    opened.finish(piece, Output(text="cat", scores=Scores(words=unheard, is_missing=True)))
    end = End(input=0, name="talk", duration_s=1.0)
    opened.add(end)
    seen.update(opened.transcript(end).warnings)
    assert seen == EVENTS


def test_file_cut_short_is_transcribed_with_a_warning(transcriber, spoken):
    (transcript,) = transcriber.transcribe([half_a_wav(spoken[0][0])], **FEW)
    assert transcript.text
    assert transcript.warnings[-1] == "input_truncated"


@pytest.mark.parametrize("one", ["a.wav", b"RIFF", Path("a.wav"), np.zeros(16_000, np.float32), io.BytesIO(), 3])
def test_one_recording_instead_of_a_list_is_a_type_error(transcriber, one):
    """A path used to be an error a letter, an array one a sample."""
    with pytest.raises(TypeError, match=r"expected a list of recordings, found one .*\[recording\]"):
        transcriber.stream(one)
    with pytest.raises(TypeError, match="expected a list of recordings"):
        transcriber.transcribe(one)


def test_failing_disk_ends_its_input_only(transcriber, spoken):
    class Failing(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    bad, good = transcriber.stream([Failing(b"RIFF"), spoken[0][0]], **FEW)
    assert "cannot be read: Input/output error" in bad.error
    assert good.error is None


def test_disk_that_fails_half_way_keeps_what_was_read(spoken, tmp_path, monkeypatch, capfd):
    """libsndfile calls back from C, where an exception would be printed and lost."""
    soundfile.write(tmp_path / "x.wav", np.tile(spoken[0][0], 10), 16_000)
    real = source.Part.__init__

    def init(self, stream, *args):
        real(self, stream, *args)
        read = self._read

        def fail(size):
            if stream.tell() > 500_000:
                raise OSError(5, "Input/output error")
            return read(size)

        self._read = fail

    monkeypatch.setattr(source.Part, "__init__", init)
    with pytest.raises(AudioError, match="cannot be read: Input/output error"):
        audio.load_audio(tmp_path / "x.wav")
    assert "Traceback" not in capfd.readouterr().err


def test_batch_too_large_for_the_gpu_is_one_line_that_names_the_option(model, processor, spoken):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand so on")

    _, recognizer = scripted(model, processor, too_much)
    with pytest.raises(ModelError, match=r"1 segments .* Lower --batch-size") as raised:
        list(recognizer.stream([spoken[0][0]], Options()))
    assert "\n" not in str(raised.value)


def test_finished_input_is_returned_while_the_next_one_is_slow(transcriber, spoken, tmp_path):
    release = threading.Event()

    def sources():
        yield tmp_path / "nowhere.wav"
        yield spoken[0][0]
        release.wait(30)
        yield spoken[1][0]

    stream = transcriber.stream(sources(), batch_size=8, **FEW)
    assert "does not exist" in next(stream).error
    assert next(stream).text
    assert not release.is_set()
    release.set()
    assert next(stream).text


@pytest.mark.parametrize("sound", ["silence", "noise", "hum", "tones"])
def test_decoder_does_not_run_on_audio_without_speech(model, processor, noise, sound):
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


def test_reading_ahead_is_bounded(model, processor, spoken):
    """The reader stops a bounded number of pieces ahead of a consumer that pauses."""
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


def test_bug_in_a_source_is_raised_in_the_callers_thread(transcriber):
    def broken():
        raise RuntimeError("not an audio problem")
        yield

    with pytest.raises(RuntimeError, match="not an audio problem"):
        transcriber.transcribe(broken())


def test_progress_adds_up_to_the_audio(transcriber, spoken):
    seen = []
    silence = np.zeros(48_000, np.float32)
    sources = [silence, *(np.concatenate([silence, samples, silence]) for samples, _ in spoken[:4]), silence]
    transcriber.transcribe(sources, on_progress=seen.append, batch_size=2, **FEW)
    assert seen[-1].done_s == pytest.approx(sum(map(len, sources)) / 16_000)
    assert seen[-1].num_done == len(sources)
    assert [p.done_s for p in seen] == sorted(p.done_s for p in seen)


def test_batches_hold_pieces_of_like_length():
    pieces = [Piece(samples=np.zeros(n), start_s=0, end_s=0, advance_s=0) for n in (5, 1, 4, 2, 3)]
    assert [[len(p.samples) for p in batch] for batch in batches_by_length(pieces, 2)] == [[1, 2], [3, 4], [5]]
    long = [Piece(samples=np.zeros(16_000 * 30), start_s=0, end_s=30, advance_s=30) for _ in range(20)]
    assert max(len(batch) for batch in batches_by_length(long, 64)) == 16
    assert max(len(batch) for batch in batches_by_length(long, 64, GPU_MAX_BATCH_S)) == 20


def smollm3_on(free_gb, monkeypatch, **options):
    """The batch size for the real shapes on a GPU with so much free memory; on the meta device, so without memory."""
    with torch.device("meta"):
        decoder = SmolLM3ForCausalLM(SmolLM3Config()).bfloat16()
    config = TinyAudioConfig(prompt_prefix_ids=[1, 2, 3], prompt_suffix_ids=[4, 5, 6], window_s=30.0)
    generation = GenerationConfig(num_beams=4, max_new_tokens=200)
    model = SimpleNamespace(
        device=torch.device("cuda"),
        config=config,
        decoder=decoder,
        generation_config=generation,
        get_input_embeddings=decoder.get_input_embeddings,
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gb * 1e9), 0))
    return default_batch_size(model, Options(**options)), cache_bytes(model, Options(**options))


def test_default_batch_follows_the_free_memory_of_a_gpu(monkeypatch):
    sizes = {gb: smollm3_on(gb, monkeypatch)[0] for gb in (130, 32, 16, 8, 4)}
    assert sizes == {130: 64, 32: 64, 16: 32, 8: 16, 4: 8}
    positions = 6 + 300 + 200  # of 1,499 frames, of which 5 are joined
    assert smollm3_on(32, monkeypatch)[1] == 2 * 36 * 4 * 128 * 2 * positions * 4
    assert smollm3_on(32, monkeypatch, num_beams=8)[1] == 2 * smollm3_on(32, monkeypatch, num_beams=1)[1]


def test_default_batch_of_a_cpu_is_small(transcriber):
    assert default_batch_size(transcriber.model, Options()) == 8


def test_a_large_batch_is_encoded_in_parts_and_gives_the_same_text(transcriber, spoken, monkeypatch):
    sources = [samples for samples, _ in spoken]
    expected = [t.text for t in transcriber.transcribe(sources, batch_size=8, **FEW)]
    calls, encode = [], type(transcriber.model).encode
    monkeypatch.setattr(type(transcriber.model), "encode", lambda *a: calls.append(len(a[1])) or encode(*a))
    monkeypatch.setattr("tinyaudio.model.recognize.ENCODER_BATCH_S", 6.0)
    assert [t.text for t in transcriber.transcribe(sources, batch_size=8, **FEW)] == expected
    assert len(calls) > 1


@pytest.mark.parametrize("name", ["batch_size", "num_beams", "max_new_tokens", "window_s"])
@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf])
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Options(**{name: value})


@pytest.mark.parametrize("length", [0.0001, 0.1, 0.99])
def test_pieces_too_short_for_a_word_are_refused(checkpoint, length):
    """They gave no text, without a warning."""
    with pytest.raises(ValueError, match=r"window_s is .*; expected at least 1 second"):
        Options(window_s=length)
    with pytest.raises(ValueError, match=r"window_s is .*; expected at least 1 second"):
        Transcriber.load(checkpoint, window_s=length)


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


def test_memory_is_released_after_every_group(transcriber, spoken, monkeypatch):
    """Memory kept by malloc shows after an hour only: 775 MB instead of 456, together with oneDNN's kernels."""
    given_back = []
    monkeypatch.setattr(recognize, "give_back_free_memory", lambda: given_back.append(1))
    transcriber.transcribe([spoken[0][0][:16_000]] * 9, batch_size=1, **FEW)
    assert len(given_back) >= 9 // recognize.BATCHES_AHEAD


MEMORY_SCRIPT = """
import re, sys
import numpy as np, pyarrow.parquet, torch
from pathlib import Path
from types import SimpleNamespace
from pipelines.train.model import load_tokenizer
from tinyaudio.model.audio import load_audio
from tinyaudio.model.configuration_tinyaudio import TinyAudioConfig
from tinyaudio.model.encoder import load_feature_extractor
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.recognize import Options, Recognizer

demo = Path(sys.argv[1])
tokenizer = load_tokenizer(str(demo / "decoder"))
parts = {"encoder_id": str(demo / "encoder"), "decoder_id": str(demo / "decoder"), "decoder_dtype": "float32"}
from transformers import AutoConfig
sizes = {f"{part}_dim": AutoConfig.from_pretrained(demo / part).hidden_size for part in ("encoder", "decoder")}
ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
model = TinyAudioForConditionalGeneration(TinyAudioConfig(**parts, **sizes, **ids, prompt_prefix_ids=[5]))
model.load_frozen_parts()
recognizer = Recognizer(model.eval(), load_feature_extractor(str(demo / "encoder")), tokenizer)
(table,) = (demo / "corpus").glob("test-0*.parquet")
spoken = [load_audio(row["wav"]["bytes"]) for row in pyarrow.parquet.read_table(table).slice(0, 200).to_pylist()]
rng = np.random.default_rng(0)

def talks(minutes):
    done = 0
    while done < minutes * 60 * 16_000:
        pauses = [np.zeros(int(16_000 * rng.uniform(0.4, 1.5)), np.float32) for _ in range(8)]
        talk = np.concatenate([part for pause in pauses for part in (spoken[rng.integers(len(spoken))], pause)])
        done += len(talk)
        yield talk

for minutes in (2, 12):
    for _ in recognizer.stream(talks(minutes), Options(num_beams=1, max_new_tokens=12, window_s=10.0)):
        pass
    print(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_after_two_minutes():
    """On the bundled models; the kernels that oneDNN kept were another tenth after twelve minutes."""
    demo = Path(__file__).parent.parent / "pipelines" / "demo"
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(demo)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    early, late = map(int, done.stdout.split())
    assert late < 1.06 * early, f"{early} kB, then {late} kB"
