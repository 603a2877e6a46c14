"""How much faster greedy decoding is with drafts, beside the same text by `generate`, in one run.

Both ways decode the same features, at batch 1 and batched; drafting is part of the time. A model with one drafter has
one contestant, one with two has both. A larger decoder shows what a pass costs where the decoder and not Python takes
the time: random weights in the shape of SmolLM2-135M, on drafts with as many errors as those of the bundled models.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from pipelines.bench.models import smollm2_135m
from pipelines.bench.race import median_ratio, race, seconds
from tinyaudio.model.drafts import Drafter, open_drafter, vocabulary_of
from tinyaudio.model.encoder import encoder_inputs
from tinyaudio.model.frozen import freeze
from tinyaudio.model.prompt import pad_left
from tinyaudio.model.verify import Written, write_with_drafts
from tinyaudio.transcribe import Transcriber

Batch = tuple[Tensor, Tensor]  # features (B, T, D) and their numbers of frames
BATCH_SIZES = (1, 16)
BUDGET = 60  # tokens; the bundled transcripts have at most 20
LARGE_UTTERANCES = 4  # at batch 1; a pass of 135 M parameters takes a tenth of a second on a CPU


def measure_drafts(transcriber: Transcriber, recordings: Sequence[Any], repeats: int) -> dict[str, dict[str, Any]]:
    """Measure every drafter of a model.

    Args:
        recordings: samples at 16 kHz.
        repeats: rounds, of which the median ratio counts.

    Returns:
        By drafter and batch size, such as "encoder, batch 1": `speedup` over `generate` in wall time, `passes` an
        utterance, `passes_per_token`, `accepted_share`, and `same_text`: the utterances with equal tokens, as a share.
        For "135 M, batch 1" the tokens are those of the larger decoder. "transcribe, batch 1" is the whole way from
        samples to text, with encoder and guard. Empty if the model has no drafter.
    """
    model, tokenizer = transcriber.model, transcriber.processor.tokenizer
    heads = {"projector": model.token_ctc, "encoder": model.ctc_head}
    drafters = [open_drafter(model, tokenizer, kind) for kind, head in heads.items() if head is not None]
    vocabulary = vocabulary_of(tokenizer, len(model.get_input_embeddings().weight))
    results: dict[str, dict[str, Any]] = {}
    written: list[Written] = []
    for batch_size in BATCH_SIZES:
        batches = _encoded(transcriber, recordings, batch_size)
        plain = partial(_plain, model, batches)
        for drafter in filter(None, drafters):
            drafted = partial(_drafted, model, batches, drafter, vocabulary)
            results[f"{drafter.kind}, batch {batch_size}"], found = _compare(plain, drafted, repeats)
            written = written or found  # of the drafter that `auto` takes
        if any(drafters):
            ways = {
                draft: partial(_transcribe, transcriber, recordings, batch_size, draft) for draft in ("none", "auto")
            }
            times = race(ways, repeats)
            results[f"transcribe, batch {batch_size}"] = {
                **dict.fromkeys(next(iter(results.values()))),
                "speedup": round(median_ratio(times["none"], times["auto"]), 2),
            }
    if written:
        longest_s = max(len(samples) for samples in recordings) / 16_000
        results["135 M, batch 1"] = measure_large(written[:LARGE_UTTERANCES], round(10 * longest_s), repeats)
    return results


def measure_large(like: Sequence[Written], num_positions: int, repeats: int) -> dict[str, Any]:
    """Measure a decoder of 134.5 million random weights in float32, one text at a time.

    Args:
        like: texts whose numbers of tokens, and of passes of their drafts, are made again.
        num_positions: of the prompts.
    """
    torch.manual_seed(0)
    decoder = freeze(LlamaForCausalLM(smollm2_135m()))
    prompts = torch.randn(len(like), num_positions, decoder.config.hidden_size) * decoder.config.initializer_range
    vocabulary = [f" {token_id}" for token_id in range(decoder.config.vocab_size)]

    def plain() -> list[list[int]]:
        texts = []
        for prompt, one in zip(prompts, like, strict=True):
            embeds, mask = pad_left([prompt])
            options = {"num_beams": 1, "do_sample": False, "pad_token_id": 0}
            tokens = decoder.generate(
                inputs_embeds=embeds, attention_mask=mask, max_new_tokens=len(one.token_ids), **options
            )
            texts.append(tokens[0].tolist())
        return texts

    drafts = [_with_errors(text, one.num_passes - 1) for text, one in zip(plain(), like, strict=True)]

    def drafted() -> list[Written]:
        written = []
        for prompt, draft, one in zip(prompts, drafts, like, strict=True):
            written += write_with_drafts(decoder, [prompt], [draft], vocabulary, [len(one.token_ids)], -1)
        return written

    return _compare(plain, drafted, repeats)[0]


def _with_errors(text: Sequence[int], count: int) -> list[int]:
    """Replace so many tokens of a text by others, evenly."""
    draft = list(text)
    for error in range(count):
        place = (2 * error + 1) * len(draft) // (2 * count)
        draft[place] = (draft[place] + 1) % 299
    return draft


def _compare(
    plain: Callable[[], list[list[int]]], drafted: Callable[[], list[Written]], repeats: int
) -> tuple[dict[str, Any], list[Written]]:
    expected, written = plain(), drafted()
    times = race({"plain": lambda: seconds(plain), "drafted": lambda: seconds(drafted)}, repeats)
    num_passes, num_tokens, num_accepted = (
        sum(numbers)
        for numbers in zip(*((o.num_passes, len(o.token_ids), o.num_accepted) for o in written), strict=True)
    )
    same = [one.token_ids == tokens for one, tokens in zip(written, expected, strict=True)]
    result = {
        "speedup": round(median_ratio(times["plain"], times["drafted"]), 2),
        "passes": round(num_passes / len(written), 2),
        "passes_per_token": round(num_passes / num_tokens, 3),
        "accepted_share": round(num_accepted / num_tokens, 3),
        "same_text": round(statistics.mean(same), 3),
    }
    return result, written


def _encoded(transcriber: Transcriber, recordings: Sequence[Any], batch_size: int) -> list[Batch]:
    ordered, batches = sorted(recordings, key=len), []
    model = transcriber.model
    for start in range(0, len(ordered), batch_size):
        values, mask = encoder_inputs(transcriber.processor.feature_extractor, ordered[start : start + batch_size])
        batches.append(model.encode(values.to(model.device), mask.to(model.device)))
    return batches


def _transcribe(transcriber: Transcriber, recordings: Sequence[Any], batch_size: int, draft: str) -> float:
    return seconds(lambda: transcriber.transcribe(recordings, num_beams=1, batch_size=batch_size, draft=draft))


def _plain(model: Any, batches: Sequence[Batch]) -> list[list[int]]:
    texts, end = [], model.config.eos_token_id
    for features, num_frames in batches:
        tokens = model.generate(features=features, num_frames=num_frames, num_beams=1, max_new_tokens=BUDGET)
        texts += [row[: row.index(end) + 1] if end in row else row for row in tokens.tolist()]
    return texts


def _drafted(model: Any, batches: Sequence[Batch], drafter: Drafter, vocabulary: Sequence[str]) -> list[Written]:
    written: list[Written] = []
    for features, num_frames in batches:
        written += model.generate_with_drafts(features, num_frames, drafter, vocabulary, [BUDGET] * len(features))
    return written
