"""Stage two: train the projector, and nothing else, from a feature store.

transformers' Trainer does the loop, the optimizer and the schedule (`trainer`); batches are a pure function
of their number (`batches`); `callback` keeps metrics and word errors in the open. This module puts
them together, begins and resumes. The encoder is never loaded here.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback

from cache import FeatureStore
from pipelines.encoders import check_encoder, pick_device
from pipelines.errors import RunError
from pipelines.processes import is_main_process, local_rank, num_processes
from pipelines.recipes import Recipe
from pipelines.train.batches import (
    TrainingBatches,
    longest_batch,
    open_training_reader,
    positions_needed,
    stored_targets,
)
from pipelines.train.callback import Watch, stop_on_sigterm
from pipelines.train.dev_set import DevSet, chosen_for_overfitting
from pipelines.train.encoder_passes import counting_encoder_passes
from pipelines.train.meter import peak_memory_bytes
from pipelines.train.model import build_model
from pipelines.train.runs import Run
from pipelines.train.trainer import (
    PROGRESS,
    ProjectorTrainer,
    check_settings,
    last_checkpoint,
    step_of,
    tensorboard,
    training_arguments,
)
from tinyaudio.model.frozen import weights_digest

Say = Callable[[str], None]
OVERFIT_WER = 0.05  # what "near zero" means for `train.overfit_utterances`


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The closing line of stage two; counts are of the whole run, resumed parts included."""

    run: str
    steps: int
    loss: float | None
    dev_wer: float | None
    parameters: int
    seconds: float
    is_finished: bool
    num_utterances: int = 0
    audio_s: float = 0.0
    encoder_passes: int = 0
    peak_memory_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        wer = "" if self.dev_wer is None else f", dev WER {100 * self.dev_wer:.2f} %"
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
    say: Say = print,
    stop_after: int | None = None,
    is_rehearsal: bool = False,
) -> TrainReport:
    """Run stage two, or go on with it.

    Args:
        store_path: what stage one made.
        run: where everything goes; a finished run of the same settings is left alone.
        resume: go on from the last checkpoint (or from the start, if there is none yet).
        say: receives lines for people, from the first process alone.
        stop_after: a step after which to stop as on SIGTERM, saved; None for the recipe's end.
        is_rehearsal: train on the longest utterances and evaluate on one full batch.

    Raises:
        StoreNotFoundError, StoreMismatchError: no store, or of another encoder.
        RunError: a run in the way, settings that drifted or cannot be had here, a loss or a weight that is not finite,
            or an overfit that failed.
        ModelError: a frozen part cannot be loaded.
    """
    told = say if is_main_process() else _say_nothing
    device_here = _device_of_process(device)
    check_settings(recipe)
    store = FeatureStore.open(store_path)
    check_encoder(recipe.encoder, store.fingerprint, store_path)
    if pending := store.pending_shards():
        told(
            f"WARNING: {len(pending)} of {store.num_shards} shards of {store_path} are not extracted yet; this run "
            "sees the others only. Extract again until the store is complete"
        )
    is_finished = run.is_finished
    if resume or is_finished:
        run.check_resumable(recipe, store.fingerprint_id)
        recipe = _at_the_recorded_commit(recipe, run)
    elif is_main_process():
        run.check_free()
    if is_finished:
        told(f"{run.folder} is finished; nothing to do (name another --run to train again)")
        return _checked(TrainReport(**run.state["report"]), recipe)
    checkpoint = last_checkpoint(run) if resume else None
    stage = _Stage(recipe, store, run, checkpoint, device_here, told, is_rehearsal)
    if not resume and is_main_process():
        made_from = {
            "store": str(store_path.resolve()),
            "store_fingerprint": store.fingerprint_id,
            "encoder_revision": stage.model.config.encoder_revision,
            "decoder_revision": stage.model.config.decoder_revision,
        }
        run.begin(recipe, made_from)
    with counting_encoder_passes() as count:
        report = stage.run_to_the_end(lambda: count.passes, stop_after)
    if not report.is_finished:
        told(
            f"stopped at step {report.steps} of {recipe.train.steps}, saved; "
            f"go on with the same command and --run {run.folder} --resume"
        )
    return _checked(report, recipe)


def _checked(report: TrainReport, recipe: Recipe) -> TrainReport:
    """Refuse to call an overfit that failed a success."""
    few = recipe.train.overfit_utterances
    if report.is_finished and few is not None and (report.dev_wer is None or report.dev_wer > OVERFIT_WER):
        wer = "unknown" if report.dev_wer is None else f"{100 * report.dev_wer:.1f} %"
        raise RunError(
            f"{few} utterances were not learnt by heart in {report.steps} steps: WER {wer}, expected at most "
            f"{100 * OVERFIT_WER:.0f} %; raise train.steps or train.learning_rate in a new --run, and look at the pairs"
        )
    return report


