"""Random speech-like sound through every container and codec that can be written here: none of it is lost.

PyAV's own packet-by-packet decode is the reference: what is decoded is never shorter without a warning.
"""

import numpy as np
import pytest
from audio_files import correlation, packet_by_packet, speech, with_av, with_soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyaudio.model.audio import SAMPLING_RATE, iter_audio
from tinyaudio.model.errors import AudioError


def soundfile_writer(format, **options):
    return lambda samples, rate: with_soundfile(samples, rate, format, **options)


def av_writer(format, codec, *rates, **options):
    return lambda samples, rate: with_av(format, codec, samples, rate=rate, options=options), rates


WAV = ["PCM_16", "PCM_24", "PCM_32", "PCM_U8", "FLOAT", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "GSM610"]
ANY = (8_000, 16_000, 22_050, 44_100, 48_000)
OPUS = (8_000, 16_000, 48_000)
WRITERS = {
    **{f"WAV {name}": (soundfile_writer("WAV", subtype=name), ANY) for name in WAV},
    **{f"{name}": (soundfile_writer(name, subtype="PCM_16"), ANY) for name in ("WAVEX", "RF64", "W64", "AIFF", "AU")},
    **{f"FLAC {name}": (soundfile_writer("FLAC", subtype=name), ANY) for name in ("PCM_S8", "PCM_16", "PCM_24")},
    "CAF": (soundfile_writer("CAF", subtype="PCM_16"), ANY),
    "CAF ALAC": (soundfile_writer("CAF", subtype="ALAC_16"), ANY),
    "Ogg Vorbis": (soundfile_writer("OGG"), ANY),
    "Ogg Opus": (soundfile_writer("OGG", subtype="OPUS"), OPUS),
    "MP3 constant": (soundfile_writer("MP3", bitrate_mode="CONSTANT"), ANY),
    "MP3 variable": (soundfile_writer("MP3", bitrate_mode="VARIABLE"), ANY),
    "MP3 by FFmpeg": av_writer("mp3", "mp3", *ANY),
    "MP3 without header": av_writer("mp3", "mp3", *ANY, write_xing="0", id3v2_version="0"),
    "MP2": av_writer("mp2", "mp2", 44_100, 48_000, 22_050),
    "AAC": av_writer("adts", "aac", *ANY),
    "AC3": av_writer("ac3", "ac3", 44_100, 48_000),
    "M4A": av_writer("mp4", "aac", *ANY),
    "M4A in fragments": av_writer("mp4", "aac", *ANY, movflags="frag_keyframe+empty_moov"),
    "M4A ALAC": av_writer("mov", "alac", 44_100, 48_000),
    "3GP": av_writer("3gp", "libopencore_amrnb", 8_000),
    "AMR": av_writer("amr", "libopencore_amrnb", 8_000),
    "WebM": av_writer("webm", "libopus", 48_000, 16_000),
    "MKA AAC": av_writer("matroska", "aac", *ANY),
    "MKA FLAC": av_writer("matroska", "flac", *ANY),
    "MKA MP3": av_writer("matroska", "mp3", 44_100, 48_000),
    "MKA live": av_writer("matroska", "aac", 48_000, live="1"),
    "Ogg FLAC": av_writer("ogg", "flac", *ANY),
    "Ogg Opus by FFmpeg": av_writer("ogg", "libopus", 48_000, 16_000),
    "TS": av_writer("mpegts", "aac", 44_100, 48_000),
    "FLV": av_writer("flv", "aac", 44_100),
    "AVI": av_writer("avi", "mp3", 44_100, 48_000),
    "NUT": av_writer("nut", "libopus", 48_000),
    "TTA": av_writer("tta", "tta", *ANY),
    "WavPack": av_writer("wv", "wavpack", *ANY),
}

CHAINED = ["Ogg Vorbis", "Ogg Opus", "Ogg FLAC", "MP3 variable", "MP3 without header", "FLAC PCM_16"]


