"""What stage one, stage two and transcription do on this GPU: a JSON line for each measurement, at once.

    python -m pipelines.bench.gpu_check [profile] [train] [extract] [transcribe]

All parts at the sizes of HuBERT-large and SmolLM3-3B with random weights take at most 480 s on an H200. A part that
fails does not stop the others, and none begins after SECONDS_LEFT. With SMALL=1 tiny shapes run on a CPU, in bfloat16
too, to try this.
"""

import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from transformers import HubertConfig, SmolLM3Config

from pipelines.bench import models
from pipelines.bench.extract import encoder_alone, extract_once, flops_per_audio_second, make_wav_corpus
from pipelines.bench.memory import matmul_peak
from pipelines.bench.race import seconds
from pipelines.bench.train import Batch, Contestant, Step, our_batches, our_loss, plain_loss
from pipelines.bench.transcribe import scripted, timed_parts
from pipelines.corpora import open_corpus
from pipelines.encoders import LoadedEncoder
from pipelines.extract.encode import open_batch_encoder
from pipelines.extract.plan import plan_corpus
from tinyaudio.model.audio import SAMPLING_RATE

SMALL = os.environ.get("SMALL") == "1"
STARTED = time.monotonic()
DEADLINE = STARTED + float(os.environ.get("SECONDS_LEFT", "480"))
DECODER_FLOPS = 4 * 2.8124e9  # a position: forward and backward through SmolLM3-3B without its embedding


def report(**values: Any) -> None:
    """Print one measurement."""
    print(json.dumps({"t": round(time.monotonic() - STARTED, 1), **values}), flush=True)


def synchronize() -> None:
    """Wait until the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def shrink() -> None:
    """Replace the real shapes by tiny ones."""
    hubert: dict[str, Any] = {
        **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
        **{"conv_dim": [32] * 7, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
        **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    }
    smollm: dict[str, Any] = {
        **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4},
        **{"num_attention_heads": 8, "num_key_value_heads": 2},
    }
    patch.object(models, "hubert_large", lambda: HubertConfig(**hubert)).start()
    patch.object(models, "SmolLM3Config", lambda: SmolLM3Config(**smollm)).start()
    patch.multiple(models, NUM_UTTERANCES=48, FULL_BUDGET=1024).start()


def in_bf16(encoder: LoadedEncoder) -> LoadedEncoder:
    """Compute in bfloat16, as on a GPU."""
    return replace(encoder, precision="bfloat16")


def check_profile(device: torch.device) -> None:
    """Measure a batch of 320 s through the encoder, where its time goes, and the host's part of it."""
    loaded = in_bf16(models.bench_encoder(device, full_size=True))
    encoder = open_batch_encoder(loaded, "float16")
    random, count = np.random.default_rng(0), 3 if SMALL else 38
    recordings = [(0.1 * random.standard_normal(134_400 - 137 * i)).astype(np.float32) for i in range(count)]
    audio_s = sum(map(len, recordings)) / SAMPLING_RATE

    def fastest(work: Callable[[], object]) -> float:
        def finish() -> None:
            work()
            synchronize()

        return audio_s / min(seconds(finish) for _ in range(5))

    inputs = encoder.prepare(recordings)
    for is_on in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(is_on)
        first_s = seconds(lambda: encoder.encode(inputs)())
        speed = fastest(lambda: encoder.encode(inputs)())
        found = {"cudnn_attention": is_on, "first_ms": first_s * 1e3, "real_time": speed}
        report(profile="encode", precision=loaded.precision, **found)
    if SMALL:
        alone, why = encoder_alone(loaded, 2, 4.0, with_compiled=False), "not measured on a CPU, where it takes minutes"
        report(profile="encoder alone, real time", precision=loaded.precision, **alone, compiled=why)
    else:
        report(profile="encoder alone, real time", precision=loaded.precision, **encoder_alone(loaded))
    report(profile="host", prepare=fastest(lambda: encoder.prepare(recordings)))
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            encoder.encode(inputs)()
            synchronize()
        rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)[:14]
        report(profile="kernels, ms", top={row.key[:70]: round(row.self_device_time_total / 1e3, 2) for row in rows})


