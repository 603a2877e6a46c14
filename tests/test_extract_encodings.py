"""What a store's encoding loses of the bundled encoder's features: `docs/benchmarks.md` gives the figures."""

import numpy as np
import pytest
import torch

from cache.quantize import Moments, Quantized, quantize
from pipelines.corpora import open_corpus
from pipelines.recipes import load_recipe
from tinyaudio.model.audio import load_audio
from tinyaudio.model.encoder import encode, encoder_inputs, load_encoder, load_feature_extractor


def snr_db(reference: np.ndarray, decoded: np.ndarray) -> tuple[float, float]:
    """Median and worst dimension of 10 log10(variance / mean squared error)."""
    noise = np.square(reference.astype(np.float64) - decoded).mean(axis=0)
    levels = 10 * np.log10(reference.astype(np.float64).var(axis=0) / noise)
    return float(np.median(levels)), float(levels.min())


def test_the_error_is_that_of_each_dimension_and_a_loud_one_does_not_hide_a_quiet_one():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(20_000, 3)).astype(np.float32) * np.float32([1, 1, 1_000]) + np.float32(50)
    noise = rng.normal(size=reference.shape).astype(np.float32) * np.float32([0.1, 0.01, 1.0])
    median, worst = snr_db(reference, reference + noise)
    assert worst == pytest.approx(20.0, abs=0.2)  # 1 to 0.1
    assert median == pytest.approx(40.0, abs=0.2)  # 1 to 0.01; the loud dimension is at 60


@pytest.mark.slow
def test_int8_loses_more_than_float16_and_less_than_one_step_for_all_frames():
    recipe = load_recipe("demo")
    corpus, encoder = open_corpus(recipe.corpus), load_encoder(recipe.encoder.id)
    extractor = load_feature_extractor(recipe.encoder.id)
    ids = corpus.scan("dev")["source_id"].to_pylist()
    rows, moments = [], Moments(encoder.config.hidden_size)
    for _, audio in corpus.read_audio(ids):
        (features,), _ = encode(encoder, *encoder_inputs(extractor, [load_audio(audio)]))
        rows.append(features.numpy())
        moments.update(rows[-1])
    reference, calibration = np.concatenate(rows), moments.calibration()
    codes, scales = quantize(reference, calibration)
    normal = (reference - calibration.mean) / calibration.std
    step = np.abs(normal).max() / 127
    decoded = {
        "float16": reference.astype(np.float16).astype(np.float32),
        "bfloat16": torch.from_numpy(reference).bfloat16().float().numpy(),
        "int8": Quantized(codes, scales, calibration).dequantize(),
        "int4": Quantized(*quantize(reference, calibration, 4), calibration, 4).dequantize(),
        "int3": Quantized(*quantize(reference, calibration, 3), calibration, 3).dequantize(),
        "one step": np.rint(normal / step) * step * calibration.std + calibration.mean,
    }
    found = {encoding: snr_db(reference, features) for encoding, features in decoded.items()}
    assert found["float16"] == pytest.approx((72.4, 69.8), abs=1)
    assert found["bfloat16"] == pytest.approx((54.3, 51.8), abs=1)
    assert found["int8"] == pytest.approx((43.5, 43.3), abs=1)
    assert found["int4"] == pytest.approx((19.7, 18.5), abs=0.5)
    assert found["int3"] == pytest.approx((14.4, 12.6), abs=0.5)
    assert found["one step"] == pytest.approx((37.2, 37.0), abs=1)
