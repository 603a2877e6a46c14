"""Which frozen encoder this is: loaded once, identified by its weights, compared with what a store was made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipelines.errors import RunError
from pipelines.processes import local_rank
from pipelines.recipes.recipe import EncoderSection
from pipelines.retry import retry_hub
from tinyaudio.model.encoder import load_encoder, load_feature_extractor
from tinyaudio.model.frozen import resolved_revision, weights_digest
from tinyaudio.transcribe import pick_device as usable_device

OPENING_PATIENCE_S = 30.0  # seconds to keep trying, where somebody waits at the terminal


@dataclass(frozen=True, kw_only=True)
class LoadedEncoder:
    """A frozen encoder on its device, its feature extractor, and what a fingerprint says of them."""

    model: PreTrainedModel
    feature_extractor: Any
    precision: str
    fingerprint: dict[str, Any]


def pick_device(device: str = "auto") -> torch.device:
    """Resolve "auto" to a GPU if there is one; of several, to that of this process's place under torchrun.

    Raises:
        ModelError: a name torch does not know, or a device this machine does not have.
    """
    if device != "auto":
        return usable_device(device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def open_encoder(
    section: EncoderSection, device: torch.device, patience_s: float = OPENING_PATIENCE_S
) -> LoadedEncoder:
    """Load the encoder of a recipe; errors as `tinyaudio.model.encoder.load_encoder`; FetchError: no way to the hub."""
    what = f"encoder {section.id!r}"
    model = retry_hub(lambda: load_encoder(section.id, section.revision), what, patience_s)
    extractor = retry_hub(lambda: load_feature_extractor(section.id, section.revision), what, patience_s)
    precision = section.precision if device.type == "cuda" else "float32"
    fingerprint = {
        "id": encoder_name(section.id),
        "revision": None if is_local(section.id) else resolved_revision(model, section.revision),
        "weights": weights_digest(model),
        "layer": "last_hidden_state",
        "precision": precision,
        "do_normalize": bool(extractor.do_normalize),
        **({"compile": True} if section.compile else {}),
    }
    if section.compile:
        model.compile(dynamic=True)
    return LoadedEncoder(
        model=model.to(device), feature_extractor=extractor, precision=precision, fingerprint=fingerprint
    )


def check_encoder(section: EncoderSection, fingerprint: dict[str, Any], store: Path) -> None:
    """Refuse a store that another encoder made.

    A hub id is compared by name and revision, without loading; a local folder by its weights.

    Raises:
        RunError: with what was found and expected.
    """
    made_by = fingerprint["encoder"]
    if is_local(section.id):
        found, expected = made_by["weights"], weights_digest(load_encoder(section.id))
        differs = found != expected
        detail = f"weights {found[:12]}, the recipe's encoder {section.id!r} has {expected[:12]}"
    else:
        pinned = section.revision not in (None, "main", made_by["revision"])
        differs = made_by["id"] != section.id or pinned
        detail = f"{made_by['id']!r} at {made_by['revision']}, the recipe names {section.id!r} at {section.revision}"
    if differs:
        raise RunError(
            f"store {str(store)!r} was extracted with another encoder: {detail}; "
            "extract again into another --store, or set encoder.id to the one that made it"
        )


def is_local(model_id: str) -> bool:
    return Path(model_id).is_dir()


def encoder_name(encoder_id: str) -> str:
    """Name an encoder in a fingerprint: its hub id, or a local folder's own name (weights tell folders apart)."""
    return Path(encoder_id).resolve().name if is_local(encoder_id) else encoder_id
