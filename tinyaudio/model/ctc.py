"""A CTC loss whose classes are the decoder's own tokens: it shows the projector where the token embeddings lie.

For a projected frame x, the score of token c is

    scale * cosine(x, e_c) + bias_c

with e_c the decoder's frozen input embedding of c; the score of CTC's blank is the same with a learned vector. The
targets are the token ids of the transcript. The decoder itself never runs, so a step costs a fraction of a step through
it. Shape letters as in `modeling_tinyaudio`; C classes without the blank, U tokens of the longest transcript.

Memory: the loss needs the scores of all classes for one number a frame only, the log of the softmax's denominator. It
is computed for a block of frames at a time, together with its gradient, and the block's scores are freed. CTC's own
recursion sees the blank and the tokens of its row: (B, P, U + 1) scores instead of (B, P, C + 1).

Related: LegoSLM (arXiv 2505.11352) trains an encoder to CTC posteriors over a language model's vocabulary, and CJST
(arXiv 2411.07607) uses embeddings as CTC classes; both train the encoder. Here both ends stay frozen. CTC: Graves et
al., 2006.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

BLOCK_ENTRIES = 2**24  # scores in memory at once: 67 MB in float32, 130 frames of 128,257 classes
CLASSES_SEARCHED = 12  # of each frame, by `best_texts`
INITIAL_SCALE = 16.0  # cosines of unrelated vectors of width 64 to 2,048 differ by 0.02 to 0.12


class TokenCTC(nn.Module):
    """Scores projected frames by the decoder's tokens. Float32, also under autocast.

    Args:
        num_classes: C. `token_ids` says which tokens they are; a checkpoint has them.
        dim: H, width of the decoder's embeddings.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.token_ids: Tensor
        self.register_buffer("token_ids", torch.arange(num_classes))  # (C,) ascending
        self.blank = nn.Parameter(torch.randn(dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))
        self.bias = nn.Parameter(torch.zeros(num_classes + 1))  # of the blank first
        self._cached_vectors: Tensor | None = None

    def loss(
        self, projected: Tensor, lengths: Sequence[int], labels: Tensor, num_tokens: Sequence[int], embeddings: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum the CTC loss of transcripts, in nats.

        A row with more tokens than projected frames (a blank between two equal tokens counted) has no alignment; its
        loss is 0.

        Args:
            projected: (B, P, H). lengths: valid frames of each row.
            labels: (B, L) token ids; only the first `num_tokens` of each row are read. All are in `token_ids`.
            num_tokens: tokens of each row, without end-of-text.
            embeddings: (V, H), the decoder's.

        Returns:
            The sum, a float32 scalar, and the number of rows without an alignment, a scalar on the device.
        """
        device, num_rows = projected.device, len(projected)
        longest = max(1, *num_tokens)
        frames_host, tokens_host = torch.tensor(lengths), torch.tensor(num_tokens)
        index = torch.searchsorted(self.token_ids, labels[:, :longest].clamp_min(0).contiguous())
        # Made on the host, so that nothing waits for the device.
        is_token = torch.arange(longest) < tokens_host[:, None]
        frame_rows = torch.repeat_interleave(torch.arange(num_rows), frames_host)
        frames = torch.cat([torch.arange(length) for length in lengths])
        is_token, frame_rows, frames = (t.to(device, non_blocking=True) for t in (is_token, frame_rows, frames))
        with torch.autocast(device.type, enabled=False):
            unit, blank = nn.functional.normalize(projected.float(), dim=-1), nn.functional.normalize(self.blank, dim=0)
            scale = self.log_scale.exp()
            vectors = self._vectors(embeddings)

            repeats = (index[:, 1:] == index[:, :-1]) & is_token[:, 1:]
            needed = tokens_host.to(device, non_blocking=True) + repeats.sum(-1)
            can_align = needed <= frames_host.to(device, non_blocking=True)
            denominators, total = _summed_logsumexp(
                unit[frame_rows, frames], can_align[frame_rows].float(), vectors, blank, scale, self.bias
            )
            of_frame = denominators.new_zeros(projected.shape[:2])
            of_frame[frame_rows, frames] = denominators

            # CTC over each row's own tokens: a class is a token's first place in the row.
            equal = index[:, :, None] == index[:, None, :]
            places = torch.arange(longest, device=device)
            first = torch.where(equal, places[None, None, :], longest).amin(-1)
            tokens = unit @ vectors[index + 1].transpose(1, 2) * scale + self.bias[index + 1][:, None, :]
            blanks = (unit @ blank * scale + self.bias[0])[:, :, None]
            scores = torch.cat([blanks, tokens], dim=-1) - of_frame[:, :, None]
            paths = _OwnTokensCTC.apply(scores.transpose(0, 1), first + 1, frames_host, tokens_host)  # type: ignore[no-untyped-call]
            # `total` brings the denominators' gradient; their value is in `paths` already.
            return (paths * can_align).sum() + total - total.detach(), num_rows - can_align.sum()

    @torch.no_grad()
    def best_path(self, projected: Tensor, lengths: Tensor, embeddings: Tensor) -> list[list[int]]:
        """Decode greedily: the best class of each frame, without repeats and blanks.

        Args:
            projected: (B, P, H). lengths: (B,) valid frames of each row. embeddings: (V, H), the decoder's.

        Returns:
            Token ids of each row, without end-of-text.
        """
        best = [scores.argmax(-1) for scores in self._scores(projected, embeddings)]
        classes = torch.cat(best).view(projected.shape[:2]).cpu()
        token_ids, paths = self.token_ids.cpu(), []
        for row, length in zip(classes, lengths.tolist(), strict=True):
            path = torch.unique_consecutive(row[:length])
            paths.append(token_ids[path[path > 0] - 1].tolist())
        return paths

    @torch.no_grad()
    def best_texts(
        self, projected: Tensor, lengths: Tensor, embeddings: Tensor, count: int
    ) -> list[list[tuple[list[int], float]]]:
        """Search the most probable token sequences, each over all of its alignments.

        Prefix beam search (Hannun et al. 2014, arXiv 1408.2873) over the `CLASSES_SEARCHED` best classes of each frame.

        Args:
            projected, lengths, embeddings: as in `best_path`.
            count: beams, and the most sequences of a row.

        Returns:
            For each row, the best first: token ids without end-of-text, and the log-probability in nats, which lacks
            the alignments that the search has left out.
        """
        values, places, blanks = [], [], []
        for scores in self._scores(projected, embeddings):
            log_probs = scores.log_softmax(-1)
            top = log_probs[:, 1:].topk(min(CLASSES_SEARCHED, log_probs.shape[1] - 1))
            values.append(top.values)
            places.append(top.indices + 1)
            blanks.append(log_probs[:, 0])
        shape = projected.shape[:2]
        best, classes = (torch.cat(parts).view(*shape, -1).cpu().numpy() for parts in (values, places))
        blank_log_probs = torch.cat(blanks).view(shape).cpu().numpy()
        token_ids, found = self.token_ids.tolist(), []
        for row, length in enumerate(lengths.tolist()):
            beams = _prefix_beam_search(best[row, :length], classes[row, :length], blank_log_probs[row, :length], count)
            found.append([([token_ids[place - 1] for place in path], score) for path, score in beams])
        return found

    def _scores(self, projected: Tensor, embeddings: Tensor) -> Iterator[Tensor]:
        """Yield the scores of all classes, (frames, C + 1) float32 with the blank first, for a block of frames each."""
        with torch.autocast(projected.device.type, enabled=False):
            unit = nn.functional.normalize(projected.float(), dim=-1)
            vectors = self._vectors(embeddings)
            vectors[0] = nn.functional.normalize(self.blank, dim=0)
            scale = self.log_scale.exp()
            for block in torch.split(unit.flatten(0, 1), max(1, BLOCK_ENTRIES // len(vectors))):
                yield block @ vectors.T * scale + self.bias

    def _vectors(self, embeddings: Tensor) -> Tensor:
        """Return the class vectors (C + 1, H), float32, of length 1; row 0 is free for the blank."""
        kept = self._cached_vectors
        if kept is None or kept.device != embeddings.device:
            chosen = embeddings.detach()[self.token_ids].float()
            kept = torch.cat([chosen.new_zeros(1, chosen.shape[1]), nn.functional.normalize(chosen, dim=-1)])
            self._cached_vectors = kept
        return kept


def _prefix_beam_search(
    log_probs: NDArray[np.float32], classes: NDArray[np.int64], blank_log_probs: NDArray[np.float32], count: int
) -> list[tuple[tuple[int, ...], float]]:
    """Find the `count` most probable sequences of classes.

    Args:
        log_probs, classes: (P, K), the best classes of each frame. blank_log_probs: (P,).

    Returns:
        Sequences with their log-probabilities, the best first.
    """
    never = float("-inf")
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, never)}  # ending in a blank, and in their last class
    for frame_log_probs, frame_classes, blank in zip(
        log_probs.tolist(), classes.tolist(), blank_log_probs.tolist(), strict=True
    ):
        grown: dict[tuple[int, ...], tuple[float, float]] = {}

        def add(path: tuple[int, ...], with_blank: float, with_class: float, into: Any = grown) -> None:
            before = into.get(path, (never, never))
            into[path] = (_log_add(before[0], with_blank), _log_add(before[1], with_class))

        for path, (with_blank, with_class) in beams.items():
            either = _log_add(with_blank, with_class)
            add(path, either + blank, never)
            for log_prob, one in zip(frame_log_probs, frame_classes, strict=True):
                if path and path[-1] == one:  # without a blank between them, two equal classes are one
                    add(path, never, with_class + log_prob)
                    if with_blank > never:
                        add((*path, one), never, with_blank + log_prob)
                else:
                    add((*path, one), never, either + log_prob)
        beams = dict(sorted(grown.items(), key=lambda item: -_log_add(*item[1]))[:count])
    return [(path, _log_add(*both)) for path, both in beams.items()]


def _log_add(a: float, b: float) -> float:
    """Add two probabilities that are given as logarithms."""
    larger, smaller = (a, b) if a > b else (b, a)
    return larger if smaller == float("-inf") else larger + math.log1p(math.exp(smaller - larger))


def _summed_logsumexp(
    frames: Tensor, weights: Tensor, vectors: Tensor, blank: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the log of the softmax's denominator of each frame (N,), no gradient, and their weighted sum, with one."""
    rows = max(1, BLOCK_ENTRIES // len(vectors))
    each, total = _SummedLogSumExp.apply(frames, weights, vectors, blank, scale, bias, rows)  # type: ignore[no-untyped-call]
    return each, total


class _SummedLogSumExp(torch.autograd.Function):
    """The gradient is computed in forward, block by block: only one number, that of the sum, arrives in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        frames: Tensor,
        weights: Tensor,
        vectors: Tensor,
        blank: Tensor,
        scale: Tensor,
        bias: Tensor,
        block_rows: int,
    ) -> tuple[Tensor, Tensor]:
        vectors[0] = blank
        each = frames.new_empty(len(frames))
        d_frames, d_blank = torch.empty_like(frames), torch.zeros_like(blank)
        d_scale, d_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        for start in range(0, len(frames), block_rows):
            here = slice(start, start + block_rows)
            cosines = frames[here] @ vectors.T
            share = cosines * scale + bias
            each[here] = share.logsumexp(-1)
            share.sub_(each[here, None]).exp_().mul_(weights[here, None])  # the softmax
            d_bias += share.sum(0)
            d_blank += share[:, 0] @ frames[here]
            d_frames[here] = share @ vectors
            d_scale += share.mul_(cosines).sum()
        ctx.save_for_backward(d_frames.mul_(scale), d_blank.mul_(scale), d_scale, d_bias)
        ctx.mark_non_differentiable(each)
        return each, each @ weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_frames, d_blank, d_scale, d_bias = (saved * gradients[1] for saved in ctx.saved_tensors)
        return d_frames, None, None, d_blank, d_scale, d_bias, None


class _OwnTokensCTC(torch.autograd.Function):
    """torch's CTC loss on scores (P, B, U + 1) that belong to a larger softmax.

    torch computes the gradient of a log-softmax over exactly these classes, exp(scores) minus the alignment's share.
    Here the other classes are part of the denominator, whose gradient is computed elsewhere; the alignment's share is
    what is left.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, classes: Tensor, lengths: Tensor, num_tokens: Tensor) -> Tensor:
        with torch.enable_grad():
            # In float32 torch's recursion errs by more than 1e-5; these few scores cost little in float64.
            leaf = scores.detach().double().requires_grad_(True)
            losses = nn.functional.ctc_loss(leaf, classes, lengths, num_tokens, reduction="none", zero_infinity=True)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        is_frame = (torch.arange(len(scores)) < lengths[:, None]).T.to(scores.device, non_blocking=True)
        ctx.save_for_backward((gradient - leaf.detach().exp() * is_frame[:, :, None]).to(scores.dtype))
        return losses.detach().to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][None, :, None], None, None, None
