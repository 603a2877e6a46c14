"""Cross-entropy through a frozen head, a few rows of logits at a time.

A row of SmolLM3's logits has 128,256 entries, 513 kB in float32. For every position of a batch of 4,096 that would be
2.1 GB, the same again for their gradient, and again in half precision. Here each chunk's gradient with respect to the
hidden states is computed right after its loss, and its logits are freed. This is enough because the head is frozen; the
arithmetic is the same, and none of it is done twice. Shape letters as in `modeling_tinyaudio`.

Source: the idea is Liger Kernel's fused linear cross-entropy (github.com/linkedin/Liger-Kernel), here in plain PyTorch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import ModelError

# Logits in memory at once: 2**25 entries are 134 MB in float32, 261 rows of 128,256. Smaller would starve a GPU (the
# product is 261 x 2048 x 128,256, still bound by arithmetic on an A100); larger saves too little on a small batch.
CHUNK_ENTRIES = 2**25


def summed_cross_entropy(hidden: Tensor, head: nn.Module, targets: Tensor, chunk_rows: int | None = None) -> Tensor:
    """Sum the cross-entropy of targets, in nats.

    Args:
        hidden: (N, H), the hidden states that predict the targets.
        head: frozen; (n, H) to (n, V).
        targets: (N,) int64.
        chunk_rows: rows of logits computed at once; None for `CHUNK_ENTRIES` over V.

    Returns:
        Scalar float32. Its gradient reaches `hidden` only.
    """
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_ENTRIES // _vocabulary(head, hidden))
    total: Tensor = _ChunkedCrossEntropy.apply(hidden, head, targets, chunk_rows)  # type: ignore[no-untyped-call]
    return total


class AdjustedHead(nn.Module):
    """A head, and what some decoders do to its logits: Gemma 2 caps them, Cohere and Granite scale them."""

    def __init__(self, linear: nn.Module, scale: float, cap: float | None) -> None:
        super().__init__()
        self.linear, self.scale, self.cap = linear, scale, cap

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.linear(hidden) * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def head_of(decoder: PreTrainedModel) -> nn.Module:
    """Return the head of a decoder, which gives the logits that its own forward gives."""
    config = decoder.config.get_text_config()
    linear: nn.Module = decoder.get_output_embeddings()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return linear if scale == 1.0 and cap is None else AdjustedHead(linear, scale, cap)


@torch.no_grad()
def check_head(decoder: PreTrainedModel) -> None:
    """Check that `head_of` gives the logits that a decoder generates with; else training would learn another loss.

    Raises:
        ModelError: it does not.
    """
    hidden = decoder.get_decoder()(torch.tensor([[0, 1]], device=decoder.device), use_cache=False).last_hidden_state
    expected = decoder(torch.tensor([[0, 1]], device=decoder.device), use_cache=False).logits.float()
    error = (head_of(decoder)(hidden).float() - expected).abs().max()
    if not error <= 0.01 * expected.abs().max():
        raise ModelError(
            f"expected a decoder whose logits are its head's, found other ones in {decoder.config.model_type!r}. "
            "Try another decoder.id"
        )


@torch.no_grad()
def target_log_probs(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Compute the log-probability of each target, (N,) float32, in nats; arguments as `summed_cross_entropy`."""
    chunk_rows = max(1, CHUNK_ENTRIES // _vocabulary(head, hidden))
    chunks = zip(torch.split(hidden, chunk_rows), torch.split(targets, chunk_rows), strict=True)
    losses = [nn.functional.cross_entropy(head(rows).float(), wanted, reduction="none") for rows, wanted in chunks]
    return -torch.cat(losses)


def _vocabulary(head: nn.Module, hidden: Tensor) -> int:
    if isinstance(head, nn.Linear):
        return head.out_features
    with torch.no_grad():
        return int(head(hidden[:1]).shape[-1])


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Module, targets: Tensor, chunk_rows: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_gradient = hidden.requires_grad
        gradient = torch.empty_like(hidden) if wants_gradient else None
        for start in range(0, len(hidden), chunk_rows):
            chunk = hidden[start : start + chunk_rows].detach().requires_grad_(wants_gradient)
            with torch.set_grad_enabled(wants_gradient):
                logits = head(chunk).float()
                loss = nn.functional.cross_entropy(logits, targets[start : start + chunk_rows], reduction="sum")
            del logits
            if gradient is not None:
                (gradient[start : start + chunk_rows],) = torch.autograd.grad(loss, chunk)
            total += loss.detach()
        ctx.save_for_backward(*(() if gradient is None else (gradient,)))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None, None, None
