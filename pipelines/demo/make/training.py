"""What both bundled models need for their training: a schedule, one optimizer step, and weights saved as float16."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How long and how fast a model is trained."""

    steps: int
    batch_size: int  # utterances or sequences in one step
    learning_rate: float  # peak of a linear warm-up and a cosine to zero
    warmup_steps: int

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def update(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], loss: Tensor, rate: float) -> None:
    """Take one step at the given learning rate, with gradients clipped to a norm of 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Save a model rounded to float16; its config asks for loading in float32."""
    weights: Any = model
    weights.half()
    model.save_pretrained(folder)
    weights.float()
    (folder / "model.safetensors").chmod(0o644)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
