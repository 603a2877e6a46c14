"""The same loss computed the ways that others compute it: what `bench train` compares the model's own forward with.

Each takes a batch of `train.batches` (on the device, features already floating) and gives the mean loss in nats per
target token; a test holds them equal to 1e-5. None of it is used in training: these are the ways that measured slower.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tinyaudio.model.loss import summed_cross_entropy
from tinyaudio.model.modeling_tinyaudio import IGNORED_LABEL, TinyAudioForConditionalGeneration
from tinyaudio.model.prompt import assemble, pad_right

Batch = dict[str, Any]
Loss = Callable[[TinyAudioForConditionalGeneration, Batch], Tensor]


def own(model: TinyAudioForConditionalGeneration, batch: Batch) -> Tensor:
    """The model's own: label positions only, chunks, right padding without a mask."""
    names = ("features", "num_frames", "labels", "host_counts")
    loss = model(**{name: batch.get(name) for name in names}).loss
    assert loss is not None
    return loss


def full_logits(model: TinyAudioForConditionalGeneration, batch: Batch) -> Tensor:
    """Logits at every position, audio and padding included."""
    embeds, labels, _ = _padded(model, batch)
    return _mean_over_labels(_decoder(model)(inputs_embeds=embeds, use_cache=False).logits, labels)


def one_chunk(model: TinyAudioForConditionalGeneration, batch: Batch) -> Tensor:
    """Label positions only, but all their logits at once."""
    states, targets = _states_and_targets(model, batch)
    return nn.functional.cross_entropy(_decoder(model).get_output_embeddings()(states).float(), targets)


class Compiled:
    """As the model's own, with the decoder through torch.compile, once for any length."""

    def __init__(self) -> None:
        self._forward: Any = None

    def __call__(self, model: TinyAudioForConditionalGeneration, batch: Batch) -> Tensor:
        if self._forward is None:
            self._forward = torch.compile(_decoder(model).get_decoder().forward, dynamic=True)
        embeds, labels, _ = _padded(model, batch)
        states = self._forward(inputs_embeds=embeds, attention_mask=model.no_mask, use_cache=False).last_hidden_state
        return _at_labels(model, states, labels)


def with_mask(model: TinyAudioForConditionalGeneration, batch: Batch) -> Tensor:
    """As the model's own, with an attention mask over the padding."""
    embeds, labels, mask = _padded(model, batch)
    states = _decoder(model).get_decoder()(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    return _at_labels(model, states, labels)


def packed(model: TinyAudioForConditionalGeneration, batch: Batch) -> Tensor:
    """One row without padding: positions restart at every utterance, and attention is block-diagonal by that."""
    rows, targets = _rows(model, batch)
    labels = torch.cat(_labels(rows, targets))
    positions = torch.cat([torch.arange(len(row), device=labels.device) for row in rows])
    embeds = torch.cat(rows)[None]
    # use_cache=True, the default, would let utterances see each other in silence.
    states = _decoder(model).get_decoder()(inputs_embeds=embeds, position_ids=positions[None], use_cache=False)
    return _at_labels(model, states.last_hidden_state, labels[None])


def as_a_user_would(model: TinyAudioForConditionalGeneration, batch: Batch) -> Tensor:
    """A plain transformers loop: padded, masked, labels handed to the decoder."""
    embeds, labels, mask = _padded(model, batch)
    loss: Tensor = _decoder(model)(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
    return loss


def _decoder(model: TinyAudioForConditionalGeneration) -> Any:
    return model.decoder


def _rows(model: TinyAudioForConditionalGeneration, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    projected, lengths = model.project(batch["features"], batch["num_frames"])
    embed, config = model.get_input_embeddings(), model.config
    prefix, suffix = (
        embed(torch.tensor(ids, device=projected.device))
        for ids in (config.prompt_prefix_ids, config.prompt_suffix_ids)
    )
    targets = [row[row != IGNORED_LABEL] for row in batch["labels"]]
    return assemble(prefix, projected, lengths, suffix, [embed(ids) for ids in targets]), targets


def _labels(rows: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
    """Place targets at the end of each row, in the decoder's own convention: a label stands where its token does."""
    return [
        torch.cat([target.new_full((len(row) - len(target),), IGNORED_LABEL), target])
        for row, target in zip(rows, targets, strict=True)
    ]


def _padded(model: TinyAudioForConditionalGeneration, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    rows, targets = _rows(model, batch)
    labels = nn.utils.rnn.pad_sequence(_labels(rows, targets), batch_first=True, padding_value=IGNORED_LABEL)
    lengths = torch.tensor([len(row) for row in rows], device=labels.device)
    mask = (torch.arange(labels.shape[1], device=labels.device)[None, :] < lengths[:, None]).long()
    return pad_right(rows), labels, mask


def _states_and_targets(model: TinyAudioForConditionalGeneration, batch: Batch) -> tuple[Tensor, Tensor]:
    """Give the hidden states that predict a target (N, H), and the targets (N,)."""
    embeds, labels, _ = _padded(model, batch)
    states = _decoder(model).get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
    is_target = labels[:, 1:] != IGNORED_LABEL
    return states[:, :-1][is_target], labels[:, 1:][is_target]


def _at_labels(model: TinyAudioForConditionalGeneration, states: Tensor, labels: Tensor) -> Tensor:
    is_target = labels[:, 1:] != IGNORED_LABEL
    targets = labels[:, 1:][is_target]
    return summed_cross_entropy(states[:, :-1][is_target], _decoder(model).get_output_embeddings(), targets) / len(
        targets
    )


def _mean_over_labels(logits: Tensor, labels: Tensor) -> Tensor:
    flat = logits[:, :-1].float().flatten(0, 1)
    return nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL)
