"""What this machine can do, one line each, with a remedy where something is missing.

Looks, and changes nothing; asks no network. Keys are reported as present or not, never shown.
"""

import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

MIN_PYTHON = (3, 11)
MIN_FREE_GB = 10  # the two default frozen parts take 7.5 GB, installation the rest
DEFAULT_PARTS = ("facebook/hubert-large-ls960-ft", "HuggingFaceTB/SmolLM3-3B-Base")
KEYS = {"HF_TOKEN": "gated models and publishing", "ASSEMBLYAI_API_KEY": "`tinyaudio eval --provider assemblyai`"}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in one file; else <name>.index.json names the files


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at.

    Args:
        name: what.
        state: "ok", "note" (works without) or "bad" (something will fail).
        found: what is there.
        remedy: what to do about it; empty where there is nothing to do.
    """

    name: str
    state: str
    found: str
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Look at everything that transcription and training depend on."""
    yield _python()
    yield from _torch()
    yield from map(_broken_or_absent, ("torchaudio", "torchcodec"))
    yield from _formats()
    yield _voice_activity()
    yield _disk()
    yield _hub()
    yield _default_model()
    yield from map(_frozen_part, DEFAULT_PARTS)
    for name, use in KEYS.items():
        is_set = _has_key(name)
        yield Finding(
            name=name,
            state="ok" if is_set else "note",
            found="set" if is_set else "not set",
            remedy=_only(not is_set, f"needed for {use} only"),
        )


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= MIN_PYTHON
    return Finding(
        name="Python",
        state="ok" if good else "bad",
        found=found,
        remedy=_only(not good, "install Python 3.11 or later"),
    )


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding(name="torch", state="bad", found=_line(error), remedy="pip install torch")
        return
    yield Finding(name="torch", state="ok", found=f"{torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found = f"{torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        enough = free > 9e9
        yield Finding(
            name="device",
            state="ok" if enough else "note",
            found=found,
            remedy=_only(not enough, "the default decoder takes 7.5 GB in bfloat16"),
        )
    elif torch.backends.mps.is_available():
        yield Finding(name="device", state="ok", found="Apple MPS")
    else:
        remedy = "works; for a GPU install a CUDA build of torch (pytorch.org/get-started)"
        yield Finding(name="device", state="note", found="CPU only", remedy=remedy)


def _broken_or_absent(name: str) -> Finding:
    """torchaudio and torchcodec are not used here, but a broken copy breaks other packages' audio."""
    if find_spec(name) is None:
        return Finding(name=name, state="ok", found="not installed, not needed")
    try:
        importlib.import_module(name)
    except Exception as error:  # any failure at import, whatever its type, is the finding
        remedy = (
            f"tinyaudio does not use it, other packages may: pip uninstall {name}, or install the build for your torch"
        )
        return Finding(name=name, state="note", found=f"installed but broken: {_line(error)}", remedy=remedy)
    return Finding(name=name, state="ok", found=f"{_version(name)}, loads; not needed")


def _formats() -> Iterator[Finding]:
    """Write and read a tenth of a second in memory, rather than believe a version number."""
    try:
        import numpy as np
        import soundfile

        from tinyaudio.model.audio import load_audio

        readable = []
        for kind in ("WAV", "AIFF", "FLAC", "MP3", "OGG"):
            buffer = BytesIO()
            soundfile.write(buffer, np.zeros(4410, np.float32), 44_100, format=kind)
            load_audio(buffer.getvalue())
            readable.append(kind)
        yield Finding(name="libsndfile", state="ok", found=f"{soundfile.__libsndfile_version__}: {', '.join(readable)}")
    except Exception as error:  # any failure is the finding
        yield Finding(name="libsndfile", state="bad", found=_line(error), remedy="pip install --upgrade soundfile soxr")
    try:
        import av

        missing = [codec for codec in ("aac", "opus", "vorbis", "mp3") if codec not in av.codecs_available]
        found = f"PyAV {av.__version__}: M4A, AAC, WebM" + (f"; without {', '.join(missing)}" if missing else "")
        yield Finding(name="FFmpeg libraries", state="ok" if not missing else "note", found=found)
    except Exception as error:  # any failure is the finding
        yield Finding(name="FFmpeg libraries", state="bad", found=_line(error), remedy="pip install --upgrade av")


def _voice_activity() -> Finding:
    try:
        import numpy as np

        from tinyaudio.model.voice import VoiceActivity

        VoiceActivity().feed(np.zeros(512, np.float32))
    except Exception as error:  # any failure is the finding
        return Finding(name="voice activity", state="bad", found=_line(error), remedy="pip install 'silero-vad>=6.2'")
    return Finding(name="voice activity", state="ok", found=f"silero-vad {_version('silero-vad')}")


def _disk() -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free_gb = shutil.disk_usage(place).free / 1e9
    enough = free_gb >= MIN_FREE_GB
    remedy = _only(not enough, f"the default models need {MIN_FREE_GB} GB; set HF_HOME to a larger disk")
    return Finding(
        name="free disk", state="ok" if enough else "note", found=f"{free_gb:.0f} GB for models", remedy=remedy
    )


def _hub() -> Finding:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Finding(name="hub", state="note", found="offline mode", remedy="unset HF_HUB_OFFLINE to download models")
    return Finding(name="hub", state="ok", found="online mode (not tried)")


def _default_model() -> Finding:
    from tinyaudio.model.errors import MissingModelError
    from tinyaudio.model.frozen import is_hub_id
    from tinyaudio.transcribe import MODEL_VARIABLE, default_model

    try:
        model = default_model()
    except MissingModelError as error:
        return Finding(name="default model", state="note", found="none", remedy=str(error))
    if (Path(model) / "config.json").is_file():
        return Finding(name="default model", state="ok", found=model)
    if is_hub_id(model):
        return replace(_frozen_part(model), name="default model")
    remedy = f"set ${MODEL_VARIABLE} to a run's folder or to a hub id, 'owner/name'"
    return Finding(name="default model", state="bad", found=f"{model!r}, which holds no model", remedy=remedy)


def _frozen_part(model_id: str) -> Finding:
    is_here = _is_cached(model_id)
    remedy = _only(not is_here, f"downloaded at first use, or now: hf download {model_id}")
    found = f"{model_id} is {'' if is_here else 'not, or not wholly, '}in the cache"
    return Finding(name=model_id, state="ok" if is_here else "note", found=found, remedy=remedy)


def _is_cached(model_id: str) -> bool:
    """Look for the configuration and for every file of weights: a download that broke off has some."""
    from huggingface_hub import try_to_load_from_cache

    def path_of(name: str) -> str | None:
        path = try_to_load_from_cache(model_id, name)
        return path if isinstance(path, str) and Path(path).is_file() else None

    if path_of("config.json") is None:
        return False
    if any(map(path_of, WEIGHTS)):
        return True
    indices = [path for name in WEIGHTS if (path := path_of(f"{name}.index.json"))]
    return any(all(map(path_of, set(json.loads(Path(index).read_text())["weight_map"].values()))) for index in indices)


def _has_key(name: str) -> bool:
    if name == "HF_TOKEN":
        from huggingface_hub import get_token

        return get_token() is not None  # from the variable or from `hf auth login`
    return bool(os.environ.get(name))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown version"


def _only(condition: bool, text: str) -> str:
    return text if condition else ""


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
