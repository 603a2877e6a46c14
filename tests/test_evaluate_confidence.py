"""How `eval` judges confidence: areas and calibration against their definitions, and what the report says of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import prediction
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate_report import SETTINGS, summary_of

from pipelines.evaluate.confidence import area_under_roc, measure_confidence
from pipelines.evaluate.eval_sets import Clip, Utterance
from pipelines.evaluate.normalizers import make_pairs, open_normalizer
from pipelines.evaluate.predictions import Prediction, WordScore, read_predictions, write_predictions
from pipelines.evaluate.providers.base import ProviderOptions
from pipelines.evaluate.providers.tinyaudio import TinyAudioProvider
from pipelines.evaluate.report.report import write_reports
from pipelines.evaluate.summary import load_summary, save_summary
from tinyaudio.transcribe import Transcriber


def scored(i: int, text: str, *words: tuple[str, float, float | None], **changes: Any) -> Prediction:
    """A prediction from (word, probability, acoustic score); words with the score 0 were not heard."""
    scores = tuple(WordScore(word=word, probability=p, acoustic_score=a, is_unheard=a == 0.0) for word, p, a in words)
    return prediction(i, text, " ".join(word for word, *_ in words), words=scores, **changes)


def measured(*predictions: Prediction, normalizer: str = "none") -> Any:
    chosen = open_normalizer(normalizer, SETTINGS.section)
    return measure_confidence(make_pairs(predictions, chosen), chosen)


@given(words=st.lists(st.tuples(st.integers(0, 5).map(lambda n: n / 5), st.booleans()), max_size=40))
def test_area_is_the_share_of_pairs_in_the_right_order(words: list[tuple[float, bool]]) -> None:
    right = [score for score, is_right in words if is_right]
    wrong = [score for score, is_right in words if not is_right]
    found = area_under_roc(np.array([s for s, _ in words], float), np.array([r for _, r in words], bool))
    if not right or not wrong:
        assert found is None
        return
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in right for b in wrong]
    assert found == pytest.approx(sum(pairs) / len(pairs))


@given(words=st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40))
def test_calibration_error_is_the_mean_distance_in_tenths(words: list[tuple[float, bool]]) -> None:
    rows = [scored(i, "yes", ("yes" if is_right else "no", score, None)) for i, (score, is_right) in enumerate(words)]
    probability, acoustic = measured(*rows).scores
    distance = 0.0
    for tenth in range(10):
        inside = [(s, r) for s, r in words if tenth / 10 <= s < (tenth + 1) / 10 or (tenth == 9 and s == 1.0)]
        if inside:
            distance += abs(sum(s for s, _ in inside) - sum(r for _, r in inside))
    assert probability.calibration_error == pytest.approx(distance / len(words), abs=0.02)
    assert sum(one.num_words for one in probability.bins) == probability.num_words == len(words)
    assert sum(one.num_right for one in probability.bins) == sum(r for _, r in words)
    assert (acoustic.num_words, acoustic.auc, acoustic.bins) == (0, None, ())


def test_substituted_and_inserted_words_are_wrong_and_warnings_are_checked() -> None:
    found = measured(
        scored(0, "the cat sat", ("the", 0.9, 0.9), ("dog", 0.2, 0.1), ("sat", 0.9, 0.8)),
        scored(1, "a cat", ("a", 0.8, 0.9), ("very", 0.3, 0.0), ("cat", 0.9, 0.9)),
        scored(2, "a big cat", ("a", 0.9, 0.0), ("cat", 0.9, None), warnings=("missing",)),
        scored(3, "on a mat", ("on", 0.9, 0.9), ("mat", 0.9, 0.9)),
        scored(4, "now", ("now", 0.1, 0.9), warnings=("missing", "truncated")),
        prediction(5, "no scores", "none"),
        prediction(6, "failed"),
    )
    probability, acoustic = found.scores
    assert (probability.name, probability.num_words, probability.num_wrong) == ("probability", 11, 2)
    assert (acoustic.name, acoustic.num_words, acoustic.num_wrong) == ("acoustic_score", 10, 2)
    assert probability.auc == pytest.approx(16 / 18), "one right word is below both wrong ones"
    unheard, missing = found.warnings
    assert (unheard.code, unheard.num_scored, unheard.num_warned, unheard.num_wrong) == ("unheard", 11, 2, 1)
    assert (unheard.num_errors, unheard.num_found) == (1, 1)
    assert (missing.code, missing.num_scored, missing.num_warned, missing.num_wrong) == ("missing", 5, 2, 1)
    assert (missing.num_errors, missing.num_found) == (2, 1)
    assert found.num_skipped == 0


def test_words_are_compared_as_the_normalizer_leaves_them() -> None:
    found = measured(
        scored(0, "It is Mr. Smith", ("it's", 0.9, 0.9), ("-", 0.1, None), ("Mister", 0.8, 0.9), ("Smyth,", 0.3, 0.1)),
        scored(1, "two hundred", ("two", 0.9, 0.9), ("hundred", 0.9, 0.9)),
        normalizer="whisper",
    )
    assert found.num_skipped == 1, "two words became one number"
    (probability, _) = found.scores
    assert (probability.num_words, probability.num_wrong, probability.auc) == (3, 1, 1.0)


def test_scores_are_in_predictions_summary_and_reports(tmp_path: Path) -> None:
    rows = [scored(0, "the cat", ("the", 0.9, 0.75), ("hat", 0.25, 0.0)), prediction(1, "a dog", "a dog")]
    write_predictions(tmp_path / "predictions.jsonl", rows)
    assert read_predictions(tmp_path / "predictions.jsonl") == rows
    summary = summary_of(*rows)
    save_summary(tmp_path / "summary.json", summary)
    assert load_summary(tmp_path / "summary.json").confidence == summary.confidence
    write_reports(tmp_path, summary)
    markdown, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert "| probability | 2 | 1 | 1.000 |" in markdown
    assert "| unheard | 2 words | 1 | 1 |" in markdown
    assert "| 0.2 to 0.3 | 1 | 0.250 | 0.00 % |" in markdown
    assert "share of right words" in page[page.index("<h2>Confidence</h2>\n<figure>") :]


def test_a_report_without_scores_has_no_such_section(tmp_path: Path) -> None:
    summary = summary_of(prediction(0, "a dog", "a dog"))
    assert summary.confidence is None
    write_reports(tmp_path, summary)
    assert "Confidence" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("has_head", [True, False])
def test_our_provider_scores_words_where_the_encoder_has_a_head(
    processor: Any, spoken: Any, has_head: bool, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue("with_head" if has_head else "model")
    options = ProviderOptions(model="tiny", device="cpu", num_beams=1, max_new_tokens=4)
    provider = TinyAudioProvider(transcriber=Transcriber(model, processor), options=options)
    clips = [
        Clip(utterance=Utterance(utterance_id=str(i), source_id=str(i), transcript=text), samples=samples)
        for i, (samples, text) in enumerate(spoken[:2])
    ]
    for one in provider.transcribe(clips):
        assert one.pred_text
        assert (one.words is None) == (not has_head)
        if one.words is not None:
            assert [word.word for word in one.words] == one.pred_text.split()
            assert all(word.probability is not None and 0 < word.probability < 1 for word in one.words)
