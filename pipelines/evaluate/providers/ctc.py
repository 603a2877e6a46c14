"""The `ctc` provider: an encoder's own head, greedy, without any language model.

A control that shows whether the decoder helps: the same frozen encoder on the same clips. The model is a checkpoint of
ours, whose encoder is used, or a CTC model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CTC_MAPPING, AutoModelForCTC, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from pipelines.encoders import pick_device
from pipelines.errors import EvaluationError
from pipelines.evaluate.eval_sets import Clip
from pipelines.evaluate.predictions import Prediction
from pipelines.evaluate.providers.base import ProviderOptions, in_batches, length_batches, local_environment
from pipelines.recipes.recipe import model_name
from tinyaudio.model.configuration_tinyaudio import TinyAudioConfig
from tinyaudio.model.encoder import encode, encoder_inputs, load_feature_extractor
from tinyaudio.model.frozen import freeze, load_config, load_frozen, place, resolved_revision, weights_digest


@dataclass(frozen=True, kw_only=True, eq=False)
class CTCProvider:
    """A loaded encoder with its CTC head."""

    model: PreTrainedModel
    feature_extractor: Any
    tokenizer: Any
    model_id: str
    revision: str | None
    batch_size: int
    name: str = "ctc"

    @classmethod
    def load(cls, options: ProviderOptions) -> "CTCProvider":
        """Load the encoder of a checkpoint, or a CTC model.

        Raises:
            MissingModelError: no such model.
            EvaluationError: a folder without model, or a model without a CTC head.
        """
        if options.model is None:
            raise EvaluationError("provider 'ctc' needs a model: a run's folder, whose encoder is used, or a CTC model")
        model_id, revision = _encoder_of(options.model, options.revision)
        if type(config := load_config(model_id, revision)) not in MODEL_FOR_CTC_MAPPING:
            raise EvaluationError(
                f"{model_id!r} has no CTC head, as no {config.model_type} model has; "
                "name a fine-tuned encoder, such as facebook/hubert-large-ls960-ft"
            )
        model, info = load_frozen(AutoModelForCTC, model_id, revision, output_loading_info=True)
        if info["missing_keys"]:
            raise EvaluationError(
                f"{model_id!r} has no CTC head (its weights lack {', '.join(sorted(info['missing_keys']))}); "
                "name a fine-tuned encoder, such as facebook/hubert-large-ls960-ft"
            )
        return cls(
            model=place(freeze(model), pick_device(options.device)),
            feature_extractor=load_feature_extractor(model_id, revision),
            tokenizer=load_frozen(AutoTokenizer, model_id, revision),
            model_id=model_id,
            revision=resolved_revision(model, revision),
            batch_size=options.clips_at_once(),
        )

    def identity(self) -> dict[str, Any]:
        return {
            "name": model_name(self.model_id),
            "encoder": {"id": model_name(self.model_id), "revision": self.revision},
            "weights_digest": weights_digest(self.model),
            "decoding": "greedy",
        }

    def environment(self) -> dict[str, Any]:
        precision = str(self.model.dtype).removeprefix("torch.")
        return {"batch_size": self.batch_size, "encoder_precision": precision, **local_environment(self.model.device)}

    def transcribe(self, clips: Sequence[Clip]) -> Iterator[Prediction]:
        return in_batches(length_batches(clips, self.batch_size), self._transcribe_batch)

    @torch.no_grad()
    def _transcribe_batch(self, batch: list[Clip]) -> list[Prediction]:
        inputs = encoder_inputs(self.feature_extractor, [clip.samples for clip in batch])
        values, mask = (part.to(self.model.device) for part in inputs)
        features, num_frames = encode(self.model.base_model, values, mask)
        best = self.model.lm_head(features).argmax(-1).cpu()
        rows = [row[:count].tolist() for row, count in zip(best, num_frames.tolist(), strict=True)]
        return [clip.answer(self._read(row)) for clip, row in zip(batch, rows, strict=True)]

    def _read(self, ids: list[int]) -> str:
        """Collapse repeats and blanks, and drop special tokens such as "<unk>", which a head may also choose."""
        text = str(self.tokenizer.decode(ids))  # skip_special_tokens would lose the blank between "ee" and "e"
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return " ".join(text.split())


def _encoder_of(model: str, revision: str | None) -> tuple[str, str | None]:
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise EvaluationError(f"{model!r} does not contain config.json; expected a run, a checkpoint or a CTC model")
    settings, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
    if settings.get("model_type") != TinyAudioConfig.model_type:
        return model, revision
    config = TinyAudioConfig.from_dict(settings)
    return config.encoder_id, config.encoder_revision
