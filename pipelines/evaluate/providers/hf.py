"""The `hf` provider: any speech recognition model of the hub, through transformers' own pipeline.

Clips are passed as arrays at 16 kHz, so neither the ffmpeg binary nor torchaudio is needed. If the pipeline fails on a
batch, its clips are transcribed one by one, and only those that fail again are failures.

Whisper models are given what the pipeline would otherwise guess: the language is English, and clips beyond the model's
window are decoded with timestamps, without which it refuses them. Encoders with group norm average over padding, so
they get one clip at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import pipeline

from pipelines.encoders import pick_device
from pipelines.errors import EvaluationError, one_line
from pipelines.evaluate.eval_sets import Clip
from pipelines.evaluate.predictions import Prediction
from pipelines.evaluate.providers.base import ProviderOptions, in_batches, length_batches, local_environment
from pipelines.recipes.recipe import model_name
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
        """Load a model by hub id or folder; code from the hub is never run.

        Raises:
            EvaluationError: no model named.
            MissingModelError: no such model, or one that requires code of its own.
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
            raise MissingModelError(f"{options.model!r} cannot be loaded: {one_line(error)}") from error
        return cls(recognizer=recognizer, options=options)

    def _decoding(self) -> dict[str, Any]:
        generation = getattr(self.recognizer.model, "generation_config", None)
        is_multilingual = getattr(generation, "is_multilingual", False)
        language = {"language": LANGUAGE, "task": "transcribe"} if is_multilingual else {}
        return {**language, **self.options.decoding()}

    def identity(self) -> dict[str, Any]:
        config = self.recognizer.model.config
        return {
            "name": model_name(str(self.options.model)),
            "revision": getattr(config, "_commit_hash", None) or self.options.revision,
            "architecture": (config.architectures or [None])[0],
            "decoding": self._decoding() or "the pipeline's own",
        }

    def environment(self) -> dict[str, Any]:
        return {"batch_size": self.options.clips_at_once(), **local_environment(self.recognizer.model.device)}

    def transcribe(self, clips: Sequence[Clip]) -> Iterator[Prediction]:
        has_group_norm = getattr(self.recognizer.model.config, "feat_extract_norm", None) == "group"
        short = [clip for clip in clips if not self._is_long(clip)]
        batches = [[clip] for clip in clips if self._is_long(clip)]
        batches += length_batches(short, 1 if has_group_norm else self.options.clips_at_once())
        return in_batches(batches, self._transcribe_batch)

    def _is_long(self, clip: Clip) -> bool:
        is_whisper = self.recognizer.model.config.model_type == "whisper"
        return is_whisper and clip.duration_s > self.recognizer.feature_extractor.chunk_length

    def _transcribe_batch(self, batch: list[Clip]) -> list[Prediction]:
        settings: dict[str, Any] = {"generate_kwargs": self._decoding()} if self._decoding() else {}
        if self._is_long(batch[0]):
            settings["return_timestamps"] = True
        inputs = [{"raw": clip.samples, "sampling_rate": SAMPLING_RATE} for clip in batch]
        try:
            written = self.recognizer(inputs, batch_size=len(batch), **settings)
        except (ValueError, RuntimeError) as error:
            if len(batch) > 1:
                return [one for clip in batch for one in self._transcribe_batch([clip])]
            return [batch[0].answer(None, error=f"the pipeline failed: {one_line(error)}")]
        return [clip.answer(one["text"]) for clip, one in zip(batch, written, strict=True)]
