"""`transformers.pipeline("automatic-speech-recognition")` for tinyaudio models.

It uses `recognize`, as the command line does. The stock pipeline calls the ffmpeg binary for files and torchaudio for
other sampling rates, and simply concatenates the texts of overlapping chunks. Travels with the checkpoint.
"""

import warnings as python_warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutomaticSpeechRecognitionPipeline, GenerationConfig

from .errors import AudioError
from .reader import Input
from .recognize import Options, Recognizer

_OWN = ("num_beams", "max_new_tokens", "length_penalty")


class TinyAudioPipeline(AutomaticSpeechRecognitionPipeline):
    """Transcribes a path, bytes, file object, array, or dict with `raw` (or `array`) and `sampling_rate`; or many.

    Returns {"text": transcript}; with return_timestamps=True also "chunks", one per segment with its (start, end) in
    seconds; and "warnings" if there are any. A list gives a list; a generator or dataset an iterator. Options, for a
    call or at construction: batch_size, num_beams, max_new_tokens, length_penalty, chunk_length_s (the longest piece
    decoded at once), return_timestamps, and all other options of `generate`, directly or as generate_kwargs={...}.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # transformers 5.17 and 5.23 store generation options given here in different places.
        names = {*vars(GenerationConfig()), "generation_config"}
        self._at_construction = {name: value for name, value in kwargs.items() if name in names}

    def _sanitize_parameters(
        self, generate_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unsupported = {
            "return_language": "this model transcribes English only",
            "decoder_kwargs": "this model has no CTC decoder",
        }
        for name, reason in unsupported.items():
            if options.pop(name, None):
                raise ValueError(f"{name} is not supported: {reason}")
        if options.get("return_timestamps") not in (None, True, False):
            raise ValueError(
                f"return_timestamps={options['return_timestamps']!r} is not supported; expected True (segment times)"
            )
        if options.pop("stride_length_s", None) is not None:
            python_warnings.warn(
                "stride_length_s is ignored: windows overlap by a fixed length, and only where there is no pause",
                stacklevel=3,
            )
        options |= generate_kwargs or {}
        if options.get("num_return_sequences") not in (None, 1):
            raise ValueError(f"num_return_sequences={options['num_return_sequences']} is not supported; expected 1")
        return {}, options, {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Transcribe one input or many; see the class.

        Raises:
            AudioError: an input that cannot be read.
        """
        if (
            isinstance(inputs, (str, bytes, np.ndarray, torch.Tensor, Mapping))
            or hasattr(inputs, "read")
            or hasattr(inputs, "__fspath__")
        ):
            return next(self._stream([inputs], kwargs))
        outputs = self._stream(inputs, kwargs)
        return list(outputs) if isinstance(inputs, (list, tuple)) else outputs

    def _stream(self, inputs: Iterable[Any], kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        batch_size = kwargs.pop("batch_size", None) or self._batch_size or 1
        kwargs.pop("num_workers", None)
        at_construction = {**self._at_construction, **self._forward_params}
        settings = {**at_construction, **self._sanitize_parameters(**kwargs)[1]}
        config = settings.pop("generation_config", None)
        if config is not None:
            given = {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}
            settings = {**given, **settings}
        with_times = settings.pop("return_timestamps", None)
        own = {name: settings.pop(name) for name in _OWN if name in settings}
        options = Options(
            batch_size=batch_size, window_s=settings.pop("chunk_length_s", None) or None, generate=settings, **own
        )
        recognizer = Recognizer(self.model, self.feature_extractor, self.tokenizer)
        for transcript in recognizer.stream(map(_as_input, inputs), options):
            if transcript.error is not None:
                raise AudioError(transcript.error)
            output: dict[str, Any] = {"text": transcript.text}
            if with_times:
                output["chunks"] = [{"text": s.text, "timestamp": (s.start, s.end)} for s in transcript.segments]
            if transcript.warnings:
                output["warnings"] = list(transcript.warnings)
                python_warnings.warn(f"{transcript.source}: {', '.join(transcript.warnings)}", stacklevel=3)
            yield output


def _as_input(given: Any) -> Input:
    """Convert a tensor, or a dict as pipelines accept it, to an input; return any other input unchanged.

    Raises:
        AudioError: a dict without raw, array, bytes or path, or with an array but no sampling_rate.
    """
    if isinstance(given, torch.Tensor):
        samples = given.detach().cpu()
        return (samples.float() if samples.is_floating_point() else samples).numpy()
    if not isinstance(given, Mapping):
        return given
    samples = given.get("raw", given.get("array"))
    if given.get("bytes") is not None:
        return given["bytes"]
    if samples is None and given.get("path") is not None:  # an undecoded row of a dataset
        return given["path"]
    if samples is None or given.get("sampling_rate") is None:
        raise AudioError(
            f"expected 'raw' (or 'array') and 'sampling_rate', or 'bytes' or 'path'; found a dict with {sorted(given)}"
        )
    return np.asarray(_as_input(samples)), int(given["sampling_rate"])
