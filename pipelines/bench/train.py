"""How fast stage two is, beside the encoder in the loop and a plain transformers loop, in one run.

Every contestant takes whole optimizer steps on the same models and recordings, a few at a time, in turns. What is
compared is seconds of audio trained on per second, since batches differ. The encoder in the loop gets our batches, our
loss and a thread that prepares its audio and labels. The plain loop prepares what it needs when it needs it, as a
DataLoader without workers does.
"""

import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.bench.memory import CountFlops, matmul_peak, measuring_peak
from pipelines.bench.models import Parts, build_parts
from pipelines.bench.race import median_ratio, race, seconds
from pipelines.bench.store import drop_from_page_cache
from pipelines.encoders import pick_device
from pipelines.errors import RunError
from pipelines.train.batches import BATCHES_AHEAD, TrainingBatches, pad_labels
from tinyaudio.model.audio import SAMPLING_RATE
from tinyaudio.model.ctc import TokenCTC
from tinyaudio.model.encoder import encoder_inputs
from tinyaudio.model.frozen import place
from tinyaudio.model.loss import summed_cross_entropy
from tinyaudio.model.modeling_tinyaudio import IGNORED_LABEL, TinyAudioForConditionalGeneration
from tinyaudio.model.prompt import assemble, pad_right

OURS, LIVE, PLAIN = "this stage two", "encoder in the loop", "plain transformers loop"
TURNS, STEPS_A_TURN = 5, 3
LOADER_STEPS = 32  # in one stretch, for the share of waiting
VOCABULARY, LOSS_ROWS, LOSS_TARGETS, LOSS_WIDTH = 128_256, 1536, 384, 64
CTC_ROWS, CTC_FRAMES, CTC_TOKENS = 16, 64, 20  # projected frames and tokens of a row

NOTES = {
    "vs_plain": "times as much audio per second as a plain loop",
    "vs_live": "times as much audio per second as with the encoder in the loop",
    "loss_memory_vs_full": "at most 0.25",
    "ctc_step_share": "time of a step on the CTC loss alone over one through the decoder",
    "ctc_memory_vs_full": f"peak memory of the CTC loss over {VOCABULARY:,} classes, over that with all its logits",
    "ctc_peak_bytes": f"of the CTC loss for 4,096 projected frames and {VOCABULARY:,} classes",
    "loader_share": f"at most 0.02: waiting for batches, over {LOADER_STEPS} steps from a cold store",
    "matmul_share": "of the device's matmul peak; not measured without a GPU",
    "peak_bytes": "beyond weights and inputs",
    "total_bytes": "with weights and optimizer",
}

Batch = dict[str, Any]


@dataclass(kw_only=True)
class Contestant:
    """One way to train."""

    name: str
    next_batch: Callable[[], Batch]
    loss: Callable[[TinyAudioForConditionalGeneration, Batch], Tensor]  # mean, in nats per target token
    needs_encoder: bool = False
    peak_bytes: int | None = None  # beyond the weights; None: does not fit into the GPU's memory
    total_bytes: int | None = None  # with the weights that it needs, and the optimizer's state


