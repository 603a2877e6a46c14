"""Stage two: train the projector, and nothing else, from a feature store.

transformers' Trainer runs the loop, the optimizer and the schedule (`trainer`); batches are a pure function of their
number (`batches`); `callback` records metrics and word errors. The encoder is never loaded.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, ProgressCallback

from cache import FeatureStore
from pipelines.encoders import check_encoder, pick_device, require_bfloat16
from pipelines.errors import RunError
from pipelines.processes import is_main_process, local_rank, num_processes
from pipelines.recipes import Recipe
from pipelines.train.batches import TrainingBatches, ctc_coverage, longest_batch, open_training_reader, positions_needed
from pipelines.train.callback import TrainingCallback, stop_on_sigterm
from pipelines.train.dev_set import DevSet, overfit_positions
from pipelines.train.meter import counting_encoder_passes, peak_memory_bytes
from pipelines.train.model import build_model
from pipelines.train.runs import LOG, Run
from pipelines.train.targets import stored_targets
from pipelines.train.trainer import (
    PROGRESS,
    ProjectorTrainer,
    check_settings,
    last_checkpoint,
    step_of,
    tensorboard,
    training_arguments,
)
from tinyaudio.model.frozen import check_files, weights_digest

OVERFIT_WER = 0.05  # the most that `train.overfit_utterances` may end with


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The result of stage two; counts are of the whole run, including the parts before a resume."""

    run: str
    steps: int
    loss: float | None
    dev_wer: float | None
    ctc_wer: float | None = None
    parameters: int
    seconds: float
    is_finished: bool
    num_utterances: int = 0
    audio_s: float = 0.0
    encoder_passes: int = 0
    peak_memory_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def require_finished(self) -> None:
        """Raise a RunError if a signal stopped the run before its last step; what would follow expects all of it."""
        if not self.is_finished:
            raise RunError(f"{self.run} was stopped at step {self.steps}. Run the same command again to resume")

    def __str__(self) -> str:
        wer = "" if self.dev_wer is None else f", dev WER {100 * self.dev_wer:.2f} %"
        wer += "" if self.ctc_wer is None else f" ({100 * self.ctc_wer:.2f} % by CTC alone)"
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        return (
            f"{self.run}: {self.steps} steps, {self.audio_s / 3600:.2f} h of audio in {self.seconds:.1f} s{loss}{wer}; "
            f"{self.parameters:,} parameters trained, encoder passes {self.encoder_passes}"
        )


