"""Drafts: greedy decoding writes the same tokens with any draft, in fewer passes with a good one."""

import random
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import jiwer
import numpy as np
import pytest
import torch
from bundled import utterances
from tiny_decoders import DECODERS, SIZES, WIDTH
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from tinyaudio.cli.options import DRAFTS
from tinyaudio.model.align import BLANK, SPACE
from tinyaudio.model.ctc_head import CTCHead
from tinyaudio.model.drafts import (
    KINDS,
    LONGEST_UNMATCHED,
    EncoderDrafter,
    Remainder,
    can_verify,
    open_drafter,
    vocabulary_of,
)
from tinyaudio.model.errors import ModelError
from tinyaudio.model.prompt import pad_left
from tinyaudio.model.recognize import Options
from tinyaudio.model.transcript import DraftCounts
from tinyaudio.model.verify import write_with_drafts
from tinyaudio.transcribe import Transcriber

BUDGET = 24
WORDS = [f" w{i}" for i in range(500)]  # more than the decoders have tokens


def random_decoder(kind):
    """A decoder whose greedy texts vary: weights many times larger than those of a new one."""
    torch.manual_seed(3)
    made, _ = DECODERS[kind]()
    for weight in made.parameters():
        weight.data *= 15 if weight.dim() == 2 else 1
    return made.eval()


def random_prompts(count):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(5 + 3 * (i % 7), WIDTH, generator=generator) for i in range(count)]


def greedy(decoder, prompts, budget=BUDGET, eos_token_id=0):
    """The tokens of transformers' own greedy decoding, to end-of-text if there is one."""
    embeds, mask = pad_left(prompts)
    options = {"num_beams": 1, "do_sample": False, "eos_token_id": eos_token_id, "pad_token_id": 1}
    tokens = decoder.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=budget, **options).tolist()
    return [row[: row.index(eos_token_id) + 1] if eos_token_id in row else row for row in tokens]


def ending(decoder, prompts):
    """Greedy texts that end: with an end-of-text that several rows write, at different positions."""
    texts = greedy(decoder, prompts)
    counts = [sum(token in row for row in texts) for token in range(decoder.config.vocab_size)]
    eos_token_id = int(np.argmax(counts))
    return eos_token_id, greedy(decoder, prompts, eos_token_id=eos_token_id)


def spoiled(text, rate, seed):
    """A draft with errors: tokens replaced, left out and put in."""
    rng = random.Random(seed)
    draft = []
    for token in text:
        draw = rng.random()
        if draw < rate / 3:
            continue
        draft.append(rng.randrange(2, 100) if draw < 2 * rate / 3 else token)
        if 2 * rate / 3 <= draw < rate:
            draft.append(rng.randrange(2, 100))
    return draft


@pytest.mark.parametrize(
    ("kind", "batch_size"),
    [("smollm3", 1), ("smollm3", 4), ("smollm3", 16), ("llama", 4), ("qwen3", 16), ("gemma", 16), ("granite", 16)],
)
def test_any_draft_gives_the_tokens_of_generate(kind, batch_size):
    decoder, prompts = random_decoder(kind), random_prompts(16)
    eos_token_id, expected = ending(decoder, prompts)
    lengths = {len(row) for row in expected}
    assert len(lengths) > 2, "rows end at different positions"
    for seed, rate in enumerate([0.0, 0.2, 0.6, None]):
        texts = [row[:-1] if row[-1] == eos_token_id else row for row in expected]
        drafts = [[] if rate is None else spoiled(text, rate, seed * 100 + i) for i, text in enumerate(texts)]
        written = []
        for at in range(0, 16, batch_size):
            part = slice(at, at + batch_size)
            budgets = [BUDGET] * len(prompts[part])
            written += write_with_drafts(decoder, prompts[part], drafts[part], WORDS, budgets, eos_token_id)
        assert [one.token_ids for one in written] == expected
        assert all(one.num_passes + one.num_accepted == len(one.token_ids) for one in written)


