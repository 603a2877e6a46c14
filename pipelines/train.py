"""Stage two: train the projector, and nothing else, from a feature store.

transformers' Trainer does the loop, the optimizer, the schedule and the checkpoints; this module gives it batches that are
a pure function of their number, measures dev WER by real generation, keeps metrics in the open, and makes every stop
resumable. The encoder is never loaded here.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from cache import FeatureReader, FeatureStore
from pipelines.batches import TrainingBatches, collate, cut_by_budget, dequantize, positions_needed, tokenize
from pipelines.build import build_model
from pipelines.errors import RunError
from pipelines.identity import check_encoder, pick_device
from pipelines.recipes import Recipe
from pipelines.runs import Run
from pipelines.scoring import WordErrors, count_word_errors
from tinyaudio.frozen import weights_digest
from tinyaudio.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.processing_tinyaudio import TinyAudioProcessor

NUM_PAIRS = 8  # reference and hypothesis pairs shown at every evaluation, always the same utterances
DEV_BATCH_FRAMES = 40_000  # encoder frames in one batch of dev generation

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The closing line of stage two."""

    run: str
    steps: int
    loss: float | None
    dev_wer: float | None
    parameters: int
    seconds: float
    is_finished: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(
    recipe: Recipe, store_path: Path, run: Run, *, resume: bool = False, device: str = "auto", say: Say = print
) -> TrainReport:
    """Run stage two, or go on with it.

    Args:
        store_path: what stage one made.
        run: where everything goes; a finished run is left alone.
        resume: go on from the last checkpoint (or from the start, if there is none yet).
        say: receives lines for people.

    Raises:
        StoreNotFoundError, StoreMismatchError: no store, or of another encoder.
        RunError: a run in the way, settings that drifted, or a loss that is not finite.
    """
    if run.is_finished:
        say(f"{run.folder} is finished; nothing to do (name another --run to train again)")
        return TrainReport(**run.state["report"])
    store = FeatureStore.open(store_path)
    check_encoder(recipe.encoder, store.fingerprint, store_path)
    if resume:
        run.check_resumable(recipe, store.fingerprint_id)
    stage = _Stage(recipe, store, run, pick_device(device), say)
    if not resume:
        run.begin(recipe, {"store": str(store_path.resolve()), "store_fingerprint": store.fingerprint_id})
    return stage.run_to_the_end(get_last_checkpoint(str(run.checkpoints)) if run.checkpoints.is_dir() else None)


class _Stage:
    """Stage two with everything loaded."""

    def __init__(self, recipe: Recipe, store: FeatureStore, run: Run, device: torch.device, say: Say) -> None:
        self.recipe, self.store, self.run, self.say = recipe, store, run, say
        self.model, self.processor = build_model(recipe, store, device)
        self.reader = FeatureReader(store, split=recipe.corpus.train_split)
        self.batches = self._plan_batches()
        self.dev = _DevSet.open(recipe, store, self.processor)
        if recipe.train.gradient_checkpointing:
            self.model.checkpoint_activations()

    def _plan_batches(self) -> TrainingBatches:
        settings, tokenizer = self.recipe.train, self.processor.tokenizer
        targets = tokenize(tokenizer, self.reader.index["transcript"].to_pylist())
        costs = positions_needed(self.reader, targets, tokenizer, self.recipe.projector.stack_factor)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        return TrainingBatches(
            self.reader,
            targets,
            costs,
            budget=settings.batch_tokens,
            seed=settings.seed,
            num_batches=settings.steps * settings.accumulate * world,
        )

    def run_to_the_end(self, checkpoint: str | None) -> TrainReport:
        started, settings = time.monotonic(), self.recipe.train
        watch = _Watch(self.run, self.dev, settings.eval_every, self.say)
        trainer = ProjectorTrainer(
            model=self.model,
            args=_arguments(self.recipe, self.run),
            train_dataset=self.batches,
            processor=self.processor,
            callbacks=[watch, *_tensorboard(self.recipe, self.run)],
            calibration=self.store.calibration,
        )
        trainer.remove_callback(PrinterCallback)  # _Watch says it better
        with _stop_on_sigterm(watch):
            trainer.train(resume_from_checkpoint=checkpoint)
        self._check_frozen()
        self.run.adopt_model(Path(trainer.checkpoint_now()))
        is_finished = trainer.state.global_step >= settings.steps
        report = TrainReport(
            run=str(self.run.folder),
            steps=trainer.state.global_step,
            loss=watch.last_loss,
            dev_wer=watch.last_wer,
            parameters=sum(p.numel() for p in self.model.projector.parameters()),
            seconds=time.monotonic() - started,
            is_finished=is_finished,
        )
        self.run.update({"is_finished": is_finished, "report": report.to_dict()})
        if not is_finished:
            self.say(f"stopped at step {report.steps} of {settings.steps}, saved; go on with --run {self.run.folder} --resume")
        return report

    def _check_frozen(self) -> None:
        found, expected = weights_digest(self.model.decoder), self.model.config.decoder_digest
        assert found == expected, f"the frozen decoder changed during training: {found} is not {expected}"


