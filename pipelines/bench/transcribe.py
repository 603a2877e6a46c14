"""How fast transcription is, and how its time is divided, in one run.

RTFx is seconds of audio over seconds of wall clock, summed over the set (the Open ASR Leaderboard's definition).
"""

import io
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import soundfile
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, pipeline

from pipelines.bench.drafts import measure_drafts
from pipelines.bench.memory import measuring_resident
from pipelines.bench.models import DEMO, full_size_model
from pipelines.bench.race import race, seconds
from pipelines.train.model import load_tokenizer
from tinyaudio.model.audio import SAMPLING_RATE, load_audio
from tinyaudio.model.encoder import load_feature_extractor
from tinyaudio.model.errors import ModelError
from tinyaudio.model.pipeline_tinyaudio import TinyAudioPipeline
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor
from tinyaudio.transcribe import Transcriber, default_model, pick_device

NUM_UTTERANCES, MEAN_DURATION_S = 64, 1.85  # of the bundled test split
GPU_SLOW_SHARE = 0.1  # of the recordings, one by one on a GPU: 64 of them at 28 tokens of 25 ms take 45 s a round
PARTS = ("decode", "encoder", "prefill", "generation")
# HuBERT-large in float32 (1.26 GB), SmolLM3-3B in bfloat16 (6.15 GB), projector, activations and Python.
FULL_SIZE_BYTES = 9_500_000_000

NOTES = {
    "rtfx": "seconds of audio per second: batched, greedy",
    "batched_vs_single": "the smaller ratio of batched over one by one",
    "same_text": "True: both ways give equal texts; not compared at random weights",
}


