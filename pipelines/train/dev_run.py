"""The dev run: one step of everything in a temporary folder, before a long run.

It trains a step on the longest utterances, evaluates a full batch, saves, stops, resumes, trains another step, loads
the saved model as a user would, and transcribes with it. What would fail after hours (a batch that does not fit, a full
disk, a decoder that cannot be loaded again) fails now.
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
from pipelines.train.batches import Dequantizer, collate
from pipelines.train.meter import release_memory
from pipelines.train.runs import Run
from pipelines.train.stage import train
from pipelines.train.targets import stored_targets
from tinyaudio.model.frozen import place
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor

STEPS = 2
SETTINGS: dict[str, Any] = {
    **{"warmup_steps": 1, "log_every": 1, "eval_every": 1, "save_every": 1},
    **{"report_to": [], "overfit_utterances": None},  # two steps cannot overfit
}


@dataclass(frozen=True, kw_only=True)
class DevRunReport:
    """The result of a dev run; `peak_memory_bytes` is the peak of training and evaluating."""

    steps: int
    seconds: float
    peak_memory_bytes: int
    transcript: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"trained, evaluated, saved, loaded and resumed; peak memory {self.peak_memory_bytes / 1e9:.1f} GB; the "
            f"loaded model writes {self.transcript[:60]!r}"
        )


def dev_run(recipe: Recipe, store: Path, *, device: str = "auto", say: Callable[[str], None] = print) -> DevRunReport:
    """Run one step of everything with the recipe's own sizes; nothing is left behind.

    Raises:
        RunError: several processes, or a stop by a signal.
        Everything that `train` raises.
    """
    if num_processes() > 1:
        raise RunError(f"--dev-run with {num_processes()} processes; expected one. Run --dev-run without torchrun")
    # One step of each phase, or two of the only one.
    of_ctc = min(recipe.train.ctc_steps, 1 if recipe.train.steps else STEPS)
    settings = {**SETTINGS, "ctc_steps": of_ctc, "steps": STEPS - of_ctc}
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update=settings)})
    with tempfile.TemporaryDirectory(prefix="tinyaudio-dev-run-") as folder:
        run = Run(Path(folder) / "run")
        where = pick_device(device)
        first = train(short, store, run, device=device, say=say, is_dev_run=True, stop_after=1)
        release_memory(where)  # else two decoders at a time, 6.2 GB each
        report = train(short, store, run, resume=True, device=device, say=say, is_dev_run=True)
        release_memory(where)
        if not report.is_finished:
            raise RunError(f"the dev run was stopped by a signal at step {report.steps} of {STEPS}. Run it again")
        # Load the folder as a user would, and transcribe a stored utterance.
        model = TinyAudioForConditionalGeneration.from_pretrained(run.folder, trust_remote_code=False)
        processor = TinyAudioProcessor.from_pretrained(run.folder, trust_remote_code=False)  # else it asks on stdin
        reader = FeatureReader(FeatureStore.open(store), split=recipe.corpus.train_split)
        batch = collate(reader, stored_targets(reader, processor.tokenizer), [0])
        model = place(model, where)
        batch = {
            key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()
        }
        with torch.no_grad():
            features = Dequantizer(reader)(batch)
            tokens = model.generate(features=features, num_frames=batch["num_frames"], num_beams=1, max_new_tokens=20)
    return DevRunReport(
        steps=report.steps,
        seconds=report.seconds,
        peak_memory_bytes=max(first.peak_memory_bytes, report.peak_memory_bytes),
        transcript=str(processor.decode_transcripts(tokens)[0]),
    )