def bench_train(
    *,
    full_size: bool = False,
    device: str = "auto",
    turns: int = TURNS,
    on_race: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure training steps.

    Args:
        on_race: called with `contestants` before anything else is measured, so that a later failure does not lose them.
        full_size: HuBERT-large and SmolLM3-3B shapes at random weights; requires a GPU.

    Returns:
        `vs_plain`, `vs_live`: our audio seconds per second over theirs, None where they do not fit into the GPU.
        `loss_memory_vs_full`: peak memory of our loss over that of full logits. `ctc_step_share`: time of a step on the
        CTC loss alone over that of a whole step. `ctc_memory_vs_full`: peak memory of the CTC loss over that with the
        logits of all classes; `ctc_peak_bytes`: its peak for 4,096 projected frames. `loader_share`: fraction of our
        step time spent waiting for batches, from a cold store. `matmul_share`: fraction of the measured matmul peak,
        None without a GPU. `peak_bytes`: of our step, beyond the weights; `total_bytes`: with them. `contestants`: by
        name. Then `device`, `full_size`, `tflops_per_step`, `load_average`.

    Raises:
        RunError: our own step does not fit into the GPU.
    """
    where = pick_device(device)
    with tempfile.TemporaryDirectory(prefix="bench-train-", dir=Path.cwd()) as folder:
        parts = build_parts(Path(folder), full_size=full_size, device=where)
        step, found = Step(parts), contestants(parts)
        by_name, ours = compete(found, step, turns), found[0]
        on_race(by_name)
        loader_share = _loader_share(ours, step, parts)
        batch = ours.next_batch()
        with CountFlops() as counter:
            step(ours, batch)
        fastest_s = min(seconds(lambda: step(ours, batch, waits=True)) for _ in range(5))
        ctc_step_share = _ctc_step_share(ours, step, parts)
    return {
        "vs_plain": by_name[PLAIN]["ours_is_faster_by"],
        "vs_live": by_name[LIVE]["ours_is_faster_by"],
        "loss_memory_vs_full": loss_memory_vs_full(where),
        "ctc_step_share": ctc_step_share,
        "ctc_memory_vs_full": peak_ctc_bytes(where, is_full=False) / peak_ctc_bytes(where, is_full=True),
        "ctc_peak_bytes": peak_ctc_bytes(where, is_full=False, num_rows=4096 // CTC_FRAMES),
        "loader_share": loader_share,
        "matmul_share": counter.flops / fastest_s / matmul_peak(where) if where.type == "cuda" else None,
        "peak_bytes": ours.peak_bytes,
        "total_bytes": ours.total_bytes,
        "contestants": by_name,
        "device": where.type,
        "full_size": full_size,
        "tflops_per_step": counter.flops / 1e12,
        "load_average": os.getloadavg()[0],
    }


def contestants(parts: Parts) -> list[Contestant]:
    """Set up the three contestants, ours first."""
    ours = our_batches(parts)
    planned = (ours.positions(number) for number in range(len(ours)))
    live, plain = _audio_batches(parts, planned, BATCHES_AHEAD), _audio_batches(parts, _shuffled(parts), 0)
    return [
        Contestant(name=OURS, next_batch=map(ours.__getitem__, range(len(ours))).__next__, loss=our_loss),
        Contestant(name=LIVE, next_batch=live.__next__, loss=our_loss, needs_encoder=True),
        Contestant(name=PLAIN, next_batch=plain.__next__, loss=plain_loss, needs_encoder=True),
    ]


def our_batches(parts: Parts) -> TrainingBatches:
    """Plan a million batches as stage two does."""
    is_pinned = parts.device.type == "cuda"
    settings: dict[str, Any] = {"budget": parts.budget, "seed": 0, "num_batches": 1_000_000, "is_pinned": is_pinned}
    return TrainingBatches(parts.reader, parts.targets, parts.costs, **settings)


def _shuffled(parts: Parts) -> Iterator[list[int]]:
    """Draw batches of a fixed number of utterances, the mean of ours."""
    ours = our_batches(parts)
    count = round(statistics.mean(len(ours.positions(number)) for number in range(8)))
    random = np.random.default_rng(0)
    while True:
        permutation = random.permutation(len(parts.reader))
        for start in range(0, len(permutation) - count + 1, count):
            yield [int(position) for position in permutation[start : start + count]]


def _audio_batches(parts: Parts, positions: Iterator[list[int]], num_ahead: int) -> Iterator[Batch]:
    """Yield batches of audio for an encoder in the loop, made by a thread, `num_ahead` of them in advance."""

    def make(chosen: list[int]) -> Batch:
        recordings = [parts.recordings[position] for position in chosen]
        values, mask = encoder_inputs(parts.feature_extractor, recordings)
        labels, lengths = pad_labels(parts.targets, chosen)
        batch = {"input_values": values, "attention_mask": mask, "labels": labels}
        if num_ahead and parts.device.type == "cuda":
            batch = {key: value.pin_memory() for key, value in batch.items()}
        return {
            **batch,
            "host_counts": (parts.reader.num_frames[chosen].tolist(), lengths),
            "num_tokens": int(parts.costs[chosen].sum()),
            "duration_s": sum(map(len, recordings)) / SAMPLING_RATE,
        }

    waiting: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(1) as pool:
        while True:
            while len(waiting) <= num_ahead:
                waiting.append(pool.submit(make, next(positions)))
            yield waiting.popleft().result()


def our_loss(model: TinyAudioForConditionalGeneration, batch: Batch, **options: Any) -> Tensor:
    """Compute the model's own loss: logits at label positions only, in chunks; right padding without a mask."""
    names = ("features", "num_frames", "labels", "host_counts")
    loss = model(**{name: batch.get(name) for name in names}, **options).loss
    assert loss is not None
    return loss


def plain_loss(model: TinyAudioForConditionalGeneration, batch: Batch) -> Tensor:
    """Compute the same loss as a plain transformers loop does: padded, masked, labels passed to the decoder."""
    projected, lengths = model.project(batch["features"], batch["num_frames"])
    embed, config, decoder = model.get_input_embeddings(), model.config, model.decoder
    prefix, suffix = (
        embed(torch.tensor(ids, device=projected.device))
        for ids in (config.prompt_prefix_ids, config.prompt_suffix_ids)
    )
    targets = [row[row != IGNORED_LABEL] for row in batch["labels"]]
    rows = assemble(prefix, projected, lengths, suffix, [embed(ids) for ids in targets])
    labels = batch["labels"].new_full((len(rows), max(map(len, rows))), IGNORED_LABEL)
    mask = torch.zeros_like(labels)
    for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
        labels[i, len(row) - len(target) : len(row)] = target
        mask[i, : len(row)] = 1
    loss: Tensor = decoder(inputs_embeds=pad_right(rows), attention_mask=mask, labels=labels).loss
    return loss


class Step:
    """A whole optimizer step for any contestant, in bfloat16 on a GPU."""

    def __init__(self, parts: Parts, *, is_bf16: bool | None = None) -> None:
        self.model, self.device = parts.model, parts.device
        self.is_gpu = self.device.type == "cuda"
        self.is_bf16 = self.is_gpu if is_bf16 is None else is_bf16
        self.optimizer = torch.optim.AdamW(self.model.projector.parameters(), lr=1e-5, fused=self.is_gpu)

    def __call__(self, contestant: Contestant, batch: Batch, waits: bool = False) -> None:
        """Take the step; `waits`: until the device has done it."""
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
        if waits and self.is_gpu:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Free what a contestant has left on the GPU."""
        self.optimizer.zero_grad()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def weight_bytes(self, contestant: Contestant) -> int:
        """Add up the weights that a contestant needs, and the optimizer's two values for each of the projector's."""
        model: Any = self.model
        needed = [model.projector, model.decoder, *([model.encoder] if contestant.needs_encoder else [])]
        weights = {weight for part in needed for weight in part.parameters()}
        trained = sum(weight.nbytes for weight in model.projector.parameters())
        return sum(weight.nbytes for weight in weights) + 2 * trained


def compete(found: list[Contestant], step: Step, turns: int) -> dict[str, dict[str, Any]]:
    """Warm all contestants up, measure their memory, then let those that fit take turns; errors as `bench_train`.

    Returns:
        By name: `fits` (into the GPU's memory), and if so `audio_seconds_per_second`, `tokens_per_second` (medians),
        `ours_is_faster_by` (median ratio to the first contestant), `peak_bytes`, `total_bytes`; else None for each.
    """
    for one in found:
        try:
            batch = one.next_batch()
            step(one, batch)
            with measuring_peak(step.device) as peak:
                step(one, batch)
            step(one, one.next_batch())
        except torch.OutOfMemoryError:
            pass
        else:
            one.peak_bytes, one.total_bytes = peak.size_bytes, peak.size_bytes + step.weight_bytes(one)
        step.free()
    ours = found[0]
    if ours.peak_bytes is None:
        raise RunError("stage two does not fit into the GPU's memory. Full size needs about 21 GB of free memory.")

    def take_turn(one: Contestant) -> tuple[float, float]:
        started, audio_s, tokens = time.perf_counter(), 0.0, 0
        for number in range(1, STEPS_A_TURN + 1):
            batch = one.next_batch()
            audio_s, tokens = audio_s + batch["duration_s"], tokens + batch["num_tokens"]
            step(one, batch, waits=number == STEPS_A_TURN)
        took_s = time.perf_counter() - started
        step.free()
        return audio_s / took_s, tokens / took_s

    racing = {one.name: partial(take_turn, one) for one in found if one.peak_bytes is not None}
    speeds = {name: list(zip(*pairs, strict=True)) for name, pairs in race(racing, turns).items()}
    by_name = {}
    for one in found:
        audio, tokens = speeds.get(one.name, (None, None))
        by_name[one.name] = {
            "fits": audio is not None,
            "audio_seconds_per_second": statistics.median(audio) if audio else None,
            "tokens_per_second": statistics.median(tokens) if tokens else None,
            "ours_is_faster_by": median_ratio(speeds[ours.name][0], audio) if audio else None,
            "peak_bytes": one.peak_bytes,
            "total_bytes": one.total_bytes,
        }
    return by_name


def _loader_share(ours: Contestant, step: Step, parts: Parts) -> float:
    """Measure the fraction of our time spent waiting for batches, over a stretch of steps from a cold store."""
    drop_from_page_cache([path for path in parts.reader.store.path.rglob("c.*") if path.is_file()])
    parts.reader.clear()
    batches, started = our_batches(parts), time.perf_counter()
    for number in range(LOADER_STEPS):
        step(ours, batches[number], waits=number == LOADER_STEPS - 1)
    return batches.waited_s / (time.perf_counter() - started)


def _ctc_step_share(ours: Contestant, step: Step, parts: Parts) -> float:
    """Measure a step on the CTC loss over the tokens of the transcripts beside one through the decoder, in turns."""
    tokens = np.unique(parts.targets.ids).astype(np.int64)
    parts.model.add_token_ctc(torch.from_numpy(tokens[tokens != parts.model.config.eos_token_id]))
    ctc_loss = partial(our_loss, is_ctc_only=True)
    ctc, batch = Contestant(name="CTC alone", next_batch=ours.next_batch, loss=ctc_loss), ours.next_batch()
    step(ctc, batch)
    ways = {one.name: partial(seconds, partial(step, one, batch, True)) for one in (ctc, ours)}
    took = race(ways, TURNS)
    return median_ratio(took[ctc.name], took[ours.name])


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


def peak_ctc_bytes(device: torch.device, *, is_full: bool, num_rows: int = CTC_ROWS) -> int:
    """Measure the CTC loss over all tokens of SmolLM3's vocabulary, from projected frames to their gradient."""
    torch.manual_seed(0)
    embeddings = torch.randn(VOCABULARY, LOSS_WIDTH, device=device)
    head = place(TokenCTC(VOCABULARY, LOSS_WIDTH), device)
    projected = torch.randn(num_rows, CTC_FRAMES, LOSS_WIDTH, device=device, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (num_rows, CTC_TOKENS), device=device)
    lengths, num_tokens = [CTC_FRAMES] * num_rows, [CTC_TOKENS] * num_rows
    head.best_path(projected[:1], torch.tensor(lengths[:1]), embeddings)  # keeps the class vectors
    with measuring_peak(device) as peak:
        if is_full:
            vectors = torch.cat([head.blank[None], nn.functional.normalize(embeddings, dim=-1)])
            scores = nn.functional.normalize(projected, dim=-1) @ vectors.T * head.log_scale.exp() + head.bias
            by_frame = scores.log_softmax(-1).transpose(0, 1)
            loss = nn.functional.ctc_loss(by_frame, labels + 1, torch.tensor(lengths), torch.tensor(num_tokens))
        else:
            loss, _ = head.loss(projected, lengths, labels, num_tokens, embeddings)
        torch.autograd.backward(loss)
    return peak.size_bytes
