"""Word times: CTC alignment against the definition, and the bundled encoder's head against the synthesiser's events."""

import itertools
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from bundled import utterances

from tinyaudio.model.align import ANYTHING, BLANK, SPACE, align, align_words, spell
from tinyaudio.model.ctc_head import CTCHead, load_alphabet
from tinyaudio.model.encoder import (
    encode,
    encoder_inputs,
    load_encoder,
    load_encoder_with_head,
    load_feature_extractor,
)
from tinyaudio.model.errors import ModelError
from tinyaudio.model.frozen import weights_digest
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.recognize import Options, Recognizer
from tinyaudio.transcribe import Transcriber

ROOT = Path(__file__).parent.parent
TRUTH = json.loads((ROOT / "tests/data/word_times.json").read_text())  # by python -m pipelines.demo.make.word_times
LETTERS = {BLANK: 0, SPACE: 1, **{letter: i + 2 for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz'")}}
FEW = {"num_beams": 1, "max_new_tokens": 4}


def collapsed(path):
    """CTC's own definition: repeats are one, then blanks are dropped (Graves et al. 2006, section 3.1)."""
    return [symbol for symbol, _ in itertools.groupby(path) if symbol != 0]


def best_by_trying_all(log_probs, target):
    """The best score of all paths that collapse to the target, by trying every path."""
    paths = itertools.product(range(log_probs.shape[1]), repeat=len(log_probs))
    scores = [sum(log_probs[t, s].item() for t, s in enumerate(path)) for path in paths if collapsed(path) == target]
    return max(scores, default=None)


def best_by_forward_recursion(log_probs, target):
    """The best score by the textbook recursion over prefixes of the target, one cell at a time, in plain Python."""
    blanked = [0, *(s for symbol in target for s in (symbol, 0))]
    table = {(0, 0): log_probs[0][0], (0, 1): log_probs[0][blanked[1]]} if target else {(0, 0): log_probs[0][0]}
    for t in range(1, len(log_probs)):
        for s, symbol in enumerate(blanked):
            sources = [s, s - 1, *([s - 2] if s > 1 and symbol not in (0, blanked[s - 2]) else [])]
            known = [table[t - 1, source] for source in sources if (t - 1, source) in table]
            if known:
                table[t, s] = max(known) + log_probs[t][symbol]
    return max(table[len(log_probs) - 1, s] for s in range(len(blanked))[-2:] if (len(log_probs) - 1, s) in table)


def random_log_probs(generator, *shape):
    return (2 * torch.randn(*shape, generator=generator)).log_softmax(-1)


def symbols_of(path, target):
    return [0 if state % 2 == 0 else target[state // 2] for state in path.tolist()]


def test_alignment_is_the_best_of_all_paths():
    generator = torch.Generator().manual_seed(0)
    for target in ([1], [1, 2], [1, 1], [2, 1, 2], [1, 1, 1], [], [1, 2, 2, 1]):
        log_probs = random_log_probs(generator, 1, 6, 3)
        (path,) = align(log_probs, [6], [target], blank=0)
        expected = best_by_trying_all(log_probs[0], target)
        if expected is None:
            assert not len(path), "the target needs more frames"
            continue
        symbols = symbols_of(path, target)
        assert collapsed(symbols) == target
        assert sum(log_probs[0, t, s].item() for t, s in enumerate(symbols)) == pytest.approx(expected, abs=1e-5)


def test_alignment_of_a_batch_equals_the_textbook_recursion_row_by_row():
    generator = torch.Generator().manual_seed(1)
    num_frames = [90, 40, 61, 25]
    targets = [torch.randint(1, 12, (n,), generator=generator).tolist() for n in (30, 12, 1, 12)]
    log_probs = random_log_probs(generator, 4, 90, 12)
    for row, path in enumerate(align(log_probs, num_frames, targets, blank=0)):
        symbols = symbols_of(path, targets[row])
        assert len(symbols) == num_frames[row]
        assert collapsed(symbols) == targets[row]
        score = sum(log_probs[row, t, s].item() for t, s in enumerate(symbols))
        expected = best_by_forward_recursion(log_probs[row, : num_frames[row]].tolist(), targets[row])
        assert score == pytest.approx(expected, abs=1e-3)


def test_targets_that_match_anything_never_push_letters_away():
    generator = torch.Generator().manual_seed(2)
    log_probs = random_log_probs(generator, 1, 40, 8)
    (path,) = align(log_probs, [40], [[3, ANYTHING, 4]], blank=0)
    assert set(path.tolist()) >= {1, 3, 5}
    score = sum(
        (log_probs[0, t].max() if state == 3 else log_probs[0, t, [0, 3, 0, 0, 0, 4, 0][state]]).item()
        for t, state in enumerate(path.tolist())
    )
    both = max(best_by_forward_recursion(log_probs[0].tolist(), [3, any_, 4]) for any_ in (1, 2, 5, 6, 7))
    assert score >= both - 1e-4, "at least as good as any one symbol in between"


def heard(pattern):
    """Log-probabilities of letters that are certain, one frame each: `_` is the blank, `|` the space."""
    ids = [LETTERS[{"_": BLANK, "|": SPACE}.get(letter, letter)] for letter in pattern]
    return torch.nn.functional.one_hot(torch.tensor(ids), len(LETTERS)).float().clamp(1e-6).log()[None]


def times_of(text, pattern, span=None, offset_s=0.0):
    log_probs = heard(pattern)
    length_s = log_probs.shape[1] * 0.02
    (found,) = align_words(
        [text], log_probs, [log_probs.shape[1]], LETTERS, offset_s=offset_s, spans=[span or (0, length_s)]
    )
    return found.words


def test_words_begin_at_their_first_letter_and_last_to_the_next_word():
    the, cat = times_of("the cat", "__t_h_e_|_c_a_t____")
    assert (the.word, the.start, the.end) == ("the", pytest.approx(0.04), pytest.approx(0.2))
    assert (cat.word, cat.start, cat.end) == ("cat", pytest.approx(0.2), pytest.approx(0.38))
    assert the.acoustic_score == pytest.approx(1.0, abs=1e-3)
    earlier = times_of("the cat", "__t_h_e_|_c_a_t____", offset_s=0.02)
    assert [word.start for word in earlier] == pytest.approx([0.02, 0.18])


def test_a_word_ends_before_a_pause():
    the, cat = times_of("the cat", "the" + "_" * 30 + "|cat" + "_" * 30)
    assert the.end == pytest.approx(0.1)
    assert cat.end == pytest.approx(cat.start + 0.04 + 0.06)


def test_case_accents_and_punctuation_do_not_matter_and_capitals_are_an_alphabet_too():
    assert spell("Caf\u00e9,", LETTERS) == spell("cafe", LETTERS)
    assert spell("don\u2019t!", LETTERS) == spell("don't", LETTERS)
    capitals = {symbol.upper(): i for symbol, i in LETTERS.items()}
    assert spell("cat", capitals) == spell("cat", LETTERS)
    assert spell("42", LETTERS) == spell("4th", LETTERS) == spell("\u732b", LETTERS) == spell("--", LETTERS) == [-1]


def test_words_that_cannot_be_spelled_lie_between_their_neighbours_and_are_marked():
    words = times_of("the 42 7 cat", "_the|_" + "fortytwo|seven" + "_|cat__")
    assert [word.is_estimated for word in words] == [False, True, True, False]
    assert words[1].start == pytest.approx(words[0].end)
    assert words[2].start == pytest.approx(words[1].end)
    assert words[2].end == pytest.approx(words[3].start) == pytest.approx(0.02 * 22)
    assert words[1].acoustic_score is None
    alone = times_of("42", "__ab__", span=(0.02, 0.1))
    assert (alone[0].start, alone[0].end, alone[0].is_estimated) == (0.02, 0.1, True)


def test_text_that_is_longer_than_its_audio_shares_the_span():
    words = times_of("a cat and a dog", "___", span=(0.0, 0.06))
    assert [word.word for word in words] == ["a", "cat", "and", "a", "dog"]
    assert all(word.is_estimated for word in words)
    assert all(a.end == pytest.approx(b.start) for a, b in pairwise(words))
    assert words[-1].end == pytest.approx(0.06)
    assert times_of("", "___") == ()


def test_words_that_were_not_heard_have_a_low_score():
    the, dog = times_of("the dog", "_the|cat_")
    assert the.acoustic_score > 0.99
    assert dog.acoustic_score < 0.01


def test_encoder_is_the_same_with_and_without_its_head(ctc_folder, spoken):
    alone, (encoder, head) = load_encoder(str(ctc_folder)), load_encoder_with_head(str(ctc_folder))
    assert weights_digest(encoder) == weights_digest(alone)
    values, mask = encoder_inputs(load_feature_extractor(str(ctc_folder)), [samples for samples, _ in spoken[:2]])
    features, num_frames = encode(encoder, values, mask)
    assert torch.equal(features, encode(alone, values, mask)[0])
    from transformers import HubertForCTC

    whole = HubertForCTC.from_pretrained(ctc_folder).eval()
    logits = whole(values, attention_mask=mask).logits
    for row, length in enumerate(num_frames.tolist()):
        expected = logits[row, :length].log_softmax(-1)
        torch.testing.assert_close(head(features)[row, :length], expected, atol=1e-5, rtol=1e-4)
    assert head.alphabet[BLANK] == 0
    assert head.alphabet[SPACE] == 4
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_an_encoder_without_head_works_as_before_and_word_times_say_why_not(model, processor, spoken):
    assert model.ctc_head is None
    transcriber = Transcriber(model, processor)
    (transcript,) = transcriber.transcribe([spoken[0][0]], **FEW)
    assert transcript.segments[0].words is None
    assert "words" not in transcript.to_dict()["segments"][0]
    with pytest.raises(ModelError, match=r"found none in .*words have no times"):
        transcriber.transcribe([spoken[0][0]], word_timestamps=True, **FEW)


def test_a_checkpoint_knows_the_letters_without_the_encoders_tokenizer(with_head, processor, tmp_path, ctc_folder):
    model, checkpoint = with_head, tmp_path / "with-head"
    model.config.ctc_alphabet = load_alphabet(str(ctc_folder))
    model.config.ctc_head_digest = weights_digest(model.ctc_head)
    model.save_pretrained(checkpoint)
    assert not [name for name in saved_names(checkpoint) if not name.startswith("projector.")]
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((ctc_folder / name).read_bytes())
    assert load_alphabet(str(bare)) is None
    loaded = TinyAudioForConditionalGeneration.from_pretrained(checkpoint, encoder_id=str(bare))
    assert isinstance(loaded.ctc_head, CTCHead)
    assert loaded.ctc_head.alphabet == model.ctc_head.alphabet
    with pytest.raises(ModelError, match="expected the ctc_head weights 000000000000"):
        TinyAudioForConditionalGeneration.from_pretrained(checkpoint, ctc_head_digest="0" * 64)


def saved_names(checkpoint):
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        return list(file.keys())


def edges_of(words):
    return [edge for word in words for edge in (word.start, word.end)]


def test_word_times_change_no_text_and_stay_inside_their_segment(with_head, processor, spoken):
    transcriber, sources = Transcriber(with_head, processor), [samples for samples, _ in spoken[:6]]
    plain = transcriber.transcribe(sources, **FEW)
    timed = transcriber.transcribe(sources, word_timestamps=True, batch_size=1, **FEW)
    batched = transcriber.transcribe(sources, word_timestamps=True, batch_size=16, **FEW)
    assert [t.text for t in plain] == [t.text for t in timed]
    assert any(t.text for t in plain)
    for one, many in zip(timed, batched, strict=True):
        for segment, same in zip(one.segments, many.segments, strict=True):
            assert [word.word for word in segment.words] == segment.text.split()
            assert all(segment.start <= w.start <= w.end <= segment.end + 1e-9 for w in segment.words)
            assert all(before.end <= after.start + 1e-9 for before, after in pairwise(segment.words))
            assert edges_of(same.words) == pytest.approx(edges_of(segment.words))


def test_pipeline_returns_words_in_the_format_of_transformers(with_head, processor, spoken):
    from transformers import AutomaticSpeechRecognitionPipeline

    from tinyaudio.model.pipeline_tinyaudio import TinyAudioPipeline

    asr = TinyAudioPipeline(
        model=with_head, feature_extractor=processor.feature_extractor, tokenizer=processor.tokenizer
    )
    assert isinstance(asr, AutomaticSpeechRecognitionPipeline)
    output = asr(spoken[0][0], return_timestamps="word", **FEW)
    assert " ".join(chunk["text"] for chunk in output["chunks"]) == output["text"]
    assert all(len(chunk["timestamp"]) == 2 for chunk in output["chunks"])
    with pytest.raises(ValueError, match="return_timestamps='char' is not supported"):
        asr(spoken[0][0], return_timestamps="char", **FEW)


def timed(bundled_encoder, texts, recordings, batch_size, offset_s=None):
    encoder, head, extractor = bundled_encoder
    words = []
    for at in range(0, len(texts), batch_size):
        part = recordings[at : at + batch_size]
        features, num_frames = encode(encoder, *encoder_inputs(extractor, part))
        found = align_words(
            texts[at : at + batch_size],
            head(features),
            num_frames.tolist(),
            head.alphabet,
            offset_s=head.offset_s if offset_s is None else offset_s,
            spans=[(0.0, len(samples) / 16_000 - 0.06) for samples in part],  # corpus.EDGE_SILENCE_S
        )
        words += [one.words for one in found]
    return words


def edges_off(bundled_encoder, split, count, **options):
    """By how many seconds onsets and ends are late, where the truth is known."""
    ids, texts, recordings = zip(*utterances(split, count), strict=True)
    onsets, ends = [], []
    for name, words in zip(ids, timed(bundled_encoder, texts, recordings, 16, **options), strict=True):
        for i, word in enumerate(words):
            start, end = TRUTH[name][i : i + 2]
            onsets += [] if start is None else [word.start - start / 1000]
            ends += [] if end is None else [word.end - end / 1000]
    return np.array(onsets), np.array(ends)


@pytest.mark.parametrize(
    ("split", "count"),
    [
        ("test", 32),
        ("test_unseen", 32),
        pytest.param("test", 200, marks=pytest.mark.slow),
        pytest.param("test_unseen", 200, marks=pytest.mark.slow),
    ],
)
def test_words_are_where_the_synthesiser_says(bundled_encoder, split, count):
    for name, off in zip(("onsets", "ends"), edges_off(bundled_encoder, split, count), strict=True):
        mean, within = np.abs(off).mean(), (np.abs(off) <= 0.08).mean()
        print(f"{split}, {len(off)} {name}: {1000 * mean:.1f} ms off on average, {within:.1%} within 80 ms")
        assert mean <= 0.025
        assert within >= 0.95


def test_the_offset_of_the_bundled_head_is_its_median_on_dev(bundled_encoder):
    onsets, _ = edges_off(bundled_encoder, "dev", 120, offset_s=0.0)
    measured = np.median(onsets[onsets != 0])  # a first word begins at the first sample, which no letter precedes
    print(f"median {1000 * measured:.1f} ms over {len(onsets)} words")
    assert bundled_encoder[1].offset_s == pytest.approx(measured, abs=0.002)


def test_words_are_the_same_at_any_batch_size(bundled_encoder):
    _, texts, recordings = zip(*utterances("test_unseen", 16), strict=True)
    alone, together = timed(bundled_encoder, texts, recordings, 1), timed(bundled_encoder, texts, recordings, 16)
    for one, many in zip(alone, together, strict=True):
        assert edges_of(one) == pytest.approx(edges_of(many))


class TruthfulRecognizer(Recognizer):
    """Writes the words that were said in each piece, and finds their times with the bundled head."""

    def __init__(self, model, processor, bundled_encoder, said):
        encoder, self.head, extractor = bundled_encoder
        model.encode, model.ctc_head = (lambda values, mask: encode(encoder, values, mask)), self.head
        model.target_log_probs = lambda features, num_frames, ids: [torch.zeros(len(row)) for row in ids]
        super().__init__(model, extractor, processor.tokenizer)
        self.said, self.texts = said, []

    def decode(self, pieces, options):
        inside = [(p.begin_s, p.begin_s + len(p.samples) / 16_000) for p in pieces]
        self.texts = [" ".join(w for w, a, b in self.said if begin <= a and b <= end) for begin, end in inside]
        return super().decode(pieces, replace(options, draft="none"))

    def _write(self, *_):
        return [(text, True) for text in self.texts]


def joined(count, pause_s):
    """Utterances in one recording, and its words: [(word, start, end)], in seconds."""
    parts, said, at_s = [], [], 0.0
    for name, text, samples in utterances("test_unseen", count):
        edges = [edge / 1000 for edge in TRUTH[name]]
        said += [(word, at_s + a, at_s + b) for word, (a, b) in zip(text.split(), pairwise(edges), strict=True)]
        parts += [samples, np.zeros(int(pause_s * 16_000), np.float32)]
        at_s += (len(parts[-2]) + len(parts[-1])) / 16_000
    return np.concatenate(parts), said


@pytest.mark.parametrize(("pause_s", "window_s", "has_seams"), [(0.7, 4.0, False), (0.0, 4.0, True)])
def test_words_are_right_across_pieces_and_seams(model, processor, bundled_encoder, pause_s, window_s, has_seams):
    """Joined at pauses, and without any, where windows overlap; pauses stay out of the words."""
    samples, said = joined(12, pause_s)
    found = []
    for batch_size in (1, 16):
        recognizer = TruthfulRecognizer(model, processor, bundled_encoder, said)
        options = Options(batch_size=batch_size, window_s=window_s, word_timestamps=True, num_beams=1)
        (transcript,) = recognizer.stream([samples], options)
        words = [word for segment in transcript.segments for word in segment.words]
        assert " ".join(word.word for word in words) == transcript.text
        assert ("no_pause" in transcript.warnings) == has_seams
        found.append(words)
    assert [(w.word, w.start) for w in found[0]] == [(w.word, pytest.approx(w.start)) for w in found[1]]
    assert all(before.end <= after.start + 1e-9 for before, after in pairwise(found[0]))
    assert [word.word for word in found[0]] == [word for word, *_ in said]
    onsets, ends = (
        np.array([getattr(word, edge) - truth[i] for word, truth in zip(found[0], said, strict=True)])
        for i, edge in ((1, "start"), (2, "end"))
    )
    for name, off in (("onsets", onsets), ("ends", ends)):
        mean, within = np.abs(off).mean(), (np.abs(off) <= 0.08).mean()
        print(f"{len(off)} {name}, pauses of {pause_s} s: {1000 * mean:.1f} ms, {within:.1%} within 80 ms")
        assert mean <= 0.025
        assert within >= 0.95
