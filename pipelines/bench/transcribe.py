"""How fast transcription is, and where its time goes; everything measured in one run on one machine.

RTFx is seconds of audio over seconds of wall clock, summed over the set (the Open ASR Leaderboard's definition).
"""

import io
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch
from transformers import pipeline

from pipelines.bench.models import full_size_model
from pipelines.train.model import load_tokenizer
from tinyaudio.model.audio import SAMPLING_RATE, Samples, load_audio
from tinyaudio.model.encoder import load_feature_extractor
from tinyaudio.model.errors import ModelError
from tinyaudio.model.pipeline_tinyaudio import TinyAudioPipeline
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor
from tinyaudio.transcribe import Transcriber, default_model, pick_device

DEMO = Path(__file__).parents[1] / "demo"
TASK = "automatic-speech-recognition"
# HuBERT-large in float32 (1.26 GB), SmolLM3-3B in bfloat16 (6.15 GB), projector, activations and Python.
FULL_SIZE_BYTES = 9_500_000_000


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is transcribed, and how often.

    Args:
        recordings: encoded audio.
        batch_size: of the batched way.
        beams: numbers of beams, each measured.
        repeats: runs of each way, of which the median counts.
        options: for both ways, as `recognize.Options` and `generate` take them.
    """

    recordings: Sequence[bytes]
    batch_size: int
    beams: Sequence[int]
    repeats: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Both ways at one number of beams.

    Args:
        single, batched: RTFx, median of the repeats; single is plain `pipeline()`, one by one.
        ratio: speed of batched over single.
        shares: part of a batched run's busy time in decode (audio), encoder, prefill, generation; in 0..1.
    """

    single: float
    batched: float
    ratio: float
    shares: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TranscribeBench:
    """One run.

    Args:
        model: what was asked.
        utterances, audio_s: what was transcribed.
        rtfx: of batched transcription, greedy.
        batched_vs_single: the smaller of the ratios.
        by_beams: number of beams -> `Speed`.
        same_text: whether all ways at equal beams gave the same texts; None at random weights, which say nothing.
        peak_rss_bytes: of this process, which holds one model.
        peak_gpu_bytes: allocated on the GPU; None where there is none.
        device, batch_size, repeats: how.
    """

    model: str
    utterances: int
    audio_s: float
    rtfx: float
    batched_vs_single: float
    by_beams: dict[str, Speed]
    same_text: bool | None
    peak_rss_bytes: int
    peak_gpu_bytes: int | None
    device: str
    batch_size: int
    repeats: int


def bench_transcribe(*, full_size: bool = False, device: str = "auto") -> dict[str, Any]:
    """Measure the default model ($TINYAUDIO_MODEL, else runs/latest), or the real sizes at random weights.

    Returns:
        The fields of `TranscribeBench`.

    Raises:
        ModelError: an unknown device, or too little memory for the full size.
        MissingModelError: no model.
    """
    return asdict(measure_full_size(device) if full_size else measure(default_model(), device))


def format_table(results: dict[str, Any]) -> str:
    """Lay the results out for a terminal."""
    texts = {True: "texts equal", False: "texts DIFFER", None: "random weights"}[results["same_text"]]
    lines = [
        f"{results['model']}: {results['utterances']} utterances, {results['audio_s']} s of audio, "
        f"{results['device']}, batches of {results['batch_size']}, median of {results['repeats']}; {texts}; "
        f"peak memory {results['peak_rss_bytes'] / 1e6:.0f} MB"
        + (f", {results['peak_gpu_bytes'] / 1e6:.0f} MB on the GPU" if results["peak_gpu_bytes"] else ""),
        "beams  RTFx one by one  RTFx batched  ratio  share of: decode  encoder  prefill  generation",
    ]
    for beams, speed in results["by_beams"].items():
        parts = "".join(f"{speed['shares'][part]:>9.0%}" for part in ("decode", "encoder", "prefill", "generation"))
        numbers = f"{speed['single']:>15}  {speed['batched']:>12}  {speed['ratio']:>5}"
        lines.append(f"{beams:>5}  {numbers}           {parts}")
    return "\n".join(lines)


