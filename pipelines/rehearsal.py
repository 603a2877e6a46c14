"""A rehearsal of stage two, for before a night's run: one step of everything, in a temporary folder.

Train a step, evaluate, save, stop, resume, train another, load what was saved as anyone would, and transcribe with it.
What would fail after hours (a batch that does not fit, a full disk, a decoder that cannot be loaded again) fails now.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from cache import FeatureReader, FeatureStore
from pipelines.batches import Dequantizer, collate, tokenize
from pipelines.errors import RunError
from pipelines.recipes import Recipe
from pipelines.runs import Run
from pipelines.train import train
from tinyaudio.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.processing_tinyaudio import TinyAudioProcessor

STEPS = 2
OFTEN = {"steps": STEPS, "warmup_steps": 1, "log_every": 1, "eval_every": 1, "save_every": 1, "eval_utterances": 4}


def rehearse(recipe: Recipe, store: Path, *, device: str = "auto", say: Callable[[str], None] = print) -> None:
    """Do one step of everything, with the recipe's own sizes; leaves nothing behind.

    Raises:
        RunError: what was saved does not do what the trained model did; and everything that `train` raises.
    """
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update={**OFTEN, "report_to": []})})
    with tempfile.TemporaryDirectory(prefix="tinyaudio-rehearsal-") as folder:
        run = Run(Path(folder) / "run")
        train(short, store, run, device=device, say=say, is_latest=False, stop_after=1)
        report = train(short, store, run, resume=True, device=device, say=say, is_latest=False)
        transcript = _transcribe_one(run, store, recipe.corpus.train_split, device)
    if not report.is_finished:
        raise RunError(f"the rehearsal ended at step {report.steps} of {STEPS}; it was stopped from outside")
    say(f"trained, evaluated, saved, loaded and resumed; the loaded model writes {transcript[:60]!r}")


def _transcribe_one(run: Run, store: Path, split: str, device: str) -> str:
    """Load the run's folder as a user would and transcribe a stored utterance."""
    model = TinyAudioForConditionalGeneration.from_pretrained(run.folder, trust_remote_code=False)
    processor = TinyAudioProcessor.from_pretrained(run.folder, trust_remote_code=False)  # else it asks, on stdin
    reader = FeatureReader(FeatureStore.open(store), split=split)
    batch = collate(reader, tokenize(processor.tokenizer, reader.index["transcript"].to_pylist()), [0])
    features = Dequantizer(reader)(batch)
    with torch.no_grad():
        tokens = model.generate(features=features, num_frames=batch["num_frames"], num_beams=1, max_new_tokens=20)
    return str(processor.decode_transcripts(tokens)[0])
