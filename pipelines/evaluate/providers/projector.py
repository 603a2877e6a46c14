"""The `projector` provider: the text that a projector's CTC head reads from its frames, without the language model.

A control for checkpoints that were trained with a CTC loss over the decoder's tokens (`train.ctc_steps` or
`train.ctc_weight`): what the decoder adds is the difference. Only its token embeddings are used. Greedy, no guard.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.errors import EvaluationError
from pipelines.evaluate.eval_sets import Clip
from pipelines.evaluate.predictions import Prediction
from pipelines.evaluate.providers.base import ProviderOptions, in_batches, length_batches
from pipelines.evaluate.providers.tinyaudio import TinyAudioProvider
from tinyaudio.model.frozen import weights_digest


@dataclass(frozen=True, kw_only=True, eq=False)
class ProjectorProvider:
    """A loaded checkpoint whose projector has a CTC head."""

    whole: TinyAudioProvider
    name: str = "projector"

    @classmethod
    def load(cls, options: ProviderOptions) -> "ProjectorProvider":
        """Load a checkpoint folder or hub id; errors as `Transcriber.load`.

        Raises:
            EvaluationError: no model named, or one that was trained without a CTC loss over tokens.
        """
        if options.model is None:
            raise EvaluationError("provider 'projector' needs a model: a run's folder or a hub id")
        whole = TinyAudioProvider.load(options)
        if whole.transcriber.model.token_ctc is None:
            raise EvaluationError(
                f"the projector of {options.model!r} has no CTC head; expected a run with train.ctc_steps or "
                "train.ctc_weight above 0"
            )
        return cls(whole=whole)

    def identity(self) -> dict[str, Any]:
        head = self.whole.transcriber.model.token_ctc
        return {**self.whole.identity(), "ctc_digest": weights_digest(head), "decoding": "greedy, projector alone"}

    def environment(self) -> dict[str, Any]:
        return self.whole.environment()

    def transcribe(self, clips: Sequence[Clip]) -> Iterator[Prediction]:
        batches = length_batches(clips, self.whole.options.clips_at_once())
        return in_batches(batches, self._transcribe_batch)

    @torch.no_grad()
    def _transcribe_batch(self, batch: list[Clip]) -> list[Prediction]:
        model, processor = self.whole.transcriber.model, self.whole.transcriber.processor
        inputs = processor([clip.samples for clip in batch])
        features, num_frames = model.encode(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
        projected, lengths = model.project(features, num_frames)
        paths = model.token_ctc.best_path(projected, lengths, model.get_input_embeddings().weight)
        texts = processor.decode_transcripts(paths)
        return [clip.answer(text) for clip, text in zip(batch, texts, strict=True)]
