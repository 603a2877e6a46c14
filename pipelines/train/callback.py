"""Seeing a run learn: a line of metrics at every log, word errors by real generation at every evaluation.

Everything logged goes to metrics.jsonl and through the Trainer to TensorBoard and whoever else `report_to` names. Also
here: the warning when nothing has clicked, and the flag that SIGTERM raises.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pipelines.recipes.recipe import TrainSection
from pipelines.scoring import WordErrors, count_word_errors
from pipelines.train.dev_set import DevSet, Listening
from pipelines.train.runs import Run

NUM_PAIRS = 8  # reference and hypothesis pairs shown at every evaluation, always the same utterances
NUM_WORST = 5
# A projector is deaf at first, then suddenly not. SLAM-ASR and Tiny Audio see that within some 1,000 to 2,500 steps of
# 24 to 36 utterances; twice the latest of them is a run that will not come round by itself.
CLICK_UTTERANCES = 60_000
CLICK_GAIN = 0.5  # nats per token that the right audio is worth; below it, transcripts hardly depend on the audio
# Without a dev split the training loss has to tell. A decoder that hears nothing pays the entropy of its text, some 3
# nats a token of English speech for one of 3 B parameters; one that hears well pays a few tenths.
CLICK_LOSS = 1.5

Say = Callable[[str], None]


class Watch(TrainerCallback):
    """What the Trainer tells us, written down; evaluations; the request to stop."""

    def __init__(
        self, run: Run, dev: DevSet | None, settings: TrainSection, say: Say, stop_after: int | None = None
    ) -> None:
        self.run, self.dev, self.settings, self.say, self.stop_after = run, dev, settings, say, stop_after
        self.trainer: Any = None  # set once it exists; dev metrics are logged through it
        self.last_loss: float | None = None
        self.last_wer: float | None = None
        self.judged_step: int | None = None  # of the last word error rate
        self.num_utterances = 0.0
        self.has_clicked = self.has_warned = False
        self.stop_requested = self.is_learnt_by_heart = False

    def resume(self, step: int) -> None:
        """Remember what earlier parts of the run had seen, up to a step."""
        for entry in (entry for entry in self.run.metrics() if entry["step"] <= step):
            self.last_loss = entry.get("loss", self.last_loss)
            if "dev_wer" in entry:
                self.last_wer, self.judged_step = entry["dev_wer"], entry["step"]
            self.has_clicked |= self._is_click(entry)

    def has_judged(self, step: int) -> bool:
        """Say whether the word errors of a step are known, or never will be for want of a dev set."""
        return self.dev is None or self.judged_step == step

    # ------------------------------------------------------------------------------------- what the Trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make up for an evaluation that a stop had cut off."""
        if self.dev is None:
            self.say(
                "no dev split in the store or the recipe: nothing will be evaluated, the training loss has to tell"
            )
        elif state.global_step and self._is_due(state) and not self.has_judged(state.global_step):
            self._evaluate(kwargs["model"], state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._agree_to_stop(args.device):
            control.should_save = control.should_training_stop = True
        elif self._is_due(state):
            self._evaluate(kwargs["model"], state, control)
        if state.global_step == state.max_steps:
            control.should_log = True  # so that the report's loss is that of the end, whatever `log_every`
        if state.global_step == self.stop_after:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self.run.add_metrics({"step": state.global_step, **logs})
        if "loss" in logs:
            self.last_loss, self.num_utterances = logs["loss"], logs["num_utterances"]
            self.has_clicked |= self._is_click(logs)
            self.say(
                f"step {state.global_step:>6}/{state.max_steps}  loss {logs['loss']:.4f}  "
                f"lr {logs['learning_rate']:.2e}  grad {logs['grad_norm']:.2f}  rms {logs['projected_rms']:.1f}  "
                f"{logs['tokens_per_second']:,.0f} tok/s  {logs['audio_seconds_per_second']:,.0f} audio s/s  "
                f"{logs['peak_memory_bytes'] / 1e9:.1f} GB"
            )
            self._warn_if_deaf(logs["projected_rms"])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.run.adopt_model(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    # ------------------------------------------------------------------------------------- stopping

    def request_stop(self, *_: Any) -> None:
        self.stop_requested = True

    def _agree_to_stop(self, device: torch.device) -> bool:
        """Let all processes stop at the same step if one was told to."""
        if torch.distributed.is_initialized():
            flag = torch.tensor(int(self.stop_requested), device=device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.stop_requested = bool(flag)
        return self.stop_requested

    # ------------------------------------------------------------------------------------- evaluating

    def _is_due(self, state: Any) -> bool:
        is_last = state.global_step == state.max_steps
        return self.dev is not None and (is_last or state.global_step % self.settings.eval_every == 0)

    def _evaluate(self, model: Any, state: Any, control: Any) -> None:
        assert self.dev is not None
        self.trainer.check_finite()
        was_training = model.training
        model.eval()
        with self.trainer.meter.paused():
            listening = self.dev.listen(model)
            found = self.dev.transcribe(model, lambda: self.stop_requested)
        model.train(was_training)
        if found is None:  # told to stop in the middle; on_train_begin makes up for it
            control.should_save = control.should_training_stop = True
            return
        errors = count_word_errors(*found)
        self.last_wer, self.judged_step = errors.wer, state.global_step
        should_log = control.should_log  # of the step's own metrics, which are still to come
        self.trainer.log({f"dev_{key}": value for key, value in errors.to_dict().items()} | self._hear(listening))
        control.should_log = should_log
        if state.is_world_process_zero:
            self._show(state.global_step, errors, listening, *found)
        if self.settings.overfit_utterances is not None and errors.wer == 0:
            self.is_learnt_by_heart = control.should_save = control.should_training_stop = True

    def _hear(self, listening: Listening | None) -> dict[str, float]:
        if listening is None:
            return {}
        heard = {
            "dev_loss": listening.own,
            "dev_loss_other_audio": listening.other,
            "dev_listening_gain": listening.gain,
        }
        self.has_clicked |= self._is_click(heard)
        return heard

    def _show(
        self, step: int, errors: WordErrors, listening: Listening | None, references: list[str], hypotheses: list[str]
    ) -> None:
        heard = "" if listening is None else f"; the right audio is worth {listening.gain:.2f} nats a token"
        self.say(f"step {step:>6}  dev {errors}{heard}")
        pairs = list(zip(references, hypotheses, strict=True))
        for reference, hypothesis in pairs[:NUM_PAIRS]:
            self.say(f"    ref  {reference}\n    hyp  {hypothesis}")
        scored = [(_num_errors(count_word_errors([r], [h])), r, h) for r, h in pairs]
        worst = sorted((s for s in scored if s[0]), key=lambda s: -s[0])[:NUM_WORST]
        if worst:
            self.say("    worst:")
        for _, reference, hypothesis in worst:
            self.say(f"    ref  {reference}\n    hyp  {hypothesis}")

    def _is_click(self, metrics: dict[str, float]) -> bool:
        if self.dev is None:
            return metrics.get("loss", CLICK_LOSS) < CLICK_LOSS
        return metrics.get("dev_listening_gain", 0.0) > CLICK_GAIN

    def _warn_if_deaf(self, projected_rms: float) -> None:
        if self.has_clicked or self.has_warned or self.num_utterances < CLICK_UTTERANCES:
            return
        self.has_warned = True
        self.say(
            f"warning: {self.num_utterances:,.0f} utterances seen and transcripts still hardly depend on the audio "
            f"(most runs have clicked by {CLICK_UTTERANCES:,}). Projected frames are {projected_rms:.1f} times as loud "
            "as embeddings (good runs: 1 to 66). Try train.learning_rate up to 1e-3 or "
            "projector.kind=norm_mlp; check that `tinyaudio train --overfit 32` reaches 0 % and that the worst pairs "
            "have the right transcripts"
        )


def _num_errors(errors: WordErrors) -> int:
    return errors.substitutions + errors.deletions + errors.insertions


@contextlib.contextmanager
def stop_on_sigterm(watch: Watch) -> Iterator[None]:
    """Let SIGTERM (Slurm, spot machines) end the run after the step under way, saved."""
    before = signal.signal(signal.SIGTERM, watch.request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