def test_a_right_draft_takes_one_pass_and_no_draft_one_for_each_token():
    decoder, prompts = random_decoder("smollm3"), random_prompts(4)
    eos_token_id, expected = ending(decoder, prompts)
    assert all(row[-1] == eos_token_id for row in expected[:1])
    text = expected[0][:-1]
    for draft, num_passes in ((text, 1), ([], len(text) + 1), ([*text[:-1], 7], 2)):
        (written,) = write_with_drafts(decoder, prompts[:1], [draft], WORDS, [BUDGET], eos_token_id)
        assert written.token_ids == expected[0]
        assert written.num_passes == num_passes
        assert written.num_accepted == len(text) + 1 - num_passes


def test_each_row_stops_at_its_own_budget():
    decoder, prompts = random_decoder("smollm3"), random_prompts(6)
    expected = greedy(decoder, prompts, eos_token_id=199)
    budgets = [1, 2, 3, 10, 24, 5]
    for drafts in (expected, [[] for _ in prompts], [[3, 4, 5, 6] for _ in prompts]):
        written = write_with_drafts(decoder, prompts, drafts, WORDS, budgets, 199)
        assert [one.token_ids for one in written] == [row[:n] for row, n in zip(expected, budgets, strict=True)]


def left(draft, *written):
    """What a draft expects after words that were written one by one, none of them as it expected."""
    vocabulary = sorted({*draft.replace(" ", "| ").split("|"), *written, ""})
    ids = {word: i for i, word in enumerate(vocabulary)}
    remainder = Remainder([ids[word] for word in draft.replace(" ", "| ").split("|") if word], vocabulary)
    remainder.proposal()
    for word in written:
        remainder.advance(0, ids[word])
        proposal = remainder.proposal()
    return "".join(vocabulary[i] for i in proposal)


def test_the_draft_is_found_again_behind_what_was_written():
    assert left(" the cet sat on", " the", " cat") == " sat on", "another word"
    assert left(" uh the cat sat", " the", " cat") == " sat", "a word too many"
    assert left(" nei bour sat", " neighbour") == " sat", "one word for two"
    assert left(" neighbour sat", " nei", "ghbour") == " sat", "two pieces for one"
    assert left(" cat", " dog", " and", " more") == ""
    assert left("", " dog") == ""


def test_the_remainder_is_nearest_by_edit_distance(monkeypatch):
    monkeypatch.setattr("tinyaudio.model.drafts.AFTER_A_MISS", None)  # the whole remainder shows where it begins
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abc", k=rng.randint(1, 3))) for _ in range(40)]
    for _ in range(200):
        draft, written = rng.choices(range(40), k=8), rng.choices(range(40), k=rng.randint(1, 4))
        remainder = Remainder(draft, vocabulary)
        for token_id in written:
            remainder.advance(0, token_id)
        num_skipped = len(draft) - len(remainder.proposal())
        text = "".join(vocabulary[i] for i in written)
        distances = [distance("".join(vocabulary[i] for i in draft[:n]), text) for n in range(len(draft) + 1)]
        assert num_skipped == max(n for n, one in enumerate(distances) if one == min(distances))


def distance(one, other):
    """The edit distance in characters, by jiwer."""
    if not one or not other:
        return len(one) + len(other)
    found = jiwer.process_characters(one, other)
    return found.substitutions + found.deletions + found.insertions


def test_agreement_is_where_the_draft_is_anchored():
    """Repeated words are not skipped: what was accepted is known exactly."""
    remainder = Remainder([1, 1, 1, 2], ["", " no", " yes", " not"])
    remainder.proposal()
    remainder.advance(1, 3)
    assert remainder.proposal() == [1, 2], "another word stands for the second"


def test_after_a_pass_that_accepted_nothing_few_tokens_are_proposed():
    """Until a pass accepts one again."""
    remainder = Remainder(list(range(20)), [f" {n:02}" for n in range(21)])
    assert remainder.proposal() == list(range(20))
    remainder.advance(0, 20)
    assert remainder.proposal() == [1, 2, 3, 4], "another word stands for the first"
    remainder.advance(1, 20)
    assert remainder.proposal() == list(range(3, 20))


