"""Speech recognition from a frozen encoder, a small trained projector and a frozen language model.

    from tinyaudio import Transcriber
    print(Transcriber.load("runs/latest").transcribe(["speech.wav"])[0].text)

This package turns samples into text. It does not use the feature store or data sets: it transcribes without `cache`,
`pipelines`, zarr and datasets installed. Names are imported at first use, so importing the package is fast.
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
    "Transcript": "model.transcript",
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
    from tinyaudio.model.transcript import Transcript  # noqa: F401
    from tinyaudio.transcribe import Transcriber  # noqa: F401


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tinyaudio' has no attribute {name!r}")
    return getattr(import_module(f"tinyaudio.{_HOME[name]}"), name)
