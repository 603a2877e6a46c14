"""tinyaudio: speech recognition out of a frozen encoder, a small trained projector and a frozen language model.

    from tinyaudio import Transcriber
    print(Transcriber.load("runs/latest").transcribe(["speech.wav"])[0].text)

This package goes from samples to text. It knows no feature store and no data set: it works, and transcribes, with
`cache`, `pipelines`, zarr and datasets absent. Names load on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tinyaudio.version import __version__

_HOME = {
    "AudioError": "model.errors",
    "MissingModelError": "model.errors",
    "ModelError": "model.errors",
    "TinyAudioError": "model.errors",
    "TinyAudioConfig": "model.configuration_tinyaudio",
    "TinyAudioForConditionalGeneration": "model.modeling_tinyaudio",
    "TinyAudioPipeline": "model.pipeline_tinyaudio",
    "TinyAudioProcessor": "model.processing_tinyaudio",
    "Transcriber": "transcribe",
    "Transcript": "transcribe",
    "load_audio": "model.audio",
    "num_frames": "model.audio",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from tinyaudio.model.audio import load_audio, num_frames  # noqa: F401
    from tinyaudio.model.configuration_tinyaudio import TinyAudioConfig  # noqa: F401
    from tinyaudio.model.errors import AudioError, MissingModelError, ModelError, TinyAudioError  # noqa: F401
    from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration  # noqa: F401
    from tinyaudio.model.pipeline_tinyaudio import TinyAudioPipeline  # noqa: F401
    from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor  # noqa: F401
    from tinyaudio.transcribe import Transcriber, Transcript  # noqa: F401


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tinyaudio' has no attribute {name!r}")
    return getattr(import_module(f"tinyaudio.{_HOME[name]}"), name)
