"""`bench train`: both ways to compute the loss agree, and its meters count correctly."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from pipelines.bench import train as bench_train
from pipelines.bench.memory import CountFlops, measuring_peak
from pipelines.bench.train import LIVE, OURS, PLAIN, Contestant
from pipelines.errors import RunError
from tinyaudio.model import ctc
from tinyaudio.model.prompt import transcript_ids

CPU = torch.device("cpu")
TRANSCRIPTS = ["the cat sat", "", "a dog", "on the mat"]


@pytest.fixture
def batch(model, processor, noise, tokenizer):
    features, num_frames = model.encode(**processor([noise(s) for s in (1.0, 0.31, 0.01, 2.2)]))
    rows = [torch.tensor(transcript_ids(tokenizer, text)) for text in TRANSCRIPTS]
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return {"features": features.detach(), "num_frames": num_frames, "labels": labels}


def one_by_one(model, batch):
    """Reference: every utterance by itself, without any padding."""
    total, count = 0.0, 0
    for i, frames in enumerate(batch["num_frames"].tolist()):
        labels = batch["labels"][i][batch["labels"][i] != -100][None]
        alone = {"features": batch["features"][i : i + 1, :frames], "num_frames": batch["num_frames"][i : i + 1]}
        total = total + bench_train.our_loss(model, {**alone, "labels": labels}) * labels.numel()
        count += labels.numel()
    return total / count


@pytest.mark.parametrize("loss", [bench_train.our_loss, bench_train.plain_loss])
def test_unmasked_and_masked_batches_equal_single_utterances(model, batch, loss):
    def value_and_gradient(way):
        model.projector.zero_grad()
        value = way(model, batch)
        value.backward()
        return value.detach(), [p.grad.clone() for p in model.projector.parameters()]

    expected, gradients = value_and_gradient(one_by_one)
    found, others = value_and_gradient(loss)
    assert abs(found - expected) < 1e-5
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(gradients, others, strict=True))


@pytest.mark.parametrize("loss", [bench_train.our_loss, bench_train.plain_loss])
def test_a_step_in_bfloat16_trains_the_projector_in_float32(model, batch, loss):
    """As on a GPU, here by the autocast of a CPU."""
    dtypes = []
    layer = model.decoder.model.layers[0].mlp
    hook = layer.register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
    step = bench_train.Step(SimpleNamespace(model=model, device=CPU), is_bf16=True)
    before = [weight.clone() for weight in model.projector.parameters()]
    step(Contestant(name="one", next_batch=lambda: batch, loss=loss), batch, waits=True)
    hook.remove()
    assert all(weight.dtype == torch.float32 for weight in model.projector.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.projector.parameters(), strict=True))
    assert set(dtypes) == {torch.bfloat16}


def test_peak_counts_what_lives_at_the_same_time():
    with measuring_peak(CPU) as peak:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100) * 2
        del b, c
        torch.ones(1000)
    assert peak.size_bytes == 2 * 4000


def test_flops_are_those_of_the_products():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    with CountFlops() as counter:
        (a @ b).sum().backward()
    assert counter.flops == 2 * 2 * 3 * 5 * 7  # forward, and backward to a alone


@pytest.mark.parametrize("num_key_heads", [16, 4])
def test_flops_of_attention_with_fewer_heads_of_keys_are_those_of_all_heads(monkeypatch, num_key_heads):
    """As SmolLM3 reaches the kernels of CUDA, on which torch 2.11's formulas assert equal heads."""
    forward, backward = (
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{name}") for name in ("", "_backward")
    )

    def strict(formula):
        def count(*args, out_val=None, **kwargs):
            shapes = [arg.shape for arg in args if isinstance(arg, torch.Tensor) and arg.ndim == 4]
            assert len({shape[1] for shape in shapes}) == 1
            return formula(*args, out_val=out_val, **kwargs)

        return count

    for packet in (forward, backward):
        monkeypatch.setitem(flop_registry, packet, strict(flop_registry[packet]))
    query = torch.empty(2, 16, 32, 64, dtype=torch.bfloat16, device="meta")
    key, value = (torch.empty(2, num_key_heads, 32, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with CountFlops() as counter:
        output, logsumexp, *rest = forward(query, key, value, 0.0, True)
        assert counter.flops == 2 * 2 * (2 * 16) * 32 * 32 * 64
        backward(output, query, key, value, output, logsumexp, *rest[:4], 0.0, True, *rest[4:6])
    assert counter.flops == 7 * 2 * (2 * 16) * 32 * 32 * 64


def test_loss_part_takes_at_most_a_quarter_of_the_memory_of_full_logits():
    assert bench_train.loss_memory_vs_full(CPU) <= 0.25


def test_the_ctc_loss_does_not_keep_the_scores_of_all_classes(monkeypatch):
    monkeypatch.setattr(bench_train, "VOCABULARY", 2**14)
    monkeypatch.setattr(ctc, "BLOCK_ENTRIES", 2**20)
    assert bench_train.peak_ctc_bytes(CPU, is_full=False) <= 0.15 * bench_train.peak_ctc_bytes(CPU, is_full=True)


class FakeStep:
    """Steps that take no time and no memory."""

    device = CPU

    def __call__(self, contestant, batch, waits=False):
        contestant.loss(None, batch)

    def weight_bytes(self, contestant):
        return 1000

    def free(self):
        pass


def too_large(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_contestant_that_does_not_fit_is_reported_and_stops_no_other():
    def next_batch():
        return {"duration_s": 1.0, "num_tokens": 10}

    ours = Contestant(name=OURS, next_batch=next_batch, loss=lambda *_: torch.zeros(1))
    plain = Contestant(name=PLAIN, next_batch=next_batch, loss=too_large)
    found = bench_train.compete([ours, plain], FakeStep(), turns=2)
    assert found[OURS]["fits"] is True
    assert found[OURS]["ours_is_faster_by"] == 1
    assert found[OURS]["audio_seconds_per_second"] == pytest.approx(found[OURS]["tokens_per_second"] / 10)
    assert found[OURS]["total_bytes"] == found[OURS]["peak_bytes"] + 1000
    assert found[PLAIN] == dict.fromkeys(found[OURS], None) | {"fits": False}
    with pytest.raises(RunError, match=r"stage two does not fit"):
        bench_train.compete([plain], FakeStep(), turns=2)


@pytest.mark.slow
def test_bench_train_reaches_its_ratios_on_the_bundled_models(tmp_path):
    command = [sys.executable, "-m", "tinyaudio", "bench", "train", "--json", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["vs_plain"] >= 2
    assert result["vs_live"] >= 1.3
    assert result["loss_memory_vs_full"] <= 0.25
    assert result["ctc_memory_vs_full"] <= 0.25
    assert result["ctc_peak_bytes"] <= 300e6
    assert result["loader_share"] <= 0.02
    assert result["matmul_share"] is None
    assert 0 < result["peak_bytes"] < result["total_bytes"]
    assert result["contestants"].keys() == {OURS, LIVE, PLAIN}
    assert all(name in done.stdout for name in result)
