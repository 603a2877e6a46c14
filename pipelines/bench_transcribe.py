"""How fast transcription is, and where its time goes; everything measured in one run on one machine.

RTFx is seconds of audio over seconds of wall clock, summed over the set (the Open ASR Leaderboard's definition).
"""

import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers import pipeline

from tinyaudio.audio import SAMPLING_RATE, Samples, load_audio
from tinyaudio.errors import ModelError
from tinyaudio.transcribe import Transcriber, default_model

CORPUS = Path(__file__).parent / "demo" / "corpus"
BEAMS = (1, 4)


@dataclass(frozen=True, kw_only=True)
class TranscribeBench:
    """One run.

    Args:
        utterances, audio_s: what was transcribed.
        rtfx: "<way>_<beams>" -> RTFx, median of the repeats; ways: single (plain pipeline(), one by one), batched.
        batched_vs_single: beams -> speed of batched over single.
        same_text: whether all ways at equal beams gave the same texts.
        shares: beams -> part of a batched run's busy time in decode (audio), encoder, prefill, generation; in 0..1.
        peak_rss_bytes: of this process.
        device, batch_size, repeats: how.
    """

    utterances: int
    audio_s: float
    rtfx: dict[str, float]
    batched_vs_single: dict[str, float]
    same_text: bool
    shares: dict[str, dict[str, float]]
    peak_rss_bytes: int
    device: str
    batch_size: int
    repeats: int


def bench_transcribe(*, full_size: bool = False, device: str = "auto") -> dict[str, Any]:
    """Measure the default model ($TINYAUDIO_MODEL, else runs/latest); the fields of `TranscribeBench`.

    Raises:
        ModelError: full_size, which is not written yet.
        MissingModelError: no model.
    """
    if full_size:
        raise ModelError("bench transcribe --full-size is not written yet; run it without, on a trained model")
    return asdict(measure(default_model(), device))


def format_table(results: dict[str, Any]) -> str:
    """Lay the results out for a terminal."""
    lines = [
        f"{results['utterances']} utterances, {results['audio_s']} s of audio, {results['device']}, "
        f"batches of {results['batch_size']}, median of {results['repeats']}; "
        f"texts {'equal' if results['same_text'] else 'DIFFER'}; peak memory {results['peak_rss_bytes'] / 1e6:.0f} MB",
        "beams  RTFx one by one  RTFx batched  ratio  share of: decode  encoder  prefill  generation",
    ]
    for beams, shares in results["shares"].items():
        single, batched = (results["rtfx"][f"{way}_{beams}"] for way in ("single", "batched"))
        ratio = results["batched_vs_single"][beams]
        parts = "".join(f"{shares[part]:>9.0%}" for part in ("decode", "encoder", "prefill", "generation"))
        lines.append(f"{beams:>5}  {single:>15}  {batched:>12}  {ratio:>5}           {parts}")
    return "\n".join(lines)


def measure(
    model: str, device: str, num_utterances: int = 64, batch_size: int = 16, repeats: int = 3
) -> TranscribeBench:
    """Measure one by one against batched, at 1 and 4 beams, side by side, on the bundled test split.

    Raises:
        TinyAudioError: the model cannot be loaded.
    """
    (path,) = CORPUS.glob("test-0*.parquet")
    encoded = [row["wav"]["bytes"] for row in pq.read_table(path).slice(0, num_utterances).to_pylist()]
    audio_s = sum(len(load_audio(data)) for data in encoded) / SAMPLING_RATE
    transcriber = Transcriber.load(model, device=device)
    asr = pipeline("automatic-speech-recognition", model=model, trust_remote_code=True, device=transcriber.model.device)
    asr(encoded[0])  # the first call allocates and loads what stays loaded
    rtfx: dict[str, float] = {}
    shares, ratios, texts = {}, {}, defaultdict(list)
    for beams in BEAMS:
        ways: dict[str, Callable[[], list[str]]] = {
            "single": lambda beams=beams: [asr(data, num_beams=beams)["text"] for data in encoded],  # type: ignore[misc]
            "batched": lambda beams=beams: _batched(transcriber, encoded, batch_size, beams),  # type: ignore[misc]
        }
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(repeats):  # in turns, so that a busy minute of the machine hits both
            for way, run in ways.items():
                started = time.perf_counter()
                texts[beams].append(run())
                times[way].append(time.perf_counter() - started)
        for way in ways:
            rtfx[f"{way}_{beams}"] = round(audio_s / statistics.median(times[way]), 2)
        ratios[str(beams)] = round(rtfx[f"batched_{beams}"] / rtfx[f"single_{beams}"], 2)
        shares[str(beams)] = _shares(transcriber, encoded, batch_size, beams)
    return TranscribeBench(
        utterances=len(encoded),
        audio_s=round(audio_s, 1),
        rtfx=rtfx,
        batched_vs_single=ratios,
        same_text=all(all(text == many[0] for text in many) for many in texts.values()),
        shares=shares,
        peak_rss_bytes=_peak_rss_bytes(),
        device=str(transcriber.model.device),
        batch_size=batch_size,
        repeats=repeats,
    )


def _batched(transcriber: Transcriber, encoded: Sequence[bytes], batch_size: int, beams: int) -> list[str]:
    return [t.text for t in transcriber.transcribe(encoded, batch_size=batch_size, num_beams=beams)]


def _shares(transcriber: Transcriber, encoded: Sequence[bytes], batch_size: int, beams: int) -> dict[str, float]:
    """Take one batched run apart by timing the calls inside; audio is decoded apart, as its thread runs beside."""
    seconds: dict[str, float] = defaultdict(float)
    started = time.perf_counter()
    _decode_all(encoded)
    seconds["decode"] = time.perf_counter() - started
    with _timed(transcriber.model, seconds):
        _batched(transcriber, encoded, batch_size, beams)
    total = sum(seconds.values())
    return {name: round(seconds[name] / total, 3) for name in ("decode", "encoder", "prefill", "generation")}


def _decode_all(encoded: Sequence[bytes]) -> list[Samples]:
    return [load_audio(data) for data in encoded]


@contextmanager
def _timed(model: Any, seconds: dict[str, float]) -> Iterator[None]:
    """Time the encoder, the decoder's first call of each generation (prefill) and the rest of the generation."""
    encode, generate, forward = model.encode, model.generate, model.decoder.forward
    calls = {"count": 0, "prefill": 0.0}

    def timed_encode(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return encode(*args, **kwargs)
        finally:
            seconds["encoder"] += time.perf_counter() - started

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        output = forward(*args, **kwargs)
        if not calls["count"]:
            calls["prefill"] = time.perf_counter() - started
        calls["count"] += 1
        return output

    def timed_generate(*args: Any, **kwargs: Any) -> Any:
        calls.update(count=0, prefill=0.0)
        started = time.perf_counter()
        output = generate(*args, **kwargs)
        seconds["prefill"] += calls["prefill"]
        seconds["generation"] += time.perf_counter() - started - calls["prefill"]
        return output

    model.encode, model.generate, model.decoder.forward = timed_encode, timed_generate, timed_forward
    try:
        yield
    finally:
        del model.encode, model.generate, model.decoder.forward


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