def test_a_draft_of_something_else_is_given_up():
    remainder = Remainder(list(range(50)), [*("b" * 10 for _ in range(50)), "aaaaa"])
    sizes = []
    for _ in range(LONGEST_UNMATCHED // 5 + 1):
        remainder.advance(0, 50)
        sizes.append(len(remainder.proposal()))
    assert sizes[-2] > 0
    assert sizes[-1] == 0


def test_the_encoders_letters_become_token_ids(tokenizer):
    alphabet = {BLANK: 0, SPACE: 1, "T": 2, "H": 3, "E": 4, "C": 5, "A": 6}
    linear = torch.nn.Linear(8, 8, bias=False)
    torch.nn.init.eye_(linear.weight)  # a feature is the symbol that is heard; 7 has no letter
    drafter = EncoderDrafter(CTCHead(linear, alphabet), tokenizer)
    said = [[2, 2, 0, 3, 4, 7, 1, 1, 5, 6, 6, 0, 2, 5, 5], [0, 4, 4, 0, 4, 1, 1, 0]]
    features = torch.zeros(2, 15, 8)
    for row, symbols in enumerate(said):
        features[row, range(len(symbols)), symbols] = 1.0
    nothing = torch.zeros(2, 1, 1)
    ids = drafter.draft(features, torch.tensor([13, 8]), nothing, torch.tensor([1, 1]))
    assert [tokenizer.decode(row) for row in ids] == [" the cat", " ee"]
    assert ids[0] == tokenizer(" the cat")["input_ids"]
    silent = drafter.draft(features * 0, torch.tensor([13, 8]), nothing, torch.tensor([1, 1]))
    assert silent == [[], []]


def test_every_token_of_the_decoder_has_a_string(tokenizer):
    vocabulary = vocabulary_of(tokenizer, len(tokenizer) + 5)
    assert vocabulary[len(tokenizer) :] == [""] * 5
    assert vocabulary[tokenizer(" THE")["input_ids"][-1]] == vocabulary[tokenizer(" THE")["input_ids"][-1]].lower()


def test_the_command_line_knows_every_drafter():
    assert DRAFTS == KINDS


def test_auto_takes_the_best_drafter_that_there_is(model, tokenizer, request):
    assert open_drafter(model, tokenizer, "auto") is None
    assert open_drafter(model, tokenizer, "none") is None
    with pytest.raises(ModelError, match="expected an encoder with a CTC head, found none in"):
        open_drafter(model, tokenizer, "encoder")
    with pytest.raises(ModelError, match="expected a projector trained with a CTC loss, found none"):
        open_drafter(model, tokenizer, "projector")
    with pytest.raises(ValueError, match="draft is 'whisper'; expected one of auto"):
        open_drafter(model, tokenizer, "whisper")
    request.getfixturevalue("with_head")
    assert open_drafter(model, tokenizer, "auto").kind == "encoder"
    assert open_drafter(model, tokenizer, "none") is None


def test_decoders_with_windows_cannot_check_drafts(with_head, tokenizer, monkeypatch):
    able = {name for name, make in DECODERS.items() if can_verify(make()[0])}
    assert set(DECODERS) - able == {"gemma2", "gemma3"}
    assert not can_verify(MistralForCausalLM(MistralConfig(**SIZES, vocab_size=20, sliding_window=8)))
    assert not can_verify(BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2))), "ALiBi, by the mask"
    monkeypatch.setattr("tinyaudio.model.drafts.can_verify", lambda decoder: False)
    assert open_drafter(with_head, tokenizer, "auto") is None
    with pytest.raises(ModelError, match="does not attend to all earlier positions"):
        open_drafter(with_head, tokenizer, "encoder")


class FakeDrafter:
    """Drafts what the decoder writes, with every third token wrong."""

    kind: ClassVar = "encoder"

    def __init__(self, texts):
        self.texts = texts

    def draft(self, features, num_frames, projected, lengths):
        return [[2 if i % 3 == 2 else token for i, token in enumerate(self.texts[n])] for n in num_frames.tolist()]