def measure(
    model: str, device: str, num_utterances: int = 64, batch_size: int = 16, repeats: int = 3
) -> TranscribeBench:
    """Measure a model on the bundled test split, at 1 and 4 beams.

    Raises:
        TinyAudioError: the model cannot be loaded.
    """
    transcriber = Transcriber.load(model, device=device)
    work = Work(recordings=_bundled(num_utterances), batch_size=batch_size, beams=(1, 4), repeats=repeats)
    return _race(model, transcriber, work, compares_texts=True)


def measure_full_size(device: str) -> TranscribeBench:
    """Measure the shapes of HuBERT-large and SmolLM3-3B at random weights; a CPU gets very little to do.

    Raises:
        ModelError: an unknown device, or too little memory on it.
    """
    where = pick_device(device)
    _check_memory(where)
    model = full_size_model(where)
    tokenizer = load_tokenizer(str(DEMO / "decoder"))
    processor = TinyAudioProcessor(load_feature_extractor(str(DEMO / "encoder")), tokenizer)
    is_gpu = where.type == "cuda"
    # Random weights never end a text: it is ended for them, at 3.5 tokens a second, as English speech has.
    num_tokens = 28 if is_gpu else 7
    work = Work(
        recordings=_bundled_of_length(64, 8.0) if is_gpu else _bundled_of_length(2, 2.0),
        batch_size=16 if is_gpu else 2,
        beams=(1, 4) if is_gpu else (1,),
        repeats=3 if is_gpu else 1,
        options={"max_new_tokens": num_tokens, "forced_eos_token_id": model.config.eos_token_id},
    )
    name = "HuBERT-large and SmolLM3-3B at random weights"
    # What random weights write trips the guard, and would be decoded twice.
    with patch("tinyaudio.model.recognize.judge", return_value=None):
        return _race(name, Transcriber(model, processor), work, compares_texts=False)


def _race(name: str, transcriber: Transcriber, work: Work, *, compares_texts: bool) -> TranscribeBench:
    """Measure one by one against batched, in turns, so that a busy minute of the machine hits both."""
    device = transcriber.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # `pipeline(model=...)` would build this same class around a second copy of the model.
    asr = pipeline(
        TASK,
        model=transcriber.model,
        feature_extractor=transcriber.processor.feature_extractor,
        tokenizer=transcriber.processor.tokenizer,
        pipeline_class=TinyAudioPipeline,
        device=device,
    )
    asr(work.recordings[0], **work.options)  # the first call allocates and loads what stays loaded
    audio_s = sum(len(load_audio(data)) for data in work.recordings) / SAMPLING_RATE
    by_beams, same_text = {}, True
    for beams in work.beams:
        ways: dict[str, Callable[[], list[str]]] = {
            "single": lambda beams=beams: [  # type: ignore[misc]
                asr(data, num_beams=beams, **work.options)["text"] for data in work.recordings
            ],
            "batched": lambda beams=beams: _batched(transcriber, work, beams),  # type: ignore[misc]
        }
        times: dict[str, list[float]] = defaultdict(list)
        texts = []
        for _ in range(work.repeats):
            for way, run in ways.items():
                started = time.perf_counter()
                texts.append(run())
                times[way].append(time.perf_counter() - started)
        same_text = same_text and all(text == texts[0] for text in texts)
        single, batched = (audio_s / statistics.median(times[way]) for way in ways)
        by_beams[str(beams)] = Speed(
            single=round(single, 3),
            batched=round(batched, 3),
            ratio=round(batched / single, 2),
            shares=_shares(transcriber, work, beams),
        )
    return TranscribeBench(
        model=name,
        utterances=len(work.recordings),
        audio_s=round(audio_s, 1),
        rtfx=by_beams[str(work.beams[0])].batched,
        batched_vs_single=min(speed.ratio for speed in by_beams.values()),
        by_beams=by_beams,
        same_text=same_text if compares_texts else None,
        peak_rss_bytes=_peak_rss_bytes(),
        peak_gpu_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        device=str(device),
        batch_size=work.batch_size,
        repeats=work.repeats,
    )


