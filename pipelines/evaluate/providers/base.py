"""What a system that is evaluated looks like: clips in, answers out, in batches of like lengths."""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import torch
import transformers
from numpy.typing import NDArray

from tinyaudio.model.audio import SAMPLING_RATE, Samples
from tinyaudio.version import __version__


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """One utterance as every provider gets it.

    Args:
        utterance_id: unique in the evaluation.
        samples: (S,) float32, 16 kHz mono; empty for a clip out of a feature store.
        features: (T, D) float32, out of a store, with the duration that stands there. None: encode the samples.
    """

    utterance_id: str
    samples: Samples
    features: NDArray[np.float32] | None = None
    stored_duration_s: float | None = None

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLING_RATE if self.stored_duration_s is None else self.stored_duration_s

    def to_wav(self) -> bytes:
        """Encode as 16 kHz mono 16-bit WAV, the bytes that every remote provider is sent."""
        stream = io.BytesIO()
        soundfile.write(stream, self.samples, SAMPLING_RATE, format="WAV", subtype="PCM_16")
        return stream.getvalue()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a provider made of one clip: a text (perhaps empty) or an error; the rest as in `Prediction`."""

    utterance_id: str
    text: str | None
    time_s: float
    error: str | None = None
    warnings: tuple[str, ...] = ()
    provider_id: str | None = None


class Provider(Protocol):
    """A system under evaluation."""

    @property
    def name(self) -> str: ...

    def identity(self) -> dict[str, Any]:
        """Return all that can change an answer: ids, revisions, digests, decoding settings."""

    def environment(self) -> dict[str, Any]:
        """Return what answers are computed on: device, precision, versions of libraries."""

    def transcribe(self, clips: Sequence[Clip]) -> Iterator[Answer]:
        """Answer every clip once, in any order, as soon as each is done.

        Raises:
            EvaluationError: something that will not be better for the next clip, such as a wrong key.
        """


@dataclass(frozen=True, kw_only=True)
class ProviderOptions:
    """What the command line may tell a provider; `open_provider` refuses what the named one would ignore.

    Args:
        model: folder or hub id; for a paid provider the name of its model.
        device: "auto", "cpu", "cuda", "cuda:1".
        batch_size: clips decoded together; local models only.
        num_beams, max_new_tokens, length_penalty: decoding; None is the model's own.
        guard: transcribe as `tinyaudio transcribe` does, with voice detection and guard; False asks the model alone.
        api_key: of a paid provider; None looks into its environment variable.
        concurrency: jobs of a paid provider in flight; AssemblyAI's free accounts run 5 at a time.
        output: folder of the evaluation, where a paid provider keeps the ids of what it has paid for.
    """

    model: str | None = None
    revision: str | None = None
    device: str = "auto"
    batch_size: int = 16
    num_beams: int | None = None
    max_new_tokens: int | None = None
    length_penalty: float | None = None
    guard: bool = True
    api_key: str | None = None
    concurrency: int = 5
    output: Path | None = None


def length_batches(clips: Sequence[Clip], batch_size: int) -> Iterator[list[Clip]]:
    """Batch clips of similar length, longest first, so that too large a batch fails at once."""
    ordered = sorted(clips, key=lambda clip: -clip.duration_s)
    for first in range(0, len(ordered), batch_size):
        yield ordered[first : first + batch_size]


def in_batches(
    clips: Sequence[Clip], batch_size: int, transcribe_batch: Callable[[Sequence[Clip]], Sequence[str]]
) -> Iterator[Answer]:
    """Run a local model over `length_batches`, and share out each batch's wall time."""
    for batch in length_batches(clips, batch_size):
        started = time.perf_counter()
        texts = transcribe_batch(batch)
        share = (time.perf_counter() - started) / len(batch)
        for clip, text in zip(batch, texts, strict=True):
            yield Answer(utterance_id=clip.utterance_id, text=text, time_s=share)


def model_name(model: str) -> str:
    """Name a model: its hub id, or a local folder's own name (`runs/latest` goes by the run it points to)."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def local_environment(device: torch.device) -> dict[str, Any]:
    """Say what a local model is computed on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    versions = {"tinyaudio": __version__, "torch": torch.__version__}
    where = {"device": name or device.type, "audio": "16 kHz mono, float32 samples"}
    return {**where, **versions, "transformers": transformers.__version__}
