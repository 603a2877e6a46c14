"""Loading, freezing, placing and identifying the two pretrained parts.

A part is named by its hub id, or a local folder, and a revision. Errors of the hub client become one line here. A
digest of the weights lets a store, a run and a checkpoint check that they were made with the same part.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .errors import MissingModelError, ModelError, is_missing_revision, one_line

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# facebook/hubert-large-ls960-ft ships only pytorch_model.bin on its main branch; transformers v5 would then start a
# background thread that asks the network for a converted copy.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


_POINTER = b"version https://git-lfs.github.com/spec/"
_SETTINGS = "config generation_config preprocessor_config processor_config tokenizer_config tokenizer vocab".split()
# In order of precedence, as transformers looks for them. An index names the files that it needs.
_WEIGHTS = "model.safetensors model.safetensors.index.json pytorch_model.bin pytorch_model.bin.index.json".split()
_TRAINING = ("optimizer.pt", "scheduler.pt", "rng_state.pth")  # in a checkpoint of a run
# What damaged weights raise in formats without checks; struct.error in GGUF.
_DAMAGE = (SafetensorError, pickle.UnpicklingError, EOFError, struct.error)


def check_files(folder: Path) -> None:
    """Check that the files of a local model are files, and whole: weights, settings, and the state of a training.

    Reads the headers of weights, so it costs milliseconds. A folder without some of the files passes.

    Raises:
        ModelError: a Git LFS pointer, a file that was cut, or settings that are not JSON.
    """
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    found = [folder / f"{name}.json" for name in _SETTINGS] + [folder / name for name in _TRAINING]
    for path in [*([weights] if weights else []), *found]:
        if path.is_file():
            _check_file(path)
    if weights is not None and weights.suffix == ".json":
        for name in sorted(set(json.loads(weights.read_text())["weight_map"].values())):
            if (folder / name).is_file():
                _check_file(folder / name)


def _check_file(path: Path) -> None:
    status = path.stat()
    fault = _fault(path, status.st_size, status.st_mtime_ns)
    if fault is not None:
        raise ModelError(f"{str(path)!r} {fault}")


@functools.lru_cache(maxsize=256)
def _fault(path: Path, size: int, _: int) -> str | None:
    """Find what is wrong with a file, for the second half of a sentence."""
    with path.open("rb") as stream:
        first = stream.read(len(_POINTER))
        if first == _POINTER:
            return "is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder, or download it again"
        if path.suffix == ".safetensors":
            length = int.from_bytes(first[:8], "little")
            try:
                header = json.loads(first[8:] + stream.read(min(max(0, length + 8 - len(first)), size)))
                ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
                expected = 8 + length + max(ends, default=0)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                return f"is damaged: its {size:,} bytes do not begin with a header. Download or copy it again"
            if size != expected:
                return f"is damaged: expected {expected:,} bytes, found {size:,}. Download or copy it again"
    # Before version 1.6, torch wrote plain pickles, which have no length to check.
    if path.suffix in (".bin", ".pt", ".pth") and first[:1] != b"\x80" and not zipfile.is_zipfile(path):
        return f"is damaged: its {size:,} bytes are not a file of torch. Download or copy it again"
    if path.suffix == ".json":
        try:
            settings = json.loads(path.read_bytes())
        except ValueError as error:
            return f"is damaged: it is not JSON ({one_line(error)}). Download or copy it again"
        if not isinstance(settings, dict):
            return f"is damaged: expected a JSON object, found a {type(settings).__name__}. Download or copy it again"
    return None


def _check_gguf(path: Path) -> None:
    """Check that a GGUF file exists and begins as one; errors as `load_frozen`."""
    if not path.is_file():
        found = sorted(file.name for file in path.parent.glob("*.gguf"))
        raise MissingModelError(f"expected the GGUF file {str(path)!r}, found {found}. Set decoder.gguf_file to one")
    with path.open("rb") as stream:
        first = stream.read(len(_POINTER))
    if first == _POINTER:
        _check_file(path)
    if not first.startswith(b"GGUF"):
        raise ModelError(f"{str(path)!r} is not a GGUF file. Download or copy it again")


@contextlib.contextmanager
def naming_damage(name: str) -> Iterator[None]:
    """Turn what damaged weights raise into one line.

    Raises:
        ModelError: with the name of the model.
    """
    try:
        yield
    except (RuntimeError, *_DAMAGE) as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ModelError(
                f"{name!r}: expected weights of the sizes in config.json, found others. Download or copy both again"
            ) from error
        is_damage = any(words in str(error) for words in ("PytorchStreamReader", "unexpected EOF"))
        if isinstance(error, RuntimeError) and not is_damage:
            raise
        raise ModelError(f"{name!r} has damaged weights ({one_line(error)}). Download or copy it again") from error


def is_hub_id(name: str) -> bool:
    """Check whether a name has the form of a hub id, owner/name, and is not a folder. Does not access the network."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).is_dir()


