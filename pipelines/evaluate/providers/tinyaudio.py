"""The `tinyaudio` provider: a checkpoint of ours, end to end from samples, as `tinyaudio transcribe` runs it.

`guard=False` runs the model alone: no voice detection, no second decoding, no cut; its output is scored unchanged. Both
results are useful, because a guard that shortens loops also lowers the number of insertions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import EvaluationError
from pipelines.evaluate.eval_sets import Clip
from pipelines.evaluate.predictions import Prediction, WordScore
from pipelines.evaluate.providers.base import DECODING, ProviderOptions, in_batches, length_batches, local_environment
from pipelines.recipes.recipe import model_name
from tinyaudio.model.frozen import weights_digest
from tinyaudio.model.recognize import Options
from tinyaudio.model.transcript import Transcript
from tinyaudio.transcribe import Transcriber


@dataclass(frozen=True, kw_only=True, eq=False)
class TinyAudioProvider:
    """A loaded checkpoint with the decoding settings it is evaluated with."""

    transcriber: Transcriber
    options: ProviderOptions
    name: str = "tinyaudio"

    @classmethod
    def load(cls, options: ProviderOptions) -> "TinyAudioProvider":
        """Load a checkpoint folder or hub id; errors as `Transcriber.load`, and for drafts as `Recognizer.drafter`."""
        if options.model is None:
            raise EvaluationError("provider 'tinyaudio' needs a model: a run's folder or a hub id")
        if options.draft != "auto" and not options.guard:
            raise EvaluationError(f"--draft {options.draft} and --no-guard: the model alone takes no drafts. Omit one")
        if options.ctc_nbest is not None and not options.guard:
            raise EvaluationError("--ctc-nbest and --no-guard: the model alone writes its text. Omit one")
        loaded = Transcriber.load(options.model, device=options.device, revision=options.revision)
        provider = cls(transcriber=loaded, options=options)
        if options.guard:
            provider.transcriber.recognizer.drafter(provider._options())  # an error now, before a folder has files
        return provider

    def _decoding(self) -> dict[str, Any]:
        own = self.transcriber.model.generation_config
        return {**{name: getattr(own, name) for name in DECODING}, **self.options.decoding()}

    def identity(self) -> dict[str, Any]:
        config = self.transcriber.model.config
        encoder, decoder = (
            {key: getattr(config, f"{part}_{key}") for key in ("id", "revision", "digest")}
            for part in ("encoder", "decoder")
        )
        chosen = {} if self.options.ctc_nbest is None else {"ctc_nbest": self.options.ctc_nbest}
        return {
            "name": model_name(str(self.options.model)),
            "revision": self.transcriber.revision,
            "projector_digest": weights_digest(self.transcriber.model.projector),
            "encoder": {**encoder, "id": model_name(encoder["id"])},
            "decoder": {**decoder, "id": model_name(decoder["id"]), "dtype": config.decoder_dtype},
            "decoding": {**self._decoding(), "guard": self.options.guard, **chosen},
        }

    def environment(self) -> dict[str, Any]:
        model = self.transcriber.model
        precision = model.config.encoder_precision if model.device.type == "cuda" else "float32"
        where = local_environment(model.device)
        drafter = self.transcriber.recognizer.drafter(self._options()) if self.options.guard else None
        drafted = {} if drafter is None else {"draft": drafter.kind}
        return {"batch_size": self.options.clips_at_once(), "encoder_precision": precision, **drafted, **where}

    def _options(self, **options: Any) -> Options:
        return Options(draft=self.options.draft, ctc_nbest=self.options.ctc_nbest, **self.options.decoding(), **options)

    def transcribe(self, clips: Sequence[Clip]) -> Iterator[Prediction]:
        transcribe_batch = self._with_guard if self.options.guard else self._model_alone
        return in_batches(length_batches(clips, self.options.clips_at_once()), transcribe_batch)

    def _with_guard(self, batch: list[Clip]) -> list[Prediction]:
        sources = [clip.samples for clip in batch]
        has_head = self.transcriber.model.ctc_head is not None
        transcripts = self.transcriber.recognizer.stream(
            sources, self._options(batch_size=len(batch), word_timestamps=has_head)
        )
        return [
            clip.answer(
                one.text if one.error is None else None,
                error=one.error,
                warnings=one.warnings,
                words=_word_scores(one) if has_head else None,
                drafts=one.drafts,
            )
            for clip, one in zip(batch, transcripts, strict=True)
        ]

    def _model_alone(self, batch: list[Clip]) -> list[Prediction]:
        model, processor = self.transcriber.model, self.transcriber.processor
        inputs = processor([clip.samples for clip in batch])
        on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        texts = processor.decode_transcripts(model.generate(**on_device, **self._decoding()))
        return [clip.answer(text) for clip, text in zip(batch, texts, strict=True)]


def _word_scores(transcript: Transcript) -> tuple[WordScore, ...]:
    return tuple(
        WordScore(
            word=word.word,
            probability=_rounded(word.probability),
            acoustic_score=_rounded(word.acoustic_score),
            is_unheard=word.is_unheard,
        )
        for segment in transcript.segments
        for word in segment.words or ()
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
