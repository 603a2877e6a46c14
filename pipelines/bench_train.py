"""How fast stage two is, and what each saving is worth: contestants side by side in one run.

Every contestant takes whole optimizer steps on the same models and recordings, a few at a time, turn by turn, so that
other work on the machine hits all alike; ratios are of medians over the turns. What is compared is seconds of audio
trained on per second, since batches differ.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines import batches as batches_module
from pipelines import bench_losses as losses
from pipelines.batches import TrainingBatches, collate
from pipelines.bench_parts import Parts, build_parts
from pipelines.identity import pick_device
from pipelines.peak_memory import CountFlops, measuring_peak
from tinyaudio.encoder import encoder_inputs
from tinyaudio.loss import summed_cross_entropy
from tinyaudio.modeling_tinyaudio import IGNORED_LABEL

TURNS, STEPS_A_TURN = 5, 3
VOCABULARY, LOSS_ROWS, LOSS_TARGETS, LOSS_WIDTH = 128_256, 1536, 384, 64
MATMUL_SIZE = 8192  # of the product whose speed is taken for the device's best
OURS, LIVE, PLAIN = "this stage two", "encoder in the loop", "plain transformers loop"

Batch = dict[str, Any]


@dataclass(kw_only=True)
class Contestant:
    """One way to train; `turn_off` says in which respect it differs from ours."""

    name: str
    next_batch: Callable[[], Batch]
    loss: losses.Loss
    speeds: list[float] = field(default_factory=list)  # audio seconds per second, by turn
    token_speeds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def bench_train(*, full_size: bool = False, device: str = "auto", turns: int = TURNS) -> dict[str, Any]:
    """Measure training steps.

    Args:
        full_size: HuBERT-large and SmolLM3-3B shapes at random weights; wants a GPU.
        turns: of a few steps for each contestant.

    Returns:
        `vs_plain`, `vs_live`: our audio seconds per second over theirs. `loss_memory_vs_full`: peak memory of our loss
        over that of full logits. `loader_share`: of our step time, waiting for batches. `matmul_share`: of the measured
        matmul peak, None without a GPU. `peak_bytes`: of our step, beyond the weights. `contestants`: by name.
    """
    where = pick_device(device)
    with tempfile.TemporaryDirectory(prefix="bench-train-", dir=Path.cwd()) as folder:
        parts = build_parts(Path(folder), full_size=full_size, device=where)
        step = _Step(parts)
        ours = _our_batches(parts)
        contestants = _contestants(parts, ours)
        waited = _race(contestants, step, ours, turns)
        flops, seconds = step.count_flops(contestants[0]), step.time_one(contestants[0])
    speeds = {one.name: statistics.median(one.speeds) for one in contestants}
    return {
        "vs_plain": _ratio(contestants, PLAIN),
        "vs_live": _ratio(contestants, LIVE),
        "loss_memory_vs_full": loss_memory_vs_full(where),
        "loader_share": waited,
        "matmul_share": flops / seconds / _matmul_peak(where) if where.type == "cuda" else None,
        "peak_bytes": contestants[0].peak_bytes,
        "contestants": {
            one.name: {
                "audio_seconds_per_second": speeds[one.name],
                "tokens_per_second": statistics.median(one.token_speeds),
                "ours_is_faster_by": _ratio(contestants, one.name),
                "peak_bytes": one.peak_bytes,
            }
            for one in contestants
        },
        "device": where.type,
        "full_size": full_size,
        "tflops_per_step": flops / 1e12,
        "load_average": os.getloadavg()[0],
    }


# ------------------------------------------------------------------------------------------- who competes


def _contestants(parts: Parts, ours: TrainingBatches) -> list[Contestant]:
    cached = _endless(ours)
    live, plain = _Live(parts), _Live(parts, is_shuffled=True)
    unsorted = _Live(parts, is_shuffled=True, is_cached=True)
    unthreaded = _endless(_our_batches(parts, ahead=0))
    rows: list[tuple[str, Callable[[], Batch], losses.Loss]] = [
        (OURS, cached, losses.own),
        (LIVE, live, losses.own),
        (PLAIN, plain, losses.as_a_user_would),
        ("logits at every position", cached, losses.full_logits),
        ("label logits in one chunk", cached, losses.one_chunk),
        ("attention mask over padding", cached, losses.with_mask),
        ("packed, block-diagonal attention", cached, losses.packed),
        ("shuffled batches of a fixed count", unsorted, losses.own),
        ("no thread makes batches ahead", unthreaded, losses.own),
        ("gradients for the frozen weights", cached, _with_weight_gradients),
        ("activations checkpointed", cached, _checkpointed),
    ]
    return [Contestant(name=name, next_batch=batch, loss=loss) for name, batch, loss in rows]


def _our_batches(parts: Parts, ahead: int | None = None) -> TrainingBatches:
    made = TrainingBatches(
        parts.reader,
        parts.targets,
        parts.costs,
        budget=parts.budget,
        seed=0,
        num_batches=1_000_000,
        is_pinned=parts.device.type == "cuda",
    )
    made.num_ahead = batches_module.BATCHES_AHEAD if ahead is None else ahead
    return made


def _endless(batches: TrainingBatches) -> Callable[[], Batch]:
    numbers = iter(range(len(batches)))
    return lambda: batches[next(numbers)]


class _Live:
    """Batches with the encoder in the loop: the same as ours, or shuffled and of a fixed count."""

    def __init__(self, parts: Parts, *, is_shuffled: bool = False, is_cached: bool = False) -> None:
        self.parts, self.is_cached = parts, is_cached
        order = _our_batches(parts)
        if is_shuffled:
            count = round(statistics.mean(len(order.positions(n)) for n in range(8)))
            self._positions = _shuffled(len(parts.reader), count)
        else:
            self._positions = (order.positions(n) for n in range(1_000_000))

    def __call__(self) -> Batch:
        positions, parts = next(self._positions), self.parts
        batch = collate(parts.reader, parts.targets, positions)
        batch["num_tokens"] = int(parts.costs[positions].sum())
        batch["duration_s"] = sum(len(parts.recordings[p]) for p in positions) / 16_000
        if not self.is_cached:
            del batch["features"]
            values, mask = encoder_inputs(parts.feature_extractor, [parts.recordings[p] for p in positions])
            batch |= {"input_values": values, "attention_mask": mask}
        return batch


def _shuffled(num_utterances: int, count: int) -> Iterator[list[int]]:
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(num_utterances)
        for start in range(0, num_utterances - count + 1, count):
            yield [int(p) for p in order[start : start + count]]


def _with_weight_gradients(model: Any, batch: Batch) -> Tensor:
    """Forget to freeze the decoder: its gradients are computed and thrown away."""
    model.decoder.requires_grad_(True)
    return losses.one_chunk(model, batch)


def _checkpointed(model: Any, batch: Batch) -> Tensor:
    """Recompute activations in the backward pass."""
    model.checkpoint_activations()
    model.decoder.train()
    return losses.own(model, batch)


# ------------------------------------------------------------------------------------------- the race


class _Step:
    """A whole optimizer step for any contestant."""

    def __init__(self, parts: Parts) -> None:
        self.model, self.device = parts.model, parts.device
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.projector.parameters(), lr=1e-5, fused=fused)
        self.is_bf16 = self.device.type == "cuda"

    def __call__(self, contestant: Contestant, batch: Batch) -> None:
        batch = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16):
            if "input_values" in batch:
                encoded = self.model.encode(batch["input_values"], batch["attention_mask"])
                batch["features"], batch["num_frames"] = encoded
            loss = contestant.loss(self.model, batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.projector.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def restore(self) -> None:
        """Undo what a contestant has switched on."""
        decoder: Any = self.model.decoder
        decoder.zero_grad()
        decoder.requires_grad_(False)
        disable = getattr(decoder, "activation_checkpointing_disable", None) or decoder.gradient_checkpointing_disable
        disable()  # transformers 5.17 knows the second name only
        decoder.eval()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def count_flops(self, contestant: Contestant) -> float:
        """Count the arithmetic of one step of matrix products and attention."""
        batch = contestant.next_batch()
        with CountFlops() as counter:
            self(contestant, batch)
        self._counted = batch
        return float(counter.flops)

    def time_one(self, contestant: Contestant) -> float:
        """Time the step that was counted: the best of several."""
        times = []
        for _ in range(5):
            started = time.perf_counter()
            self(contestant, self._counted)
            self.wait()
            times.append(time.perf_counter() - started)
        return min(times)


def _race(contestants: list[Contestant], step: _Step, ours: TrainingBatches, turns: int) -> float:
    """Let all take turns; returns the share of our time that went into waiting for batches."""
    waited_s = busy_s = 0.0
    for turn in range(-1, turns):  # the first one warms up and measures memory
        for one in contestants:
            if turn < 0:
                batch = one.next_batch()
                with measuring_peak(step.device) as peak:
                    step(one, batch)
                one.peak_bytes = peak.size_bytes
                step(one, one.next_batch())
                step.restore()
                continue
            before, started = ours.waited_s, time.perf_counter()
            audio_s, tokens = _few_steps(one, step)
            seconds = time.perf_counter() - started
            one.speeds.append(audio_s / seconds)
            one.token_speeds.append(tokens / seconds)
            if one.name == OURS:
                waited_s, busy_s = waited_s + ours.waited_s - before, busy_s + seconds
            step.restore()
    return waited_s / busy_s


def _few_steps(one: Contestant, step: _Step) -> tuple[float, float]:
    audio_s = tokens = 0.0
    for _ in range(STEPS_A_TURN):
        batch = one.next_batch()
        audio_s, tokens = audio_s + batch["duration_s"], tokens + batch["num_tokens"]
        step(one, batch)
    step.wait()
    return audio_s, tokens


def _ratio(contestants: list[Contestant], name: str) -> float:
    """How many times as fast as another we are: the median over the turns."""
    other = next(one for one in contestants if one.name == name)
    return statistics.median(a / b for a, b in zip(contestants[0].speeds, other.speeds, strict=True))


# ------------------------------------------------------------------------------------------- memory and arithmetic


def loss_memory_vs_full(device: torch.device) -> float:
    """Compare the peak memory of our loss with that of full logits: SmolLM3's vocabulary, a quarter of labels."""
    return peak_loss_bytes(device, is_full=False) / peak_loss_bytes(device, is_full=True)


