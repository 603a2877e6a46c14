"""Quantised features: what is lost is small and known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from cache import Calibration, Moments, Quantized
from cache.quantize import CLIPS, pack, packed_bytes, quantize, unpack


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
    assert calibration.id == Calibration.from_base64(calibration.to_base64(), len(calibration.mean)).id
    assert calibration.id != Calibration(mean=np.ones(2, np.float32), std=np.ones(2, np.float32)).id


@pytest.mark.parametrize(
    ("mean", "std", "words"), [([0, 0], [1, 0], "positive"), ([0, np.nan], [1, 1], "finite"), ([0], [1, 1], "shapes")]
)
def test_a_useless_calibration_is_refused(mean: list[float], std: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Calibration(mean=np.array(mean, np.float32), std=np.array(std, np.float32))


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 7), dim=st.integers(1, 40), seed=st.integers(0, 99))
def test_packed_codes_are_one_stream_of_bits_and_come_back(bits: int, dim: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, dim)).astype(np.uint8)
    packed = np.zeros((3, packed_bytes(dim, bits)), np.uint8)
    pack(codes, packed, bits)
    for row, numbers in zip(packed, codes, strict=True):
        stream = int.from_bytes(row.tobytes(), "little")
        assert stream == sum(int(code) << (bits * i) for i, code in enumerate(numbers))
    found = np.full_like(codes, 255)
    unpack(packed, found, bits)
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize(
    ("bits", "at_least_db", "gain_db"),
    [(2, 7.5, 7), (3, 11.6, 3), (4, 16.2, 1), (5, 21.5, 0.2), (6, 27, 0), (7, 33, 0)],
)
def test_every_bit_is_worth_four_decibels_and_few_bits_gain_by_clipping(
    bits: int, at_least_db: float, gain_db: float
) -> None:
    moments = Moments(256)
    moments.update(outlier_features(4000, seed=2))
    calibration = moments.calibration()
    features = outlier_features(1000)
    codes, scales = quantize(features, calibration, bits)
    assert codes.shape == (1000, packed_bytes(256, bits))
    found = snr_per_dimension_db(features, Quantized(codes, scales, calibration, bits).dequantize())
    assert found > at_least_db
    zero = (2**bits - 1) / 2
    normal = (features - calibration.mean) / calibration.std
    step = np.abs(normal).max(axis=1, keepdims=True) / zero
    ratios = scales[:, None] / step
    assert np.abs(ratios - np.array(CLIPS)).min(axis=1).max() < 1e-3
    unclipped = (np.rint(normal / step + zero).clip(0, 2 * zero) - zero) * step * calibration.std + calibration.mean
    assert found > snr_per_dimension_db(features, unclipped) + gain_db - 0.01


def test_no_frame_has_a_smaller_error_at_another_scale_that_is_tried() -> None:
    calibration = Calibration(mean=np.zeros(64, np.float32), std=np.ones(64, np.float32))
    features = np.random.default_rng(0).standard_t(3, (50, 64)).astype(np.float32)
    restored = Quantized(*quantize(features, calibration, 4), calibration, 4).dequantize()
    ours = np.square(restored - features).sum(axis=1)
    peak = np.abs(features).max(axis=1, keepdims=True)
    for clip in CLIPS:
        step = (peak / 7.5 * clip).astype(np.float16).astype(np.float32)
        other = (np.clip(np.rint(features / step + 7.5), 0, 15) - 7.5) * step
        assert (ours <= np.square(other - features).sum(axis=1) * 1.001).all()


@pytest.mark.parametrize("bits", range(2, 8))
def test_extreme_frames_of_few_bits_stay_finite(bits: int) -> None:
    calibration = Calibration(mean=np.array([3, 4], np.float32), std=np.array([1, 1e-3], np.float32))
    features = np.array([[3, 4], [6e4, -6e4], [3 + 1e-7, 4]], np.float32)
    restored = Quantized(*quantize(features, calibration, bits), calibration, bits).dequantize()
    np.testing.assert_allclose(restored[[0, 2]], features[[0, 2]], atol=1e-6)
    assert np.isfinite(restored).all()
    assert quantize(np.zeros((0, 2), np.float32), calibration, bits)[0].shape == (0, packed_bytes(2, bits))


def test_the_bytes_of_int8_are_those_of_before() -> None:
    features = outlier_features(50)
    calibration = Calibration(mean=features.mean(axis=0), std=features.std(axis=0))
    normal = (features - calibration.mean) / calibration.std
    scales = (np.abs(normal).max(axis=1) / 127).astype(np.float16)
    codes = np.rint(normal / scales.astype(np.float32)[:, None]).clip(-127, 127).astype(np.int8)
    found = quantize(features, calibration)
    np.testing.assert_array_equal(found[0], codes)
    np.testing.assert_array_equal(found[1], scales)
