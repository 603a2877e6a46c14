import html
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
from evaluations import prediction
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pipelines.corpora.sources import contamination_notes, source_of
from pipelines.errors import EvaluationError
from pipelines.evaluate.comparison import Comparison, compare
from pipelines.evaluate.error_analysis import analyse, bucket_name
from pipelines.evaluate.normalizers import Pair, open_normalizer
from pipelines.evaluate.predictions import Prediction, write_predictions
from pipelines.evaluate.report.report import align_lines, comparison_line, escape_markdown, headline
from pipelines.evaluate.stage import Scoring, score_again
from pipelines.evaluate.summary import Settings, Summary, load_summary, save_settings, summarize

SETTINGS = Settings(provider="tinyaudio", model={"name": "a"}, scored={"corpus": "corpus", "split": "test"})


def summary_of(*predictions: Prediction, **options: Any) -> Summary:
    return summarize(SETTINGS, predictions, **options)


def pair(text: str, answer: str, i: int = 0, **changes: Any) -> Pair:
    return Pair(prediction=prediction(i, text, answer, **changes), reference=text, hypothesis=answer)


def test_text_is_scored_raw_and_normalised() -> None:
    summary = summary_of(prediction(0, "It's Mr. Smith!", "it is mister smith"))
    scores = {score.normalizer: score for score in summary.scores}
    assert (scores["recipe"].wer, scores["whisper"].wer) == (4 / 3, 0.0)
    assert scores["whisper"].detail.startswith("whisper-normalizer ")


def test_failures_are_listed_marked_and_kept_out_of_every_rate() -> None:
    summary = summary_of(prediction(0, "a b", "a b"), prediction(1, "c d e f"))
    assert (summary.headline.wer, summary.headline.word_errors.failed) == (0.0, 1)
    assert [(one.utterance_id, one.error) for one in summary.failures] == [("utt-1", "late")]
    assert summary.analysis.rates.answered == 1
    assert "WER 0.00 %*" in headline(summary)
    assert "CER 0.00 %*" in headline(summary)
    assert "1 failed" in headline(summary)


def test_nothing_answered_has_no_rate() -> None:
    summary = summary_of(prediction(0, "a b"))
    assert summary.headline.wer is None
    assert "WER not defined*" in headline(summary)


def test_breakdowns_cover_the_whole_set() -> None:
    rows = [prediction(i, "a b c", "a b x", source="read" if i % 2 else "talk", sex=None) for i in range(8)]
    analysis = summary_of(*rows).analysis
    assert set(analysis.breakdowns) == {"source", "duration"}
    for slices in analysis.breakdowns.values():
        assert sum(one.word_errors.words for one in slices) == 24
    assert [one.name for one in analysis.breakdowns["duration"]] == ["0 to 2 s", "2 to 5 s", "5 to 10 s"]
    assert [bucket_name(seconds) for seconds in (0.0, 2.0, 19.99, 20.0)] == [
        "0 to 2 s",
        "2 to 5 s",
        "10 to 20 s",
        "20 s and more",
    ]


def test_failures_are_counted_and_marked_in_every_slice(tmp_path: Path) -> None:
    rows = [prediction(i, "a b c", "a b x" if i < 3 else None, source="read" if i < 4 else "lost") for i in range(6)]
    folder = evaluation(tmp_path / "a", *rows)
    analysis = score_again(folder, folder, Scoring()).analysis
    by_source = {one.name: one.word_errors for one in analysis.breakdowns["source"]}
    assert {name: (counts.utterances, counts.failed) for name, counts in by_source.items()} == {
        "read": (3, 1),
        "lost": (0, 2),
    }
    for slices in analysis.breakdowns.values():
        assert sum(one.word_errors.failed for one in slices) == 3
    report = (folder / "report.md").read_text()
    assert "| lost | not defined\\* |" in report
    assert "| read | 33.33 %\\* |" in report


