"""transformers' Trainer over batches by number: exact, resumable, and saving models that load as they are.

Invariants: a checkpoint folder is complete or does not exist; a loss or a weight that is not finite is found before
anything is saved; a step takes `train.accumulate` batches whatever the number of processes, so one process and eight
take the same steps.
"""

import json
import math
import shutil
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from cache.files import sync
from pipelines.errors import RunError
from pipelines.files import full_disk
from pipelines.processes import gather, is_main_process, num_processes
from pipelines.recipes import Recipe
from pipelines.recipes.recipe import TrainSection
from pipelines.train.batches import Dequantizer, TrainingBatches
from pipelines.train.meter import Meter
from pipelines.train.runs import Run
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor

PROGRESS = "progress.json"  # in a checkpoint: counts and batches up to it
NOT_FINITE = "not_finite.txt"  # in a run's folder: the utterances on which it ended
NUM_NAMED = 5  # utterances in an error message
STAGING = "partial"  # in the folder of checkpoints: the one being written


class ProjectorTrainer(Trainer):
    """The loop of stage two."""

    def __init__(
        self, *, processor: TinyAudioProcessor, batches: TrainingBatches, settings: TrainSection, **kwargs: Any
    ) -> None:
        super().__init__(train_dataset=batches, **kwargs)
        self.processor, self.batches, self.settings = processor, batches, settings
        self.meter = Meter(self.args.device)
        self.projected_rms: Tensor | None = None
        self._dequantize = Dequantizer(batches.reader)
        self._unchecked: list[UncheckedLoss] = []
        self._ctc: list[tuple[Tensor, Tensor]] = []  # loss and rows left out of each batch since the last log
        self._newest: tuple[int, list[str]] = (0, [])  # the current step and the utterances of its batches so far

    def get_train_dataloader(self) -> Any:
        numbers = [[number] for number in range(len(self.batches))]
        return self.accelerator.prepare(DataLoader(self.batches, batch_sampler=numbers, collate_fn=itemgetter(0)))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of one batch as Trainer expects it: its share of the step's mean, times the processes."""
        is_ctc_only = self.state.global_step < self.settings.ctc_steps
        output = model(
            features=self._dequantize(inputs),
            num_frames=inputs["num_frames"],
            labels=inputs["labels"],
            num_items_in_batch=num_items_in_batch,
            host_counts=inputs["host_counts"],
            ctc_weight=self.settings.ctc_weight,
            is_ctc_only=is_ctc_only,
        )
        if output.ctc_loss is not None:
            self._ctc.append((output.ctc_loss, output.ctc_left_out))
        step, utterance_ids = self.state.global_step + 1, inputs["utterance_ids"]
        self._newest = (step, [*(self._newest[1] if self._newest[0] == step else []), *utterance_ids])
        self._unchecked.append(UncheckedLoss(step, utterance_ids, output.loss.detach()))
        self.check_finite(keep=1)  # one batch late: by then a GPU has copied the flag, and nothing waits for it
        self.projected_rms = output.projected_rms
        self.meter.add(
            num_utterances=len(utterance_ids),
            num_tokens=inputs["num_tokens"],
            num_targets=inputs["num_targets"],
            audio_s=inputs["duration_s"],
        )
        # Processes average their gradients, and num_items_in_batch counts the targets of all of them.
        loss = output.loss * (1 if num_items_in_batch is None else self.accelerator.num_processes)
        return (loss, output) if return_outputs else loss

    def check_finite(self, keep: int = 0) -> None:
        """Check the losses that have not been checked, except for the last `keep`.

        Raises:
            RunError: one is not finite; with its step and the utterances of its batch.
        """
        while len(self._unchecked) > keep:
            unchecked = self._unchecked.pop(0)
            if not unchecked.is_finite():
                found = f"loss is {unchecked.loss.item()} at step {unchecked.step}"
                raise self._not_finite(found, unchecked.utterance_ids)

    def _check_weights(self) -> None:
        """Check losses and projector: a finite loss can have a gradient that is not finite, which ruins all weights.

        Raises:
            RunError: a weight is not finite; with the last step, which must have caused it, and its utterances.
        """
        self.check_finite()
        weights = self.accelerator.unwrap_model(self.model).parameters()
        if not all(bool(torch.isfinite(weight).all()) for weight in weights if weight.requires_grad):
            step, utterance_ids = self._newest
            raise self._not_finite(f"projector weights are not finite after step {step}", utterance_ids)

    def _not_finite(self, found: str, utterance_ids: list[str]) -> RunError:
        """Write all utterance ids to a file, and make an error that names the first few."""
        path = Path(self.args.output_dir).parent / NOT_FINITE
        path.write_text("".join(f"{utterance_id}\n" for utterance_id in utterance_ids))
        named, more = ", ".join(utterance_ids[:NUM_NAMED]), len(utterance_ids) - NUM_NAMED
        rest = f" and {more} more (all in {str(path)!r})" if more > 0 else ""
        return RunError(
            f"{found}, on utterances {named}{rest}; nothing was saved since the last checkpoint. "
            "Check these utterances, or lower train.learning_rate"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.check_finite()
            assert self.projected_rms is not None
            logs = {**logs, **self._ctc_logs(logs["loss"]), "projected_rms": float(self.projected_rms)}
            logs |= self.meter.read(self.batches.waited_s)
        super().log(logs, *args, **kwargs)

    def _ctc_logs(self, loss: float) -> dict[str, float]:
        """Return the mean CTC loss since the last log, the rows it left out, and what is left of `loss` without it."""
        if not self._ctc:
            return {}
        steps = len(self._ctc) / self.args.gradient_accumulation_steps
        here, self._ctc = [float(torch.stack(values).sum()) for values in zip(*self._ctc, strict=True)], []
        ctc_loss, left_out = (sum(values) for values in zip(here, *gather(here), strict=True))
        logs = {"ctc_loss": ctc_loss / steps, "ctc_left_out": left_out}
        if self.state.global_step <= self.settings.ctc_steps:
            return logs
        return {**logs, "decoder_loss": loss - self.settings.ctc_weight * logs["ctc_loss"]}

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm up and decay in each phase by itself; without a CTC phase this is transformers' own schedule."""
        if not self.settings.ctc_steps:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._share_of_learning_rate)
        return self.lr_scheduler

    def _share_of_learning_rate(self, step: int) -> float:
        """Rise linearly over `train.warmup_steps`, then fall to 0 as a cosine."""
        settings = self.settings
        if step < settings.ctc_steps:
            number, length = step, settings.ctc_steps
        else:
            number, length = step - settings.ctc_steps, settings.steps
        warmup = min(settings.warmup_steps, length // 2)
        if number < warmup:
            return number / warmup
        return 0.5 * (1 + math.cos(math.pi * (number - warmup) / max(1, length - warmup)))

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Weight decay is for the projector: the CTC loss has a scale, a bias and a direction."""
        return [name for name in super().get_decay_parameter_names(model) if "token_ctc." not in name]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: Trainer's estimate walks all parameters at every step and assumes that all of them are trained."""
        return 0

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / STAGING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint into a staging folder, then move it into place (transformers 5.23 writes in place).

        Raises:
            RunError: the disk is full; the unfinished checkpoint is removed.
        """
        name = f"checkpoint-{self.state.global_step}"
        folder, staging = Path(self.args.output_dir), Path(self._get_output_dir(trial))
        if (folder / name).is_dir():
            return
        self._check_weights()
        try:
            self._write_checkpoint(model, trial, staging / name, folder / name)
        except Exception as error:
            reason = full_disk(error)
            if reason is None:
                raise
            shutil.rmtree(staging, ignore_errors=True)
            raise RunError(
                f"{str(folder / name)!r} cannot be written: {reason}. Earlier checkpoints are whole. Free some space, "
                f"and run the same command with --run {folder.parent} --resume"
            ) from error

    def _write_checkpoint(self, model: Any, trial: Any, staged: Path, target: Path) -> None:
        with self.meter.paused():
            totals = self.meter.totals()
            if self.args.should_save:
                shutil.rmtree(staged.parent, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                progress = {**totals, **self.batches.progress()}
                (staged / PROGRESS).write_text(json.dumps(progress) + "\n")
                for path in [*staged.iterdir(), staged]:  # so that a power cut after the rename leaves them whole
                    sync(path)
                staged.rename(target)
                rotate_checkpoints(str(target.parent), self.args.save_total_limit)
            self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # transformers 5.23 calls this in every process
            return
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def checkpoint_now(self) -> Path:
        """Return the checkpoint of the last step, saving it if there is none."""
        self._save_checkpoint(self.model, trial=None)
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"


class UncheckedLoss:
    """The loss of one batch, whose check does not wait for the batches after it.

    Reading a tensor of a GPU waits until the GPU has done all that is queued. So a flag, whether the loss is finite, is
    copied to page-locked memory in the background, and `is_finite` waits for that copy alone.
    """

    def __init__(self, step: int, utterance_ids: list[str], loss: Tensor) -> None:
        self.step, self.utterance_ids, self.loss = step, utterance_ids, loss
        self._flag, self._copied = torch.isfinite(loss), None
        if loss.is_cuda:
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(self._flag, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(loss.device))

    def is_finite(self) -> bool:
        """Wait until the flag has been copied, and return it."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._flag.numpy())


def last_checkpoint(run: Run) -> Path | None:
    """Return the newest checkpoint of a run, if there is one."""
    found = get_last_checkpoint(str(run.checkpoints)) if run.checkpoints.is_dir() else None
    return None if found is None else Path(found)


def step_of(checkpoint: Path) -> int:
    """Read a checkpoint's step from its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def training_arguments(recipe: Recipe, run: Run, device: torch.device) -> TrainingArguments:
    """Translate a recipe into transformers' arguments; creates the folder of checkpoints."""
    settings, on_gpu = recipe.train, device.type == "cuda"
    if is_main_process():
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=settings.all_steps,
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
        dataloader_pin_memory=False,  # the thread that makes batches does it
        ddp_find_unused_parameters=False,
        accelerator_config={
            "split_batches": False,
            "dispatch_batches": False,
            "even_batches": True,
            "non_blocking": on_gpu,
        },
    )
    arguments._n_gpu = min(arguments._n_gpu, 1)  # several GPUs need torchrun; never DataParallel
    return arguments


