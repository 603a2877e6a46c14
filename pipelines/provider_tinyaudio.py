"""The `tinyaudio` provider: a checkpoint of ours, end to end from samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

import tinyaudio
from pipelines.errors import EvaluationError
from pipelines.providers import Answer, Clip, ProviderOptions, in_batches
from tinyaudio.frozen import weights_digest
from tinyaudio.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.processing_tinyaudio import TinyAudioProcessor


@dataclass(frozen=True, kw_only=True, eq=False)
class TinyAudioProvider:
    """A loaded checkpoint with the decoding settings it is evaluated with."""

    model: TinyAudioForConditionalGeneration
    processor: TinyAudioProcessor
    options: ProviderOptions
    name: str = "tinyaudio"

    @classmethod
    def load(cls, options: ProviderOptions) -> "TinyAudioProvider":
        """Load a checkpoint folder or hub id; errors as `TinyAudioForConditionalGeneration.from_pretrained`."""
        if options.model is None:
            raise EvaluationError("provider 'tinyaudio' needs a model: a run's folder or a hub id")
        revision: dict[str, Any] = {"revision": options.revision} if options.revision else {}
        model = TinyAudioForConditionalGeneration.from_pretrained(options.model, **revision)
        processor = TinyAudioProcessor.from_pretrained(options.model, **revision)
        return cls(model=model.to(pick_device(options.device)), processor=processor, options=options)

    def with_beams(self, num_beams: int) -> "TinyAudioProvider":
        """Return the same loaded model with another beam width."""
        return replace(self, options=replace(self.options, num_beams=num_beams))

    def _decoding(self) -> dict[str, Any]:
        config, options = self.model.generation_config, self.options
        names = ("num_beams", "max_new_tokens", "length_penalty")
        chosen = {name: getattr(options, name) for name in names}
        return {name: getattr(config, name) if value is None else value for name, value in chosen.items()}

    def identity(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "projector_digest": weights_digest(self.model.projector),
            "encoder": {key: getattr(config, f"encoder_{key}") for key in ("id", "revision", "digest")},
            "decoder": {key: getattr(config, f"decoder_{key}") for key in ("id", "revision", "digest", "dtype")},
            "decoding": self._decoding(),
        }

    def environment(self) -> dict[str, Any]:
        return {
            "device": str(self.model.device),
            "batch_size": self.options.batch_size,
            "tinyaudio": tinyaudio.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def transcribe(self, clips: Sequence[Clip]) -> Iterator[Answer]:
        return in_batches(clips, self.options.batch_size, self._transcribe_batch)

    def _transcribe_batch(self, clips: Sequence[Clip]) -> list[str]:
        inputs = self.processor([clip.samples for clip in clips]).to(self.model.device)
        return self.processor.decode_transcripts(self.model.generate(**inputs, **self._decoding()))


def pick_device(wanted: str) -> torch.device:
    """Turn "auto" into the GPU if there is one."""
    if wanted != "auto":
        return torch.device(wanted)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
