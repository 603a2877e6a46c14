import random

import jiwer
import kaldialign
import pytest

from pipelines.errors import EvaluationError
from pipelines.evaluate.normalizers import NAMES, open_normalizer
from pipelines.recipes.recipe import CorpusSection
from pipelines.scoring import (
    MIN_ERRORS,
    MIN_UTTERANCES,
    count_character_errors,
    count_word_errors,
    probability_of_improvement,
    wer_interval,
)

VOCABULARY = [*"abcdefgh", "i", "set", "up", "setup", "note", "book", "notebook"]


def random_pairs(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Pairs with every kind of trouble: empty references, empty and one-letter hypotheses, loops, cut ends."""
    rng = random.Random(seed)
    references, hypotheses = [], []
    for _ in range(count):
        reference = rng.choices(VOCABULARY, k=rng.choice([0, 1, 2, 5, 10, 30]))
        hypothesis = [rng.choice(VOCABULARY) if rng.random() < 0.2 else word for word in reference]
        hypothesis = [word for word in hypothesis if rng.random() > 0.1]
        kind = rng.random()
        if kind < 0.1:
            hypothesis += [rng.choice(VOCABULARY)] * rng.randint(1, 8)
        elif kind < 0.2:
            hypothesis = [rng.choice("aix")]
        elif kind < 0.25:
            hypothesis = []
        references.append(" ".join(reference))
        hypotheses.append(" ".join(hypothesis))
    return references, hypotheses


def test_ten_thousand_pairs_agree_with_jiwer_and_kaldialign_to_the_last_digit() -> None:
    references, hypotheses = random_pairs(10_000)
    ours = count_word_errors(references, hypotheses)
    assert ours.wer == jiwer.wer(references, hypotheses)
    kaldi = kaldialign.batch_error_rate([r.split() for r in references], [h.split() for h in hypotheses])
    assert (ours.wer, ours.errors, ours.words) == (kaldi["err_rate"], kaldi["total"], kaldi["ref_len"])
    # tools split ties differently, but insertions minus deletions is a matter of lengths
    assert ours.insertions - ours.deletions == kaldi["ins"] - kaldi["del"]
    characters = count_character_errors(references, hypotheses)
    kaldi = kaldialign.batch_error_rate([list(r) for r in references], [list(h) for h in hypotheses])
    assert (characters.cer, characters.characters) == (kaldi["err_rate"], kaldi["ref_len"])
    assert characters.insertions - characters.deletions == kaldi["ins"] - kaldi["del"]


def edits(reference: list[str], hypothesis: list[str]) -> int:
    """The textbook's edit distance, in three lines of our own."""
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        above, row = row, [i]
        for j, other in enumerate(hypothesis, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (word != other)))
    return row[-1]


def test_each_pair_has_as_many_errors_as_the_edit_distance() -> None:
    for reference, hypothesis in zip(*random_pairs(300), strict=True):
        assert count_word_errors([reference], [hypothesis]).errors == edits(reference.split(), hypothesis.split())


def test_the_set_is_counted_as_a_whole_and_not_averaged() -> None:
    assert count_word_errors(["a b c d", "e"], ["a b c d", "x"]).wer == pytest.approx(1 / 5)


def test_words_where_the_reference_is_empty_are_insertions() -> None:
    counted = count_word_errors(["", "a b"], ["x y", "a b"])
    assert (counted.insertions, counted.words, counted.wer) == (2, 2, 1.0)
    assert count_word_errors([""], [""]).wer == 0.0
    assert count_word_errors([""], ["x"]).wer == float("inf")
    assert count_word_errors([], []).wer == 0.0


def test_white_space_is_not_a_word() -> None:
    assert count_word_errors(["  a \t b "], ["a b\n"]).errors == 0
    assert count_word_errors([" "], ["  "]).errors == 0


def test_lists_that_are_not_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 references and 1 hypotheses; expected pairs"):
        count_word_errors(["a", "b"], ["a"])


def test_intervals_hold_the_rate_and_shrink_with_more_utterances() -> None:
    references, hypotheses = random_pairs(2_000)
    few, many = (wer_interval(references[:n], hypotheses[:n], replications=1_000) for n in (200, 2_000))
    assert few is not None
    assert many is not None
    assert many.low < count_word_errors(references, hypotheses).wer < many.high
    assert many.high - many.low < few.high - few.low


def test_there_is_no_interval_where_there_is_too_little_to_resample() -> None:
    right, wrong = ["a b"] * 200, ["a x"] * 200
    assert wer_interval([], []) is None
    assert wer_interval(right[: MIN_UTTERANCES - 1], wrong[: MIN_UTTERANCES - 1]) is None
    assert wer_interval(right, [*wrong[: MIN_ERRORS - 1], *right[MIN_ERRORS - 1 :]]) is None
    assert wer_interval(right, [*wrong[:MIN_ERRORS], *right[MIN_ERRORS:]]) is not None
    assert wer_interval([""] * 60, ["x"] * 60) is None, "a rate without reference words"


def simulated_coverage(wer: float, draws: int, utterances: int, replications: int) -> float:
    """Draw evaluations of a system of known WER, and count how many intervals hold it.

    Utterances have 3 to 20 words; each has its own error rate (speech differs), with mean `wer`. Words are then wrong
    independently, so the system's WER is `wer` exactly.
    """
    rng = random.Random(7)
    held = 0
    for draw in range(draws):
        references, hypotheses = [], []
        for _ in range(utterances):
            words = ["w"] * rng.randint(3, 20)
            rate = rng.betavariate(10 * wer, 10 * (1 - wer))
            references.append(" ".join(words))
            hypotheses.append(" ".join("x" if rng.random() < rate else word for word in words))
        interval = wer_interval(references, hypotheses, replications=replications, seed=draw)
        held += interval is not None and interval.low <= wer <= interval.high
    return held / draws


@pytest.mark.parametrize("wer", [0.02, 0.12, 0.30])
def test_intervals_cover_the_true_rate_in_95_of_100_draws(wer: float) -> None:
    assert 0.93 <= simulated_coverage(wer, draws=500, utterances=300, replications=300) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("wer", [0.02, 0.05, 0.12, 0.30])
def test_intervals_cover_the_true_rate_in_two_thousand_draws(wer: float) -> None:
    assert 0.935 <= simulated_coverage(wer, draws=2_000, utterances=600, replications=300) <= 0.965  # 0.95 and 3 s.d.


def test_a_system_with_fewer_errors_probably_improves() -> None:
    references = ["one two three four"] * 50
    worse = ["one two three"] * 25 + references[25:]
    better = ["one two three"] * 5 + references[5:]
    assert probability_of_improvement(references, worse, better, replications=1_000) > 0.99
    assert probability_of_improvement(references, better, worse, replications=1_000) < 0.01
    assert probability_of_improvement(references, worse, worse, replications=1_000) == 0.0


def test_normalisers_do_what_their_names_promise() -> None:
    section = CorpusSection(path=".", text_case="lower", text_punctuation="remove")
    text = "  It's Mr. Smith's COLOUR, twenty-one! "
    results = {name: open_normalizer(name, section).apply(text) for name in NAMES}
    assert results["recipe"] == "it's mr smith's colour twenty one"
    assert results["whisper"] == "it is mister smith is color 21"
    assert results["none"] == "It's Mr. Smith's COLOUR, twenty-one!"
    assert open_normalizer("whisper", section).detail.startswith("whisper-normalizer 0.")
    with pytest.raises(EvaluationError, match="no normaliser 'kaldi'; expected one of recipe, whisper"):
        open_normalizer("kaldi", section)
