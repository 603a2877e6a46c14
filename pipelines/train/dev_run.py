"""A rehearsal of stage two, for before a night's run: one step of everything, in a temporary folder.

Train a step on the longest utterances, evaluate a full batch, save, stop, resume, train another, load what was saved
as anyone would, and transcribe with it. What would fail after hours (a batch that does not fit, a full disk, a decoder
that cannot be loaded again) fails now.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cache import FeatureReader, FeatureStore
from pipelines.encoders import pick_device
from pipelines.errors import RunError
from pipelines.processes import num_processes
from pipelines.recipes import Recipe
from pipelines.train.batches import Dequantizer, collate, stored_targets
from pipelines.train.runs import Run
from pipelines.train.stage import train
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor

STEPS = 2
OFTEN = {"steps": STEPS, "warmup_steps": 1, "log_every": 1, "eval_every": 1, "save_every": 1}
QUIETLY: dict[str, Any] = {"report_to": [], "overfit_utterances": None}  # two steps learn nothing by heart


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a rehearsal went through; `peak_memory_bytes` is the most that training or evaluating took."""

    steps: int
    seconds: float
    peak_memory_bytes: int
    transcript: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"trained, evaluated, saved, loaded and resumed, with at most {self.peak_memory_bytes / 1e9:.1f} GB; the "
            f"loaded model writes {self.transcript[:60]!r}"
        )


def rehearse(recipe: Recipe, store: Path, *, device: str = "auto", say: Callable[[str], None] = print) -> Rehearsal:
    """Do one step of everything, with the recipe's own sizes; leaves nothing behind.

    Raises:
        RunError: several processes, a stop from outside, and everything that `train` raises.
    """
    if num_processes() > 1:
        raise RunError(
            f"--dev-run under {num_processes()} processes; expected one: leave torchrun away for the rehearsal"
        )
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update=OFTEN | QUIETLY)})
    with tempfile.TemporaryDirectory(prefix="tinyaudio-rehearsal-") as folder:
        run = Run(Path(folder) / "run")
        train(short, store, run, device=device, say=say, is_rehearsal=True, stop_after=1)
        report = train(short, store, run, resume=True, device=device, say=say, is_rehearsal=True)
        if not report.is_finished:
            raise RunError(f"the rehearsal ended at step {report.steps} of {STEPS}; it was stopped from outside")
        transcript = _transcribe_one(run, store, recipe.corpus.train_split, device)
    return Rehearsal(
        steps=report.steps,
        seconds=report.seconds,
        peak_memory_bytes=report.peak_memory_bytes,
        transcript=transcript,
    )


def _transcribe_one(run: Run, store: Path, split: str, device: str) -> str:
    """Load the run's folder as a user would and transcribe a stored utterance."""
    model = TinyAudioForConditionalGeneration.from_pretrained(run.folder, trust_remote_code=False)
    processor = TinyAudioProcessor.from_pretrained(run.folder, trust_remote_code=False)  # else it asks, on stdin
    reader = FeatureReader(FeatureStore.open(store), split=split)
    batch = collate(reader, stored_targets(reader, processor.tokenizer), [0])
    model = model.to(pick_device(device))
    batch = {key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    with torch.no_grad():
        features = Dequantizer(reader)(batch)
        tokens = model.generate(features=features, num_frames=batch["num_frames"], num_beams=1, max_new_tokens=20)
    return str(processor.decode_transcripts(tokens)[0])