def test_outputs_that_went_wrong_as_a_whole_are_counted() -> None:
    loop = "okay " * 12
    pairs = [
        pair("hello there", ""),
        pair("one two", loop, 1),
        pair("no no no no no no no no", "no no no no no no no no", 2),
        pair("good day", "i'm an ai language model and i cannot transcribe audio", 3),
        pair("first middle last", "middle", 4),
        pair("", "noise", 5),
        pair("kept", "kept", 6, warnings=("repetition", "truncated_retried")),
        pair("kept", "kept", 7, warnings=("other_model:small",)),
    ]
    rates = analyse(pairs).rates
    assert (rates.empty, rates.looping, rates.refusing, rates.guarded, rates.empty_references) == (1, 1, 1, 1, 1)
    assert rates.guard_codes == {"repetition": 1, "truncated_retried": 1}
    assert rates.provider_codes == {"other_model:small": 1}, "no guard of ours says so"
    assert (rates.leading_deletions, rates.trailing_deletions) == (2, 2)


def test_confusions_are_counted_word_by_word_and_worst_come_first() -> None:
    analysis = analyse([pair("the cat", "a cat"), pair("the dog", "a hog", 1), pair("x", "x", 2)])
    top = analysis.confusions[0]
    assert (top.kind, top.reference, top.hypothesis, top.count) == ("substitute", "the", "a", 2)
    assert [one.utterance_id for one in analysis.worst] == ["utt-1", "utt-0"]
    assert analysis.error_histogram[:3] == (1, 1, 1)


def test_alignments_show_every_kind_of_error() -> None:
    [worst] = analyse([pair("the cat sat down", "the bat sat right down now")]).worst
    lines = align_lines(worst.steps)
    assert lines == [
        "REF: the cat sat *     down *",
        "HYP: the bat sat right down now",
        "         S       I          I",
    ]


def compared(mine: list[Prediction], other: list[Prediction]) -> Comparison:
    return compare(("a", "b"), mine, other, open_normalizer("none", SETTINGS.section))


def test_comparison_tells_which_system_is_better_and_how_surely() -> None:
    texts = [f"word{i} two three four" for i in range(60)]
    mine = [prediction(i, text, text.replace("two", "2") if i < 3 else text) for i, text in enumerate(texts)]
    other = [prediction(i, text, text.replace("two", "2") if i < 40 else text) for i, text in enumerate(texts)]
    found = compared(mine, [prediction(0, texts[0]), *other[1:]])
    assert (found.utterances, found.failed, found.unshared) == (59, 1, 0)
    assert found.wer is not None
    assert found.other_wer is not None
    assert found.wer < found.other_wer
    assert found.p_better > 0.999
    assert found.p_other_better < 0.001
    assert (found.num_better, found.num_worse, found.num_tied) == (37, 0, 22)
    same = compared(mine, mine)
    assert (same.p_better, same.p_other_better) == (0.0, 0.0)


def test_what_is_not_compared_is_said_with_its_reason() -> None:
    mine = [prediction(i, "a b", "a b") for i in range(4)]
    found = compared(mine, [*mine[:2], prediction(2, "a b"), prediction(9, "a b")])
    assert (found.utterances, found.failed, found.unshared) == (2, 1, 2)
    line = comparison_line(found)
    assert "a 0.00 %* against b 0.00 %* on 2 utterances" in line
    assert "(1 without an answer of one or both, 2 in one of the two sets only)" in line
    whole = compared(mine, mine)
    assert "a 0.00 % against b 0.00 % on 4 utterances: better" in comparison_line(whole)


def test_comparison_of_different_sets_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no utterance in common"):
        compared([prediction(1, "x", "x")], [prediction(2, "x", "x")])
    with pytest.raises(EvaluationError, match="has two references, 'x' and 'y'"):
        compared([prediction(1, "x", "x")], [prediction(1, "y", "x")])


def evaluation(folder: Path, *predictions: Prediction) -> Path:
    folder.mkdir()
    save_settings(folder / "settings.json", SETTINGS)
    write_predictions(folder / "predictions.jsonl", predictions)
    return folder


