"""int8 features: what is lost is small and known. Run: pytest tests/test_cache_quantize.py"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from cache import Calibration, Moments, Quantized
from cache.quantize import quantize


def outlier_features(count: int, seed: int = 0) -> np.ndarray:
    """Draw features like a trained encoder's: dimensions of unlike loudness, three of them 25 times as loud."""
    rng = np.random.default_rng(seed)
    scales = np.exp(np.random.default_rng(1).normal(0, 0.7, 256))
    scales[:3] *= 25
    return (rng.standard_t(6, (count, 256)) * scales + scales).astype(np.float32)


def snr_per_dimension_db(features: np.ndarray, restored: np.ndarray) -> float:
    noise = np.square(restored - features).mean(axis=0) / features.var(axis=0)
    return float(-10 * np.log10(noise.mean()))


def test_int8_keeps_forty_decibels_in_every_dimension_where_plain_scaling_keeps_fifteen() -> None:
    moments = Moments(256)
    moments.update(outlier_features(4000, seed=2))
    calibration = moments.calibration()
    features = outlier_features(4000)
    calibrated = snr_per_dimension_db(features, Quantized(*quantize(features, calibration), calibration).dequantize())
    plain = Calibration(mean=np.zeros(256, np.float32), std=np.ones(256, np.float32))
    uncalibrated = snr_per_dimension_db(features, Quantized(*quantize(features, plain), plain).dequantize())
    assert calibrated > 38
    assert uncalibrated < 20


@settings(max_examples=100, deadline=None)
@given(
    st_np.arrays(np.float32, st.tuples(st.integers(1, 20), st.just(4)), elements=st.floats(-60_000, 60_000, width=32))
)
def test_the_error_is_half_a_step_at_most(features: np.ndarray) -> None:
    calibration = Calibration(mean=np.array([0, 1, -5, 100], np.float32), std=np.array([1, 2, 50, 0.5], np.float32))
    codes, scales = quantize(features, calibration)
    assert codes.dtype == np.int8
    assert codes.min(initial=0) >= -127
    assert np.isfinite(scales).all()
    restored = Quantized(codes, scales, calibration).dequantize()
    step = scales.astype(np.float64)[:, None] * calibration.std
    rounding = 1e-5 * np.abs(features).max()
    assert (np.abs(restored - features) <= 0.57 * step + 127 * step * 2**-11 + rounding).all()


def test_a_frame_at_the_mean_is_exact_and_an_empty_utterance_is_empty() -> None:
    calibration = Calibration(mean=np.array([3, 4], np.float32), std=np.array([1, 1], np.float32))
    codes, scales = quantize(np.array([[3, 4]], np.float32), calibration)
    np.testing.assert_array_equal(Quantized(codes, scales, calibration).dequantize(), [[3, 4]])
    assert quantize(np.zeros((0, 2), np.float32), calibration)[0].shape == (0, 2)


def test_moments_do_not_depend_on_how_the_frames_come() -> None:
    frames = np.random.default_rng(0).normal(1e4, 1, (5000, 3))
    whole, parts = Moments(3), Moments(3)
    whole.update(frames)
    for part in np.array_split(frames, 50):
        parts.update(part)
    for moments in (whole, parts):
        assert moments.num_frames == 5000
        np.testing.assert_allclose(moments.mean, frames.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(moments.std, frames.std(axis=0), rtol=1e-9)


def test_a_calibration_knows_when_it_has_seen_enough() -> None:
    moments = Moments(1)
    for _ in range(1000):
        assert not moments.is_enough
        moments.update(np.zeros((100, 1)))
    assert moments.is_enough
    np.testing.assert_array_equal(moments.calibration().std, [1])  # a dimension that never moved


def test_the_id_of_a_calibration_is_that_of_its_numbers() -> None:
    calibration = Calibration(mean=np.zeros(2, np.float32), std=np.ones(2, np.float32))
    assert calibration.id == Calibration.from_array(calibration.array).id
    assert calibration.id != Calibration(mean=np.ones(2, np.float32), std=np.ones(2, np.float32)).id


@pytest.mark.parametrize(
    ("mean", "std", "words"), [([0, 0], [1, 0], "positive"), ([0, np.nan], [1, 1], "finite"), ([0], [1, 1], "shapes")]
)
def test_a_useless_calibration_is_refused(mean: list[float], std: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Calibration(mean=np.array(mean, np.float32), std=np.array(std, np.float32))
