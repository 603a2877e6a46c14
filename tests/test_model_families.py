"""Every family of encoders through the same seam: frames, batches, precision of spectrograms, loading, limits."""

import numpy as np
import pytest
import torch
from extractions import stage_one
from tiny_encoders import FAMILIES, WIDTH, save_encoder
from transformers import (
    AutoConfig,
    SeamlessM4TFeatureExtractor,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from cache import FeatureStore
from cache.errors import StoreMismatchError
from pipelines.encoders import check_encoder
from pipelines.errors import RunError
from pipelines.recipes import load_recipe
from tinyaudio.model.encoder import encode, encoder_inputs, load_encoder, load_feature_extractor
from tinyaudio.model.errors import ModelError
from tinyaudio.model.families import family_of
from tinyaudio.model.frozen import weights_digest
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.recognize import Options, Recognizer
from tinyaudio.model.spectrograms import kaldi_log_mel, whisper_log_mel

RATE = 16_000


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return save_encoder(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
    return save_encoder("whisper", tmp_path_factory.mktemp("whisper"))


def run(folder, recordings, **settings):
    encoder = load_encoder(str(folder), **settings)
    return encode(encoder, *encoder_inputs(load_feature_extractor(str(folder)), recordings))


def test_features_are_the_same_alone_and_in_any_padded_batch(folder, noise):
    recordings = [noise(s) for s in (2.0, 0.5, 0.01, 1.313, 0.0351)]
    together, frames = run(folder, recordings)
    assert together.shape[2] == WIDTH
    for i, samples in enumerate(recordings):
        alone, (count,) = run(folder, [samples])
        assert count == frames[i] == alone.shape[1]
        assert (together[i, :count] - alone[0]).abs().max() < 1e-5
        assert not together[i, count:].any(), "frames behind the end must be zero"


def test_frames_are_counted_from_samples_as_the_encoder_gives_them(folder):
    family = family_of(AutoConfig.from_pretrained(folder))
    lengths = [1, 399, 400, 401, 559, 560, 561, 719, 720, 721, 880, 15_999, 16_000, 16_001, 16_320]
    encoder, extractor = load_encoder(str(folder)), load_feature_extractor(str(folder))
    counts = []
    for length in lengths:
        values, mask = encoder_inputs(extractor, [np.ones(length, np.float32)])
        ran = family.run(encoder, values, mask, [values.shape[1]])
        counts.append(ran.shape[1])
        assert ran.isfinite().all()
    assert counts == [family.num_frames(length) for length in lengths]
    assert 49 <= family.num_frames(RATE) <= 50


def test_encoder_is_frozen_and_has_no_other_weights(folder):
    encoder = load_encoder(str(folder))
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any("decoder" in name for name, _ in encoder.named_parameters())
    again = load_encoder(str(folder))
    assert weights_digest(encoder) == weights_digest(again)


def test_whisper_log_mel_is_that_of_its_feature_extractor(whisper_folder, noise):
    recordings = [noise(s) * np.linspace(0, 1, int(s * RATE), dtype=np.float32) for s in (3.0, 0.5, 29.0, 1.01, 0.03)]
    for num_bands in (80, 128):
        expected = WhisperFeatureExtractor(feature_size=num_bands)(recordings, sampling_rate=RATE, return_tensors="pt")
        values, _ = encoder_inputs(load_feature_extractor(str(whisper_folder)), recordings)
        counts = [-(-len(samples) // 160) for samples in recordings]
        found = whisper_log_mel(values, counts, num_bands)
        for row, reference, count in zip(found, expected["input_features"], counts, strict=True):
            assert (row[:, :count] - reference[:, :count]).abs().max() < 1e-5
            assert not row[:, count:].any()


def test_whisper_at_full_context_is_the_encoder_of_transformers(whisper_folder, noise):
    recordings = [noise(2.0), noise(0.7)]
    whole = WhisperForConditionalGeneration.from_pretrained(whisper_folder).eval()
    inputs = WhisperFeatureExtractor()(recordings, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        expected = whole.model.encoder(**inputs).last_hidden_state
    full, frames = run(whisper_folder, recordings, context="full")
    own, _ = run(whisper_folder, recordings)
    for i, count in enumerate(frames):
        assert (full[i, :count] - expected[i, :count]).abs().max() < 1e-5
        assert (own[i, :count] - expected[i, :count]).abs().max() > 1e-3, "the context makes no difference"


def test_whisper_at_its_own_context_is_the_encoder_on_its_first_positions(whisper_folder, noise):
    """The encoder of transformers refuses other lengths than 30 s, unless it is configured for them."""
    samples = noise(1.0)
    whole = WhisperForConditionalGeneration.from_pretrained(whisper_folder).eval()
    inputs = WhisperFeatureExtractor()([samples], sampling_rate=RATE, return_tensors="pt")
    encoder = whole.model.encoder
    encoder.config.max_source_positions = 50
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(encoder.embed_positions.weight[:50])
    with torch.no_grad():
        expected = encoder(inputs["input_features"][:, :, :100]).last_hidden_state
    found, _ = run(whisper_folder, [samples])
    assert (found - expected).abs().max() < 1e-5


def test_filter_banks_are_those_of_w2v_bert(whisper_folder, noise):
    recordings = [noise(s) for s in (2.0, 0.5, 1.313, 0.035)]
    expected = SeamlessM4TFeatureExtractor()(recordings, sampling_rate=RATE, return_tensors="pt")
    values, _ = encoder_inputs(load_feature_extractor(str(whisper_folder)), recordings)
    windows = [(len(samples) - 400) // 160 + 1 for samples in recordings]
    found = kaldi_log_mel(values, windows, 80)
    assert expected["attention_mask"].sum(-1).tolist() == [count // 2 for count in windows]
    for row, reference, count in zip(found, expected["input_features"], windows, strict=True):
        pairs = row[: count // 2 * 2].reshape(-1, 160)
        assert (pairs - reference[: count // 2]).abs().max() < 1e-3


def test_recording_longer_than_whisper_hears_is_refused(whisper_folder):
    with pytest.raises(ModelError, match=r"at most 30 s for this encoder, found 30.1 s"):
        run(whisper_folder, [np.zeros(30 * RATE + 800, np.float32)])


@pytest.mark.parametrize(
    ("name", "expected"), [("hubert", "of none for this encoder"), ("whisper", "of one of own, full")]
)
def test_unknown_context_is_refused(name, expected, tmp_path):
    with pytest.raises(ModelError, match=expected):
        load_encoder(str(save_encoder(name, tmp_path)), context="half")


@pytest.mark.parametrize("name", ["wav2vec2_base", "w2v_bert"])
def test_encoder_that_joins_frames_is_refused(name, tmp_path):
    config = AutoConfig.from_pretrained(save_encoder(name, tmp_path), add_adapter=True)
    with pytest.raises(ModelError, match="expected an encoder at 50 Hz"):
        family_of(config)


def test_unknown_family_is_refused_by_name(decoder_folder):
    with pytest.raises(ModelError, match=r"expected an encoder of hubert, .*found 'smollm3'"):
        load_encoder(str(decoder_folder))


def test_windows_are_no_longer_than_what_whisper_hears(tmp_path, config, tokenizer, spoken):
    """Ten seconds of speech without a pause through an encoder of 5 s, whatever window is asked for."""
    folder = save_encoder("whisper", tmp_path / "whisper", max_s=5)
    config.encoder_id = str(folder)
    model = TinyAudioForConditionalGeneration(config)
    model.load_frozen_parts()
    recognizer = Recognizer(model.eval(), load_feature_extractor(str(folder)), tokenizer)
    samples = np.concatenate([samples for samples, _ in spoken[:8]])
    for window_s in (None, 30.0):
        (transcript,) = recognizer.stream([samples], Options(window_s=window_s, num_beams=1, max_new_tokens=2))
        assert transcript.error is None
        assert len(transcript.segments) > len(samples) / RATE / 5


def test_a_store_of_one_context_is_not_trained_or_continued_with_another(tmp_path, recipe_file):
    folder, store = save_encoder("whisper", tmp_path / "whisper"), tmp_path / "store"
    settings = (f"encoder.id={folder}", "encoder.context=full")
    stage_one(recipe_file, store, *settings)
    for other in ((), ("encoder.context=own",)):
        recipe = load_recipe(str(recipe_file), [settings[0], *other])
        with pytest.raises(RunError, match=r"its encoder.context is 'full', the recipe's"):
            check_encoder(recipe.encoder, FeatureStore.open(store).fingerprint, store)
        with pytest.raises(StoreMismatchError, match="context"):
            stage_one(recipe_file, store, settings[0], *other)
    check_encoder(load_recipe(str(recipe_file), settings).encoder, FeatureStore.open(store).fingerprint, store)


def test_own_context_may_be_named_or_not(tmp_path, recipe_file):
    folder, store = save_encoder("whisper", tmp_path / "whisper"), tmp_path / "store"
    stage_one(recipe_file, store, f"encoder.id={folder}")
    report = stage_one(recipe_file, store, f"encoder.id={folder}", "encoder.context=own")
    assert report.shards_written == 0