def test_rescoring_gives_the_same_numbers_as_scoring(tmp_path: Path) -> None:
    rows = [prediction(i, "the cat sat", "the rat sat" if i % 3 else "the cat sat") for i in range(20)]
    folder = evaluation(tmp_path / "a", *rows)
    first = score_again(folder, folder, Scoring())
    again = score_again(folder, tmp_path / "again", Scoring())
    assert again == first == load_summary(folder / "summary.json")
    for name in ("eval.json", "summary.json", "report.md", "report.html"):
        assert (folder / name).read_text() == (tmp_path / "again" / name).read_text()


def test_a_leaderboard_file_can_be_scored_without_settings(tmp_path: Path) -> None:
    line = {"audio_filepath": "s0", "duration": 1.5, "time": 0.1, "text": "Hi there", "pred_text": "hi there"}
    (tmp_path / "MODEL_x.jsonl").write_text(json.dumps(line) + "\n")
    summary = score_again(tmp_path / "MODEL_x.jsonl", tmp_path / "out", Scoring(normalizer="whisper"))
    assert summary.headline.wer == 0.0
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["words"] == 2


def test_a_damaged_summary_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="does not exist; expected the folder of an evaluation"):
        load_summary(tmp_path / "summary.json")
    (tmp_path / "summary.json").write_text('{"format": 1}')
    with pytest.raises(EvaluationError, match=r"has format 1; expected 2\. Score again with --rescore"):
        load_summary(tmp_path / "summary.json")
    (tmp_path / "summary.json").write_text('{"format": 2}')
    with pytest.raises(EvaluationError, match="is not readable: settings"):
        load_summary(tmp_path / "summary.json")


HOSTILE = '<script>alert("x")</script> | `a` *b* [c](d) ![e](f) <img src=x> &lt; ~~g~~ $h$\n```\n# i\n<b>j</b>'


def test_reports_escape_what_corpora_and_models_say(tmp_path: Path) -> None:
    """The texts, ids, sources and errors of a hostile corpus are shown as they are, and nothing of them is markup."""
    rows = [prediction(i, f"{HOSTILE} one", f"{HOSTILE} two", source=HOSTILE) for i in range(2)]
    rows.append(prediction(2, "lost", error=HOSTILE))
    rows.append(prediction(3, f"{HOSTILE} one", "three", utterance_id=HOSTILE, warnings=(HOSTILE,)))
    folder = evaluation(tmp_path / "a", *rows)
    score_again(folder, folder, Scoring())
    page = (folder / "report.html").read_text()
    assert not re.search(r"<(script|img|s|a|code|b>j)\b", page)
    assert "&lt;script&gt;" in page
    assert page.count("<h1>") == 1
    cells = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", page)]
    shown = " ".join(HOSTILE.split())
    assert shown in cells, "an error and a source"
    assert f"provider: {shown}" in cells
    report = (folder / "report.md").read_text()
    rows_of_tables = [line for line in report.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (3, 4, 5, 8, 9) for row in rows_of_tables)
    fences = [line for line in report.splitlines() if line.startswith("```")]
    assert fences == ["```text", "```"] * 3


@given(st.text() | st.text(alphabet="\\`*_[]()<>|#&;~$@!:/. \nwhtps\u00e4"))
def test_escaped_text_is_shown_as_it_is(text: str) -> None:
    page = MarkdownIt("gfm-like", {"linkify": False}).render(f"| a |\n|---|\n| x{escape_markdown(text)}x |\n")
    [cell] = re.findall(r"<td>(.*)</td>", page)
    assert html.unescape(cell) == re.sub(r"\s+", " ", f"x{text}x").replace("\0", "\ufffd")


