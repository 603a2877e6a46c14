"""`transformers.pipeline("automatic-speech-recognition")` for tinyaudio models.

Our own preprocessing, because the stock pipeline calls the ffmpeg binary for files and torchaudio for other sampling
rates; our own parameters, because for this kind of model it joins overlapping chunks by plain concatenation. Travels with
the checkpoint.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from transformers import AutomaticSpeechRecognitionPipeline

from .audio import load_audio
from .encoder import encoder_inputs
from .errors import AudioError


class TinyAudioPipeline(AutomaticSpeechRecognitionPipeline):
    """Transcribe a path, bytes, file object, array, or dict with `raw` (or `array`) and `sampling_rate`; or many of them.

    Returns {"text": transcript}. Call-time options: batch_size, num_beams, max_new_tokens, length_penalty and whatever
    else `generate` takes, directly or as generate_kwargs={...}.
    """

    def _sanitize_parameters(
        self, generate_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unsupported = {
            "chunk_length_s": "recordings are decoded whole",
            "stride_length_s": "recordings are decoded whole",
            "return_timestamps": "this model writes text only",
            "return_language": "this model writes English only",
        }
        for name, reason in unsupported.items():
            if options.pop(name, None):
                raise ValueError(f"{name} is not supported: {reason}")
        return {}, {**options, **(generate_kwargs or {})}, {}

    def preprocess(self, inputs: Any) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        if isinstance(inputs, Mapping):
            samples = load_audio(*_array_and_rate(inputs))
        else:
            samples = load_audio(inputs)
        values, mask = encoder_inputs(self.feature_extractor, [samples])
        yield {"is_last": True, "input_values": values, "attention_mask": mask}

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:
        is_last = model_inputs.pop("is_last")
        tokens = self.model.generate(**model_inputs, **generate_kwargs)
        return {"is_last": is_last, "tokens": tokens}

    def postprocess(self, model_outputs: list[dict[str, Any]], **_: Any) -> dict[str, str]:  # type: ignore[override]
        texts = [
            self.tokenizer.decode(row, skip_special_tokens=True).strip()
            for output in model_outputs
            for row in output["tokens"]
        ]
        return {"text": " ".join(text for text in texts if text)}


def _array_and_rate(inputs: Mapping[str, Any]) -> tuple[Any, int | None]:
    """Take samples and rate out of a dict as pipelines accept it.

    Raises:
        AudioError: neither raw, array nor bytes in it, or an array without sampling_rate.
    """
    if inputs.get("bytes") is not None:
        return inputs["bytes"], None
    samples = inputs.get("raw", inputs.get("array"))
    if samples is None or inputs.get("sampling_rate") is None:
        raise AudioError(f"a dict with keys {sorted(inputs)}; expected 'raw' (or 'array') and 'sampling_rate', or 'bytes'")
    return np.asarray(samples), int(inputs["sampling_rate"])
