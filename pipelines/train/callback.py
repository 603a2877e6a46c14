"""The Trainer's callback: metrics at every log, word errors by real generation at every evaluation, stop on SIGTERM.

Everything logged goes to metrics.jsonl, to TensorBoard, and to the other reporters of `train.report_to`. Pairs of
reference and hypothesis go to the run's log.txt.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pipelines.recipes.recipe import TrainSection
from pipelines.scoring import count_word_errors
from pipelines.train.dev_set import DevSet
from pipelines.train.runs import LOG, Run

NUM_PAIRS = 8  # reference and hypothesis pairs logged at every evaluation, always the same utterances
NUM_WORST = 5
# A projector's transcripts first ignore the audio, then start to use it within a few steps. SLAM-ASR and Tiny Audio see
# that after 1,000 to 2,500 steps of 24 to 36 utterances; a run that needs twice the latest of them will not recover.
WARN_AFTER_UTTERANCES = 60_000
USED_AUDIO_GAIN = 0.5  # nats per token; below it, transcripts hardly depend on the audio
# Without a dev split the training loss decides. A decoder without audio has the entropy of the text, about 3 nats per
# token of English speech for 3 B parameters; one that uses the audio well has a few tenths.
USED_AUDIO_LOSS = 1.5
USED_AUDIO_CTC_WER = 0.8  # a CTC draft below it has words that can only come from the audio

Say = Callable[[str], None]


class TrainingCallback(TrainerCallback):
    """Records what the Trainer reports, evaluates, and requests the end of training."""

    def __init__(
        self, run: Run, dev: DevSet | None, settings: TrainSection, say: Say, stop_after: int | None = None
    ) -> None:
        self.run, self.dev, self.settings, self.say, self.stop_after = run, dev, settings, say, stop_after
        self.trainer: Any = None  # set once it exists; dev metrics are logged through it
        self.last_loss: float | None = None
        self.last_wer: float | None = None
        self.last_ctc_wer: float | None = None  # of the last evaluation; training without the weight outdates it
        self.evaluated_step: int | None = None
        self.num_utterances = 0.0
        self.uses_audio = self.has_warned = False
        self.stop_requested = self.has_overfit = False

    def resume(self, step: int) -> None:
        """Restore the state from the metrics of earlier parts of the run, up to a step."""
        for entry in (entry for entry in self.run.metrics() if entry["step"] <= step):
            self.last_loss = entry.get("decoder_loss", entry.get("loss", self.last_loss))
            if "dev_wer" in entry or "dev_ctc_wer" in entry:
                self.evaluated_step = entry["step"]
                self.last_wer, self.last_ctc_wer = entry.get("dev_wer", self.last_wer), entry.get("dev_ctc_wer")
            self._note_use_of_audio(entry)

    def has_evaluated(self, step: int) -> bool:
        """Return whether the word errors of a step are known, or there is no dev set to evaluate."""
        return self.dev is None or self.evaluated_step == step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Repeat an evaluation that was interrupted by a stop."""
        if self.dev is None:
            self.say("no dev split in the store or the recipe: nothing will be evaluated but the training loss")
        elif state.global_step and self._is_due(state) and not self.has_evaluated(state.global_step):
            self._evaluate(kwargs["model"], state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():  # all processes stop at the same step if one has to
            flag = torch.tensor(int(self.stop_requested), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.stop_requested = bool(flag)
        if self.stop_requested or state.global_step == self.stop_after:
            control.should_save = control.should_training_stop = True
        if not self.stop_requested and self._is_due(state):
            self._evaluate(kwargs["model"], state, control)
        if state.global_step == state.max_steps:
            control.should_log = True  # so that the report's loss is that of the last steps, whatever `log_every`

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self.run.add_metrics({"step": state.global_step, **logs})
        if "loss" not in logs:
            return
        self.last_loss, self.num_utterances = logs.get("decoder_loss", logs["loss"]), logs["num_utterances"]
        self._note_use_of_audio(logs)
        losses = f"loss {logs['loss']:.4f}"
        if "ctc_loss" in logs:
            losses = f"CTC loss {logs['ctc_loss']:.4f}"
        if "decoder_loss" in logs:
            losses = f"loss {logs['decoder_loss']:.4f}  {losses}"
        self.say(
            f"step {state.global_step:>6}/{state.max_steps}  {losses}  "
            f"lr {logs['learning_rate']:.2e}  grad {logs['grad_norm']:.2f}  rms {logs['projected_rms']:.1f}  "
            f"{logs['tokens_per_second']:,.0f} tok/s  {logs['audio_seconds_per_second']:,.0f} audio s/s  "
            f"{logs['peak_memory_bytes'] / 1e9:.1f} GB"
        )
        if not (self.uses_audio or self.has_warned) and self.num_utterances >= WARN_AFTER_UTTERANCES:
            self.has_warned = True
            self.say(
                f"warning: after {self.num_utterances:,.0f} utterances the model still ignores the audio (most runs "
                f"have started to use it by {WARN_AFTER_UTTERANCES:,}). Projected frames have "
                f"{logs['projected_rms']:.1f}x the RMS of the text embeddings; healthy runs are between 1x and 66x. "
                "Try train.learning_rate up to 1e-3 or projector.kind=norm_mlp; check that `tinyaudio train --overfit "
                f"32` reaches 0 % WER and that the worst pairs in {LOG} have the right transcripts"
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.run.adopt_model(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _is_due(self, state: Any) -> bool:
        ends_phase = state.global_step in (self.settings.ctc_steps, state.max_steps)
        return self.dev is not None and (ends_phase or state.global_step % self.settings.eval_every == 0)

    def _evaluate(self, model: Any, state: Any, control: Any) -> None:
        assert self.dev is not None
        self.trainer.check_finite()
        was_training = model.training
        model.eval()
        # In the CTC phase the decoder would write 200 tokens of nonsense for every utterance.
        has_decoder = state.global_step > self.settings.ctc_steps
        audio, found, draft = None, None, None
        with self.trainer.meter.paused():
            if model.token_ctc is not None and (self.settings.ctc_weight or not has_decoder):
                draft = self.dev.draft(model)
            if has_decoder:
                audio = self.dev.audio_gain(model)
                found = self.dev.transcribe(model, lambda: self.stop_requested)
        model.train(was_training)
        if has_decoder and found is None:  # stopped; on_train_begin repeats the evaluation
            control.should_save = control.should_training_stop = True
            return
        self.evaluated_step = step = state.global_step
        words: list[str] = []
        metrics: dict[str, float] = {}
        if found is not None:
            errors = count_word_errors(*found)
            self.last_wer = errors.wer
            metrics |= {f"dev_{key}": value for key, value in errors.to_dict().items()}
            words.append(f"dev {errors}")
        self.last_ctc_wer = None if draft is None else count_word_errors(*draft).wer
        if self.last_ctc_wer is not None:
            metrics["dev_ctc_wer"] = self.last_ctc_wer
            words.append(f"dev WER by CTC alone {100 * self.last_ctc_wer:.2f} %")
        if audio is not None:
            metrics |= {"dev_loss": audio.own, "dev_loss_other_audio": audio.other, "dev_listening_gain": audio.gain}
            words.append(f"audio gain {audio.gain:.2f} nats/token")
        self._note_use_of_audio(metrics)
        should_log = control.should_log  # logging resets it, and the step's own metrics are still to come
        self.trainer.log(metrics)
        control.should_log = should_log
        if self.settings.overfit_utterances is not None and metrics.get("dev_wer") == 0:
            self.has_overfit = control.should_save = control.should_training_stop = True
        if not state.is_world_process_zero:
            return
        self.say(f"step {step:>6}  {'; '.join(words)}")
        pairs = list(zip(*(found or draft or ()), strict=True))
        errors_of = {pair: count_word_errors([pair[0]], [pair[1]]).errors for pair in pairs}
        worst = sorted((pair for pair in pairs if errors_of[pair]), key=lambda pair: -errors_of[pair])[:NUM_WORST]
        lines = [f"step {step}"] + [f"    ref  {one}\n    hyp  {other}" for one, other in pairs[:NUM_PAIRS]]
        if worst:
            lines += ["    worst:"] + [f"    ref  {one}\n    hyp  {other}" for one, other in worst]
        self.run.log("\n".join(lines))

    def _note_use_of_audio(self, metrics: dict[str, float]) -> None:
        if self.dev is None:
            self.uses_audio |= metrics.get("loss", USED_AUDIO_LOSS) < USED_AUDIO_LOSS
        else:
            self.uses_audio |= metrics.get("dev_listening_gain", 0.0) > USED_AUDIO_GAIN
            self.uses_audio |= metrics.get("dev_ctc_wer", 1.0) < USED_AUDIO_CTC_WER


@contextlib.contextmanager
def stop_on_sigterm(callback: TrainingCallback) -> Iterator[None]:
    """Let SIGTERM (Slurm, spot machines) end the run after the current step, saved."""

    def request_stop(*_: Any) -> None:
        callback.stop_requested = True

    before = signal.signal(signal.SIGTERM, request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
