"""Transcripts as files: txt, srt, vtt, tsv and json.

Subtitles are sized for reading (42 characters, two lines, seven seconds, as in Netflix's English timed text guide). A
long segment is split after a sentence, else after a clause, else after a word. A cue has the times of its words if they
are known; otherwise the segment's time is divided by the number of characters, which is an estimate.
"""

import json
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tinyaudio.model.transcript import Segment, Transcript

_SENTENCE_END, _CLAUSE_END = re.compile(r"[.?!][\"')]*$"), re.compile(r"[,;:][\"')]*$")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The size limits of a subtitle."""

    max_line_width: int = 42  # characters. A longer word has its own line and is never broken
    max_line_count: int = 2
    max_cue_s: float = 7.0
    highlight_words: bool = False  # show a cue once for each of its words, with that word underlined, as Whisper does

    def __post_init__(self) -> None:
        if min(self.max_line_width, self.max_line_count, self.max_cue_s) <= 0:
            raise ValueError(f"{self}: expected positive numbers")


@dataclass(frozen=True, kw_only=True)
class Cue:
    """One subtitle: from start to end, in milliseconds; `underlined` is the number of a word, counted from 0."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]
    underlined: int | None = None


def cues(segments: Sequence[Segment], layout: Layout) -> Iterator[Cue]:
    """Split segments into subtitles. A segment without text gives none. Cues never overlap and never last 0 ms."""
    floor = 0
    for segment in segments:
        words = plain(segment.text).split()
        timed = segment.words or ()
        if [plain(word.word) for word in timed] != words:  # not asked for, or with control characters inside
            timed = ()
        num_shown = 0
        seconds_per_character = (segment.end - segment.start) / max(1, len(" ".join(words)))
        start = segment.start
        for taken in _split(words, layout, layout.max_cue_s / seconds_per_character if seconds_per_character else 1e9):
            lines = tuple(_wrap(taken, layout.max_line_width))
            end = start + seconds_per_character * (len(" ".join(taken)) + 1)
            shown_until = min(end, segment.end, start + layout.max_cue_s)
            own = timed[num_shown : num_shown + len(taken)]
            if own:
                start, shown_until = own[0].start, min(own[-1].end, own[0].start + layout.max_cue_s)
            if own and layout.highlight_words:
                for i, word in enumerate(own):
                    start_ms = max(floor, round(word.start * 1000))
                    floor = max(start_ms + 1, round(word.end * 1000))
                    yield Cue(start_ms=start_ms, end_ms=floor, lines=lines, underlined=i)
            else:
                start_ms = max(floor, round(start * 1000))
                floor = max(start_ms + 1, round(shown_until * 1000))
                yield Cue(start_ms=start_ms, end_ms=floor, lines=lines)
            start, num_shown = end, num_shown + len(taken)


def _split(words: list[str], layout: Layout, max_characters: float) -> Iterator[list[str]]:
    """Split words into cues: as many as fit, ending at a sentence or clause in the last two thirds if there is one."""
    while words:
        count = 1
        while (
            count < len(words)
            and len(_wrap(words[: count + 1], layout.max_line_width)) <= layout.max_line_count
            and len(" ".join(words[: count + 1])) <= max_characters
        ):
            count += 1
        if count < len(words):
            places = range(count, count // 3, -1)
            ends = [n for mark in (_SENTENCE_END, _CLAUSE_END) for n in places if mark.search(words[n - 1])]
            count = ends[0] if ends else count
        yield words[:count]
        words = words[count:]


def _wrap(words: list[str], width: int) -> list[str]:
    return textwrap.wrap(" ".join(words), width, break_long_words=False, break_on_hyphens=False)


def _underline(lines: Sequence[str], number: int | None) -> list[str]:
    """Put <u> around the word of that number."""
    words = [line.split(" ") for line in lines]
    first = 0
    for line in words:
        if number is not None and first <= number < first + len(line):
            line[number - first] = f"<u>{line[number - first]}</u>"
        first += len(line)
    return [" ".join(line) for line in words]


def plain(text: str) -> str:
    """Put text on one line: no control characters, line breaks or repeated spaces."""
    return " ".join(_CONTROL.sub(" ", text).split())


def to_txt(transcript: Transcript, layout: Layout) -> str:
    """One segment a line, as in Whisper's files; an empty line if there is no text."""
    return "\n".join(filter(None, (plain(segment.text) for segment in transcript.segments))) + "\n"


def to_srt(transcript: Transcript, layout: Layout) -> str:
    """SubRip: numbered cues, HH:MM:SS,mmm."""
    blocks = []
    for number, cue in enumerate(cues(transcript.segments, layout), 1):
        times = f"{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}"
        lines = [line.replace("-->", "->") for line in cue.lines]
        blocks.append("\n".join([str(number), times, *_underline(lines, cue.underlined)]) + "\n")
    return "\n".join(blocks)


def to_vtt(transcript: Transcript, layout: Layout) -> str:
    """WebVTT, https://www.w3.org/TR/webvtt1/: & < > are escaped, so that --> is never in the text."""
    blocks = ["WEBVTT\n"]
    for cue in cues(transcript.segments, layout):
        escaped = [line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in cue.lines]
        times = f"{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}"
        blocks.append("\n".join([times, *_underline(escaped, cue.underlined)]) + "\n")
    return "\n".join(blocks)


def to_tsv(transcript: Transcript, layout: Layout) -> str:
    """One segment a line: start and end in milliseconds, text; the columns of Whisper's files."""
    rows = [
        f"{round(segment.start * 1000)}\t{round(segment.end * 1000)}\t{plain(segment.text)}\n"
        for segment in transcript.segments
    ]
    return "".join(["start\tend\ttext\n", *rows])


def to_json(transcript: Transcript, layout: Layout) -> str:
    """The object of `Transcript.to_dict`, ASCII, on one line."""
    return json.dumps(transcript.to_dict()) + "\n"


def _clock(milliseconds: int, mark: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{mark}{rest:03d}"


WRITERS: dict[str, Callable[[Transcript, Layout], str]] = {
    "txt": to_txt,
    "srt": to_srt,
    "vtt": to_vtt,
    "tsv": to_tsv,
    "json": to_json,
}
