"""Lengths that headers guess, do not know or state wrongly: what is decoded is what counts."""

import io
import struct

import numpy as np
import pytest
import soundfile
from audio_files import correlation, speech, with_av, with_soundfile

from tinyaudio.model.audio import SAMPLING_RATE, iter_audio, load_audio, probe_duration_s
from tinyaudio.model.errors import AudioError
from tinyaudio.model.structure import _page_checksum


def heard(data, **options):
    """The seconds that are decoded, the warnings, and the samples."""
    warnings = []
    samples = np.concatenate(list(iter_audio(data, on_warning=warnings.append, **options)))
    return len(samples) / SAMPLING_RATE, warnings, samples


def patched(data, place, value):
    return data[:place] + value + data[place + len(value) :]


def variable_mp3(duration_s, header):
    """Loud and silent in turn, so that a guess from the first frames' bit rate is far off."""
    samples = speech(duration_s, 44_100)
    samples[: len(samples) // 2] *= 0.001
    return with_av("mp3", "mp3", samples, rate=44_100, options={"write_xing": str(int(header))})


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
@pytest.mark.parametrize("bitrate_mode", ["CONSTANT", "VARIABLE"])
def test_mp3_without_a_header_is_heard_to_its_end(rate, bitrate_mode):
    samples = speech(20.0, rate)
    samples[: rate * 5] *= 0.002
    data = with_soundfile(samples, rate, "MP3", bitrate_mode=bitrate_mode, compression_level=0.9)
    start = data.find(b"\xff")
    place = max(data.find(b"Xing"), data.find(b"Info"))
    if place > 0:  # remove the header's frame, as an encoder that writes to a pipe does
        following = data.find(data[start : start + 2], place)
        data = data[following:]
    duration_s, warnings, _ = heard(data)
    assert duration_s == pytest.approx(20.0, abs=0.15)
    assert warnings == []
    assert probe_duration_s(data) is None


def test_mp3_whose_header_states_too_little_is_heard_to_its_end():
    data = variable_mp3(12.0, header=True)
    place = max(data.find(b"Xing"), data.find(b"Info"))
    assert place > 0
    for num_frames in (1, 100, 0):
        duration_s, warnings, _ = heard(patched(data, place + 8, struct.pack(">I", num_frames)))
        assert duration_s == pytest.approx(12.0, abs=0.15)
        assert warnings == []


WAV_SIZES = [0, 1000, 0x7FFFF000, 0xFFFFFFFF, 0xFFFFFFF0]


@pytest.mark.parametrize("size", WAV_SIZES)
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT", "ULAW"])
def test_wav_of_unknown_or_wrong_size_is_heard_to_its_end(size, subtype):
    whole = with_soundfile(speech(3.0), subtype=subtype)
    place = whole.find(b"data") + 4
    whole = whole[: place + 4 + int.from_bytes(whole[place : place + 4], "little")]  # no chunks after the samples
    data = patched(patched(whole, place, struct.pack("<I", size)), 4, struct.pack("<I", size))
    duration_s, warnings, samples = heard(data)
    assert duration_s == 3.0
    assert warnings == []
    assert np.array_equal(samples, load_audio(whole))


@pytest.mark.parametrize("size", [0, 1000, 0x7FFFF000, 0xFFFFFFFF])
def test_aiff_and_au_of_unknown_or_wrong_size_are_heard_to_their_end(size):
    for kind, name, offset in (("AIFF", b"SSND", 4), ("AU", b".snd", 8)):
        whole = with_soundfile(speech(3.0), format=kind, subtype="PCM_16")
        place = whole.find(name) + offset
        duration_s, warnings, samples = heard(patched(whole, place, struct.pack(">I", size)))
        assert duration_s == 3.0, kind
        assert warnings == []
        assert np.array_equal(samples, load_audio(whole))


def test_64_bit_sizes_that_are_unknown_or_wrong_are_no_limit():
    for kind, name, offset, order in (("W64", b"data", 16, "<"), ("CAF", b"data", 4, ">"), ("RF64", b"ds64", 16, "<")):
        whole = with_soundfile(speech(3.0), format=kind, subtype="PCM_16")
        place = whole.find(name) + offset
        if kind == "RF64":
            assert whole[whole.find(b"data") + 4 :][:4] == b"\xff" * 4
        for size in (0, 1000, (1 << 64) - 1):
            duration_s, _, samples = heard(patched(whole, place, struct.pack(order + "Q", size)))
            assert duration_s == 3.0, (kind, size)
            assert np.array_equal(samples, load_audio(whole))


def test_chunks_and_tags_behind_the_samples_are_not_heard():
    whole = with_soundfile(speech(2.0))
    place = whole.find(b"data") + 4
    whole = whole[: place + 4 + int.from_bytes(whole[place : place + 4], "little")]
    tails = [b"LIST" + struct.pack("<I", 4) + b"INFO", b"TAG" + b"x" * 125, b"ID3\x04" + b"y" * 50, bytes(2048), b"\0"]
    for tail in tails:
        duration_s, warnings, _ = heard(whole + tail)
        assert duration_s == 2.0
        assert warnings == []


@pytest.mark.parametrize("num_samples", [0, 1, 5000, (1 << 36) - 1])
def test_flac_of_unknown_or_wrong_length_is_heard_to_its_end(num_samples):
    whole = with_soundfile(speech(4.0), format="FLAC")
    packed = int.from_bytes(whole[18:26], "big") >> 36 << 36 | num_samples
    duration_s, warnings, samples = heard(patched(whole, 18, packed.to_bytes(8, "big")))
    assert duration_s == 4.0
    assert np.array_equal(samples, load_audio(whole))
    assert warnings == (["input_truncated"] if num_samples > 1 << 35 else [])  # it promises 49 days
    assert load_audio(io.BytesIO(whole)).shape == samples.shape


CUT = {
    "wav": lambda s: with_soundfile(s, 48_000),
    "float wav": lambda s: with_soundfile(s, 48_000, subtype="FLOAT"),
    "aiff": lambda s: with_soundfile(s, 48_000, "AIFF"),
    "w64": lambda s: with_soundfile(s, 48_000, "W64"),
    "rf64": lambda s: with_soundfile(s, 48_000, "RF64"),
    "caf": lambda s: with_soundfile(s, 48_000, "CAF"),
    "flac": lambda s: with_soundfile(s, 48_000, "FLAC"),
    "ogg vorbis": lambda s: with_soundfile(s, 48_000, "OGG"),
    "ogg opus": lambda s: with_soundfile(s, 48_000, "OGG", subtype="OPUS"),
    "ogg flac": lambda s: with_av("ogg", "flac", s),
    "mp3": lambda s: with_soundfile(s, 48_000, "MP3"),
    "aac": lambda s: with_av("adts", "aac", s),
    "ac3": lambda s: with_av("ac3", "ac3", s),
    "m4a, index first": lambda s: with_av("mp4", "aac", s, options={"movflags": "frag_keyframe+empty_moov"}),
    "webm": lambda s: with_av("webm", "libopus", s),
    "mka": lambda s: with_av("matroska", "flac", s),
    "live mka": lambda s: with_av("matroska", "aac", s, options={"live": "1"}),
    "flv": lambda s: with_av("flv", "aac", s),
    "avi": lambda s: with_av("avi", "mp3", s),
}


@pytest.mark.parametrize("kind", CUT)
def test_what_is_left_of_a_cut_file_is_heard_with_a_warning(kind):
    samples = speech(8.0, 48_000)
    data = CUT[kind](samples)
    whole_s, warnings, whole = heard(data)
    assert whole_s == pytest.approx(8.0, abs=0.1)
    assert warnings == []
    for share in (0.55, 0.83):
        duration_s, warnings, part = heard(data[: int(len(data) * share) | 1])
        assert 0.5 * share * 8 < duration_s < 8.0
        assert warnings == ["input_truncated"]
        assert correlation(whole[: len(part)], part) > 0.98


def test_mp4_without_its_index_is_one_clear_line():
    data = with_av("mp4", "aac", speech(4.0, 48_000))
    with pytest.raises(AudioError, match=r"no index \(moov\).* cut short") as caught:
        load_audio(data[: len(data) // 2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["flac", "mp3", "aac", "ogg flac", "ogg opus", "ogg vorbis"])
def test_damage_in_the_middle_is_reported_and_the_rest_is_heard(kind):
    data = bytearray(CUT[kind](speech(8.0, 48_000)))
    middle = len(data) // 2
    data[middle : middle + 1500] = bytes(np.random.default_rng(1).integers(0, 250, 1500, dtype=np.uint8))
    duration_s, warnings, _ = heard(bytes(data))
    assert duration_s > 6.5
    assert set(warnings) & {"input_damaged", "input_truncated"}


def flac_frames(data):
    """Where the frames of a FLAC file with frames of fixed length begin."""
    places, place = [], data.find(b"\xff\xf8")
    while place >= 0:
        if data.startswith(chr(len(places)).encode(), place + 4):
            places.append(place)
        place = data.find(b"\xff\xf8", place + 2)
    return places


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    "damage", ["a bit", "noise", "a frame is missing", "five frames are missing", "bytes are missing"]
)
def test_damaged_flac_is_heard_to_its_end_from_the_frame_after_the_damage(damage, channels):
    samples = np.stack([speech(25.0, seed=i) for i in range(channels)], axis=1)
    whole = with_soundfile(samples, format="FLAC")
    places = flac_frames(whole)
    assert len(places) == -(-25 * 16_000 // 4096)
    for number in (1, 20, 50, 90):  # frames of 0.26 s; the decoder works on blocks of 10 s
        place, following = places[number], places[number + 1]
        data = {
            "a bit": patched(whole, place + 99, bytes([whole[place + 99] ^ 4])),
            "noise": patched(whole, place + 50, np.random.default_rng(1).bytes(1000)),
            "a frame is missing": whole[:place] + whole[following:],
            "five frames are missing": whole[:place] + whole[places[number + 5] :],
            "bytes are missing": whole[: place + 50] + whole[following - 50 :],
        }[damage]
        duration_s, warnings, heard_samples = heard(data)
        assert duration_s == 25.0, number
        assert warnings == ["input_damaged"], number
        num_lost = 5 if damage.startswith("five") else 1
        different = np.flatnonzero(heard_samples != load_audio(whole))
        assert set(different // 4096) == set(range(number, number + num_lost))


def test_digital_silence_in_flac_is_not_taken_for_damage():
    for begin_s, end_s in ((0, 3), (9, 12), (18, 20), (0, 20)):
        samples = speech(20.0)
        samples[begin_s * 16_000 : end_s * 16_000] = 0
        duration_s, warnings, heard_samples = heard(with_soundfile(samples, format="FLAC", subtype="PCM_24"))
        assert (duration_s, warnings) == (20.0, [])
        assert np.abs(heard_samples - samples).max() < 1e-6


@pytest.mark.parametrize("at", [3, 12, 28])
@pytest.mark.parametrize("late", [-2_000, -648, 2_000])
def test_opus_whose_positions_jump_by_a_few_milliseconds_is_heard_to_its_end(at, late):
    """As programs leave them that join files without encoding them again: libsndfile stops where one is too early."""
    data, place, number = bytearray(with_av("ogg", "libopus", speech(30.0, 48_000))), 0, 0
    while place < len(data):
        size = 27 + data[place + 26] + sum(data[place + 27 : place + 27 + data[place + 26]])
        position = int.from_bytes(data[place + 6 : place + 14], "little")
        if number >= at:
            data[place + 6 : place + 14] = struct.pack("<Q", position + late)
            data[place + 22 : place + 26] = struct.pack("<I", _page_checksum(bytes(data[place : place + size])))
        place, number = place + size, number + 1
    assert number > 28
    duration_s, warnings, _ = heard(bytes(data))
    assert duration_s == pytest.approx(30.0, abs=0.1)
    assert warnings == []


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "WAV"])
def test_sound_files_have_libsndfiles_samples(kind):
    data = with_soundfile(speech(12.0, seed=5), format=kind)
    assert np.array_equal(load_audio(data), soundfile.read(io.BytesIO(data), dtype="float32")[0])


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("bitrate_mode", ["CONSTANT", "VARIABLE"])
def test_mp3_has_the_samples_that_existing_stores_were_made_from(rate, bitrate_mode):
    """libsndfile decoded MP3 before FFmpeg did: no other length or delay, and differences by rounding only."""
    data = with_soundfile(speech(6.0, rate), rate, "MP3", bitrate_mode=bitrate_mode)
    earlier = load_audio(with_soundfile(soundfile.read(io.BytesIO(data), dtype="float32")[0], rate, subtype="FLOAT"))
    samples = load_audio(data)
    assert len(samples) == len(earlier)
    assert np.abs(samples - earlier).max() < 5e-6
