"""The loss through a frozen head: equal to full logits in value and gradient, without ever holding them."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from pipelines.bench.memory import measuring_peak
from tinyaudio.model.loss import summed_cross_entropy


def parts(rows: int, width: int, vocabulary: int):
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    return hidden, head, torch.randint(0, vocabulary, (rows,))


@pytest.mark.parametrize("chunk_rows", [1, 7, 60, 1000, None])
def test_chunked_loss_equals_full_logits_in_value_and_gradient(chunk_rows):
    hidden, head, targets = parts(60, 32, 500)
    full = cross_entropy(head(hidden), targets, reduction="sum") / 60
    (expected,) = torch.autograd.grad(full, hidden)
    loss = summed_cross_entropy(hidden, head, targets, chunk_rows) / 60
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert abs(loss - full) < 1e-5
    assert (gradient - expected).abs().max() < 1e-5


def test_loss_without_gradient_is_the_same_value():
    hidden, head, targets = parts(30, 16, 100)
    expected = summed_cross_entropy(hidden, head, targets, 8)
    assert expected.requires_grad
    with torch.no_grad():
        assert torch.equal(summed_cross_entropy(hidden, head, targets, 8), expected.detach())
    assert not summed_cross_entropy(hidden.detach(), head, targets, 8).requires_grad


def test_a_step_whose_counts_are_known_asks_the_device_for_nothing(model, processor, noise, tokenizer):
    """On the meta device there is nothing to ask for: reading any value, or picking by a mask, is an error."""
    features, num_frames = model.encode(**processor([noise(s) for s in (1.0, 0.31, 2.2)]))
    labels = torch.tensor([[5, 6, 0], [7, 0, -100], [0, -100, -100]])
    batch = {"features": features.detach(), "num_frames": num_frames, "labels": labels}
    counts = (num_frames.tolist(), [3, 2, 1])
    assert torch.equal(model(**batch).loss, model(**batch, host_counts=counts).loss)
    far = {name: value.to("meta") for name, value in batch.items()}
    output = model.to("meta").train()(**far, host_counts=counts, num_items_in_batch=6)
    output.loss.backward()
    assert output.projected_rms.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        model(**far, num_items_in_batch=6)


def test_the_first_step_makes_no_copy_of_the_embeddings(model, processor, noise):
    """In float32 and squared they are 2.1 GB at SmolLM3's size."""
    model.decoder.resize_token_embeddings(50_000)
    features, num_frames = model.encode(**processor([noise(1.0)]))
    embeddings = model.get_input_embeddings().weight
    labels = torch.tensor([[5, 6, 0]])
    with measuring_peak(torch.device("cpu")) as peak:
        output = model(features=features, num_frames=num_frames, labels=labels, host_counts=(num_frames.tolist(), [3]))
        first = peak.size_bytes
    with measuring_peak(torch.device("cpu")) as peak:
        model(features=features, num_frames=num_frames, labels=labels, host_counts=(num_frames.tolist(), [3]))
    assert first < peak.size_bytes + embeddings.nbytes / 8
    projected, _ = model.project(features, num_frames)
    expected = projected.float().square().mean().sqrt() / embeddings.float().square().mean().sqrt()
    assert output.projected_rms.item() == pytest.approx(expected.item(), rel=1e-4)


def test_head_that_is_not_linear_works_too():
    hidden, linear, targets = parts(20, 16, 50)
    head = torch.nn.Sequential(linear, torch.nn.Tanh())
    assert (
        abs(summed_cross_entropy(hidden, head, targets, 3) - cross_entropy(head(hidden), targets, reduction="sum"))
        < 1e-4
    )