def check_train(device: torch.device) -> None:
    """Measure steps of 4,096 positions: with cuDNN's attention and without, and a plain masked loss."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        parts = models.build_parts(Path(folder), full_size=True, device=device)
        report(built="train", matmul_tflops=matmul_peak(device) / 1e12 if device.type == "cuda" else None)
        step, num_steps = Step(parts, is_bf16=True), 2 if SMALL else 24
        planned = our_batches(parts)
        batches: Iterator[Batch] = map(planned.__getitem__, range(len(planned)))
        contestants: list[tuple[str, bool, Any]] = [
            ("ours, cuDNN attention", True, our_loss),
            ("ours", False, our_loss),
            ("plain loss with a mask", False, plain_loss),
        ]
        for name, is_on, loss in contestants:
            torch.backends.cuda.enable_cudnn_sdp(is_on)
            one = Contestant(name=name, next_batch=batches.__next__, loss=loss)
            for _ in range(3):
                step(one, one.next_batch())
            synchronize()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started, audio_s, num_positions, slowest_s = time.perf_counter(), 0.0, 0, 0.0
            for _ in range(num_steps):
                batch = one.next_batch()
                audio_s, num_positions = audio_s + batch["duration_s"], num_positions + batch["num_tokens"]
                step_started = time.perf_counter()
                step(one, batch)
                slowest_s = max(slowest_s, time.perf_counter() - step_started)
            synchronize()
            took_s = time.perf_counter() - started
            report(
                train=name,
                precision="bfloat16",
                s_a_step=took_s / num_steps,
                real_time=audio_s / took_s,
                tflops=DECODER_FLOPS * num_positions / took_s / 1e12,
                slowest_host_s=slowest_s,
                peak_gb=torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
            )


def check_extract(device: torch.device) -> None:
    """Measure stage one from WAV files to committed shards."""
    encoder = in_bf16(models.bench_encoder(device, full_size=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = make_wav_corpus(folder, 60.0 if SMALL else 24_000.0)
        corpus = open_corpus(recipe.corpus)
        plan = plan_corpus(recipe, corpus, ["train"])
        audio_s = float(plan.accepted["duration_s"].to_numpy().sum())
        for number, is_on in enumerate((True, False, False)):
            torch.backends.cuda.enable_cudnn_sdp(is_on)
            took_s, found = extract_once(folder / f"store-{number}", recipe, corpus, plan, encoder)
            report(
                extract=f"run {number}",
                cudnn_attention=is_on,
                real_time=audio_s / took_s,
                encoder_busy=found.encoder_busy,
                encoder_alone=audio_s / max(found.encode_s, 1e-9),
                decode_s=found.decode_s,
                write_s=found.write_s,
                seconds=took_s,
            )
        if device.type == "cuda":
            share = flops_per_audio_second(encoder) * audio_s / took_s / matmul_peak(device)
            report(extract="matmul share", share=share, peak_gb=torch.cuda.max_memory_allocated() / 1e9)


def check_transcribe(device: torch.device) -> None:
    """Measure generation at several batch sizes, with the text of a script."""
    count, duration_s = (4, 2.0) if SMALL else (64, 8.0)
    transcriber, recordings, settings = scripted(device, count, duration_s)
    for is_on, batch_size, num_beams in ((True, 16, 1), (False, 16, 1), (False, 64, 1), (False, 64, 4), (False, 8, 4)):
        torch.backends.cuda.enable_cudnn_sdp(is_on)
        settings |= {"batch_size": batch_size, "num_beams": num_beams}
        if not is_on:
            transcriber.transcribe(recordings[:batch_size], **settings)
        started = time.perf_counter()
        transcriber.transcribe(recordings, **settings)
        synchronize()
        took_s = time.perf_counter() - started
        with timed_parts(transcriber.model) as spent:
            transcriber.transcribe(recordings[:batch_size], **settings)
        report(
            transcribe=f"batch {batch_size}, beams {num_beams}",
            cudnn_attention=is_on,
            rtfx=count * duration_s / took_s,
            shares={part: round(seconds / sum(spent.values()), 3) for part, seconds in spent.items()},
        )


CHECKS = {"profile": check_profile, "train": check_train, "extract": check_extract, "transcribe": check_transcribe}


def main() -> None:
    if SMALL:
        shrink()
    device = torch.device("cpu" if SMALL else "cuda")
    report(
        torch=torch.__version__,
        transformers=transformers.__version__,
        cudnn=torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        gpu=None if SMALL else torch.cuda.get_device_name(),
        cores=os.cpu_count(),
    )
    for name in sys.argv[1:] or CHECKS:
        if time.monotonic() > DEADLINE:
            report(skipped=name)
            continue
        try:
            CHECKS[name](device)
        except Exception as error:  # a failure in one part must not lose the others
            report(failed=name, error=f"{type(error).__name__}: {error}"[:400])
            traceback.print_exc()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