def bench_transcribe(
    *, full_size: bool = False, audio_s: float | None = None, rounds: int | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Measure the default model ($TINYAUDIO_MODEL, else runs/latest), or the real sizes at random weights.

    Args:
        audio_s: seconds of audio, rounded to whole recordings; None: 64 recordings, at full size on a CPU 2.
        rounds: of each way; None: 3, at full size on a CPU 1.

    Returns:
        `model`, `utterances`, `audio_s`: what was transcribed. `rtfx`: of batched transcription, greedy.
        `batched_vs_single`: the smaller of the ratios. `by_beams`: by number of beams, `single` and `batched` (RTFx,
        median of the repeats; single is plain `pipeline()`, one by one), their `ratio`, and `shares`: fractions of a
        batched run's busy time in decode (audio), encoder, prefill, generation. `same_text`: whether all ways at equal
        beams gave the same texts; None at random weights. `peak_rss_bytes`: of this process, which holds one model.
        `peak_gpu_bytes`: allocated on the GPU, None without one. Then `device`, `batch_size`, `repeats`, and `drafts`
        (see `pipelines.bench.drafts`; not at full size).

    Raises:
        ModelError: an unknown device, or too little memory for the full size.
        MissingModelError: no model.
    """
    if full_size:
        return measure_full_size(device, audio_s, rounds)
    count = NUM_UTTERANCES if audio_s is None else max(1, round(audio_s / MEAN_DURATION_S))
    return measure(default_model(), device, num_utterances=count, repeats=rounds or 3)


def measure(
    model: str, device: str, num_utterances: int = NUM_UTTERANCES, batch_size: int = 16, repeats: int = 3
) -> dict[str, Any]:
    """Measure a model on the bundled test split, at 1 and 4 beams, and drafts; errors as `Transcriber.load`."""
    with measuring_resident() as peak:
        transcriber = Transcriber.load(model, device=device)
        recordings = [row["wav"]["bytes"] for row in _bundled(num_utterances)]
        result = _compare(transcriber, recordings, batch_size=batch_size, beams=(1, 4), repeats=repeats, generate={})
    drafts = measure_drafts(transcriber, [load_audio(data) for data in recordings], repeats)
    return {"model": model, **result, "peak_rss_bytes": peak.size_bytes, "drafts": drafts}


def measure_full_size(device: str, audio_s: float | None = None, rounds: int | None = None) -> dict[str, Any]:
    """Measure the real shapes at random weights; a CPU gets very little to do. Errors as `bench_transcribe`."""
    where = pick_device(device)
    is_gpu = where.type == "cuda"
    free = torch.cuda.mem_get_info(where)[0] if is_gpu else psutil.virtual_memory().available
    if free < FULL_SIZE_BYTES:
        raise ModelError(
            f"--full-size needs {FULL_SIZE_BYTES / 1e9:.1f} GB of memory on {where}, {free / 1e9:.1f} GB are free. "
            "Omit --full-size, or use a larger machine."
        )
    with measuring_resident() as peak:
        count, duration_s = (64, 8.0) if is_gpu else (2, 2.0)
        count = count if audio_s is None else max(1, round(audio_s / duration_s))
        transcriber, recordings, options = scripted(where, count, duration_s)
        result = _compare(
            transcriber,
            recordings,
            batch_size=64 if is_gpu else 2,
            beams=(1, 4) if is_gpu else (1,),
            repeats=rounds or (3 if is_gpu else 1),
            **options,
        )
    name = "HuBERT-large and SmolLM3-3B at random weights"
    return {"model": name, **result, "same_text": None, "peak_rss_bytes": peak.size_bytes}


def scripted(device: torch.device, count: int, duration_s: float) -> tuple[Transcriber, list[bytes], dict[str, Any]]:
    """Make the real shapes, bundled speech in WAV files of one length, and options to write a text of that length."""
    model, tokenizer = full_size_model(device), load_tokenizer(str(DEMO / "decoder"))
    processor = TinyAudioProcessor(load_feature_extractor(str(DEMO / "encoder")), tokenizer)
    rows = _bundled(200)
    speech = np.concatenate([load_audio(row["wav"]["bytes"]) for row in rows])
    recordings = []
    for samples in np.resize(speech, (count, int(duration_s * SAMPLING_RATE))):
        file = io.BytesIO()
        soundfile.write(file, samples, SAMPLING_RATE, format="WAV")
        recordings.append(file.getvalue())
    num_tokens = int(3.5 * duration_s)  # as English speech has
    ids = tokenizer(" ".join(row["text"] for row in rows[:10]))["input_ids"][: num_tokens - 1]
    script = LogitsProcessorList([Script([*ids, model.config.eos_token_id])])
    options = {"max_new_tokens": len(ids) + 1, "generate": {"logits_processor": script}}
    return Transcriber(model, processor), recordings, options


class Script(LogitsProcessor):
    """Let random weights write given tokens: their own text would never end, and be decoded twice as implausible."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scripted = torch.full_like(scores, -torch.inf)
        scripted[:, self.ids[min(input_ids.shape[1], len(self.ids) - 1)]] = 0
        return scripted


def _bundled(count: int) -> list[dict[str, Any]]:
    (path,) = (DEMO / "corpus").glob("test-0*.parquet")
    return list(pq.read_table(path).slice(0, count).to_pylist())


def _compare(
    transcriber: Transcriber,
    recordings: Sequence[bytes],
    *,
    batch_size: int,
    beams: Sequence[int],
    repeats: int,
    generate: dict[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """Measure one by one against batched, both without drafts.

    Args:
        generate: what both ways pass on to `generate`.
        options: fields of `recognize.Options`, for both ways.
    """
    device = transcriber.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # `pipeline(model=...)` would build this same class around a second copy of the model.
    asr = pipeline(
        "automatic-speech-recognition",
        model=transcriber.model,
        feature_extractor=transcriber.processor.feature_extractor,
        tokenizer=transcriber.processor.tokenizer,
        pipeline_class=TinyAudioPipeline,
        device=device,
    )
    asr(recordings[0], **options, **generate)  # the first call allocates and loads what stays loaded
    decode_s = seconds(lambda: [load_audio(data) for data in recordings])
    audio_s = sum(len(load_audio(data)) for data in recordings) / SAMPLING_RATE

    # One by one is slow: on a GPU it gets a tenth of the recordings, and its speed is compared.
    few = recordings[: max(2, int(GPU_SLOW_SHARE * len(recordings)))] if device.type == "cuda" else recordings
    few_s = sum(len(load_audio(data)) for data in few) / SAMPLING_RATE

    def single(num_beams: int) -> list[str]:
        return [asr(data, num_beams=num_beams, draft="none", **options, **generate)["text"] for data in few]

    def batched(num_beams: int) -> list[str]:
        settings = {**options, "num_beams": num_beams, "draft": "none", "batch_size": batch_size, "generate": generate}
        return [transcript.text for transcript in transcriber.transcribe(recordings, **settings)]

    def timed(way: Callable[[int], list[str]], num_beams: int, texts: list[list[str]]) -> float:
        return seconds(lambda: texts.append(way(num_beams)))

    by_beams: dict[str, dict[str, Any]] = {}
    same_text = True
    for num_beams in beams:
        texts: list[list[str]] = []
        ways = {
            "single": partial(timed, single, num_beams, texts),
            "batched": partial(timed, batched, num_beams, texts),
        }
        times = race(ways, repeats)
        same_text = same_text and all(text[: len(few)] == texts[0][: len(few)] for text in texts)
        heard_s = {"single": few_s, "batched": audio_s}
        speeds = {way: heard_s[way] / statistics.median(took) for way, took in times.items()}
        with timed_parts(transcriber.model) as spent:
            batched(num_beams)
        spent["decode"] = decode_s  # measured apart, since its thread runs beside the model
        by_beams[str(num_beams)] = {
            "single": round(speeds["single"], 3),
            "batched": round(speeds["batched"], 3),
            "ratio": round(speeds["batched"] / speeds["single"], 2),
            "shares": {part: round(spent[part] / sum(spent.values()), 3) for part in PARTS},
        }
    return {
        "utterances": len(recordings),
        "audio_s": round(audio_s, 1),
        "rtfx": by_beams[str(beams[0])]["batched"],
        "batched_vs_single": min(speed["ratio"] for speed in by_beams.values()),
        "by_beams": by_beams,
        "same_text": same_text,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "device": str(device),
        "batch_size": batch_size,
        "repeats": repeats,
    }


@contextmanager
def timed_parts(model: Any) -> Iterator[dict[str, float]]:
    """Time the encoder, the decoder's first call of each generation (prefill), and the rest of the generation."""
    spent: dict[str, float] = defaultdict(float)
    last = 0.0

    def lap(part: str | None) -> None:
        nonlocal last
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)  # a GPU returns before it is done
        now = time.perf_counter()
        if part:
            spent[part] += now - last
        last = now

    def before_decoder(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("inputs_embeds") is not None:  # only the first call of a generation is given embeddings
            lap("generation")  # the projector and the prompt

    def after_decoder(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        lap("prefill" if kwargs.get("inputs_embeds") is not None else "generation")

    hooks = [
        model.encoder.register_forward_pre_hook(lambda *_: lap(None)),
        model.encoder.register_forward_hook(lambda *_: lap("encoder")),
        model.decoder.register_forward_pre_hook(before_decoder, with_kwargs=True),
        model.decoder.register_forward_hook(after_decoder, with_kwargs=True),
    ]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()
