"""The frozen encoder of stage one: load it, identify it by its weights, compare it with that of a store."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipelines.errors import RunError
from pipelines.processes import local_rank
from pipelines.recipes.recipe import EncoderSection, model_name
from pipelines.retry import retry_hub
from tinyaudio.model.encoder import load_encoder, load_feature_extractor
from tinyaudio.model.families import Family, family_of
from tinyaudio.model.frozen import load_config, place, resolved_revision, weights_digest
from tinyaudio.transcribe import pick_device as usable_device

OPENING_TIMEOUT_S = 30.0  # seconds to keep trying, for interactive commands


@dataclass(frozen=True, kw_only=True)
class LoadedEncoder:
    """A frozen encoder on its device, with its feature extractor and its part of a store's fingerprint."""

    model: PreTrainedModel
    feature_extractor: Any
    precision: str
    fingerprint: dict[str, Any]

    @property
    def family(self) -> Family:
        return family_of(self.model.config)


def pick_device(device: str = "auto") -> torch.device:
    """Resolve "auto" to a GPU if there is one, of several to this process's own; errors as `transcribe.pick_device`."""
    if device != "auto":
        return usable_device(device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def require_bfloat16(device: torch.device, setting: str, cure: str) -> None:
    """Check that a GPU computes in bfloat16; torch would emulate it, several times slower than float32.

    Args:
        setting: what asks for it. cure: what to set instead.

    Raises:
        RunError: it does not, as GPUs before Ampere.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise RunError(f"{setting} asks for bfloat16, which {name} does not compute. Try --set {cure}")


def open_encoder(section: EncoderSection, device: torch.device, timeout_s: float = OPENING_TIMEOUT_S) -> LoadedEncoder:
    """Load the encoder of a recipe.

    Raises:
        As `load_encoder` and `require_bfloat16`; FetchError: the hub cannot be reached.
    """
    what = f"encoder {section.id!r}"
    if section.precision == "bfloat16":  # of a GPU; a CPU computes float32
        require_bfloat16(device, "encoder.precision", "encoder.precision=float32")
    model = retry_hub(lambda: load_encoder(section.id, section.revision, section.context), what, timeout_s)
    extractor = retry_hub(lambda: load_feature_extractor(section.id, section.revision), what, timeout_s)
    precision = section.precision if device.type == "cuda" else "float32"
    fingerprint = {
        "id": model_name(section.id),
        "revision": None if Path(section.id).is_dir() else resolved_revision(model, section.revision),
        "weights": weights_digest(model),
        "layer": "last_hidden_state",
        "precision": precision,
        "do_normalize": bool(extractor.do_normalize),
        **({"compile": True} if section.compile else {}),
        **family_of(model.config).fingerprint(),
    }
    if section.compile:
        model.compile(dynamic=True)
    return LoadedEncoder(
        model=place(model, device), feature_extractor=extractor, precision=precision, fingerprint=fingerprint
    )


def family_in(section: EncoderSection, timeout_s: float = OPENING_TIMEOUT_S) -> Family:
    """Choose the family of a recipe's encoder by its configuration alone; errors as `open_encoder`."""
    what = f"encoder {section.id!r}"
    return family_of(retry_hub(lambda: load_config(section.id, section.revision), what, timeout_s), section.context)


def check_encoder(section: EncoderSection, fingerprint: dict[str, Any], store: Path) -> None:
    """Check that a store was made by the recipe's encoder.

    A hub id is compared by name and revision, without loading it; a local folder by its weights.

    Raises:
        RunError: another encoder made it.
    """
    made_by = fingerprint["encoder"]
    if Path(section.id).is_dir():
        found, expected = made_by["weights"], weights_digest(load_encoder(section.id))
        differs = found != expected
        detail = f"weights {found[:12]}, the recipe's encoder {section.id!r} has {expected[:12]}"
    else:
        pinned = section.revision not in (None, "main", made_by["revision"])
        differs = made_by["id"] != section.id or pinned
        detail = f"{made_by['id']!r} at {made_by['revision']}, the recipe names {section.id!r} at {section.revision}"
    context = made_by.get("context")
    if not differs and context is not None and family_in(section).context != context:
        differs, detail = True, f"its encoder.context is {context!r}, the recipe's {section.context!r}"
    if differs:
        raise RunError(
            f"store {str(store)!r} was made by another encoder: {detail}. "
            "Extract into another --store, or set encoder.id to the one that made it"
        )
