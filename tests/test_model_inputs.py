"""Every form of recording that Python code has at hand, alike in `Transcriber`, `pipeline()` and the processor."""

import contextlib
import http.server
import io
import re
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from audio_files import with_soundfile
from conftest import with_pauses
from transformers import AutomaticSpeechRecognitionPipeline, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

from tinyaudio.model import inputs as inputs_module
from tinyaudio.model.audio import load_audio
from tinyaudio.model.errors import AudioError
from tinyaudio.model.inputs import as_input, each, is_single
from tinyaudio.model.pipeline_tinyaudio import TinyAudioPipeline
from tinyaudio.transcribe import Transcriber

FEW = {"num_beams": 1, "max_new_tokens": 4}
TASK = "automatic-speech-recognition"


class AudioSamples:
    """As torchcodec has it."""

    def __init__(self, data: torch.Tensor, sample_rate: int) -> None:
        self.data, self.sample_rate = data, sample_rate
        self.pts_seconds, self.duration_seconds = 0.0, data.shape[-1] / sample_rate


class AudioDecoder:
    """As `datasets` 4 and 5 give it for a cell (datasets/features/_torchcodec.py): subscriptable, but no Mapping."""

    def __init__(self, data: torch.Tensor, sample_rate: int) -> None:
        self._samples = AudioSamples(data, sample_rate)

    def get_all_samples(self) -> AudioSamples:
        return self._samples

    def __getitem__(self, key: str) -> object:
        if key == "array":
            y = self.get_all_samples().data.cpu().numpy()
            return np.mean(y, axis=tuple(range(y.ndim - 1))) if y.ndim > 1 else y
        if key == "sampling_rate":
            return self.get_all_samples().sample_rate
        raise TypeError("'torchcodec.decoders.AudioDecoder' object is not subscriptable")


class BrokenDecoder:
    def __init__(self, fault: object) -> None:
        self.fault = fault

    def get_all_samples(self) -> object:
        if isinstance(self.fault, Exception):
            raise self.fault
        return self.fault