class Closing(html.parser.HTMLParser):
    """Checks that every tag is closed in order."""

    VOID = ("meta", "br", "!doctype")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_no_other_file(tmp_path: Path) -> None:
    rows = [prediction(i, "the cat sat", "the rat sat", source="ab"[i % 2], sex="male") for i in range(12)]
    folder = evaluation(tmp_path / "a", *rows, prediction(99, "lost"))
    other = evaluation(tmp_path / "b", *rows)
    score_again(folder, folder, Scoring(compare_with=other))
    page = (folder / "report.html").read_text()
    parser = Closing()
    parser.feed(page)
    assert parser.open == []
    assert parser.links == []
    assert "url(" not in page
    assert "@import" not in page
    for part in ("<svg", "By source", "By sex", "Worst utterances", "Compared on the same utterances", "Failures"):
        assert part in page


@pytest.mark.filterwarnings("error")
def test_charts_are_drawn_for_any_name_of_a_source(tmp_path: Path) -> None:
    names = ["\u4e2d\u6587", "$\\frac{", "long " * 40, "plain"]
    rows = [prediction(i, "a b c", "a x c", source=names[i % 4]) for i in range(8)]
    folder = evaluation(tmp_path / "a", *rows, prediction(9, "", "noise", source="no words"), prediction(10, "lost"))
    score_again(folder, folder, Scoring())
    page = (folder / "report.html").read_text()
    figures = re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL)
    assert len(figures) == 3, "by source, by duration, and the number of errors"
    for label in ("\u4e2d\u6587", "$\\frac{", "plain", "no words", "not stated*"):
        assert f">{label}</text>" in figures[0]


def test_loquacious_ids_tell_their_source_where_they_can() -> None:
    name = "speechbrain/LoquaciousSet"
    assert source_of(name, "1688-142285-0000") == "librispeech"
    assert source_of(name, "common_voice_en_19698530") == "commonvoice"
    assert source_of(name, "20180612-0900-PLENARY-10-en_20180612-12:30:01_3") == "voxpopuli"
    assert source_of(name, "07282016HFUUforum_00000.flac") == "yodas-or-peoples-speech"
    assert source_of("somebody/else", "1688-142285-0000") is None


def test_overlap_of_training_and_test_data_is_noted_where_it_applies() -> None:
    loquacious, hubert = "speechbrain/LoquaciousSet", "facebook/hubert-large-ls960-ft"
    notes = contamination_notes(loquacious, hubert, loquacious)
    assert ["LibriHeavy" in notes[0], "960" in notes[1]] == [True, True]
    assert len(contamination_notes(None, hubert, "openslr/librispeech_asr")) == 1
    assert contamination_notes(loquacious, hubert, "fixie-ai/common_voice_17_0") == []
    esb = Settings(
        provider="tinyaudio",
        model={"encoder": {"id": hubert}},
        scored={"corpus": "hf-audio/esb-datasets-test-only-sorted", "config": "librispeech"},
        trained_on="LoquaciousSet",  # a copy in a folder
    )
    assert len(summarize(esb, [prediction(0, "a", "a")]).notes) == 2
    assert source_of("/data/loquaciousset", "1688-142285-0000") == "librispeech"


def test_no_number_of_resamples_makes_a_comparison_certain() -> None:
    texts = [f"word{i} two" for i in range(60)]
    better = [prediction(i, text, text) for i, text in enumerate(texts)]
    worse = [prediction(i, text, "nothing") for i, text in enumerate(texts)]
    line = comparison_line(compared(better, worse))
    assert line.endswith("better in > 99.9 % of resamples, worse in < 0.1 %")


def test_errors_made_once_are_no_pattern(tmp_path: Path) -> None:
    once = evaluation(tmp_path / "once", prediction(0, "a b", "a x"))
    score_again(once, once, Scoring())
    assert "more than once" not in (once / "report.md").read_text()
    twice = evaluation(tmp_path / "twice", prediction(0, "a b", "a x"), prediction(1, "b c", "x d"))
    score_again(twice, twice, Scoring())
    report = (twice / "report.md").read_text()
    assert "| substitution | b | x | 2 |" in report
    assert "| substitution | c | d |" not in report
    assert "| too few |" in report, "no interval, and why"
