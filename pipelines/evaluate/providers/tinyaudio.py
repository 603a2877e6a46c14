"""The `tinyaudio` provider: a checkpoint of ours, end to end from samples, as `tinyaudio transcribe` runs it.

`guard=False` asks the model itself: no voice detection, no second decoding, no cut; what it writes is scored as it is.
Both are worth knowing, since a guard that shortens loops also lowers the number of insertions.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipelines.encoders import encoder_name
from pipelines.errors import EvaluationError
from pipelines.evaluate.providers.base import (
    Answer,
    Clip,
    ProviderOptions,
    length_batches,
    local_environment,
    model_name,
)
from tinyaudio.model.frozen import weights_digest
from tinyaudio.transcribe import Transcriber

_DECODING = ("num_beams", "max_new_tokens", "length_penalty")


@dataclass(frozen=True, kw_only=True, eq=False)
class TinyAudioProvider:
    """A loaded checkpoint with the decoding settings it is evaluated with."""

    transcriber: Transcriber
    options: ProviderOptions
    name: str = "tinyaudio"

    @classmethod
    def load(cls, options: ProviderOptions) -> "TinyAudioProvider":
        """Load a checkpoint folder or hub id; errors as `Transcriber.load`."""
        if options.model is None:
            raise EvaluationError("provider 'tinyaudio' needs a model: a run's folder or a hub id")
        loaded = Transcriber.load(options.model, device=options.device, revision=options.revision)
        return cls(transcriber=loaded, options=options)

    def with_beams(self, num_beams: int) -> "TinyAudioProvider":
        """Return the same loaded model with another beam width."""
        return replace(self, options=replace(self.options, num_beams=num_beams))

    def _decoding(self) -> dict[str, Any]:
        config = self.transcriber.model.generation_config
        chosen = {name: getattr(self.options, name) for name in _DECODING}
        return {name: getattr(config, name) if value is None else value for name, value in chosen.items()}

    def identity(self) -> dict[str, Any]:
        config = self.transcriber.model.config
        encoder, decoder = (
            {key: getattr(config, f"{part}_{key}") for key in ("id", "revision", "digest")}
            for part in ("encoder", "decoder")
        )
        return {
            "name": model_name(str(self.options.model)),
            "revision": self.transcriber.revision,
            "projector_digest": weights_digest(self.transcriber.model.projector),
            "encoder": {**encoder, "id": encoder_name(encoder["id"])},
            "decoder": {**decoder, "id": encoder_name(decoder["id"]), "dtype": config.decoder_dtype},
            "decoding": {**self._decoding(), "guard": self.options.guard},
        }

    def environment(self) -> dict[str, Any]:
        model = self.transcriber.model
        precision = model.config.encoder_precision if model.device.type == "cuda" else "float32"
        where = local_environment(model.device)
        return {"batch_size": self.options.batch_size, "encoder_precision": precision, **where}

    def transcribe(self, clips: Sequence[Clip]) -> Iterator[Answer]:
        for batch in length_batches(clips, self.options.batch_size):
            started = time.perf_counter()
            answers = self._guarded(batch) if self.options.guard else self._plain(batch)
            share = (time.perf_counter() - started) / len(batch)
            for answer in answers:
                yield replace(answer, time_s=share)

    def _guarded(self, batch: Sequence[Clip]) -> list[Answer]:
        chosen = {name: getattr(self.options, name) for name in _DECODING}
        sources = [clip.samples for clip in batch]
        written = self.transcriber.stream(sources, batch_size=len(batch), **chosen)
        return [
            Answer(
                utterance_id=clip.utterance_id,
                text=one.text if one.error is None else None,
                error=one.error,
                warnings=one.warnings,
                time_s=0.0,
            )
            for clip, one in zip(batch, written, strict=True)
        ]

    def _plain(self, batch: Sequence[Clip]) -> list[Answer]:
        model, processor = self.transcriber.model, self.transcriber.processor
        inputs = self._stored(batch) if batch[0].features is not None else processor([clip.samples for clip in batch])
        on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        texts = processor.decode_transcripts(model.generate(**on_device, **self._decoding()))
        return [
            Answer(utterance_id=clip.utterance_id, text=text, time_s=0.0)
            for clip, text in zip(batch, texts, strict=True)
        ]

    def _stored(self, batch: Sequence[Clip]) -> dict[str, torch.Tensor]:
        rows = [torch.from_numpy(clip.features) for clip in batch]
        num_frames = torch.tensor([len(row) for row in rows])
        return {"features": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), "num_frames": num_frames}

    def check_store(self, encoder_weights: str) -> None:
        """Refuse features of another encoder.

        Raises:
            EvaluationError: the store was made with other weights than this model's encoder.
        """
        expected = self.transcriber.model.config.encoder_digest
        if expected is not None and expected != encoder_weights:
            raise EvaluationError(
                f"the store was made with encoder weights {encoder_weights[:12]}, this model was trained with "
                f"{expected[:12]}; name the store that it was trained from, or leave --from-store out"
            )
