"""Confidence: the decoder's probabilities against generation's own, and words that were not heard or not written.

`pytest -m "" -s tests/test_model_confidence.py` prints the rates that docs/transcribing.md states.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from bundled import utterances
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyaudio.model import loss, recognize
from tinyaudio.model.align import BLANK, SPACE, _words, align, align_words
from tinyaudio.model.confidence import no_speech_probs, tokens_of_words, word_probabilities
from tinyaudio.model.encoder import encode, encoder_inputs
from tinyaudio.model.prompt import transcript_ids
from tinyaudio.transcribe import Transcriber

LETTERS = {BLANK: 0, SPACE: 1, **{letter: i + 2 for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz'")}}
FEW = {"num_beams": 1, "max_new_tokens": 4}


@pytest.fixture
def features(model, spoken, feature_extractor):
    values, mask = encoder_inputs(feature_extractor, [samples for samples, _ in spoken[:3]])
    return model.encode(values, mask)


@pytest.mark.parametrize(
    "search", [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 1, "do_sample": True, "top_k": 0}]
)
def test_probabilities_are_those_of_generation(model, features, search):
    """A pass over finished tokens gives what generation computed step by step, in a batch, however it searched."""
    torch.manual_seed(0)
    output = model.generate(
        features=features[0],
        num_frames=features[1],
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_scores=True,
        **search,
    )
    beams = getattr(output, "beam_indices", None)
    expected = model.decoder.compute_transition_scores(output.sequences, output.scores, beams, normalize_logits=True)
    found = model.target_log_probs(*features, output.sequences.tolist())
    for row, ids in enumerate(output.sequences.tolist()):
        length = ids.index(0) + 1 if 0 in ids else len(ids)
        torch.testing.assert_close(found[row][:length], expected[row, :length], atol=1e-4, rtol=1e-4)


def test_probabilities_are_those_of_training(model, features, tokenizer, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ENTRIES", 2 * len(tokenizer))  # two rows of logits at once
    targets = [transcript_ids(tokenizer, text) for text in ("the cat sat", "", "a dog and a cat")]
    found = model.target_log_probs(*features, targets)
    assert [len(row) for row in found] == [len(target) for target in targets]
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in targets], True, -100)
    trained = model(features=features[0], num_frames=features[1], labels=labels)
    assert float(torch.cat(found).mean()) == pytest.approx(-float(trained.loss.detach()), abs=1e-5)


words = st.lists(st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=6), max_size=8)


@settings(max_examples=60, deadline=None)
@given(words=words)
def test_every_token_is_in_its_word(tokenizer, words):
    text = " ".join(" ".join(words).split())
    (ids,), (tokens,) = tokens_of_words(tokenizer, [text])
    assert ids == transcript_ids(tokenizer, text)
    assert len(tokens) == len(text.split())
    assert sorted(itertools.chain(*tokens)) == list(range(len(ids) - 1)), "all but the end of the text"
    assert [tokenizer.decode([ids[i] for i in own]).strip() for own in tokens] == text.split()


def test_a_word_has_the_mean_probability_of_its_tokens():
    log_probs = torch.tensor([0.5, 1.0, 0.25, 0.75, 0.9]).log()
    assert word_probabilities(log_probs, [[0, 1], [2], [], [3]]) == pytest.approx([0.75, 0.25, None, 0.75])


def best_of_all_subsets(log_probs, words, cost):
    """The best score over all choices of words to skip, each by an alignment of what is left."""
    scores = []
    for kept in itertools.product([False, True], repeat=len(words)):
        target = []
        for word in itertools.compress(words, kept):
            target += [1, *word] if target else word
        (path,) = align(log_probs[None], [len(log_probs)], [target], blank=0)
        symbols = [0 if state % 2 == 0 else target[state // 2] for state in path.tolist()]
        skipped = sum(len(word) for word, is_kept in zip(words, kept, strict=True) if not is_kept)
        if symbols:
            scores.append(sum(log_probs[t, s].item() for t, s in enumerate(symbols)) - cost * skipped)
    return max(scores)


def test_skipped_words_are_the_best_choice_of_all():
    generator = torch.Generator().manual_seed(3)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    num_inner = 0  # rows with a skipped word between others
    for trial in range(24):
        fewest, most = (0, 4) if trial % 2 else (4, 6)
        rows = [[[draw(2, 6) for _ in range(draw(1, 4))] for _ in range(draw(fewest, most))] for _ in range(3)]
        targets = [[s for i, word in enumerate(row) for s in ([1, *word] if i else word)] for row in rows]
        lengths, cost = [draw(1, 30) for _ in rows], draw(0, 30) / 10
        log_probs = (2 * torch.randn(3, max(lengths), 6, generator=generator)).log_softmax(-1)
        for row, path in enumerate(align(log_probs, lengths, targets, blank=0, space=1, skip_cost=cost)):
            symbols = [0 if state % 2 == 0 else targets[row][state // 2] for state in path.tolist()]
            spans = _words(targets[row], space=1)
            kept = [any(2 * a < state < 2 * b + 2 and state % 2 for state in path.tolist()) for a, b in spans]
            said = [s for s, _ in itertools.groupby(symbols) if s]
            left = list(itertools.compress(rows[row], kept))
            assert said == [s for i, word in enumerate(left) for s in ([1, *word] if i else word)]
            skipped = sum(len(word) for word, is_kept in zip(rows[row], kept, strict=True) if not is_kept)
            score = sum(log_probs[row, t, s].item() for t, s in enumerate(symbols)) - cost * skipped
            assert score == pytest.approx(
                best_of_all_subsets(log_probs[row, : lengths[row]], rows[row], cost), abs=1e-3
            )
            num_inner += any(a and not b and c for a, b, c in itertools.combinations(kept, 3))
    assert num_inner > 5


def listened(text, pattern):
    """A text beside letters that are certain, one frame each: `_` is the blank, `|` the space."""
    ids = [LETTERS[{"_": BLANK, "|": SPACE}.get(letter, letter)] for letter in pattern]
    log_probs = torch.nn.functional.one_hot(torch.tensor(ids), len(LETTERS)).float().clamp(1e-6).log()[None]
    span = (0.0, len(pattern) * 0.02)
    (found,) = align_words([text], log_probs, [len(pattern)], LETTERS, offset_s=0.0, spans=[span])
    return found


def unheard(text, pattern):
    return [word.word for word in listened(text, pattern).words if word.is_unheard]


def test_a_word_that_was_not_heard_is_marked_and_takes_nothing_from_its_neighbours():
    found = listened("the big cat", "_the|____________cat_")
    the, big, cat = found.words
    assert (big.is_unheard, big.is_estimated, big.acoustic_score) == (True, True, 0.0)
    assert (the.start, cat.start) == (pytest.approx(0.02), pytest.approx(0.34))
    assert the.end <= big.start <= big.end <= cat.start
    assert the.acoustic_score == cat.acoustic_score == pytest.approx(1.0, abs=1e-3)
    assert found.missing == ()


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("the cat", "_the|_cat_", []),
        ("thank you", "__________", ["thank", "you"]),
        ("big the cat", "______the|_cat", ["big"]),
        ("the cat big", "_the|_cat_______", ["big"]),
        ("the cat cat", "_the|_cat_______", ["cat"]),
        ("the dog", "_the|_cat_", []),
        ("the kat", "_the|_cat_", []),
        ("the 42 cat", "_the|_fortytwo|cat_", []),
        ("the 42 cat", "_the|_________|cat_", ["42"]),
        ("", "___", []),
    ],
)
def test_words_that_were_heard_as_others_are_not_unheard(text, pattern, expected):
    assert unheard(text, pattern) == expected


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("the cat", "_the|_big|_cat_", [(0.12, 0.18)]),
        ("the cat", "_big|_the|_cat_", [(0.02, 0.08)]),
        ("the cat", "_the|_cat|_big_", [(0.22, 0.28)]),
        ("", "_big_", [(0.02, 0.08)]),
        ("the cat", "_the|_um|_cat_", []),
        ("the dog", "_the|_cat_", []),
        ("the 42 cat", "_the|_fortytwo|_cat_", []),
        ("", "____", []),
    ],
)
def test_letters_that_are_not_in_the_text_are_missing(text, pattern, expected):
    found = listened(text, pattern).missing
    assert [edge for span in found for edge in span] == pytest.approx([edge for span in expected for edge in span])


def test_no_speech_is_told_by_the_clearest_letters():
    silence, letter, word, click = torch.full((4, 8, 4), 1e-4)
    silence[:, 0], letter[:, 0], word[:, 0] = 1.0, 1.0, 1.0
    letter[2] = torch.tensor([1e-4, 1e-4, 1.0, 1e-4])
    word[2:5] = torch.tensor([1e-4, 1e-4, 0.5, 0.5])
    click[:, 1] = 1.0  # spaces only
    click[7] = torch.tensor([1e-4, 1e-4, 1.0, 1e-4])  # padding
    alphabet = {BLANK: 0, SPACE: 1, "a": 2, "b": 3}
    log_probs = torch.stack([silence, letter, word, click]).log()
    assert no_speech_probs(log_probs, [8, 8, 8, 7], alphabet) == pytest.approx([1.0, 2 / 3, 0.0, 1.0], abs=1e-3)
    assert no_speech_probs(log_probs[:, :1], [1] * 4, alphabet) == pytest.approx([1.0] * 4, abs=1e-3)


def test_confidence_changes_no_text_and_no_score_depends_on_the_batch(with_head, processor, spoken):
    transcriber, sources = Transcriber(with_head, processor), [samples for samples, _ in spoken[:6]]
    plain = transcriber.transcribe(sources, **FEW)
    one, many = (transcriber.transcribe(sources, confidence=True, batch_size=n, **FEW) for n in (1, 6))
    timed = transcriber.transcribe(sources, word_timestamps=True, **FEW)
    assert [t.text for t in plain] == [t.text for t in one] == [t.text for t in timed]
    for before, alone, together, words in zip(plain, one, many, timed, strict=True):
        for a, b, c, d in zip(before.segments, alone.segments, together.segments, words.segments, strict=True):
            assert (a.avg_logprob, a.no_speech_prob) == (None, None)
            assert not {"avg_logprob", "no_speech_prob", "words"} & a.to_dict().keys()
            assert (b.avg_logprob, b.no_speech_prob) == pytest.approx((c.avg_logprob, c.no_speech_prob), abs=1e-4)
            assert b.avg_logprob == pytest.approx(d.avg_logprob, abs=1e-4)
            assert b.words is None
            assert all(0 < word.probability < 1 for word in d.words)
            assert b.warnings == d.warnings


def test_segments_have_the_mean_log_probability_of_their_tokens(with_head, processor, spoken):
    (transcript,) = Transcriber(with_head, processor).transcribe([spoken[0][0]], word_timestamps=True, **FEW)
    (segment,) = transcript.segments
    values, mask = encoder_inputs(processor.feature_extractor, [spoken[0][0]])
    ids = transcript_ids(processor.tokenizer, segment.text)
    labels = torch.tensor([ids])
    features, num_frames = with_head.encode(values, mask)
    expected = -float(with_head(features=features, num_frames=num_frames, labels=labels).loss.detach())
    assert segment.avg_logprob == pytest.approx(expected, abs=1e-3)
    assert segment.to_dict()["avg_logprob"] == round(segment.avg_logprob, 4)


def test_confidence_of_an_encoder_without_head_is_the_decoders_alone(model, processor, spoken):
    (transcript,) = Transcriber(model, processor).transcribe([spoken[0][0]], confidence=True, **FEW)
    (segment,) = transcript.segments
    assert segment.avg_logprob < 0
    assert (segment.no_speech_prob, segment.words) == (None, None)
    assert not {"unheard", "missing"} & set(transcript.warnings)


def test_nothing_is_scored_unless_asked(with_head, processor, spoken, monkeypatch):
    monkeypatch.setattr(with_head, "target_log_probs", lambda *_: 1 / 0)
    monkeypatch.setattr(recognize, "align_words", lambda *_: 1 / 0)
    (transcript,) = Transcriber(with_head, processor).transcribe([spoken[0][0]], **FEW)
    assert transcript.text
    with pytest.raises(ZeroDivisionError):
        Transcriber(with_head, processor).transcribe([spoken[0][0]], confidence=True, **FEW)


def spoken_words(split, count):
    return [(text.split(), samples) for _, text, samples in utterances(split, count)]


def heard_in(bundled_encoder, recordings):
    encoder, head, extractor = bundled_encoder
    found = []
    for samples in recordings:
        features, num_frames = encode(encoder, *encoder_inputs(extractor, [samples]))
        found.append(head(features)[0, : int(num_frames[0])])
    return found


def aligned_with(bundled_encoder, heard, texts):
    head, found = bundled_encoder[1], []
    for at in range(0, len(texts), 32):
        rows = heard[at : at + 32]
        lengths = [len(row) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        spans = [(0.0, length * 0.02) for length in lengths]
        texts_of = [" ".join(words) for words in texts[at : at + 32]]
        found += align_words(texts_of, padded, lengths, head.alphabet, offset_s=head.offset_s, spans=spans)
    return found


@pytest.mark.parametrize(
    ("split", "count", "num_planted"),
    [
        ("test", 24, 1),
        ("test_unseen", 24, 1),
        pytest.param("dev", 120, 4, marks=pytest.mark.slow),
        pytest.param("test", 200, 4, marks=pytest.mark.slow),
        pytest.param("test_unseen", 200, 4, marks=pytest.mark.slow),
    ],
)
def test_planted_words_are_found_and_right_text_is_left_alone(bundled_encoder, split, count, num_planted):
    rng, spoken = random.Random(0), spoken_words(split, count)
    heard = heard_in(bundled_encoder, [samples for _, samples in spoken])
    vocabulary = sorted({word for words, _ in spoken for word in words})
    right = aligned_with(bundled_encoder, heard, [words for words, _ in spoken])
    inserted, replaced, deleted, places, lengths = [], [], [], [], []
    for words, _ in spoken:
        for _ in range(num_planted):
            i, j, k = rng.randrange(len(words) + 1), rng.randrange(len(words)), rng.randrange(len(words))
            inserted.append([*words[:i], rng.choice(vocabulary), *words[i:]])
            other = rng.choice([word for word in vocabulary if word != words[j]])
            replaced.append([*words[:j], other, *words[j + 1 :]])
            deleted.append([*words[:k], *words[k + 1 :]])
            places.append(i)
            lengths.append(len(words[k]))
    again = [row for row in heard for _ in range(num_planted)]
    extra, swapped, shorter = (aligned_with(bundled_encoder, again, texts) for texts in (inserted, replaced, deleted))
    caught = []
    for found, texts, i in zip(extra, inserted, places, strict=True):
        near = range(max(0, i - 1), min(len(texts), i + 2))  # of two equal neighbours either may be the one
        caught.append(any(found.words[j].is_unheard and texts[j] == texts[i] for j in near))
    longer = [bool(one.missing) for one, length in zip(shorter, lengths, strict=True) if length >= 4]
    false = [word.is_unheard for one in right for word in one.words]
    is_missing = [bool(one.missing) for one in shorter]
    print(f"{split}, right text: unheard in {sum(false)} of {len(false)} words", end="; ")
    print(f"missing in {sum(bool(one.missing) for one in right)} of {len(right)} texts")
    print(f"{split}, {len(caught)} inserted words: {np.mean(caught):.1%} unheard; as many deleted ones:", end=" ")
    print(f"{np.mean(is_missing):.1%} missing, {np.mean(longer):.1%} of those with four letters or more")
    print(f"{split}, replaced words: {np.mean([any(w.is_unheard for w in one.words) for one in swapped]):.1%}", end=" ")
    print(f"unheard, {np.mean([bool(one.missing) for one in swapped]):.1%} missing")
    assert np.mean(false) <= 0.005
    assert np.mean([bool(one.missing) for one in right]) <= 0.02
    assert np.mean(caught) >= 0.95
    assert np.mean(longer) >= 0.8


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_words_invented_in_noise_are_unheard(bundled_encoder, count):
    """Pairs of utterances with 1.5 s of noise between them, 20 dB below speech, where the text has words too many."""
    rng, random_noise = random.Random(1), np.random.default_rng(1)
    spoken = spoken_words("test_unseen", 2 * count)
    vocabulary = sorted({word for words, _ in spoken for word in words})
    recordings, texts, invented = [], [], []
    for (before, first), (after, second) in zip(spoken[::2], spoken[1::2], strict=True):
        level = 0.1 * np.sqrt(np.mean(first**2))
        noise = (level * random_noise.standard_normal(24_000)).astype(np.float32)
        recordings.append(np.concatenate([first, noise, second]))
        phrase = [rng.choice(vocabulary) for _ in range(rng.randrange(1, 5))]
        texts.append([*before, *phrase, *after])
        invented.append(range(len(before), len(before) + len(phrase)))
    heard = heard_in(bundled_encoder, recordings)
    caught, false = [], []
    for found, places in zip(aligned_with(bundled_encoder, heard, texts), invented, strict=True):
        for i, word in enumerate(found.words):
            (caught if i in places else false).append(word.is_unheard)
    print(f"unheard: {np.mean(caught):.1%} of {len(caught)} invented words, {sum(false)} of {len(false)} spoken ones")
    assert np.mean(caught) >= 0.9
    assert np.mean(false) <= 0.01
