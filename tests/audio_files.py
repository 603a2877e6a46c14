"""Audio files made by PyAV and soundfile, for tests: any container, codec, number of tracks and time stamps."""

import io

import av
import numpy as np
import soundfile
from av.audio.resampler import AudioResampler


def speech(duration_s=4.0, rate=16_000, seed=0):
    """Sound like speech: a buzz of changing pitch, filtered by changing resonances, in bursts like syllables."""
    rng = np.random.default_rng(seed)
    num = int(duration_s * rate)
    times = np.arange(num) / rate
    num_syllables = max(2, int(duration_s * 4))
    knots = np.linspace(0, max(duration_s, 1e-3), num_syllables)
    pitch = np.interp(times, knots, rng.uniform(90, 220, num_syllables))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    loudness = np.interp(times, knots, rng.uniform(0.15, 1.0, num_syllables))
    sound = np.zeros(num)
    for harmonic in range(1, 12):
        weights = np.interp(times, knots, rng.uniform(0.0, 1.0, num_syllables)) / harmonic
        sound += weights * np.sin(harmonic * phase) * (harmonic * pitch < 0.45 * rate)
    sound = sound * loudness + 0.01 * rng.standard_normal(num)
    return (0.4 * sound / max(np.abs(sound).max(), 1e-9)).astype(np.float32)


def with_soundfile(samples, rate=16_000, format="WAV", **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, **options)
    return buffer.getvalue()


def with_av(format, codec, *tracks, rate=48_000, start_s=0.0, gap=None, default=0, film_s=0.0, options=None):
    """Encode tracks, (n,) or (channels, n) each.

    Args:
        start_s: time stamp of the first sample.
        gap: (at_s, length_s), seconds without time stamps after `at_s` seconds of sound.
        default: number of the default track.
        film_s: seconds of a picture in a track of its own.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format, options=options or {}) as container:
        film = None
        if film_s:
            film = container.add_stream({"flv": "flv", "mpeg": "mpeg1video"}.get(format, "mpeg4"), rate=25)
            film.width = film.height = 64
            film.pix_fmt = "yuv420p"
        streams = []
        for number, samples in enumerate(tracks):
            samples = np.atleast_2d(samples)
            layout = {1: "mono", 2: "stereo"}[len(samples)]
            stream = container.add_stream(codec, rate=rate, layout=layout)
            if len(tracks) > 1:
                stream.disposition = av.stream.Disposition(int(number == default))
            streams.append((stream, samples, layout))
        packets = []
        for i in range(int(film_s * 25)):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), i % 200, np.uint8), format="rgb24")
            frame.pts = i
            packets += film.encode(frame)
        if film is not None:
            packets += film.encode(None)
        for stream, samples, layout in streams:
            size = stream.codec_context.frame_size or 1024
            resampler = AudioResampler(stream.codec_context.format, layout, rate, frame_size=size)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, 0
            shift, position = int(start_s * rate), 0
            for part in [*resampler.resample(frame), *resampler.resample(None)]:
                late = int(gap[1] * rate) if gap is not None and position >= gap[0] * rate else 0
                position += part.samples
                part.pts = position - part.samples + shift + late
                packets += stream.encode(part)
            packets += stream.encode(None)
        for packet in sorted(packets, key=lambda p: float((p.dts or 0) * p.time_base)):
            container.mux(packet)
    return buffer.getvalue()


def packet_by_packet(data, track=0):
    """Decode as plainly as PyAV can: every packet in order; mono samples, their rate, and whether any packet failed."""
    samples, rate, failed = [], 0, False
    with av.open(io.BytesIO(data), mode="r", metadata_errors="replace") as container:
        stream = container.streams.audio[track]
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                return _joined(samples), rate, True
            if packet is None:
                return _joined(samples), rate, failed
            try:
                frames = packet.decode()
            except av.FFmpegError:
                failed = True
                continue
            for frame in frames:
                rate = frame.sample_rate
                resampler = AudioResampler("fltp", frame.layout.name, rate)
                for part in resampler.resample(frame):
                    samples.append(part.to_ndarray().mean(axis=0))


def _joined(samples):
    return np.concatenate(samples) if samples else np.zeros(0, np.float32)


def correlation(a, b, most=1_600):
    """The best correlation within a shift of `most` samples; encoders add a delay."""
    size = min(len(a), len(b)) - 2 * most
    reference = a[most : most + size]
    if size < 100 or not reference.std():
        return 0.0

    def at(shift):
        other = b[most + shift : most + shift + size]
        return float(np.corrcoef(reference, other)[0, 1]) if len(other) == size and other.std() else 0.0

    coarse = max(range(-most, most + 1, 5), key=at)
    return max(0.0, *map(at, range(max(-most, coarse - 4), min(most, coarse + 4) + 1)))
