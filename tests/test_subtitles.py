"""Subtitles and the other formats: golden files, read back by independent parsers; line lengths as properties."""

import csv
import html
import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyaudio.model.transcript import Segment, Transcript, Word
from tinyaudio.subtitles import WRITERS, Layout, cues

GOLDEN = Path(__file__).parent / "data" / "golden"
LAYOUT = Layout()


def example() -> Transcript:
    texts = [
        (0.0, 2.5, "Good morning."),
        (
            3.0,
            14.0,
            "This sentence is much too long for one subtitle, so it is split: after a sentence. Or after a clause.",
        ),
        (3599.9995, 3601.25, "a tag <b> & an arrow --> here\nand a line\x07 break"),
        (3700.0, 3701.0, ""),
    ]
    segments = tuple(Segment(id=i, start=a, end=b, text=text) for i, (a, b, text) in enumerate(texts))
    return Transcript(
        source="talk.wav",
        text=" ".join(segment.text for segment in segments if segment.text),
        segments=segments,
        duration_s=3702.0,
        warnings=("no_pause",),
        model="runs/latest",
        version="0.1.0",
    )


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_formats_equal_their_golden_files(kind):
    """Remade by TINYAUDIO_REMAKE_GOLDEN=1 pytest tests/test_subtitles.py; look at the difference before committing."""
    path = GOLDEN / f"talk.{kind}"
    written = WRITERS[kind](example(), LAYOUT)
    if os.environ.get("TINYAUDIO_REMAKE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written)
    assert written == path.read_text()


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_an_independent_parser_reads_the_subtitles_back(kind):
    """pysubs2 is a subtitle package from PyPI that knows both."""
    pysubs2 = pytest.importorskip("pysubs2")
    read = pysubs2.SSAFile.from_string(WRITERS[kind](example(), LAYOUT), format_=kind)
    expected = list(cues(example().segments, LAYOUT))
    assert [(event.start, event.end) for event in read] == [(cue.start_ms, cue.end_ms) for cue in expected]
    words = " ".join(event.plaintext.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for event in read)
    assert words.split()[:2] == ["Good", "morning."]
    assert words.split()[-3:] == ["a", "line", "break"]


def test_json_and_tsv_read_back():
    read = json.loads(WRITERS["json"](example(), LAYOUT))
    assert read == example().to_dict()
    assert {"text", "language", "segments", "duration", "model", "revision", "version", "warnings"} <= read.keys()
    rows = list(csv.DictReader(WRITERS["tsv"](example(), LAYOUT).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [int(row["start"]) for row in rows] == [0, 3000, 3600000, 3700000]
    assert rows[2]["text"] == "a tag <b> & an arrow --> here and a line break"


def timed_example() -> Transcript:
    """Two segments with word times: a pause of a second inside the first, a word between its neighbours, markup."""
    first = [("Good", 0.1, 0.4), ("morning.", 0.4, 1.0), ("It", 2.0, 2.2), ("is", 2.2, 2.3), ("9:30,", 2.3, 2.9)]
    first += [("so", 2.9, 3.1), ("<we>", 3.1, 3.3), ("begin", 3.3, 3.7), ("&", 3.7, 3.8), ("look.", 3.8, 4.25)]
    words = [
        Word(
            word=w,
            start=a,
            end=b,
            probability=0.875,
            acoustic_score=None if w == "9:30," else 0.96875,
            is_estimated=w == "9:30,",
        )
        for w, a, b in first
    ]
    words[-2:] = [
        replace(words[-2], acoustic_score=0.0, is_estimated=True, is_unheard=True),
        replace(words[-1], probability=None),
    ]
    text, scores = " ".join(word.word for word in words), {"avg_logprob": -0.25, "no_speech_prob": 0.0625}
    segments = (
        Segment(id=0, start=0.1, end=4.25, text=text, warnings=("unheard",), words=tuple(words), **scores),
        Segment(id=1, start=5.0, end=5.5, text="", words=(), avg_logprob=-1.5),
    )
    return Transcript(source="talk.wav", text=segments[0].text, segments=segments, duration_s=6.0, version="0.1.0")


@pytest.mark.parametrize("kind", ["json", "srt", "vtt"])
@pytest.mark.parametrize("name", ["words", "highlighted"])
def test_formats_with_word_times_equal_their_golden_files(kind, name):
    """Remade as above."""
    path = GOLDEN / f"{name}.{kind}"
    written = WRITERS[kind](timed_example(), Layout(max_line_width=20, highlight_words=name == "highlighted"))
    if os.environ.get("TINYAUDIO_REMAKE_GOLDEN"):
        path.write_text(written)
    assert written == path.read_text()


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_an_independent_parser_reads_word_times_back(kind):
    """Cues begin and end with their words, and with --highlight-words each word is underlined in its own time."""
    pysubs2 = pytest.importorskip("pysubs2")
    words = timed_example().segments[0].words
    plain_cues = pysubs2.SSAFile.from_string((GOLDEN / f"words.{kind}").read_text(), format_=kind)
    starts, ends = {round(word.start * 1000) for word in words}, {round(word.end * 1000) for word in words}
    assert len(plain_cues) > 1
    assert all(cue.start in starts and cue.end in ends for cue in plain_cues)
    highlighted = pysubs2.SSAFile.from_string((GOLDEN / f"highlighted.{kind}").read_text(), format_=kind)
    assert [(cue.start, cue.end) for cue in highlighted] == [
        (round(w.start * 1000), round(w.end * 1000)) for w in words
    ]
    text = (GOLDEN / f"highlighted.{kind}").read_text()
    underlined = [part.split("</u>")[0] for part in text.split("<u>")[1:]]
    if kind == "vtt":
        underlined = [html.unescape(word) for word in underlined]
    assert underlined == [word.word for word in words]


def test_json_has_words_as_whisper_writes_them():
    segments = json.loads((GOLDEN / "words.json").read_text())["segments"]
    assert "".join(word["word"] for word in segments[0]["words"]).strip() == segments[0]["text"]
    assert all({"word", "start", "end", "probability"} <= word.keys() for word in segments[0]["words"])
    assert [word["is_estimated"] for word in segments[0]["words"]] == [False] * 4 + [True] + [False] * 3 + [True, False]
    assert segments[0]["words"][4]["acoustic_score"] is None
    assert {"avg_logprob", "no_speech_prob"} <= segments[0].keys()
    assert segments[1]["words"] == []
    assert "no_speech_prob" not in segments[1]


words = st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=60), max_size=60)


@settings(max_examples=60, deadline=None)
@given(words=words, start=st.floats(0, 1e5), length=st.floats(0, 90), width=st.integers(8, 60), lines=st.integers(1, 3))
def test_every_word_is_shown_once_in_readable_cues(words, start, length, width, lines):
    segment = Segment(id=0, start=start, end=start + length, text=" ".join(words))
    layout = Layout(max_line_width=width, max_line_count=lines)
    shown = list(cues([segment], layout))
    assert " ".join(" ".join(cue.lines) for cue in shown).split() == words
    for cue in shown:
        assert cue.start_ms < cue.end_ms <= cue.start_ms + 7001
        assert len(cue.lines) <= lines
        assert all(len(line) <= width or " " not in line for line in cue.lines)
    assert all(cue.end_ms <= following.start_ms for cue, following in pairwise(shown))


def test_cues_stop_at_sentences_then_clauses():
    segment = Segment(
        id=0, start=0, end=6, text="one two three four five six. seven eight nine ten, eleven twelve thirteen"
    )
    first, second, *_ = cues([segment], Layout(max_line_width=20))
    assert first.lines[-1].endswith("six.")
    assert second.lines[-1].endswith("ten,")


def test_silence_gives_valid_empty_files():
    silent = Transcript(source="x", text="", duration_s=10.0)
    assert {kind: write(silent, LAYOUT) for kind, write in WRITERS.items() if kind != "json"} == {
        "txt": "\n",
        "srt": "",
        "vtt": "WEBVTT\n",
        "tsv": "start\tend\ttext\n",
    }
