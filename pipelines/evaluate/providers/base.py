"""The interface of a system under evaluation: clips in, predictions out, in batches of similar lengths."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from pipelines.encoders import pick_device
from pipelines.evaluate.eval_sets import Clip
from pipelines.evaluate.predictions import Prediction
from tinyaudio.version import __version__

BATCH_SIZE, GPU_BATCH_SIZE = 16, 32  # clips decoded together
DECODING = ("num_beams", "max_new_tokens", "length_penalty")


class Provider(Protocol):
    """A system under evaluation."""

    @property
    def name(self) -> str: ...

    def identity(self) -> dict[str, Any]:
        """Return all that can change an answer: ids, revisions, digests, decoding settings."""

    def environment(self) -> dict[str, Any]:
        """Return what answers are computed on: device, precision, versions of libraries."""

    def transcribe(self, clips: Sequence[Clip]) -> Iterator[Prediction]:
        """Answer every clip once, in any order, as soon as it is done; a clip that fails is a prediction with an error.

        Raises:
            EvaluationError: a problem that affects all clips, such as a wrong key.
        """


@dataclass(frozen=True, kw_only=True)
class ProviderOptions:
    """Options of the command line; `open_provider` refuses those that the named provider would ignore."""

    model: str | None = None  # folder or hub id; for a paid provider the name of its model
    revision: str | None = None  # commit, branch or tag of a hub model
    device: str = "auto"
    batch_size: int | None = None  # clips decoded together; local models only. None: 32 on a GPU, else 16
    num_beams: int | None = None  # None is the model's own, here and in the next two
    max_new_tokens: int | None = None
    length_penalty: float | None = None
    draft: str = "auto"  # what drafts greedy text, which changes the speed only; one of `tinyaudio.model.drafts.KINDS`
    ctc_nbest: int | None = None  # the decoder chooses among so many texts of the projector's CTC head; None: it writes
    guard: bool = True  # transcribe as the command does, with voice detection and guard; False runs the model alone
    api_key: str | None = None  # of a paid provider; None reads its environment variable
    concurrency: int = 5  # jobs of a paid provider in flight; AssemblyAI's free accounts run 5 at a time
    output: Path | None = None  # folder of the evaluation, where a paid provider keeps the ids of the jobs it paid for

    def clips_at_once(self) -> int:
        """Return the number of clips that are decoded together."""
        return self.batch_size or (GPU_BATCH_SIZE if pick_device(self.device).type == "cuda" else BATCH_SIZE)

    def decoding(self) -> dict[str, Any]:
        """Return the decoding settings that were asked for."""
        return {name: getattr(self, name) for name in DECODING if getattr(self, name) is not None}


def length_batches(clips: Sequence[Clip], batch_size: int) -> Iterator[list[Clip]]:
    """Batch clips of similar length, longest first, so that a batch size that is too large fails at once."""
    ordered = sorted(clips, key=lambda clip: -clip.duration_s)
    for first in range(0, len(ordered), batch_size):
        yield ordered[first : first + batch_size]


def in_batches(
    batches: Iterable[list[Clip]], transcribe_batch: Callable[[list[Clip]], list[Prediction]]
) -> Iterator[Prediction]:
    """Run a local model over batches; the wall time of a batch is divided evenly among its answers."""
    for batch in batches:
        started = time.perf_counter()
        answers = transcribe_batch(batch)
        share = round((time.perf_counter() - started) / len(batch), 6)
        for one in answers:
            yield replace(one, time=share)


def local_environment(device: torch.device) -> dict[str, Any]:
    """Return what a local model is computed on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "audio": "16 kHz mono, float32 samples",
        "tinyaudio": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