def _at_the_recorded_commit(recipe: Recipe, run: Run) -> Recipe:
    """Go on with the decoder that the run began with, wherever its branch points by now."""
    revision = run.state.get("decoder_revision", recipe.decoder.revision)
    decoder = recipe.decoder.model_copy(update={"revision": revision})
    return recipe.model_copy(update={"decoder": decoder})


def _say_nothing(_: str) -> None:
    """Processes beside the first one keep quiet."""


def _device_of_process(device: str) -> torch.device:
    """Give each process of torchrun its own GPU.

    Raises:
        RunError: one GPU of several is named; transformers' Trainer would take the first all the same.
    """
    if device.startswith("cuda:"):
        index = device.removeprefix("cuda:")
        raise RunError(
            f"device {device!r}; expected cuda, cpu or auto. Set CUDA_VISIBLE_DEVICES={index} to choose a GPU"
        )
    found = pick_device(device)
    if found.type == "cuda":
        found = torch.device("cuda", local_rank())
        torch.cuda.set_device(found)
    return found


class _Stage:
    """Stage two with everything loaded."""

    def __init__(
        self,
        recipe: Recipe,
        store: FeatureStore,
        run: Run,
        checkpoint: Path | None,
        device: torch.device,
        say: Say,
        is_rehearsal: bool,
    ) -> None:
        self.recipe, self.store, self.run, self.checkpoint = recipe, store, run, checkpoint
        self.device, self.say = device, say
        self.model, self.processor = build_model(recipe, store, device)
        self.reader = open_training_reader(store, recipe.corpus.train_split, num_processes())
        self.batches = self._plan_batches(is_rehearsal)
        self.dev = DevSet.open(recipe, store, self.processor, say)
        if self.dev is not None and is_rehearsal:
            self.dev = self.dev.largest_batch()
        if recipe.train.gradient_checkpointing:
            self.model.checkpoint_activations()
        if recipe.train.compile:
            self.model.compile_decoder()

    def _plan_batches(self, is_rehearsal: bool) -> TrainingBatches:
        settings, tokenizer = self.recipe.train, self.processor.tokenizer
        targets = stored_targets(self.reader, tokenizer, self.say)
        costs = positions_needed(self.reader, targets, tokenizer, self.recipe.projector.stack_factor)
        chosen = None
        if settings.overfit_utterances is not None:
            chosen = chosen_for_overfitting(len(self.reader), settings.overfit_utterances)
        elif is_rehearsal and len(self.reader):
            chosen = longest_batch(costs, settings.batch_tokens)
        return TrainingBatches(
            self.reader,
            targets,
            costs,
            budget=settings.batch_tokens,
            seed=settings.seed,
            num_batches=settings.steps * settings.accumulate,
            chosen=chosen,
            jitter_frames=settings.jitter_frames,
            world_size=num_processes(),
            is_pinned=self.device.type == "cuda",
        )

    def run_to_the_end(self, count_passes: Callable[[], int], stop_after: int | None) -> TrainReport:
        checkpoint = self.checkpoint
        watch = Watch(self.run, self.dev, self.recipe.train, self.say, stop_after)
        first_step = 0 if checkpoint is None else step_of(checkpoint)
        if is_main_process() and self.run.state:
            self.run.rewind_metrics(first_step)
        watch.resume(first_step)
        trainer = self._trainer(watch, first_step)
        if checkpoint is not None:
            progress = self.run.progress(checkpoint / PROGRESS)
            trainer.meter.restore(progress)
            self.batches.restore(progress)
        with stop_on_sigterm(watch):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        self._check_frozen()
        newest, totals, steps = trainer.checkpoint_now(), trainer.meter.totals(), trainer.state.global_step
        report = TrainReport(
            run=str(self.run.folder),
            steps=steps,
            loss=watch.last_loss,
            dev_wer=watch.last_wer,
            parameters=sum(p.numel() for p in self.model.projector.parameters()),
            seconds=totals["seconds"],
            is_finished=watch.is_learnt_by_heart or (steps >= self.recipe.train.steps and watch.has_judged(steps)),
            num_utterances=int(totals["num_utterances"]),
            audio_s=totals["audio_s"],
            encoder_passes=count_passes(),
            peak_memory_bytes=int(peak_memory_bytes(self.device)),
        )
        if is_main_process():
            self.run.adopt_model(newest)
            self.run.update({"is_finished": report.is_finished, "report": report.to_dict()})
        return report

    def _trainer(self, watch: Watch, first_step: int) -> ProjectorTrainer:
        trainer = ProjectorTrainer(
            model=self.model,
            args=training_arguments(self.recipe, self.run, self.device),
            batches=self.batches,
            processor=self.processor,
            callbacks=[watch, *(tensorboard(self.recipe, self.run, first_step) if is_main_process() else [])],
        )
        for talkative in (PrinterCallback, ProgressCallback):  # Watch says it better
            trainer.remove_callback(talkative)
        watch.trainer = trainer
        return trainer

    def _check_frozen(self) -> None:
        found, expected = weights_digest(self.model.decoder), self.model.config.decoder_digest
        assert found == expected, f"the frozen decoder changed during training: {found} is not {expected}"