def tensorboard(recipe: Recipe, run: Run, first_step: int) -> list[TrainerCallback]:
    """Write curves into the run's folder, if the recipe asks for it; points after `first_step` are purged."""
    if "tensorboard" not in recipe.train.report_to:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    purge = first_step + 1 if first_step else None
    return [TensorBoardCallback(SummaryWriter(log_dir=str(run.folder / "tensorboard"), purge_step=purge))]


def check_settings(recipe: Recipe) -> None:
    """Check before anything is loaded what would stop the run later.

    Raises:
        RunError: `train.accumulate` cannot be divided among the processes, or a reporter is not installed.
    """
    accumulate, processes = recipe.train.accumulate, num_processes()
    if accumulate % processes:
        raise RunError(
            f"train.accumulate is {accumulate} with {processes} processes; expected a multiple of {processes}, "
            f"since the batches of a step are divided among the processes. Try train.accumulate={processes}, which "
            f"makes a step {processes} batches large, and train.steps={max(1, recipe.train.steps // processes)} for "
            "the same amount of audio"
        )
    available = {"tensorboard", *get_available_reporting_integrations()}
    if missing := [name for name in recipe.train.report_to if name not in available]:
        raise RunError(
            f"train.report_to names {', '.join(missing)}, which is not installed; expected some of "
            f"{', '.join(sorted(available))}. Try `pip install {' '.join(missing)}`"
        )
