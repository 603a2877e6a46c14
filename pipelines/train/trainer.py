"""transformers' Trainer over batches by number: exact, resumable, saving models that load as they are.

Invariants: a checkpoint folder is complete or does not exist; a loss or a weight that is not finite is found before
anything is saved; `train.accumulate` batches make a step whatever the number of processes, so one process and eight
take the same steps.
"""

import json
import os
import shutil
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import get_last_checkpoint

from pipelines.errors import RunError
from pipelines.processes import is_main_process, num_processes
from pipelines.recipes import Recipe
from pipelines.train.batches import Dequantizer, TrainingBatches
from pipelines.train.meter import Meter
from pipelines.train.runs import Run
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor

PROGRESS = "progress.json"  # in a checkpoint: what the run had gone through
NOT_FINITE = "not_finite.txt"  # in a run's folder: the utterances on which it ended
NAMED = 5  # utterances in an error
STAGING = "partial"  # beside the checkpoints: the one being written


class ProjectorTrainer(Trainer):
    """The loop of stage two."""

    def __init__(self, *, processor: TinyAudioProcessor, batches: TrainingBatches, **kwargs: Any) -> None:
        super().__init__(train_dataset=batches, **kwargs)
        self.processor, self.batches = processor, batches
        self.meter = Meter(self.args.device)
        self.projected_rms: Tensor | None = None
        self._dequantize = Dequantizer(batches.reader)
        self._unchecked: list[tuple[int, list[str], Tensor]] = []  # step, utterance ids, loss
        self._newest: tuple[int, list[str]] = (0, [])  # the step under way and the utterances of its batches

    def get_train_dataloader(self) -> Any:
        numbers = [[number] for number in range(len(self.batches))]
        return self.accelerator.prepare(DataLoader(self.batches, batch_sampler=numbers, collate_fn=itemgetter(0)))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of one batch, as Trainer wants it: its share of the step's mean, times the processes."""
        output = model(
            features=self._dequantize(inputs),
            num_frames=inputs["num_frames"],
            labels=inputs["labels"],
            num_items_in_batch=num_items_in_batch,
            host_counts=inputs["host_counts"],
        )
        self._check_soon(inputs["utterance_ids"], output.loss.detach())
        self.projected_rms = output.projected_rms
        self.meter.add(
            num_utterances=len(inputs["utterance_ids"]),
            num_tokens=inputs["num_tokens"],
            num_targets=inputs["num_targets"],
            audio_s=inputs["duration_s"],
        )
        # Processes average their gradients, and num_items_in_batch counts the targets of all of them.
        loss = output.loss * (1 if num_items_in_batch is None else self.accelerator.num_processes)
        return (loss, output) if return_outputs else loss

    # ------------------------------------------------------------------------------------- a loss that is not finite

    def _check_soon(self, utterance_ids: list[str], loss: Tensor) -> None:
        """Look at the loss one batch late: by then a GPU has finished it, and need not be waited for."""
        step = self.state.global_step + 1
        self._newest = (step, [*(self._newest[1] if self._newest[0] == step else []), *utterance_ids])
        self._unchecked.append((step, utterance_ids, loss))
        self.check_finite(keep=1)

    def check_finite(self, keep: int = 0) -> None:
        """Look at the losses not looked at yet, except for the last `keep`.

        Raises:
            RunError: one is not finite; with its step and the utterances of its batch.
        """
        while len(self._unchecked) > keep:
            step, utterance_ids, loss = self._unchecked.pop(0)
            if not torch.isfinite(loss):
                raise RunError(
                    f"loss is {loss.item()} at step {step}, on utterances {self._named(utterance_ids)}; nothing was "
                    "saved since the last checkpoint. Look at these utterances, or lower train.learning_rate"
                )

    def check_weights(self) -> None:
        """Look at the projector itself: the gradient of a finite loss may not be finite, and then no weight is.

        Raises:
            RunError: some weight is not finite; with the last step, which must have done it, and its utterances.
        """
        self.check_finite()
        weights = self.accelerator.unwrap_model(self.model).projector.parameters()
        if not all(bool(torch.isfinite(weight).all()) for weight in weights):
            step, utterance_ids = self._newest
            raise RunError(
                f"projector weights are not finite after step {step}, on utterances {self._named(utterance_ids)}: "
                "their loss was finite and its gradient was not; nothing was saved since the last checkpoint. Look at "
                "these utterances, or lower train.learning_rate"
            )

    def _named(self, utterance_ids: list[str]) -> str:
        """Name the first few, and where all of them are left."""
        path = Path(self.args.output_dir).parent / NOT_FINITE
        path.write_text("".join(f"{one}\n" for one in utterance_ids))
        more = len(utterance_ids) - NAMED
        return ", ".join(utterance_ids[:NAMED]) + (f" and {more} more (all in {str(path)!r})" if more > 0 else "")

    # ------------------------------------------------------------------------------------- metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.check_finite()
            assert self.projected_rms is not None
            logs = {**logs, "projected_rms": float(self.projected_rms), **self.meter.read(self.batches.waited_s)}
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Give nothing: Trainer's own estimate walks all parameters at every step and assumes that all are trained."""
        return 0

    # ------------------------------------------------------------------------------------- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / STAGING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place, then move it there as a whole."""
        name = f"checkpoint-{self.state.global_step}"
        folder, staging = Path(self.args.output_dir), Path(self._get_output_dir(trial))
        if (folder / name).is_dir():
            return
        self.check_weights()
        with self.meter.paused():
            totals = self.meter.totals()
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                progress = {**totals, **self.batches.progress()}
                (staging / name / PROGRESS).write_text(json.dumps(progress) + "\n")
                _flush(staging / name)
                (staging / name).rename(folder / name)
                _forget_old(folder, keep=self.args.save_total_limit or 1)
            self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def checkpoint_now(self) -> Path:
        """Return the newest checkpoint, saving one if the last step has none."""
        self._save_checkpoint(self.model, trial=None)
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"


