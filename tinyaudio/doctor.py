"""What this machine can run, as a list of findings, each with a remedy if something is missing.

Examines what tinyaudio itself uses. Changes no files and does not access the network.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

from tinyaudio.model.errors import MissingModelError, one_line

MIN_PYTHON = (3, 11)
MIN_FREE_GB = 10  # the two default frozen parts take 7.5 GB, installation the rest
MIN_FREE_GPU_GB = 9  # the default decoder takes 7.5 GB in bfloat16


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The state of one requirement."""

    name: str
    state: str  # "ok", "note" (works with a limitation) or "bad" (something will fail)
    found: str
    remedy: str = ""  # what to do; empty for "ok"


def examine() -> Iterator[Finding]:
    """Examine Python, torch and its device, audio formats, voice activity, disk space and the default model."""
    found, remedy = sys.version.split()[0], "install Python 3.11 or later"
    yield _check("Python", sys.version_info >= MIN_PYTHON, found, remedy, "bad")
    for name, (try_out, remedy) in REQUIREMENTS.items():
        try:
            yield Finding(name=name, state="ok", found=try_out())
        except Exception as error:  # any failure is the finding
            yield Finding(name=name, state="bad", found=one_line(error), remedy=remedy)
    yield _device()
    yield _disk()
    yield _default_model()


def _check(name: str, is_ok: bool, found: str, remedy: str, otherwise: str) -> Finding:
    """Make a finding whose state is "ok" or `otherwise`, with a remedy for the latter."""
    if is_ok:
        return Finding(name=name, state="ok", found=found)
    return Finding(name=name, state=otherwise, found=found, remedy=remedy)


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _libsndfile() -> str:
    """Write and read a tenth of a second in memory: a version number does not show which formats work."""
    import numpy as np
    import soundfile

    from tinyaudio.model.audio import load_audio

    kinds = ("WAV", "AIFF", "FLAC", "MP3", "OGG")
    for kind in kinds:
        buffer = BytesIO()
        soundfile.write(buffer, np.zeros(4410, np.float32), 44_100, format=kind)
        load_audio(buffer.getvalue())
    return f"{soundfile.__libsndfile_version__}: {', '.join(kinds)}"


def _ffmpeg() -> str:
    import av

    missing = [codec for codec in ("aac", "opus", "vorbis", "mp3") if codec not in av.codecs_available]
    if missing:
        raise RuntimeError(f"PyAV {av.__version__} without {', '.join(missing)}")
    return f"PyAV {av.__version__}: M4A, AAC, WebM"


def _voice_activity() -> str:
    import numpy as np

    from tinyaudio.model.voice import VoiceActivity

    VoiceActivity().feed(np.zeros(512, np.float32))
    return f"silero-vad {version('silero-vad')}"


# Name -> a function that tries it out and raises if it does not work, and the remedy.
REQUIREMENTS: dict[str, tuple[Callable[[], str], str]] = {
    "torch": (_torch, "pip install torch"),
    "libsndfile": (_libsndfile, "pip install --upgrade soundfile soxr"),
    "FFmpeg libraries": (_ffmpeg, "pip install --upgrade av"),
    "voice activity": (_voice_activity, "pip install 'silero-vad>=6.2'"),
}


def _device() -> Finding:
    try:
        import torch
    except (ImportError, OSError):
        return Finding(name="device", state="bad", found="none without torch", remedy="pip install torch")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found = f"{torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        remedy = f"the default models need {MIN_FREE_GPU_GB} GB; free memory, or use a smaller decoder"
        return _check("device", free > MIN_FREE_GPU_GB * 1e9, found, remedy, "note")
    remedy = "works; for a GPU install a CUDA build of torch (pytorch.org/get-started)"
    has_mps = torch.backends.mps.is_available()
    return _check("device", has_mps, "Apple MPS" if has_mps else "CPU only", remedy, "note")


def _disk() -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    place = next(path for path in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if path.exists())
    free_gb = shutil.disk_usage(place).free / 1e9
    remedy = f"the default models need {MIN_FREE_GB} GB; set HF_HOME to a larger disk"
    return _check("free disk", free_gb >= MIN_FREE_GB, f"{free_gb:.0f} GB for models", remedy, "note")


def _default_model() -> Finding:
    from huggingface_hub import try_to_load_from_cache

    from tinyaudio.model.frozen import is_hub_id
    from tinyaudio.transcribe import MODEL_VARIABLE, default_model

    try:
        model = default_model()
    except MissingModelError as error:
        return Finding(name="default model", state="note", found="none", remedy=str(error))
    if is_hub_id(model):
        files = ("config.json", "model.safetensors")  # an interrupted download has the first only
        is_cached = all(isinstance(try_to_load_from_cache(model, file), str) for file in files)
        found = f"{model} is {'' if is_cached else 'not '}in the hub's cache"
        remedy = f"downloaded at first use, or now: hf download {model}"
        return _check("default model", is_cached, found, remedy, "note")
    is_model = (Path(model) / "config.json").is_file()
    found = model if is_model else f"{model!r}, which contains no model"
    remedy = f"set ${MODEL_VARIABLE} to the folder of a run or to a hub id such as 'owner/name'"
    return _check("default model", is_model, found, remedy, "bad")