def load_frozen(
    auto_class: Any, model_id: str, revision: str | None, *, gguf_file: str | None = None, **kwargs: Any
) -> Any:
    """Call `auto_class.from_pretrained` and turn its failures into one line.

    Args:
        model_id: hub id such as "facebook/hubert-large-ls960-ft", or a local folder.
        revision: hub commit, branch or tag; None for a local folder or the hub's default branch.
        gguf_file: name of the GGUF file to read; None: the usual files.

    Raises:
        MissingModelError: no such folder, or the hub cannot be reached and its cache holds no copy.
        ModelError: the files are not a model of this class, or damaged; or the package `gguf` is missing.
    """
    if not Path(model_id).is_dir() and not is_hub_id(model_id):
        raise MissingModelError(
            f"expected a model folder or a hub id such as 'owner/name', found {model_id!r}. Check the path, or name a "
            "copy: --encoder-id or --decoder-id, in a recipe encoder.id or decoder.id"
        )
    if Path(model_id).is_dir() and gguf_file is None:
        check_files(Path(model_id))
    if gguf_file is not None:
        kwargs["gguf_file"] = gguf_file
        if Path(model_id).is_dir():
            _check_gguf(Path(model_id) / gguf_file)
        if importlib.util.find_spec("gguf") is None:
            raise ModelError(f"{gguf_file!r} of {model_id!r} needs the package gguf. Try pip install gguf")
    try:
        with naming_damage(model_id):
            return auto_class.from_pretrained(model_id, revision=revision or "main", **kwargs)
    except ModelError:
        raise
    except OSError as error:
        if revision and is_missing_revision(error):
            raise MissingModelError(
                f"{model_id!r} has no revision {revision!r} on the hub. Name another commit or a branch: in a recipe "
                "that is encoder.revision or decoder.revision, such as --set decoder.revision=main"
            ) from error
        at = f" at revision {revision!r}" if revision else ""
        raise MissingModelError(
            f"{model_id!r}{at} cannot be loaded ({one_line(error)}). Check the id and the network, or name a local copy"
        ) from error
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{model_id!r} cannot be loaded as {auto_class.__name__}: {one_line(error)}") from error


def check_complete(model_id: str, missing: Iterable[str]) -> None:
    """Check that a frozen part has all its weights: transformers fills in random ones for those that a file lacks.

    Args:
        missing: names of weights that were not found. What SpecAugment fills in during training is not needed.

    Raises:
        ModelError: some are missing.
    """
    lost = sorted(name for name in missing if not name.endswith("masked_spec_embed"))
    if lost:
        some = f"{', '.join(lost[:3])}{', ...' * (len(lost) > 3)}"
        raise ModelError(f"{model_id!r} lacks {len(lost)} of its weights ({some}). Download or copy it again")


def load_decoder(
    decoder_id: str, revision: str | None, dtype: torch.dtype, gguf_file: str | None = None
) -> PreTrainedModel:
    """Load a frozen decoder, on the CPU, in eval mode; errors as `load_frozen`.

    Args:
        gguf_file: name of a GGUF file in the decoder's folder or repository, which is read in place of its other
            weights, configuration and tokenizer. Quantised weights are expanded to `dtype`.
    """
    options: dict[str, Any] = {"dtype": dtype}
    # Newer versions of transformers leave weights packed where they have a kernel: without gradients, and with another
    # digest than on other machines.
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    decoder, info = load_frozen(
        AutoModelForCausalLM, decoder_id, revision, gguf_file=gguf_file, output_loading_info=True, **options
    )
    check_complete(decoder_id, info["missing_keys"])
    return freeze(decoder)


def load_config(model_id: str, revision: str | None = None) -> Any:
    """Load a part's configuration without its weights; errors as `load_frozen`."""
    return load_frozen(AutoConfig, model_id, revision)


def resolved_revision(model: Any, revision: str | None, file: str = "config.json") -> str | None:
    """Return the hub commit a model was loaded from; for a local folder, the revision as requested.

    Args:
        file: one that was loaded.
    """
    name = model.config.name_or_path
    if not name or Path(name).is_dir():
        return revision
    loaded = try_to_load_from_cache(name, file, revision=revision or "main")
    return Path(loaded).parent.name if isinstance(loaded, str) else revision


def freeze(module: ModuleT) -> ModuleT:
    """Put a module into eval mode and switch off the gradients of its parameters."""
    return module.eval().requires_grad_(False)


def place(module: ModuleT, device: torch.device | str) -> ModuleT:
    """Move a model to its device; every model of this project is moved here.

    On CUDA this switches off cuDNN's attention for the process. torch prefers it on H100, H200 and B200, where it
    builds a plan for every new shape (batch, length), 23 to 37 ms of the host's time each. Our batches rarely repeat a
    shape. The flash and memory-efficient kernels need no plan.

    Source: github.com/pytorch/pytorch, issue 154602 and pull request 155958.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return module.to(device)


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 (hex) over names, types, shapes and bytes of all weights, in their own precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # numpy has no bfloat16; a view as bytes has the same bytes
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_digest(part: str, model_id: str, expected: str | None, module: nn.Module) -> None:
    """Check a frozen part's weights against the digest recorded at training time. Skipped if `expected` is None.

    Args:
        part: "encoder", "decoder" or "ctc_head", for the message.

    Raises:
        ModelError: the weights differ.
    """
    if expected is None:
        return
    found = weights_digest(module)
    if found != expected:
        raise ModelError(
            f"expected the {part} weights {expected[:12]} that this projector was trained with, found {found[:12]} in "
            f"{model_id!r}. Pass {part}_digest=None to use them anyway"
        )