def peak_loss_bytes(device: torch.device, *, is_full: bool) -> int:
    """Measure a loss from hidden states to their gradient."""
    torch.manual_seed(0)
    head = nn.Linear(LOSS_WIDTH, VOCABULARY, bias=False).requires_grad_(False).to(device)
    hidden = torch.randn(LOSS_ROWS, LOSS_WIDTH, device=device, requires_grad=True)
    labels = torch.full((LOSS_ROWS,), IGNORED_LABEL, device=device)
    labels[:: LOSS_ROWS // LOSS_TARGETS] = 7
    with measuring_peak(device) as peak:
        if is_full:
            torch.autograd.backward(nn.functional.cross_entropy(head(hidden).float(), labels))
        else:
            is_target = labels != IGNORED_LABEL
            torch.autograd.backward(summed_cross_entropy(hidden[is_target], head, labels[is_target]))
    return peak.size_bytes


def _matmul_peak(device: torch.device) -> float:
    """Measure the floating-point operations per second of a large bf16 product: the best of ten."""
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return float(2 * MATMUL_SIZE**3 / best)


def format_table(result: dict[str, Any]) -> str:
    """Write the result as lines for people."""
    lines = [f"{'':<36}{'audio s/s':>11}{'tokens/s':>11}{'ours is':>10}{'peak MB':>10}"]
    for name, one in result["contestants"].items():
        ratio = "" if name == OURS else f"{one['ours_is_faster_by']:.2f}x"
        lines.append(
            f"{name:<36}{one['audio_seconds_per_second']:>11,.0f}{one['tokens_per_second']:>11,.0f}{ratio:>10}"
            f"{one['peak_bytes'] / 1e6:>10,.0f}"
        )
    share = result["matmul_share"]
    lines += [
        "",
        f"loss memory over full logits  {result['loss_memory_vs_full']:.3f}   at most 0.25",
        f"waiting for batches           {100 * result['loader_share']:.2f} %  at most 2 %",
        f"share of the matmul peak      {'not measured without a GPU' if share is None else f'{100 * share:.1f} %'}",
        f"device {result['device']}, load average {result['load_average']:.1f}, memory beyond weights and inputs",
    ]
    return "\n".join(lines)
