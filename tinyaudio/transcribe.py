"""Transcription from Python: load a model once, transcribe any number of recordings.

    transcriber = Transcriber.load("runs/latest")
    print(transcriber.transcribe(["speech.wav"])[0].text)

Finds the default model and resolves the name of a device. `recognize` transcribes, here and for `pipeline()`.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor

from tinyaudio.model.configuration_tinyaudio import TinyAudioConfig
from tinyaudio.model.errors import AudioError, MissingModelError, ModelError, one_line
from tinyaudio.model.frozen import place, resolved_revision
from tinyaudio.model.inputs import each, is_single
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor
from tinyaudio.model.reader import Input
from tinyaudio.model.recognize import OnProgress, Options, Recognizer
from tinyaudio.model.source import AudioSource
from tinyaudio.model.transcript import Transcript
from tinyaudio.version import __version__

MODEL_VARIABLE = "TINYAUDIO_MODEL"
LATEST_RUN = Path("runs/latest")


class Transcriber:
    """A model on a device that transcribes recordings.

    Args:
        model: with both frozen parts attached, in eval mode.
        name, revision: recorded in every transcript.
    """

    def __init__(
        self,
        model: TinyAudioForConditionalGeneration,
        processor: TinyAudioProcessor,
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.model, self.processor, self.name, self.revision = model, processor, name, revision
        self.recognizer = Recognizer(model, processor.feature_extractor, processor.tokenizer)

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str | None = None,
        revision: str | None = None,
        **overrides: Any,
    ) -> "Transcriber":
        """Load a model.

        Args:
            model: checkpoint or run folder, or hub id. None: $TINYAUDIO_MODEL, else runs/latest.
            device: "auto" (CUDA, else Apple's MPS, else CPU) or any name of torch's, such as "cuda:1".
            dtype: precision of the decoder, such as "float32"; None: the one it was trained with.
            revision: commit, branch or tag on the hub.
            overrides: fields of `TinyAudioConfig`, such as encoder_id="/a/local/copy" or window_s=15.

        Raises:
            MissingModelError: there is no such model, or one of its frozen parts cannot be found.
            ModelError: parts that do not fit together, or an unknown device.
            ValueError: a window_s below a second.
        """
        name = str(model) if model is not None else default_model()
        # Use this package's classes for a checkpoint, not the copies that travel in its folder.
        AutoConfig.register("tinyaudio", TinyAudioConfig, exist_ok=True)
        AutoProcessor.register(TinyAudioConfig, TinyAudioProcessor, exist_ok=True)
        AutoModelForSpeechSeq2Seq.register(TinyAudioConfig, TinyAudioForConditionalGeneration, exist_ok=True)
        # False, not the default, which asks on the terminal and would read a recording on stdin as the answer.
        where: dict[str, Any] = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
        window_s = Options(window_s=overrides.pop("window_s", None)).window_s
        loaded = TinyAudioForConditionalGeneration.from_pretrained(name, dtype=dtype, **where, **overrides)
        if window_s is not None:
            loaded.config.window_s = window_s
        processor = TinyAudioProcessor.from_pretrained(name, **where)
        loaded = place(loaded, pick_device(device)).eval()
        return cls(loaded, processor, name, resolved_revision(loaded, revision))

    def transcribe(
        self, sources: Sequence[AudioSource | np.ndarray], *, on_progress: OnProgress | None = None, **options: Any
    ) -> list[Transcript]:
        """Transcribe recordings; one that cannot be read raises an error.

        Args:
            sources: recordings in any form of `inputs.as_input`: paths, URLs, encoded bytes, binary file objects,
                arrays of samples at 16 kHz, rows of data sets.
            on_progress: called after every batch.
            options: fields of `recognize.Options`: batch_size, num_beams, draft, max_new_tokens, length_penalty,
                window_s, word_timestamps, confidence, track.

        Raises:
            AudioError: the first input that cannot be read.
            ValueError: an option out of its range.
        """
        transcripts = []
        for transcript in self.stream(sources, on_progress=on_progress, **options):
            if transcript.error is not None:
                raise AudioError(transcript.error)
            transcripts.append(transcript)
        return transcripts

    def stream(
        self, sources: Iterable[Input], *, on_progress: OnProgress | None = None, **options: Any
    ) -> Iterator[Transcript]:
        """Transcribe inputs one after the other: one transcript each, in their order, in bounded memory.

        Arguments as `transcribe`. `sources` may be a generator; a tuple is (samples, sampling rate in Hz). An input
        that cannot be read gives a transcript with `error` set instead of an exception.

        Raises:
            TypeError: `sources` is one recording, not a list of them.
        """
        if is_single(sources):  # whose letters, bytes or samples would be taken for recordings
            raise TypeError(f"expected a list of recordings, found one {type(sources).__name__}. Try [recording]")
        return map(self.signed, self.recognizer.stream(each(sources), Options(**options), on_progress))

    def signed(self, transcript: Transcript) -> Transcript:
        """Record the model and the version in a transcript."""
        return replace(transcript, model=self.name, revision=self.revision, version=__version__)


def default_model(how: str = "") -> str:
    """Return the model to use if none is named: $TINYAUDIO_MODEL, else runs/latest.

    Args:
        how: for the error, how the caller takes a model, such as " with --model".

    Raises:
        MissingModelError: neither exists.
    """
    named = os.environ.get(MODEL_VARIABLE)
    if named:
        return named
    if (LATEST_RUN / "config.json").is_file():
        return str(LATEST_RUN)
    raise MissingModelError(
        f"no model found: ${MODEL_VARIABLE} is not set and {str(LATEST_RUN)!r} contains no model. "
        f"Name a run folder or a hub id{how}, or run `make demo`"
    )


def pick_device(device: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA if available, else Apple's MPS, else the CPU.

    Raises:
        ModelError: an unknown name, or a device that this machine does not have.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = one_line(error)
        raise ModelError(f"device {device!r} cannot be used ({reason}); expected auto, cpu, cuda or mps") from error
    return chosen
