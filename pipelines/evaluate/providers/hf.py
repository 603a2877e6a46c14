"""The `hf` provider: any speech recognition model of the hub, through transformers' own pipeline.

Clips go in as arrays at 16 kHz, so neither the ffmpeg binary nor torchaudio is called. A clip that the pipeline refuses
is a failure of that clip; the others of its batch are done one by one.

Whisper's kind is told what the pipeline would guess: the language is English, and clips beyond its window are decoded
with timestamps, without which it refuses them. Encoders with group norm average over padding; they get one clip at a
time.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import pipeline

from pipelines.encoders import pick_device
from pipelines.errors import EvaluationError
from pipelines.evaluate.providers.base import (
    Answer,
    Clip,
    ProviderOptions,
    length_batches,
    local_environment,
    model_name,
)
from tinyaudio.model.audio import SAMPLING_RATE
from tinyaudio.model.errors import MissingModelError

LANGUAGE = "en"  # of every corpus here


@dataclass(frozen=True, kw_only=True, eq=False)
class HubProvider:
    """A loaded pipeline."""

    recognizer: Any
    options: ProviderOptions
    name: str = "hf"

    @classmethod
    def load(cls, options: ProviderOptions) -> "HubProvider":
        """Load a model by hub id or folder; code from the hub is not run.

        Raises:
            MissingModelError: no such model, or one that wants to run code of its own.
        """
        if options.model is None:
            raise EvaluationError("provider 'hf' needs a model: a hub id such as openai/whisper-large-v3")
        try:
            recognizer = pipeline(
                "automatic-speech-recognition",
                model=options.model,
                revision=options.revision,
                device=pick_device(options.device),
            )
        except (OSError, ValueError, KeyError) as error:
            raise MissingModelError(f"{options.model!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        return cls(recognizer=recognizer, options=options)

    @property
    def _model(self) -> Any:
        return self.recognizer.model

    def _decoding(self) -> dict[str, Any]:
        chosen = {name: getattr(self.options, name) for name in ("num_beams", "max_new_tokens", "length_penalty")}
        told = {name: value for name, value in chosen.items() if value is not None}
        is_multilingual = getattr(getattr(self._model, "generation_config", None), "is_multilingual", False)
        return {**({"language": LANGUAGE, "task": "transcribe"} if is_multilingual else {}), **told}

    def identity(self) -> dict[str, Any]:
        config = self.recognizer.model.config
        return {
            "name": model_name(str(self.options.model)),
            "revision": getattr(config, "_commit_hash", None) or self.options.revision,
            "architecture": (config.architectures or [None])[0],
            "decoding": self._decoding() or "the pipeline's own",
        }

    def environment(self) -> dict[str, Any]:
        return {"batch_size": self.options.batch_size, **local_environment(self.recognizer.model.device)}

    def transcribe(self, clips: Sequence[Clip]) -> Iterator[Answer]:
        long = [clip for clip in clips if self._is_long(clip)]
        short = [clip for clip in clips if not self._is_long(clip)]
        size = 1 if getattr(self._model.config, "feat_extract_norm", None) == "group" else self.options.batch_size
        for batch in (*([clip] for clip in long), *length_batches(short, size)):
            started = time.perf_counter()
            try:
                answers = self._transcribe_batch(batch)
            except (ValueError, RuntimeError):
                answers = [self._transcribe_one(clip) for clip in batch]
            share = (time.perf_counter() - started) / len(batch)
            for answer in answers:
                yield replace(answer, time_s=share)

    def _is_long(self, clip: Clip) -> bool:
        is_whisper = self._model.config.model_type == "whisper"
        return is_whisper and clip.duration_s > self.recognizer.feature_extractor.chunk_length

    def _transcribe_batch(self, batch: Sequence[Clip]) -> list[Answer]:
        inputs = [{"raw": clip.samples, "sampling_rate": SAMPLING_RATE} for clip in batch]
        settings: dict[str, Any] = {"generate_kwargs": self._decoding()} if self._decoding() else {}
        if self._is_long(batch[0]):
            settings["return_timestamps"] = True
        written = self.recognizer(inputs, batch_size=len(batch), **settings)
        return [
            Answer(utterance_id=clip.utterance_id, text=one["text"], time_s=0.0)
            for clip, one in zip(batch, written, strict=True)
        ]

    def _transcribe_one(self, clip: Clip) -> Answer:
        try:
            return self._transcribe_batch([clip])[0]
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            return Answer(utterance_id=clip.utterance_id, text=None, time_s=0.0, error=f"the pipeline failed: {reason}")
