"""Greedy decoding that checks drafts: the text that the decoder writes by itself, in fewer passes.

A pass runs the decoder over what is written and the draft behind it. The tokens that it would have chosen itself are
kept; its own choice follows where they end, and the rest of the draft is found again behind that. Each row advances at
its own pace: keys and values of rejected tokens stay in the cache and are masked, and positions are counted without
them. Those that no row kept are cropped, and a row that is done leaves the batch. Travels with the checkpoint.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", in its greedy form; here the
draft is a whole transcript, and what follows a rejected token is aligned again and not discarded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from .drafts import Remainder
from .loss import CHUNK_ENTRIES, head_of
from .prompt import pad_left


@dataclass(kw_only=True)
class Written:
    """One row's text."""

    token_ids: list[int] = field(default_factory=list)  # with end-of-text if it came within the budget
    num_passes: int = 0  # of the decoder that this row took part in, the prompt's included
    num_accepted: int = 0  # those of `token_ids` that were drafted


@torch.no_grad()
def write_with_drafts(
    decoder: PreTrainedModel,
    prompts: Sequence[Tensor],
    drafts: Sequence[Sequence[int]],
    vocabulary: Sequence[str],
    budgets: Sequence[int],
    eos_token_id: int,
) -> list[Written]:
    """Write what greedy `generate` writes; equal token for token, up to ties of the decoder's precision.

    Args:
        decoder: of which `drafts.can_verify` holds.
        prompts: B tensors (n_i, H), embedded.
        drafts: guesses at the tokens of each row, without end-of-text.
        vocabulary: see `Remainder`.
        budgets: the most tokens of each row, at least 1.
        eos_token_id: ends a text.
    """
    embed, body, head = decoder.get_input_embeddings(), decoder.get_decoder(), head_of(decoder)
    texts = [Written() for _ in prompts]
    remainders = [Remainder(draft, vocabulary) for draft in drafts]
    rows = list(range(len(prompts)))  # that are not done
    embeds, mask = pad_left(prompts)
    cache, is_first = DynamicCache(), True
    while rows:
        # The block of this pass: the last token, which has no keys and values yet (or the prompt), then the proposal.
        proposals = [remainders[row].proposal()[: budgets[row] - len(texts[row].token_ids) - 1] for row in rows]
        given = [[*texts[row].token_ids[-1:], *proposal] for row, proposal in zip(rows, proposals, strict=True)]
        width = max(map(len, given))
        ids = torch.tensor([[*block, *[0] * (width - len(block))] for block in given], dtype=torch.long)
        block = embed(ids.to(mask.device))
        if is_first:
            block = torch.cat([embeds, block], dim=1)
        whole = torch.cat([mask, _first_columns(width, list(map(len, given)), mask)], dim=1)
        positions = (whole.cumsum(-1) - 1).clamp(min=0)[:, -block.shape[1] :]
        hidden = body(
            inputs_embeds=block, attention_mask=whole, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        # Each row's last position before its proposal, and those of the proposal, predict a token.
        before = block.shape[1] - width - 1 if is_first else 0
        counts = [len(proposal) + 1 for proposal in proposals]
        row_index = [i for i, count in enumerate(counts) for _ in range(count)]
        column_index = [before + column for count in counts for column in range(count)]
        index = torch.tensor([row_index, column_index]).to(hidden.device)
        best = _best_tokens(hidden[index[0], index[1]], head, embed.weight.shape[0])

        kept, begin = [], 0  # how many columns of each row's block are part of its text
        for row, block_ids, proposal in zip(rows, given, proposals, strict=True):
            end = begin + len(proposal) + 1
            num_accepted = _agreeing(proposal, best[begin:end])
            text = texts[row]
            text.token_ids += best[begin : begin + num_accepted + 1]
            text.num_passes += 1
            text.num_accepted += num_accepted
            remainders[row].advance(num_accepted, text.token_ids[-1])
            kept.append(len(block_ids) - len(proposal) + num_accepted)
            begin = end

        going = [
            i
            for i, row in enumerate(rows)
            if texts[row].token_ids[-1] != eos_token_id and len(texts[row].token_ids) < budgets[row]
        ]
        if not going:
            break
        longest = max(kept[i] for i in going)
        if longest < width:
            cache.crop(longest - width)
        mask = torch.cat([mask, _first_columns(longest, kept, mask)], dim=1)
        if len(going) < len(rows):
            still = torch.tensor(going).to(mask.device)
            cache.batch_select_indices(still)
            mask, rows = mask[still], [rows[i] for i in going]
        is_first = False
    return texts


def _first_columns(width: int, counts: Sequence[int], like: Tensor) -> Tensor:
    """Return a mask (B, width) that is 1 in the first columns of each row, as many as `counts` says."""
    columns = torch.arange(width, device=like.device)
    return (columns[None, :] < torch.tensor(counts).to(like.device)[:, None]).to(like.dtype)


def _best_tokens(hidden: Tensor, head: nn.Module, vocabulary_size: int) -> list[int]:
    """Choose the most probable token of each hidden state (N, H), a few rows of logits at a time."""
    chunks = torch.split(hidden, max(1, CHUNK_ENTRIES // vocabulary_size))
    return torch.cat([head(chunk).float().argmax(-1) for chunk in chunks]).tolist()


def _agreeing(proposal: Sequence[int], best: Sequence[int]) -> int:
    """Count the tokens at the beginning of a proposal that are the decoder's own choices."""
    for count, (proposed, chosen) in enumerate(zip(proposal, best, strict=False)):
        if proposed != chosen:
            return count
    return len(proposal)
