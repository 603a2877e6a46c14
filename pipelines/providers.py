"""Providers: systems that turn clips into text, behind one small interface, so that one evaluation serves them all.

A provider gets clips of 16 kHz mono samples and gives every clip one answer, in any order; a clip that it could not do
is an answer with an error, never an empty text. It says who it is (`identity`: all that can change an answer, compared
before an evaluation goes on) and what it ran on (`environment`: recorded only).
"""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
from numpy.typing import NDArray

from pipelines.errors import EvaluationError
from tinyaudio.model.audio import SAMPLING_RATE, Samples


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


def _open_tinyaudio(options: ProviderOptions) -> Provider:
    from pipelines.provider_tinyaudio import TinyAudioProvider

    return TinyAudioProvider.load(options)


def _open_ctc(options: ProviderOptions) -> Provider:
    from pipelines.provider_ctc import CTCProvider

    return CTCProvider.load(options)


def _open_hf(options: ProviderOptions) -> Provider:
    from pipelines.provider_hf import HubProvider

    return HubProvider.load(options)


def _open_assemblyai(options: ProviderOptions) -> Provider:
    try:
        from pipelines.provider_assemblyai import AssemblyAIProvider
    except ModuleNotFoundError as error:
        raise EvaluationError(f"{error}; install the extra: pip install 'tinyaudio[providers]'") from error
    return AssemblyAIProvider.open(options)


@dataclass(frozen=True)
class _Kind:
    """How a provider is opened, and the options that it takes beside `model` and `output`."""

    open: Callable[[ProviderOptions], Provider]
    takes: tuple[str, ...]


_LOCAL = ("revision", "device", "batch_size")
_DECODING = ("num_beams", "max_new_tokens", "length_penalty")
# A provider is a function from options to a `Provider`; another one is one line here and a module of its own.
_KINDS = {
    "tinyaudio": _Kind(_open_tinyaudio, (*_LOCAL, *_DECODING, "guard")),
    "ctc": _Kind(_open_ctc, _LOCAL),
    "hf": _Kind(_open_hf, (*_LOCAL, *_DECODING)),
    "assemblyai": _Kind(_open_assemblyai, ("api_key", "concurrency")),
}


def provider_names() -> list[str]:
    """List the providers."""
    return list(_KINDS)


def open_provider(name: str, options: ProviderOptions) -> Provider:
    """Open a provider by name.

    Raises:
        EvaluationError: no provider of that name, an option that it would ignore, or one that it needs and lacks.
    """
    if name not in _KINDS:
        raise EvaluationError(f"no provider {name!r}; expected one of {', '.join(_KINDS)}")
    takes = _KINDS[name].takes
    chosen = [field.name for field in fields(options) if getattr(options, field.name) != field.default]
    ignored = [option for option in chosen if option not in ("model", "output", *takes)]
    if ignored:
        raise EvaluationError(
            f"provider {name!r} does not take {_as_typed(ignored)}; it takes {_as_typed(takes)}. Leave out the rest"
        )
    return _KINDS[name].open(options)


def _as_typed(options: Sequence[str]) -> str:
    return ", ".join("--no-guard" if option == "guard" else f"--{option.replace('_', '-')}" for option in options)
