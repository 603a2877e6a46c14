"""Subtitles and the other formats: golden files, read back by independent parsers; line lengths as properties."""

import csv
import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyaudio.model.transcript import Segment, Transcript
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
