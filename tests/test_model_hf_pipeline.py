"""`transformers.pipeline`: every kind of input, every option, and the text of the command line."""

import numpy as np
import pytest
import torch
from conftest import with_pauses
from transformers import pipeline

from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.transcribe import Transcriber

FEW = {"num_beams": 1, "max_new_tokens": 4}


@pytest.fixture
def expected(model, processor, spoken):
    return [t.text for t in Transcriber(model, processor).transcribe([s for s, _ in spoken[:5]], **FEW)]


def test_lists_generators_and_single_inputs_give_the_text_of_the_command_line(asr, spoken, expected):
    sources = [samples for samples, _ in spoken[:5]]
    assert all(expected)
    for batch_size in (1, 4, 16):
        assert [output["text"] for output in asr(sources, batch_size=batch_size, **FEW)] == expected
    assert [output["text"] for output in asr((s for s in sources), **FEW)] == expected
    assert asr(sources[0], generate_kwargs=FEW)["text"] == expected[0]


def test_dicts_stay_as_they_are_and_integers_and_other_rates_are_inputs(asr, spoken, expected):
    samples = spoken[0][0]
    given = {"raw": samples, "sampling_rate": 16_000}
    assert asr(given, **FEW)["text"] == expected[0]
    assert set(given) == {"raw", "sampling_rate"}, "the caller's dict"
    integers = torch.from_numpy((samples * 32_768).round().astype(np.int16))
    for source in (integers, {"array": np.repeat(samples, 2), "sampling_rate": 32_000, "path": None}):
        assert asr(source, **FEW)["text"]
    with pytest.raises(ValueError, match="does not exist"):
        asr("nowhere.wav")


def test_timestamps_are_segments_and_chunk_length_is_the_window(asr, spoken):
    joined = with_pauses((samples for samples, _ in spoken[:4]), 0.6)
    output = asr(joined, chunk_length_s=4.0, return_timestamps=True, **FEW)
    assert len(output["chunks"]) == 4
    starts = [chunk["timestamp"][0] for chunk in output["chunks"]]
    assert starts == sorted(starts)
    assert output["text"] == " ".join(chunk["text"] for chunk in output["chunks"])


def test_unsupported_options_are_refused_or_warned_about(asr, spoken):
    with pytest.raises(ValueError, match="num_return_sequences=3 is not supported"):
        asr(spoken[0][0], num_return_sequences=3, **FEW)
    with pytest.warns(UserWarning, match="stride_length_s is ignored"):
        asr(spoken[0][0], chunk_length_s=10, stride_length_s=2, **FEW)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map_is_one_device(checkpoint, spoken, expected, device_map):
    asr = pipeline("automatic-speech-recognition", model=str(checkpoint), trust_remote_code=True, device_map=device_map)
    assert asr(spoken[0][0], **FEW)["text"] == expected[0]


def test_device_map_that_splits_the_model_is_refused(checkpoint):
    with pytest.raises(ValueError, match="would split the model"):
        TinyAudioForConditionalGeneration.from_pretrained(checkpoint, device_map={"encoder": "cpu", "decoder": "meta"})


def test_options_at_construction_hold_for_every_call(checkpoint, spoken, expected):
    asr = pipeline("automatic-speech-recognition", model=str(checkpoint), trust_remote_code=True, batch_size=3, **FEW)
    assert [o["text"] for o in asr([s for s, _ in spoken[:5]])] == expected


def test_silence_is_empty_text_with_a_warning(asr):
    with pytest.warns(UserWarning, match="no_speech"):
        output = asr(np.zeros(32_000, np.float32))
    assert output == {"text": "", "warnings": ["no_speech"]}
