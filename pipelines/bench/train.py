"""How fast stage two is, and what each saving is worth: contestants side by side in one run.

Every contestant takes whole optimizer steps on the same models and recordings, a few at a time, turn by turn, so that
other work on the machine hits all alike; a ratio is the median over the turns. What is compared is seconds of audio
trained on per second, since batches differ.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.bench.memory import CountFlops, measuring_peak
from pipelines.bench.models import Parts, build_parts
from pipelines.bench.store_contestants import drop_from_page_cache
from pipelines.bench.train_contestants import LIVE, OURS, PLAIN, Batch, Contestant, contestants, our_batches
from pipelines.encoders import pick_device
from pipelines.errors import RunError
from tinyaudio.model.loss import summed_cross_entropy
from tinyaudio.model.modeling_tinyaudio import IGNORED_LABEL

TURNS, STEPS_A_TURN = 5, 3
LOADER_STEPS = 32  # in one stretch, for the share of waiting
VOCABULARY, LOSS_ROWS, LOSS_TARGETS, LOSS_WIDTH = 128_256, 1536, 384, 64
MATMUL_SIZE = 8192  # of the product whose speed is taken for the device's best


def bench_train(*, full_size: bool = False, device: str = "auto", turns: int = TURNS) -> dict[str, Any]:
    """Measure training steps.

    Args:
        full_size: HuBERT-large and SmolLM3-3B shapes at random weights; wants a GPU.
        turns: of a few steps for each contestant.

    Returns:
        `vs_plain`, `vs_live`: our audio seconds per second over theirs, None where they do not fit into the GPU.
        `loss_memory_vs_full`: peak memory of our loss over that of full logits. `loader_share`: of our step time,
        waiting for batches, from a cold store. `matmul_share`: of the measured matmul peak, None without a GPU.
        `peak_bytes`: of our step, beyond the weights; `total_bytes`: with them. `contestants`: by name.

    Raises:
        RunError: our own step does not fit into the GPU.
    """
    where = pick_device(device)
    with tempfile.TemporaryDirectory(prefix="bench-train-", dir=Path.cwd()) as folder:
        parts = build_parts(Path(folder), full_size=full_size, device=where)
        step = _Step(parts)
        competing = contestants(parts)
        _race(competing, step, turns)
        ours = competing[0]
        loader_share = _loader_share(ours, step, parts)
        flops, seconds = step.count_flops(ours), step.time_one(ours)
    by_name = {one.name: one.to_dict(ours) for one in competing}
    return {
        "vs_plain": by_name[PLAIN]["ours_is_faster_by"],
        "vs_live": by_name[LIVE]["ours_is_faster_by"],
        "loss_memory_vs_full": loss_memory_vs_full(where),
        "loader_share": loader_share,
        "matmul_share": flops / seconds / _matmul_peak(where) if where.type == "cuda" else None,
        "peak_bytes": ours.peak_bytes,
        "total_bytes": ours.total_bytes,
        "contestants": by_name,
        "device": where.type,
        "full_size": full_size,
        "tflops_per_step": flops / 1e12,
        "load_average": os.getloadavg()[0],
    }


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
        """Undo what a contestant has switched on, and let go of what it has left."""
        self.optimizer.zero_grad()
        decoder: Any = self.model.decoder
        decoder.zero_grad()
        decoder.requires_grad_(False)
        disable = getattr(decoder, "activation_checkpointing_disable", None) or decoder.gradient_checkpointing_disable
        disable()  # transformers 5.17 knows the second name only
        decoder.eval()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def weight_bytes(self, contestant: Contestant) -> int:
        """Add up the weights that a contestant needs, and the optimizer's two values for each of the projector's."""
        model: Any = self.model
        needed = [model.projector, model.decoder, *([model.encoder] if contestant.needs_encoder else [])]
        weights = {weight for part in needed for weight in part.parameters()}
        trained = sum(weight.nbytes for weight in model.projector.parameters())
        return sum(weight.nbytes for weight in weights) + 2 * trained

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


def _race(contestants: list[Contestant], step: _Step, turns: int) -> None:
    """Warm all up and measure their memory, then let them take turns.

    Raises:
        RunError: the first of them does not fit into the GPU.
    """
    for one in contestants:
        _begin(one, step)
    if not contestants[0].fits:
        raise RunError("this stage two does not fit into the GPU's memory; expected some 21 GB free at full size")
    for _ in range(turns):
        for one in (one for one in contestants if one.fits):
            started = time.perf_counter()
            audio_s, tokens = _few_steps(one, step)
            seconds = time.perf_counter() - started
            one.speeds.append(audio_s / seconds)
            one.token_speeds.append(tokens / seconds)
            step.restore()


def _begin(one: Contestant, step: _Step) -> None:
    """Warm up, and measure memory; who does not fit is out."""
    try:
        batch = one.next_batch()
        step(one, batch)  # what is compiled is compiled here
        with measuring_peak(step.device) as peak:
            step(one, batch)
        step(one, one.next_batch())
    except torch.OutOfMemoryError:
        one.fits = False
    else:
        one.peak_bytes = peak.size_bytes
        one.total_bytes = peak.size_bytes + step.weight_bytes(one)
    step.restore()


def _few_steps(one: Contestant, step: _Step) -> tuple[float, float]:
    audio_s = tokens = 0.0
    for _ in range(STEPS_A_TURN):
        batch = one.next_batch()
        audio_s, tokens = audio_s + batch["duration_s"], tokens + batch["num_tokens"]
        step(one, batch)
    step.wait()
    return audio_s, tokens


def _loader_share(ours: Contestant, step: _Step, parts: Parts) -> float:
    """Measure the share of our time spent waiting for batches: a stretch of steps that begins with a cold store."""
    drop_from_page_cache([path for path in parts.reader.store.path.rglob("c.*") if path.is_file()])
    parts.reader.clear()
    batches, started = our_batches(parts, parts.reader), time.perf_counter()
    for number in range(LOADER_STEPS):
        step(ours, batches[number])
    step.wait()
    return batches.waited_s / (time.perf_counter() - started)


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
    lines = [f"{'':<36}{'audio s/s':>11}{'tokens/s':>11}{'ours is':>10}{'peak MB':>10}{'with weights':>14}"]
    for name, one in result["contestants"].items():
        if not one["fits"]:
            lines.append(f"{name:<36}{'does not fit':>22}")
            continue
        ratio = "" if name == OURS else f"{one['ours_is_faster_by']:.2f}x"
        lines.append(
            f"{name:<36}{one['audio_seconds_per_second']:>11,.0f}{one['tokens_per_second']:>11,.0f}{ratio:>10}"
            f"{one['peak_bytes'] / 1e6:>10,.0f}{one['total_bytes'] / 1e6:>14,.0f}"
        )
    share = result["matmul_share"]
    lines += [
        "",
        f"loss memory over full logits  {result['loss_memory_vs_full']:.3f}   at most 0.25",
        f"waiting for batches           {100 * result['loader_share']:.2f} %  at most 2 %",
        f"share of the matmul peak      {'not measured without a GPU' if share is None else f'{100 * share:.1f} %'}",
        f"waiting: over {LOADER_STEPS} steps from a cold store; peak: beyond weights and inputs",
        f"device {result['device']}, load average {result['load_average']:.1f}",
    ]
    return "\n".join(lines)