def _bundled(count: int) -> list[bytes]:
    (path,) = (DEMO / "corpus").glob("test-0*.parquet")
    return [row["wav"]["bytes"] for row in pq.read_table(path).slice(0, count).to_pylist()]


def _bundled_of_length(count: int, duration_s: float) -> list[bytes]:
    """Join bundled speech and cut it into WAV files of one length."""
    length = int(duration_s * SAMPLING_RATE)
    speech = np.resize(np.concatenate([load_audio(data) for data in _bundled(200)]), (count, length))
    files = []
    for samples in speech:
        file = io.BytesIO()
        soundfile.write(file, samples, SAMPLING_RATE, format="WAV")
        files.append(file.getvalue())
    return files


def _check_memory(device: torch.device) -> None:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        meminfo = Path("/proc/meminfo")
        if not meminfo.exists():  # not Linux: try
            return
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    if free < FULL_SIZE_BYTES:
        raise ModelError(
            f"bench transcribe --full-size needs {FULL_SIZE_BYTES / 1e9:.1f} GB of memory on {device}, where "
            f"{free / 1e9:.1f} GB are free; run it without --full-size, or on a larger machine"
        )


def _batched(transcriber: Transcriber, work: Work, beams: int) -> list[str]:
    own = {name: value for name, value in work.options.items() if name == "max_new_tokens"}
    others = {name: value for name, value in work.options.items() if name not in own}
    options = {**own, "generate": others, "batch_size": work.batch_size, "num_beams": beams}
    return [t.text for t in transcriber.transcribe(work.recordings, **options)]


def _shares(transcriber: Transcriber, work: Work, beams: int) -> dict[str, float]:
    """Take one batched run apart by timing the calls inside; audio is decoded apart, as its thread runs beside."""
    seconds: dict[str, float] = defaultdict(float)
    started = time.perf_counter()
    _decode_all(work.recordings)
    seconds["decode"] = time.perf_counter() - started
    with _timed(transcriber.model, seconds):
        _batched(transcriber, work, beams)
    total = sum(seconds.values())
    return {name: round(seconds[name] / total, 3) for name in ("decode", "encoder", "prefill", "generation")}


def _decode_all(encoded: Sequence[bytes]) -> list[Samples]:
    return [load_audio(data) for data in encoded]


@contextmanager
def _timed(model: Any, seconds: dict[str, float]) -> Iterator[None]:
    """Time the encoder, the decoder's first call of each generation (prefill) and the rest of the generation."""

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)  # a GPU answers before it is done
        return time.perf_counter()

    encode, generate, forward = model.encode, model.generate, model.decoder.forward
    calls = {"count": 0, "prefill": 0.0}

    def timed_encode(*args: Any, **kwargs: Any) -> Any:
        started = now()
        try:
            return encode(*args, **kwargs)
        finally:
            seconds["encoder"] += now() - started

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        started = now()
        output = forward(*args, **kwargs)
        if not calls["count"]:
            calls["prefill"] = now() - started
        calls["count"] += 1
        return output

    def timed_generate(*args: Any, **kwargs: Any) -> Any:
        calls.update(count=0, prefill=0.0)
        started = now()
        output = generate(*args, **kwargs)
        seconds["prefill"] += calls["prefill"]
        seconds["generation"] += now() - started - calls["prefill"]
        return output

    model.encode, model.generate, model.decoder.forward = timed_encode, timed_generate, timed_forward
    try:
        yield
    finally:
        del model.encode, model.generate, model.decoder.forward


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