def train(
    recipe: Recipe,
    store_path: Path,
    run: Run,
    *,
    resume: bool = False,
    device: str = "auto",
    say: Callable[[str], None] = print,
    overrides: Sequence[str] = (),
    stop_after: int | None = None,
    is_dev_run: bool = False,
) -> TrainReport:
    """Run or resume stage two.

    Args:
        store_path: the feature store that stage one wrote.
        run: the run's folder; a finished run with the same settings is left as it is.
        resume: continue from the last checkpoint, or from the start if there is none.
        say: receives messages, in the main process only.
        overrides: "section.key=value" as given by the user, recorded in run.json.
        stop_after: a step after which to save and stop as on SIGTERM; None for the recipe's last.
        is_dev_run: train on the longest utterances and evaluate only one full batch.

    Raises:
        StoreNotFoundError, StoreMismatchError: no store, or one made by another encoder.
        RunError: another process trains in the folder, the folder is not free, settings that changed or cannot be used
            here, a loss or a weight that is not finite, or an overfit check that failed.
        ModelError: a frozen part cannot be loaded.
    """
    is_main, settings = is_main_process(), recipe.train
    if not is_main:
        say = lambda _: None  # noqa: E731

    # The device is checked first: a run that cannot begin leaves no folder.
    if device.startswith("cuda:"):  # transformers' Trainer would use the first GPU anyway
        index = device.removeprefix("cuda:")
        raise RunError(
            f"device {device!r}; expected cuda, cpu or auto. Set CUDA_VISIBLE_DEVICES={index} to choose a GPU"
        )
    torch_device = pick_device(device)
    with run.held() if is_main and not run.is_finished else contextlib.nullcontext():
        # Check everything that can be checked before a model is loaded.
        if torch_device.type == "cuda":  # each process of torchrun has its own GPU
            torch_device = torch.device("cuda", local_rank())
            torch.cuda.set_device(torch_device)
        check_settings(recipe)
        if settings.bf16:
            require_bfloat16(torch_device, "train.bf16", "train.bf16=false")
        if recipe.decoder.dtype == "bfloat16":
            require_bfloat16(torch_device, "decoder.dtype", "decoder.dtype=float32")
        store = FeatureStore.open(store_path)
        check_encoder(recipe.encoder, store.fingerprint, store_path)
        if pending := store.pending_shards():
            say(
                f"WARNING: {len(pending)} of {store.num_shards} shards of {store_path} are not extracted yet; this run "
                "trains on the others only. Extract again until the store is complete"
            )
        is_finished = run.is_finished
        if resume or is_finished:
            run.check_resumable(recipe, store.fingerprint_id)
            # The branch of the decoder may have moved since the run began.
            revision = run.state.get("decoder_revision", recipe.decoder.revision)
            recipe = recipe.model_copy(update={"decoder": recipe.decoder.model_copy(update={"revision": revision})})
        elif is_main:
            run.check_free()
        if is_finished:
            say(f"{run.folder} is finished; nothing to do (use another --run to train again)")
            return _check_overfit(TrainReport(**run.state["report"]), recipe)

        # Load the model, plan the batches, choose the dev set.
        checkpoint = last_checkpoint(run) if resume else None
        if checkpoint is not None:
            check_files(checkpoint)
        model, processor = build_model(recipe, store, torch_device)
        reader = open_training_reader(store, recipe.corpus.train_split, num_processes())
        targets = stored_targets(reader, processor.tokenizer, say)
        if settings.ctc_steps or settings.ctc_weight:
            tokens = np.unique(targets.ids)
            model.add_token_ctc(torch.from_numpy(tokens[tokens != model.config.eos_token_id].astype(np.int64)))
            model.config.ctc_weight = settings.ctc_weight
            say(ctc_coverage(reader, targets, recipe.projector.stack_factor))
        costs = positions_needed(reader, targets, processor.tokenizer, recipe.projector.stack_factor)
        chosen = None
        if settings.overfit_utterances is not None:
            chosen = overfit_positions(len(reader), settings.overfit_utterances)
        elif is_dev_run and len(reader):
            chosen = longest_batch(costs, settings.batch_tokens)
        batches = TrainingBatches(
            reader,
            targets,
            costs,
            budget=settings.batch_tokens,
            seed=settings.seed,
            num_batches=settings.all_steps * settings.accumulate,
            chosen=chosen,
            jitter_frames=settings.jitter_frames,
            world_size=num_processes(),
            is_pinned=torch_device.type == "cuda",
        )
        if not is_dev_run and not resume:  # it needs the order of an epoch, which a resume computes once
            say(batches.coverage(settings.accumulate))
        dev = DevSet.open(recipe, store, processor, say)
        if dev is not None and is_dev_run:
            dev = dev.largest_batch()
        if settings.gradient_checkpointing:
            model.checkpoint_activations()
        if settings.compile:
            model.compile_decoder()

        # Begin the run, or return to the state of its last checkpoint.
        first_step = 0 if checkpoint is None else step_of(checkpoint)
        if is_main:
            if not resume:
                state = {
                    "store": str(store_path.resolve()),
                    "store_fingerprint": store.fingerprint_id,
                    "encoder_revision": model.config.encoder_revision,
                    "decoder_revision": model.config.decoder_revision,
                    "overrides": list(overrides),
                }
                run.begin(recipe, state)
            run.rewind_metrics(first_step)
        callback = TrainingCallback(run, dev, settings, say, stop_after)
        callback.resume(first_step)
        trainer = ProjectorTrainer(
            model=model,
            args=training_arguments(recipe, run, torch_device),
            batches=batches,
            processor=processor,
            settings=settings,
            callbacks=[callback, *(tensorboard(recipe, run, first_step) if is_main else [])],
        )
        trainer.remove_callback(PrinterCallback)  # `callback` prints instead
        trainer.remove_callback(ProgressCallback)
        callback.trainer = trainer
        if checkpoint is not None:
            progress = json.loads((checkpoint / PROGRESS).read_text())
            trainer.meter.restore(progress)
            batches.restore(progress)

        # Train.
        with counting_encoder_passes() as encoder, stop_on_sigterm(callback):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        digest = weights_digest(model.decoder)
        assert digest == model.config.decoder_digest, f"the frozen decoder changed during training: {digest}"

        # Save and report.
        newest, totals, steps = trainer.checkpoint_now(), trainer.meter.totals(), trainer.state.global_step
        report = TrainReport(
            run=str(run.folder),
            steps=steps,
            loss=callback.last_loss,
            dev_wer=callback.last_wer,
            ctc_wer=callback.last_ctc_wer,
            parameters=sum(p.numel() for p in model.projector.parameters()),
            seconds=totals["seconds"],
            is_finished=callback.has_overfit or (steps >= settings.all_steps and callback.has_evaluated(steps)),
            num_utterances=int(totals["num_utterances"]),
            audio_s=totals["audio_s"],
            encoder_passes=encoder.passes,
            peak_memory_bytes=int(peak_memory_bytes(torch_device)),
        )
        if is_main:
            run.adopt_model(newest)
            run.update({"is_finished": report.is_finished, "report": report.to_dict()})
        if not report.is_finished and not is_dev_run:
            say(
                f"stopped at step {steps} of {settings.all_steps}, saved. "
                f"Run the same command with --run {run.folder} --resume to continue"
            )
        return _check_overfit(report, recipe)


def _check_overfit(report: TrainReport, recipe: Recipe) -> TrainReport:
    """Raise a RunError if a finished overfit check has too many word errors."""
    few = recipe.train.overfit_utterances
    if report.is_finished and few is not None and (report.dev_wer is None or report.dev_wer > OVERFIT_WER):
        wer = "unknown" if report.dev_wer is None else f"{100 * report.dev_wer:.1f} %"
        raise RunError(
            f"overfit check failed: WER is {wer} after {report.steps} steps on {few} utterances (expected at most "
            f"{100 * OVERFIT_WER:.0f} %). Increase train.steps or train.learning_rate in a new --run, and inspect the "
            f"reference/hypothesis pairs in {LOG}"
        )
    return report