class ProjectorTrainer(Trainer):
    """transformers' Trainer over batches by number, saving models that load as they are."""

    def __init__(self, *, processor: TinyAudioProcessor, calibration: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.processor = processor
        self.calibration = calibration
        self.last: dict[str, float] = {}
        self._mean_std: tuple[torch.Tensor, torch.Tensor] | None = None
        self.num_seen = {"tokens": 0, "utterances": 0, "frames": 0}

    def get_train_dataloader(self) -> Any:
        numbers = [[number] for number in range(len(self.train_dataset))]
        loader = torch.utils.data.DataLoader(self.train_dataset, batch_sampler=numbers, collate_fn=itemgetter(0))
        return self.accelerator.prepare(loader)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        utterance_ids = inputs.pop("utterance_ids")
        if "scales" in inputs:
            inputs["features"] = self._dequantize(inputs["features"], inputs.pop("scales"), inputs["num_frames"])
        self.num_seen["utterances"] += len(utterance_ids)
        self.num_seen["frames"] += int(inputs["num_frames"].sum())
        output = model(**inputs, num_items_in_batch=num_items_in_batch)
        if not torch.isfinite(output.loss):
            raise RunError(
                f"loss is {output.loss.item()} at step {self.state.global_step + 1}, on utterances {', '.join(utterance_ids)}; "
                "look at them with `tinyaudio store info`, or lower train.learning_rate"
            )
        self.num_seen["tokens"] += int(output.num_targets)
        self.last["projected_rms"] = float(output.projected_rms)
        return (output.loss, output) if return_outputs else output.loss

    def _dequantize(self, codes: torch.Tensor, scales: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
        if self._mean_std is None:
            mean, std = (torch.from_numpy(np.asarray(a)).to(codes.device) for a in (self.calibration.mean, self.calibration.std))
            self._mean_std = (mean, std)
        return dequantize(codes, scales, num_frames, *self._mean_std)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **self.last, **{f"num_{name}": float(count) for name, count in self.num_seen.items()}}
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def checkpoint_now(self) -> str:
        """Return the newest checkpoint, saving one if the last step has none."""
        last = get_last_checkpoint(self.args.output_dir)
        if last is None or not last.endswith(f"-{self.state.global_step}"):
            self._save_checkpoint(self.model, trial=None)
            last = get_last_checkpoint(self.args.output_dir)
        assert last is not None
        return last


def _arguments(recipe: Recipe, run: Run) -> TrainingArguments:
    settings, on_gpu = recipe.train, torch.cuda.is_available()
    run.checkpoints.mkdir(exist_ok=True)
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_accumulation_steps=settings.accumulate,
        per_device_train_batch_size=1,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=settings.bf16 and on_gpu,
        use_cpu=not on_gpu,
        seed=settings.seed,
        logging_steps=settings.log_every,
        save_steps=settings.save_every,
        save_total_limit=settings.keep_checkpoints,
        report_to=[name for name in settings.report_to if name != "tensorboard"],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=on_gpu,
        accelerator_config={"split_batches": False, "dispatch_batches": False, "even_batches": True},
    )


def _tensorboard(recipe: Recipe, run: Run) -> list[TrainerCallback]:
    if "tensorboard" not in recipe.train.report_to:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(log_dir=str(run.folder / "tensorboard")))]


