"""`transformers.pipeline("automatic-speech-recognition")` for tinyaudio models.

It uses `recognize`, as the command line does. The stock pipeline calls the ffmpeg binary for files and torchaudio for
other sampling rates, and simply concatenates the texts of overlapping chunks. Travels with the checkpoint.
"""

import warnings as python_warnings
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import AutomaticSpeechRecognitionPipeline, GenerationConfig

from .errors import AudioError, ModelError
from .frozen import place
from .inputs import each, is_single
from .recognize import Options, Recognizer

_ENGLISH = {"language": ("en", "english"), "task": ("transcribe",)}
_OWN = ("num_beams", "draft", "ctc_nbest", "max_new_tokens", "length_penalty", "track")


class TinyAudioPipeline(AutomaticSpeechRecognitionPipeline):
    """Transcribes one recording, in any form that `inputs.as_input` knows, or many.

    Returns {"text": transcript}; with return_timestamps=True also "chunks", one per segment with its (start, end) in
    seconds, and with return_timestamps="word" one per word; and "warnings" if there are any. A list gives a list; a
    generator or dataset an iterator. Options, for a call or at construction: batch_size, num_beams, draft (of greedy
    decoding), ctc_nbest, max_new_tokens, length_penalty, track (of files with several), chunk_length_s (the longest
    piece decoded at once), return_timestamps, and all other options of `generate`, directly or as
    generate_kwargs={...}.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        place(self.model, self.device)
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
        if options.get("return_timestamps") not in (None, True, False, "word"):
            raise ValueError(
                f"return_timestamps={options['return_timestamps']!r} is not supported; expected True (segment times) "
                "or 'word'"
            )
        if options.pop("stride_length_s", None) is not None:
            python_warnings.warn(
                "stride_length_s is ignored: windows overlap by a fixed length, and only where there is no pause",
                stacklevel=3,
            )
        options |= generate_kwargs or {}
        for name, expected in _ENGLISH.items():  # a snippet for Whisper or for our command line gives them
            value = options.pop(name, None)
            if value is not None and str(value).strip("<|>").lower() not in expected:
                raise ValueError(
                    f"{name}={value!r} is not supported; expected {expected[0]!r}: this model transcribes English only"
                )
        if options.get("num_return_sequences") not in (None, 1):
            raise ValueError(f"num_return_sequences={options['num_return_sequences']} is not supported; expected 1")
        return {}, options, {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Transcribe one input or many; see the class. An input that cannot be read is an AudioError."""
        if is_single(inputs):
            return next(self._stream([inputs], kwargs))
        outputs = self._stream(each(inputs), kwargs)
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
            batch_size=batch_size,
            window_s=settings.pop("chunk_length_s", None) or None,
            word_timestamps=with_times == "word",
            generate=settings,
            **own,
        )
        recognizer = Recognizer(self.model, self.feature_extractor, self.tokenizer)
        for transcript in recognizer.stream(inputs, options):
            if transcript.error is not None:
                raise AudioError(transcript.error)
            output: dict[str, Any] = {"text": transcript.text}
            if with_times == "word":
                output["chunks"] = [
                    {"text": word.word, "timestamp": (word.start, word.end)}
                    for segment in transcript.segments
                    for word in segment.words or ()
                ]
            elif with_times:
                output["chunks"] = [{"text": s.text, "timestamp": (s.start, s.end)} for s in transcript.segments]
            if transcript.warnings:
                output["warnings"] = list(transcript.warnings)
                python_warnings.warn(f"{transcript.source}: {', '.join(transcript.warnings)}", stacklevel=3)
            yield output


def _pipeline_of_model(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Make the class of pipeline that the model names, where transformers would make its stock class.

    `pipeline(task, model=a_loaded_model, tokenizer=...)` reads no configuration, so it does not find ours. The stock
    class would decode a whole recording as one piece, and stop after the first words without an error.

    Raises:
        ModelError: another subclass of the stock pipeline.
    """
    model = kwargs.get("model", args[0] if args else None)
    own = getattr(model, "pipeline_class", None)
    if own is None or any(base.__name__ == own.__name__ for base in cls.__mro__):
        return object.__new__(cls)
    if cls is not AutomaticSpeechRecognitionPipeline:
        raise ModelError(f"expected a subclass of {own.__name__} for this model, found {cls.__name__}")
    return object.__new__(own)


AutomaticSpeechRecognitionPipeline.__new__ = _pipeline_of_model
