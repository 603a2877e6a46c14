"""Loading, freezing and identifying the two pretrained parts.

They are named by hub id (or local folder) and revision; this module turns what the hub client says when that fails into
one line, and gives weights a digest so that a store, a run and a checkpoint can tell whether they meant the same ones.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .errors import MissingModelError, ModelError

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# facebook/hubert-large-ls960-ft ships only pytorch_model.bin on its main branch; transformers v5 would then start a
# background thread that asks the network for a converted copy.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


def is_folder_or_hub_id(model_id: str) -> bool:
    """Whether there is such a folder, or the name has a hub id's form, owner/name; asks no network."""
    return Path(model_id).is_dir() or (not model_id.startswith((".", "/", "~")) and model_id.count("/") == 1)


def load_frozen(auto_class: Any, model_id: str, revision: str | None, **kwargs: Any) -> Any:
    """Call `auto_class.from_pretrained`, with a clear line when nothing is there.

    Args:
        auto_class: an Auto class of transformers.
        model_id: hub id such as "facebook/hubert-large-ls960-ft", or a local folder.
        revision: hub commit, branch or tag; None for a local folder or the hub's default branch.

    Raises:
        MissingModelError: no such folder, or the hub cannot be reached and its cache holds no copy.
        ModelError: files that do not make such a model.
    """
    if not is_folder_or_hub_id(model_id):
        raise MissingModelError(
            f"{model_id!r} is not a folder; expected a model folder or a hub id such as 'owner/name'"
        )
    try:
        return auto_class.from_pretrained(model_id, revision=revision or "main", **kwargs)
    except OSError as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).split("\n")[0]
        raise MissingModelError(
            f"{model_id!r}{at} cannot be loaded ({reason}); check the id and the network, or name a local copy"
        ) from error
    except (ValueError, KeyError) as error:
        raise ModelError(f"{model_id!r} is no {auto_class.__name__}: {str(error).splitlines()[0]}") from error


def load_decoder(decoder_id: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """Load a frozen decoder, on the CPU, in eval mode; errors as `load_frozen`."""
    return freeze(load_frozen(AutoModelForCausalLM, decoder_id, revision, dtype=dtype))


def load_config(model_id: str, revision: str | None = None) -> Any:
    """Load a part's configuration without its weights; errors as `load_frozen`."""
    return load_frozen(AutoConfig, model_id, revision)


def resolved_revision(model: Any, revision: str | None) -> str | None:
    """Return the hub commit a model was loaded from; the revision as asked for where there is none (local folders)."""
    commit = getattr(model.config, "_commit_hash", None)  # older transformers; 5.23 does not say
    if commit:
        return str(commit)
    name = model.config.name_or_path
    if not name or Path(name).is_dir():
        return revision
    config = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    return Path(config).parent.name if isinstance(config, str) else revision


def freeze(module: ModuleT) -> ModuleT:
    """Put a module into eval mode and take its parameters out of training for good."""
    return module.eval().requires_grad_(False)


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 (hex) over names, types, shapes and bytes of all weights, as they are held."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # numpy knows no bfloat16; a byte view has the same bytes
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_digest(part: str, model_id: str, expected: str | None, module: nn.Module) -> None:
    """Hold a part's weights against the digest that a projector was trained with; None says not to.

    Args:
        part: "encoder" or "decoder", for the message.

    Raises:
        ModelError: other weights.
    """
    if expected is None:
        return
    found = weights_digest(module)
    if found != expected:
        raise ModelError(
            f"{part} {model_id!r} has weights {found[:12]}; expected {expected[:12]}, the ones this projector was "
            f"trained with (pass {part}_digest=None to use it all the same)"
        )