@dataclass(frozen=True)
class _DevSet:
    """Utterances of the dev split that are transcribed at every evaluation."""

    reader: FeatureReader
    processor: TinyAudioProcessor
    positions: list[int]

    @classmethod
    def open(cls, recipe: Recipe, store: FeatureStore, processor: TinyAudioProcessor) -> "_DevSet | None":
        split = recipe.corpus.dev_split
        if split is None or not any(store.commit(shard).split == split for shard in store.committed_shards()):
            return None
        reader = FeatureReader(store, split=split)
        chosen = np.random.default_rng(0).permutation(len(reader))[: recipe.train.eval_utterances]
        return cls(reader, processor, [int(position) for position in chosen])

    @torch.no_grad()
    def transcribe(self, model: TinyAudioForConditionalGeneration) -> tuple[list[str], list[str]]:
        """Generate greedily from stored features: references and hypotheses, in the order of `positions`."""
        frames = self.reader.num_frames.astype(np.int64)
        ordered = np.array(sorted(self.positions, key=lambda p: (frames[p], p)))
        targets = tokenize(self.processor.tokenizer, self.reader.index["transcript"].to_pylist())
        hypotheses: dict[int, str] = {}
        for batch in cut_by_budget(ordered, frames, DEV_BATCH_FRAMES):
            inputs = collate(self.reader, targets, batch.tolist())
            features, num_frames = self._on_device(inputs, model.device)
            tokens = model.generate(features=features, num_frames=num_frames, num_beams=1)
            hypotheses |= dict(zip(batch.tolist(), self.processor.decode_transcripts(tokens), strict=True))
        references = self.reader.index["transcript"].take(self.positions).to_pylist()
        return references, [hypotheses[position] for position in self.positions]

    def _on_device(self, inputs: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        features, num_frames = inputs["features"].to(device), inputs["num_frames"].to(device)
        if "scales" in inputs:
            calibration = self.reader.calibration
            assert calibration is not None
            mean, std = (torch.from_numpy(np.asarray(a)).to(device) for a in (calibration.mean, calibration.std))
            features = dequantize(features, inputs["scales"].to(device), num_frames, mean, std)
        return features, num_frames


class _Watch(TrainerCallback):
    """Metrics into a file, dev WER at every evaluation, and the flag that SIGTERM raises."""

    def __init__(self, run: Run, dev: _DevSet | None, eval_every: int, say: Say) -> None:
        self.run, self.dev, self.eval_every, self.say = run, dev, eval_every, say
        self.last_loss: float | None = None
        self.last_wer: float | None = None
        self.should_stop = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self.last_loss = logs.get("loss", self.last_loss)
        self._write({"step": state.global_step, **logs})
        if "loss" in logs:
            self.say(
                f"step {state.global_step:>6}/{state.max_steps}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  "
                f"grad {logs['grad_norm']:.2f}  rms {logs['projected_rms']:.1f}"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.should_stop:
            control.should_save = control.should_training_stop = True
        is_due = state.global_step % self.eval_every == 0 or state.global_step == state.max_steps
        if is_due and self.dev is not None and state.is_world_process_zero and not self.should_stop:
            self._evaluate(kwargs["model"], state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.run.adopt_model(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _evaluate(self, model: TinyAudioForConditionalGeneration, step: int) -> None:
        assert self.dev is not None
        was_training = model.training
        model.eval()
        references, hypotheses = self.dev.transcribe(model)
        model.train(was_training)
        errors = count_word_errors(references, hypotheses)
        self.last_wer = errors.wer
        self._write({"step": step, **{f"dev_{key}": value for key, value in errors.to_dict().items()}})
        self.say(f"step {step:>6}  dev {errors}")
        for reference, hypothesis in list(zip(references, hypotheses, strict=True))[:NUM_PAIRS]:
            self.say(f"    ref  {reference}\n    hyp  {hypothesis}")
        self._say_worst(references, hypotheses)

    def _say_worst(self, references: list[str], hypotheses: list[str]) -> None:
        scored = [(count_word_errors([r], [h]), r, h) for r, h in zip(references, hypotheses, strict=True)]
        worst = sorted((s for s in scored if s[0].wer > 0), key=lambda s: -_num_errors(s[0]))[:5]
        if worst:
            self.say("    worst:")
        for _, reference, hypothesis in worst:
            self.say(f"    ref  {reference}\n    hyp  {hypothesis}")

    def _write(self, entry: dict[str, Any]) -> None:
        with (self.run.folder / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps(entry) + "\n")


def _num_errors(errors: WordErrors) -> int:
    return errors.substitutions + errors.deletions + errors.insertions


@contextlib.contextmanager
def _stop_on_sigterm(watch: _Watch) -> Iterator[None]:
    """Let SIGTERM (Slurm, spot machines) end the run after the step under way, saved."""

    def stop(*_: Any) -> None:
        watch.should_stop = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