def compare(kind, data, samples, rate, num_parts=1):
    """Decode, and compare with PyAV, which does not trim the last frame of each chained part."""
    warnings = []
    try:
        decoded = np.concatenate([np.zeros(0, np.float32), *iter_audio(data, on_warning=warnings.append)])
    except AudioError:
        decoded, warnings = np.zeros(0, np.float32), ["error"]
    try:
        theirs, their_rate, failed = packet_by_packet(data)
    except Exception:  # PyAV cannot read every file that libsndfile can
        theirs, their_rate, failed = np.zeros(0, np.float32), 1, True
    decoded_s, their_s = len(decoded) / SAMPLING_RATE, len(theirs) / max(their_rate, 1)
    if not warnings:
        assert decoded_s > their_s - 0.06 * num_parts, f"{kind}: {decoded_s} s of {their_s} s, without a warning"
        assert not failed or decoded_s > len(samples) / rate - 0.1
    return decoded, warnings


def check_whole(kind, duration_s, seed, level):
    write, rates = WRITERS[kind]
    rate = rates[seed % len(rates)]
    samples = speech(duration_s, rate, seed) * np.float32(level)
    decoded, warnings = compare(kind, write(samples, rate), samples, rate)
    assert warnings == []
    # At most the delay and the padding of an encoder longer: three frames of 72 ms for MP3 at 8 kHz.
    assert -0.05 < len(decoded) / SAMPLING_RATE - duration_s < 0.3
    reference = np.concatenate(list(iter_audio(with_soundfile(samples, rate, subtype="FLOAT"))))
    most = min(2_600, len(reference) // 4)
    assert correlation(reference, decoded, most) > (0.4 if rate == 8_000 else 0.8)  # AMR keeps 12 of 128 kbit/s


def check_cut(kind, seed, share):
    write, rates = WRITERS[kind]
    rate = rates[seed % len(rates)]
    samples = speech(3.0, rate, seed)
    whole = write(samples, rate)
    compare(kind, whole[: int(len(whole) * share)], samples, rate)


def check_chained(kind, seed, num_parts):
    write, rates = WRITERS[kind]
    rate = rates[seed % len(rates)]
    parts = [speech(1.0 + i / 2, rate, seed + i) for i in range(num_parts)]
    samples = np.concatenate(parts)
    decoded, warnings = compare(kind, b"".join(write(part, rate) for part in parts), samples, rate, num_parts)
    assert warnings == []
    assert -0.05 < len(decoded) / SAMPLING_RATE - len(samples) / rate < 0.3 * num_parts


@pytest.mark.parametrize("kind", WRITERS)
def test_nothing_is_lost_in_one_random_file_of_each_kind(kind):
    rng = np.random.default_rng(len(kind))
    check_whole(kind, rng.uniform(0.6, 3.0), int(rng.integers(1 << 30)), rng.uniform(0.05, 1.0))
    check_cut(kind, int(rng.integers(1 << 30)), rng.uniform(0.3, 0.99))
    if kind in CHAINED:
        check_chained(kind, int(rng.integers(1 << 30)), 2)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(duration_s=st.floats(0.6, 6.0), seed=st.integers(0, 1 << 30), level=st.floats(0.05, 1.0))
@pytest.mark.parametrize("kind", WRITERS)
def test_whole_file_is_heard_whole(kind, duration_s, seed, level):
    check_whole(kind, duration_s, seed, level)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1 << 30), share=st.floats(0.05, 0.99))
@pytest.mark.parametrize("kind", WRITERS)
def test_file_cut_anywhere_is_never_shorter_without_a_warning(kind, seed, share):
    check_cut(kind, seed, share)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1 << 30), num_parts=st.integers(2, 4))
@pytest.mark.parametrize("kind", CHAINED)
def test_chained_files_are_heard_whole(kind, seed, num_parts):
    check_chained(kind, seed, num_parts)
