"""What training either demo stand-in takes: a schedule, one update, and files of half the size.

Knows neither what is trained nor on what.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How long and how fast one stand-in is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: utterances or sequences in one step.
        learning_rate: peak of a linear warm-up and a cosine to zero.
        warmup_steps: length of the warm-up.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def update(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], loss: Tensor, rate: float) -> None:
    """Take one step at a learning rate, with gradients clipped to a norm of 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Round a model to float16 and save it so; its config asks to be loaded in float32."""
    weights: Any = model
    weights.half()
    model.save_pretrained(folder)
    weights.float()
    (folder / "model.safetensors").chmod(0o644)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