class MapStyle(torch.utils.data.Dataset):
    """As the tutorials write it: never an IndexError."""

    def __init__(self, rows: list[object]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> object:
        return self.rows[i % len(self.rows)]


class Plain:
    """The same without torch; it may have any further attributes."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> np.ndarray:
        return np.full(400, i, np.float32)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


def wav_of(samples: np.ndarray) -> bytes:
    return with_soundfile(samples, subtype="FLOAT")


def loaded(given: object) -> np.ndarray:
    found = as_input(given)
    return load_audio(*found) if isinstance(found, tuple) else load_audio(found)


def test_every_form_is_the_same_recording(model, processor, asr, spoken, tmp_path):
    samples = spoken[0][0]
    data = wav_of(samples)
    (tmp_path / "x.wav").write_bytes(data)
    path = str(tmp_path / "x.wav")
    tensor = torch.from_numpy(samples)
    array = {"array": samples, "sampling_rate": 16_000, "path": "x.wav"}
    decoder = AudioDecoder(tensor[None], 16_000)
    forms = [
        *(path, tmp_path / "x.wav", data, bytearray(data), memoryview(data), memoryview(bytearray(data)), samples),
        *(tensor, tensor.double(), (samples, 16_000), (tensor, np.int64(16_000)), array, {**array, "raw": samples}),
        *({"bytes": data, "path": None}, {"bytes": None, "path": path}, {"bytes": memoryview(data), "path": "gone"}),
        *(decoder, AudioDecoder(torch.stack([tensor, tensor]), 16_000), {"audio": decoder, "text": "a row"}),
        *({"audio": {"bytes": data, "path": None}, "id": 3}, {"audio": path}, {"raw": tensor, "sampling_rate": 16_000}),
    ]
    for form in [*forms, io.BytesIO(data)]:
        assert is_single(form), form
        np.testing.assert_allclose(loaded(form), samples, atol=1e-6, err_msg=repr(type(form)))
    expected = Transcriber(model, processor).transcribe([samples], **FEW)[0].text
    assert expected
    transcripts = Transcriber(model, processor).transcribe([*forms, io.BytesIO(data)], **FEW)
    assert [transcript.text for transcript in transcripts] == [expected] * (len(forms) + 1)
    assert [output["text"] for output in asr(forms, **FEW)] == [expected] * len(forms)
    assert [asr(form, **FEW)["text"] for form in forms[3:6] + forms[-6:-3]] == [expected] * 6
    assert torch.equal(processor([decoder, data])["input_values"], processor([samples, samples])["input_values"])


def test_the_rate_of_a_decoder_counts(spoken):
    twice = torch.from_numpy(np.repeat(spoken[0][0], 2))
    assert len(loaded(AudioDecoder(twice[None], 32_000))) == len(spoken[0][0])


def test_what_is_no_recording_is_one_line_and_stops_no_other(model, processor, asr, spoken):
    cases = [
        (None, "found NoneType input"),
        (3, "found int input"),
        (BrokenDecoder(RuntimeError("no stream\nat all")), "BrokenDecoder input cannot be decoded: no stream at all"),
        (BrokenDecoder(None), "BrokenDecoder input cannot be decoded"),
        (BrokenDecoder(AudioSamples(torch.zeros(0), 16_000)), "contains no samples"),
        ({"array": np.ones(800)}, "expected 'raw'"),
        ({"array": np.ones(800), "path": "x.wav"}, "expected 'raw'"),
        ({"text": "a row without audio"}, "expected 'raw'"),
        ({"bytes": None, "path": None}, "expected 'raw'"),
        ({"audio": {"bytes": None, "path": None}}, "expected 'raw'"),
        (bytearray(b"no audio"), "is not readable as audio"),
        (memoryview(b""), "is empty"),
        (object(), "found object input"),
    ]
    found = list(Transcriber(model, processor).stream([given for given, _ in cases] + [spoken[0][0]], **FEW))
    assert found.pop().text
    for (given, message), transcript in zip(cases, found, strict=True):
        assert re.search(message, str(transcript.error)), given
        with pytest.raises(ValueError, match=message) as raised:
            asr(given, **FEW)
        assert "\n" not in str(raised.value)


def test_data_sets_end_after_their_length(asr, spoken):
    rows = [{"raw": samples, "sampling_rate": 16_000} for samples, _ in spoken[:3]]
    assert len(list(asr(MapStyle(rows), **FEW))) == 3
    assert len(list(asr(MapStyle([{"audio": row} for row in rows]), batch_size=2, **FEW))) == 3
    assert len(list(asr(Plain(), **FEW))) == 3
    assert list(each(Stream())) == [0, 1, 2, 3]
    assert list(each(x for x in "ab")) == ["a", "b"]
    assert list(each(MapStyle([]))) == []


def test_transcriber_takes_data_sets_too(model, processor, spoken):
    rows = MapStyle([samples for samples, _ in spoken[:3]])
    assert [one.error for one in Transcriber(model, processor).stream(rows, **FEW)] == [None] * 3


class Server(http.server.BaseHTTPRequestHandler):
    content = b""

    def do_GET(self) -> None:
        answers = {
            "/ftp": ("Location", "ftp://127.0.0.1/x.wav"),
            "/file": ("Location", "file:///etc/hostname"),
            "/moved": ("Location", "/x.wav"),
            "/loop": ("Location", "/loop"),
        }
        if self.path in answers:
            self.send_response(302)
            self.send_header(*answers[self.path])
            self.end_headers()
            return
        if self.path == "/gone":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path == "/cut":
            self.send_header("Content-Length", str(2 * len(self.content)))
        elif self.path == "/cut-chunks":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.path == "/cut-chunks":
                self.wfile.write(b"1000\r\n" + self.content[:100])
            elif self.path == "/endless":
                while True:
                    self.wfile.write(bytes(65_536))
            else:
                self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(spoken) -> Iterator[str]:
    handler = type("Handler", (Server,), {"content": wav_of(spoken[0][0])})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_an_address_is_fetched(model, processor, asr, server, spoken):
    expected = Transcriber(model, processor).transcribe([spoken[0][0]], **FEW)[0].text
    for path in ("/x.wav", "/moved", "/a b\u00e9.wav?x=%20"):
        assert asr(server + path, **FEW)["text"] == expected
    (transcript,) = Transcriber(model, processor).transcribe([server.replace("http", "HTTP") + "/x.wav"], **FEW)
    assert (transcript.text, transcript.source) == (expected, server.replace("http", "HTTP") + "/x.wav")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/gone", "answered 404"),
        ("/ftp", "unknown url type: ftp"),
        ("/file", "answered 302"),
        ("/loop", "answered 302"),
        ("/cut", r"ended after [\d,]+ of [\d,]+ bytes"),
        ("/cut-chunks", "cannot be fetched"),
        ("/endless", "has more than 1,000,000 bytes"),
    ],
)
def test_an_address_that_fails_is_one_line(server, monkeypatch, path, message):
    monkeypatch.setattr(inputs_module, "MAX_URL_BYTES", 1_000_000)
    with pytest.raises(AudioError, match=message) as raised:
        loaded(server + path)
    assert server in str(raised.value)
    assert "\n" not in str(raised.value)


def test_addresses_without_a_server_are_one_line(model, processor, spoken):
    for address in ("http://127.0.0.1:9/x.wav", "http://", "http://[::", "https://127.0.0.1:9/"):
        bad, good = Transcriber(model, processor).stream([address, spoken[0][0]], **FEW)
        assert address in str(bad.error)
        assert "\n" not in str(bad.error)
        assert good.text
    for other in ("ftp://127.0.0.1/x.wav", "file:///x.wav", "httpx.wav"):
        with pytest.raises(AudioError, match="does not exist"):
            loaded(other)


def test_a_loaded_model_gets_its_own_pipeline(checkpoint, asr, spoken):
    """Whisper's model card: transformers chooses the class by a configuration, and reads none for a model object."""
    long = with_pauses((samples for samples, _ in spoken[:6]), 1.0)
    expected = asr(long, return_timestamps=True, chunk_length_s=4, **FEW)
    assert len(expected["chunks"]) == 6
    model = AutoModelForSpeechSeq2Seq.from_pretrained(checkpoint, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    made = [
        pipeline(TASK, model=model, **parts),
        pipeline(TASK, model=model, **parts, chunk_length_s=30, batch_size=16, dtype=torch.float32, device="cpu"),
        AutomaticSpeechRecognitionPipeline(model, **parts),
        AutomaticSpeechRecognitionPipeline(model=model, processor=processor),
    ]
    for one in made:
        assert type(one).__name__ == "TinyAudioPipeline"
        assert one(long, return_timestamps=True, chunk_length_s=4, **FEW) == expected


def test_a_subclass_of_the_stock_pipeline_is_refused_and_one_of_ours_is_not(model, processor):
    class Stock(AutomaticSpeechRecognitionPipeline):
        pass

    class Ours(TinyAudioPipeline):
        pass

    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    with pytest.raises(ValueError, match="expected a subclass of TinyAudioPipeline for this model, found Stock"):
        Stock(model=model, **parts)
    assert type(Ours(model=model, **parts)) is Ours


def test_other_models_keep_the_stock_pipeline(ctc_folder, spoken):
    stock = pipeline(TASK, model=str(ctc_folder))
    assert type(stock) is AutomaticSpeechRecognitionPipeline
    assert "text" in stock(spoken[0][0])


def test_english_is_the_language(asr, spoken):
    expected = asr(spoken[0][0], **FEW)["text"]
    for value in ("en", "english", "English", "<|en|>", None):
        assert asr(spoken[0][0], generate_kwargs={"language": value, "task": "transcribe", **FEW})["text"] == expected
        assert asr(spoken[0][0], language=value, **FEW)["text"] == expected
    for name, value in (("language", "de"), ("language", "french"), ("task", "translate")):
        with pytest.raises(ValueError, match=f"{name}='{value}' is not supported; expected"):
            asr(spoken[0][0], generate_kwargs={name: value})


def test_the_precision_of_a_model_is_that_of_its_decoder(asr, spoken):
    before = {name: value.clone() for name, value in asr.model.state_dict().items()}
    conversions = (
        (lambda model: model.half(), torch.float16),
        (lambda model: model.bfloat16(), torch.bfloat16),
        (lambda model: model.to(torch.float16), torch.float16),
        (lambda model: model.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda model: model.float(), torch.float32),
    )
    for convert, expected in conversions:
        assert convert(asr.model) is asr.model
        assert {parameter.dtype for parameter in asr.model.decoder.parameters()} == {expected}
        state = asr.model.state_dict()
        assert all(torch.equal(before[name], state[name]) for name in state if not name.startswith("decoder."))
        assert {state[name].dtype for name in state if name.startswith(("encoder.", "projector."))} == {torch.float32}
        assert asr(spoken[0][0], **FEW)["text"]
