"""Loading, freezing, placing and identifying the two pretrained parts.

A part is named by its hub id, or a local folder, and a revision. Errors of the hub client become one line here. A
digest of the weights lets a store, a run and a checkpoint check that they were made with the same part.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .errors import MissingModelError, ModelError, is_missing_revision, one_line

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# facebook/hubert-large-ls960-ft ships only pytorch_model.bin on its main branch; transformers v5 would then start a
# background thread that asks the network for a converted copy.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


def is_hub_id(name: str) -> bool:
    """Check whether a name has the form of a hub id, owner/name, and is not a folder. Does not access the network."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).is_dir()


def load_frozen(auto_class: Any, model_id: str, revision: str | None, **kwargs: Any) -> Any:
    """Call `auto_class.from_pretrained` and turn its failures into one line.

    Args:
        auto_class: an Auto class of transformers.
        model_id: hub id such as "facebook/hubert-large-ls960-ft", or a local folder.
        revision: hub commit, branch or tag; None for a local folder or the hub's default branch.

    Raises:
        MissingModelError: no such folder, or the hub cannot be reached and its cache holds no copy.
        ModelError: the files are not a model of this class.
    """
    if not Path(model_id).is_dir() and not is_hub_id(model_id):
        raise MissingModelError(f"expected a model folder or a hub id such as 'owner/name', found {model_id!r}")
    try:
        return auto_class.from_pretrained(model_id, revision=revision or "main", **kwargs)
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
    except (ValueError, KeyError) as error:
        raise ModelError(f"{model_id!r} cannot be loaded as {auto_class.__name__}: {one_line(error)}") from error


def load_decoder(decoder_id: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """Load a frozen decoder, on the CPU, in eval mode; errors as `load_frozen`."""
    return freeze(load_frozen(AutoModelForCausalLM, decoder_id, revision, dtype=dtype))


def load_config(model_id: str, revision: str | None = None) -> Any:
    """Load a part's configuration without its weights; errors as `load_frozen`."""
    return load_frozen(AutoConfig, model_id, revision)


def resolved_revision(model: Any, revision: str | None) -> str | None:
    """Return the hub commit a model was loaded from; for a local folder, the revision as requested."""
    name = model.config.name_or_path
    if not name or Path(name).is_dir():
        return revision
    config = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    return Path(config).parent.name if isinstance(config, str) else revision


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
        part: "encoder" or "decoder", for the message.

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