GREEDY = {"num_beams": 1, "max_new_tokens": 12}


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_transcripts_are_the_same_with_drafts_and_say_what_they_did(
    with_head, processor, spoken, batch_size, monkeypatch
):
    transcriber, sources = Transcriber(with_head, processor), [samples for samples, _ in spoken[:8]]
    written = {}
    write = type(with_head).generate

    def remember(self, **options):
        tokens = write(self, **options)
        if options["generation_config"].num_beams == 1:
            written.update(zip(options["num_frames"].tolist(), tokens.tolist(), strict=True))
        return tokens

    monkeypatch.setattr(type(with_head), "generate", remember)
    plain = transcriber.transcribe(sources, draft="none", batch_size=1, **GREEDY)
    assert all(transcript.drafts is None for transcript in plain)
    assert "drafts" not in plain[0].to_dict()
    monkeypatch.setattr("tinyaudio.model.recognize.open_drafter", lambda *_: FakeDrafter(written))
    drafted = transcriber.transcribe(sources, batch_size=batch_size, **GREEDY)
    assert [replace(one, drafts=None) for one in drafted] == plain
    for one in drafted:
        counts = one.drafts
        assert counts.num_tokens == counts.num_passes + counts.num_accepted
        assert counts.num_accepted > 0
        assert one.to_dict()["drafts"] == {
            "draft": "encoder",
            "passes": counts.num_passes,
            "tokens": counts.num_tokens,
            "accepted": counts.num_accepted,
            "passes_per_token": pytest.approx(counts.num_passes / counts.num_tokens, abs=1e-4),
            "accepted_share": pytest.approx(counts.num_accepted / counts.num_tokens, abs=1e-4),
        }


def test_counts_of_segments_add_up():
    one = DraftCounts(draft="encoder", num_passes=2, num_tokens=9, num_accepted=7)
    assert one + one == DraftCounts(draft="encoder", num_passes=4, num_tokens=18, num_accepted=14)


def test_drafts_are_for_plain_greedy_decoding(with_head, processor, spoken):
    transcriber, source = Transcriber(with_head, processor), spoken[0][0]

    def drafts(**options):
        return transcriber.transcribe([source], max_new_tokens=3, **options)[0].drafts

    assert drafts(num_beams=1) is not None
    assert drafts() is None, "four beams are the model's own"
    assert drafts(num_beams=1, generate={"repetition_penalty": 1.2}) is None
    assert drafts(num_beams=1, generate={"logits_processor": []}) is None
    assert drafts(generate={"num_beams": 1}) is not None
    with pytest.raises(ModelError, match=r"--draft encoder \(draft\) expects greedy decoding, found 4 beams"):
        drafts(draft="encoder")
    with pytest.raises(ModelError, match="found other options of generate"):
        drafts(draft="encoder", num_beams=1, generate={"repetition_penalty": 1.2})
    with pytest.raises(ValueError, match="draft is 'fast'; expected one of auto, projector, encoder, none"):
        Options(draft="fast")
    with_head.generation_config.suppress_tokens = [5]
    assert drafts(num_beams=1) is None, "settings of the checkpoint count too"


@pytest.mark.slow
def test_drafts_of_the_trained_demo_change_no_text_and_save_passes():
    """After `make demo`: both test sets, and their recordings joined by tens, at batch 1, 4 and 16."""
    run = Path(__file__).parent.parent / "runs/demo"
    if not (run / "config.json").is_file():
        pytest.skip("needs the trained demo; run `make demo`")
    transcriber = Transcriber.load(run, device="cpu", dtype="float32")
    for split in ("test", "test_unseen"):
        single = [samples for _, _, samples in utterances(split)]
        pause = np.zeros(16_000, np.float32)
        spaced = [np.concatenate([samples, pause]) for samples in single]
        joined = [np.concatenate(spaced[at : at + 10]) for at in range(0, len(spaced), 10)]
        for sources in (single, joined):
            plain = transcriber.transcribe(sources, num_beams=1, draft="none", batch_size=16)
            for batch_size in (1, 4, 16):
                drafted = transcriber.transcribe(sources, num_beams=1, batch_size=batch_size)
                assert [one.text for one in drafted] == [one.text for one in plain]
                counts = sum((one.drafts for one in drafted[1:]), drafted[0].drafts)
                share = counts.num_passes / counts.num_tokens
                print(f"{split}, {len(sources)} recordings, batch {batch_size}: {share:.3f} passes a token")
                assert share <= 0.35
