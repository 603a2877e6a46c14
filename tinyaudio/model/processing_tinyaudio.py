"""The processor: from audio in any form to encoder inputs, and from token ids to text."""

import json
from pathlib import Path
from typing import Any

from transformers import BatchFeature, ProcessorMixin

from .audio import Samples, load_audio
from .encoder import encoder_inputs
from .inputs import as_input, each, is_single
from .prompt import first_line


class TinyAudioProcessor(ProcessorMixin):
    """The encoder's feature extractor and the decoder's tokenizer."""

    def __init__(self, feature_extractor: Any, tokenizer: Any) -> None:
        super().__init__(feature_extractor, tokenizer)

    def __call__(self, audio: Any, sampling_rate: int | None = None, **kwargs: Any) -> BatchFeature:
        """Load, resample, normalise and pad recordings.

        Args:
            audio: one recording in any form of `inputs.as_input`, or several.
            sampling_rate: of arrays, in Hz; None is 16,000.

        Returns:
            input_values (B, S) float32 and attention_mask (B, S) int64, torch tensors.

        Raises:
            AudioError: see `audio.load_audio`.
        """
        many = [audio] if is_single(audio) else list(each(audio))
        values, mask = encoder_inputs(self.feature_extractor, [_load(one, sampling_rate) for one in many])
        return BatchFeature({"input_values": values, "attention_mask": mask.long()})

    def decode_transcripts(self, sequences: Any) -> list[str]:
        """Decode generated ids (B, L) into transcripts: one line without special tokens or surrounding space."""
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [first_line(text) for text in texts]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save both parts, and the location of this class for a process without tinyaudio."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "processor_config.json"
        settings = json.loads(path.read_text())
        settings["auto_map"] = {"AutoProcessor": "modeling_tinyaudio.TinyAudioProcessor"}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        return saved


def _load(one: Any, sampling_rate: int | None) -> Samples:
    given = as_input(one)
    return load_audio(*given) if isinstance(given, tuple) else load_audio(given, sampling_rate)
