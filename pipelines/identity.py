"""Which frozen encoder this is: loaded once, identified by its weights, compared with what a store was made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipelines.errors import RunError
from pipelines.recipes import EncoderSection
from tinyaudio.encoder import load_encoder, load_feature_extractor
from tinyaudio.frozen import resolved_revision, weights_digest


@dataclass(frozen=True, kw_only=True)
class LoadedEncoder:
    """A frozen encoder on its device, its feature extractor, and what a fingerprint says of them."""

    model: PreTrainedModel
    feature_extractor: Any
    precision: str
    fingerprint: dict[str, Any]


def pick_device(device: str = "auto") -> torch.device:
    """Resolve "auto" to the GPU of this process if there is one."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_encoder(section: EncoderSection, device: torch.device) -> LoadedEncoder:
    """Load the encoder of a recipe; errors as `tinyaudio.encoder.load_encoder`."""
    model = load_encoder(section.id, section.revision)
    extractor = load_feature_extractor(section.id, section.revision)
    precision = section.precision if device.type == "cuda" else "float32"
    fingerprint = {
        "id": encoder_name(section.id),
        "revision": None if is_local(section.id) else resolved_revision(model, section.revision),
        "weights": weights_digest(model),
        "layer": "last_hidden_state",
        "precision": precision,
        "do_normalize": bool(extractor.do_normalize),
    }
    return LoadedEncoder(
        model=model.to(device), feature_extractor=extractor, precision=precision, fingerprint=fingerprint
    )


def is_local(model_id: str) -> bool:
    return Path(model_id).is_dir()


def encoder_name(encoder_id: str) -> str:
    """Name an encoder in a fingerprint: its hub id, or a local folder's own name (weights tell folders apart)."""
    return Path(encoder_id).resolve().name if is_local(encoder_id) else encoder_id


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