def last_checkpoint(run: Run) -> Path | None:
    """Find the newest complete checkpoint of a run."""
    found = get_last_checkpoint(str(run.checkpoints)) if run.checkpoints.is_dir() else None
    return None if found is None else Path(found)


def step_of(checkpoint: Path) -> int:
    """Read a checkpoint's step from its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _flush(folder: Path) -> None:
    """Make a folder's files survive a power cut before anything points to them."""
    for path in [*folder.iterdir(), folder]:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _forget_old(folder: Path, keep: int) -> None:
    for path in sorted(folder.glob("checkpoint-*"), key=step_of)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def training_arguments(recipe: Recipe, run: Run, device: torch.device) -> TrainingArguments:
    """Translate a recipe into what transformers calls things; makes the folder of checkpoints."""
    settings, on_gpu = recipe.train, device.type == "cuda"
    if is_main_process():
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_accumulation_steps=settings.accumulate // num_processes(),
        per_device_train_batch_size=1,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=settings.bf16 and on_gpu,
        use_cpu=not on_gpu,
        seed=settings.seed,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # it would wait for the GPU at every batch and hide what check_finite looks for
        save_steps=settings.save_every,
        save_total_limit=settings.keep_checkpoints,
        report_to=[name for name in settings.report_to if name != "tensorboard"],
        run_name=run.folder.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,  # the batches' own thread does it
        ddp_find_unused_parameters=False,
        accelerator_config={
            "split_batches": False,
            "dispatch_batches": False,
            "even_batches": True,
            "non_blocking": on_gpu,
        },
    )
    arguments._n_gpu = min(arguments._n_gpu, 1)  # several GPUs are torchrun's business, never DataParallel's
    return arguments


def tensorboard(recipe: Recipe, run: Run, first_step: int) -> list[TrainerCallback]:
    """Write curves into the run's own folder, if the recipe says so; what a stop left behind it is purged."""
    if "tensorboard" not in recipe.train.report_to:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    purge = first_step + 1 if first_step else None
    return [TensorBoardCallback(SummaryWriter(log_dir=str(run.folder / "tensorboard"), purge_step=purge))]


def check_settings(recipe: Recipe) -> None:
    """Find out before anything is loaded what would stop the run later.

    Raises:
        RunError: `train.accumulate` cannot be divided among the processes, or something to report to is not installed.
    """
    accumulate, processes = recipe.train.accumulate, num_processes()
    if accumulate % processes:
        raise RunError(
            f"train.accumulate is {accumulate} and there are {processes} processes; expected a multiple of "
            f"{processes}, since a step takes train.accumulate batches over all processes"
        )
    _check_reporters(recipe)


def _check_reporters(recipe: Recipe) -> None:
    available = {"tensorboard", *get_available_reporting_integrations()}
    missing = [name for name in recipe.train.report_to if name not in available]
    if missing:
        raise RunError(
            f"train.report_to names {', '.join(missing)}, which is not installed; expected some of "
            f"{', '.join(sorted(available))} (pip install {' '.join(missing)} adds it)"
        )
