"""What a run's folder says about its model: counted and read, never assumed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pipelines.errors import PublishError
from tinyaudio.model.configuration_tinyaudio import TinyAudioConfig
from tinyaudio.model.frozen import is_hub_id, weights_digest
from tinyaudio.model.projectors import build_projector

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A checkpoint: `num_parameters` are those of its projector, counted in its weights."""

    encoder_id: str
    encoder_revision: str | None
    encoder_dim: int
    decoder_id: str
    decoder_revision: str | None
    decoder_dim: int
    projector_kind: str
    stack_factor: int
    num_parameters: int
    projector_digest: str
    store_fingerprint: str | None


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What stage two left in run.json; None for what is not recorded there."""

    steps: int | None = None
    loss: float | None = None
    seconds: float | None = None
    audio_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy of training, from measured time and a stated power; emissions only with a stated grid."""

    seconds: float
    power_watts: float
    grams_per_kwh: float | None

    @property
    def kwh(self) -> float:
        return self.power_watts * self.seconds / 3.6e6

    def describe(self) -> str:
        line = f"Stage two took {self.seconds:,.0f} s at a stated {self.power_watts:g} W: {self.kwh:.3g} kWh."
        if self.grams_per_kwh is None:
            return line
        grams = self.kwh * self.grams_per_kwh
        return f"{line} At a stated {self.grams_per_kwh:g} g of CO2 for a kWh that is {grams:.3g} g."

    def to_front_matter(self) -> dict[str, Any] | None:
        if self.grams_per_kwh is None:
            return None
        source = f"measured time, stated power of {self.power_watts:g} W, stated grid"
        return {"emissions": self.kwh * self.grams_per_kwh, "source": source, "training_type": "projector only"}


def public_name(name: str) -> str:
    """Name a part or a corpus for others: its hub id, or a folder's own name without where it lies."""
    return name if is_hub_id(name) else Path(name).name


def read_model(run: Path) -> ModelFacts:
    """Read a checkpoint folder.

    Raises:
        PublishError: no model there, or weights that do not fit its configuration.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (run / name).is_file()]
    if missing:
        raise PublishError(f"{str(run)!r} lacks {', '.join(missing)}; expected the folder of a finished run")
    config = TinyAudioConfig.from_dict(json.loads((run / CONFIG).read_text()))
    projector = build_projector(
        config.projector_kind, config.encoder_dim, config.decoder_dim, config.stack_factor, config.projector_hidden_size
    )
    weights = {key.removeprefix("projector."): tensor for key, tensor in load_file(run / WEIGHTS).items()}
    try:
        projector.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise PublishError(f"{str(run / WEIGHTS)!r} does not fit {CONFIG}: {reason}") from error
    return ModelFacts(
        encoder_id=config.encoder_id,
        encoder_revision=config.encoder_revision,
        encoder_dim=config.encoder_dim,
        decoder_id=config.decoder_id,
        decoder_revision=config.decoder_revision,
        decoder_dim=config.decoder_dim,
        projector_kind=config.projector_kind,
        stack_factor=config.stack_factor,
        num_parameters=sum(parameter.numel() for parameter in projector.parameters()),
        projector_digest=weights_digest(projector),
        store_fingerprint=config.store_fingerprint,
    )


def read_training(run: Path) -> TrainingFacts:
    """Read run.json, if there is one."""
    path = run / "run.json"
    report = json.loads(path.read_text()).get("report", {}) if path.is_file() else {}
    return TrainingFacts(**{name: report.get(name) for name in ("steps", "loss", "seconds", "audio_s")})
