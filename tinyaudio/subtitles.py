"""Transcripts as files: txt, srt, vtt, tsv and json.

Subtitles are shaped for reading (42 characters, two lines, seven seconds, as in Netflix's English timed text guide): a
long segment is split after a sentence, else after a clause, else after a word, and its time is shared out by the number
of characters. These cue times are for reading; measured times are those of the segments, in json and tsv.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tinyaudio.model.transcript import Segment, Transcript

_SENTENCE_END, _CLAUSE_END = re.compile(r"[.?!][\"')]*$"), re.compile(r"[,;:][\"')]*$")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How much a subtitle may hold.

    Args:
        max_line_width: characters. A longer word gets a line of its own, and is never broken.
        max_line_count: lines.
        max_cue_s: seconds.
    """

    max_line_width: int = 42
    max_line_count: int = 2
    max_cue_s: float = 7.0

    def __post_init__(self) -> None:
        if min(self.max_line_width, self.max_line_count, self.max_cue_s) <= 0:
            raise ValueError(f"{self}: expected positive numbers")


@dataclass(frozen=True, kw_only=True)
class Cue:
    """One subtitle: from start to end, in milliseconds."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]


def cues(segments: Sequence[Segment], layout: Layout) -> Iterator[Cue]:
    """Shape segments into subtitles; segments without text give none. Cues never overlap and never last 0 ms."""
    floor = 0
    for segment in segments:
        words = plain(segment.text).split()
        seconds_per_character = (segment.end - segment.start) / max(1, len(" ".join(words)))
        start = segment.start
        for taken in _split(words, layout, layout.max_cue_s / seconds_per_character if seconds_per_character else 1e9):
            end = start + seconds_per_character * (len(" ".join(taken)) + 1)
            start_ms = max(floor, round(start * 1000))
            shown_until = min(end, segment.end, start + layout.max_cue_s)
            floor = max(start_ms + 1, round(shown_until * 1000))
            yield Cue(start_ms=start_ms, end_ms=floor, lines=tuple(_wrap(taken, layout.max_line_width)))
            start = end


def _split(words: list[str], layout: Layout, max_characters: float) -> Iterator[list[str]]:
    """Split words into cues: as many as fit, less what stands behind the best place to stop."""
    while words:
        fitting = 1
        while fitting < len(words) and _fits(words[: fitting + 1], layout, max_characters):
            fitting += 1
        if fitting < len(words):
            fitting = _best_stop(words[:fitting])
        yield words[:fitting]
        words = words[fitting:]


def _fits(words: list[str], layout: Layout, max_characters: float) -> bool:
    is_short = len(_wrap(words, layout.max_line_width)) <= layout.max_line_count
    return is_short and len(" ".join(words)) <= max_characters


def _best_stop(words: list[str]) -> int:
    """Count the words up to the last sentence end, else clause end, in the later two thirds; else all of them."""
    for mark in (_SENTENCE_END, _CLAUSE_END):
        for count in range(len(words), len(words) // 3, -1):
            if mark.search(words[count - 1]):
                return count
    return len(words)


def _wrap(words: Sequence[str], width: int) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def plain(text: str) -> str:
    """Make text safe for one line: no control characters, line breaks or runs of space."""
    return " ".join(_CONTROL.sub(" ", text).split())


def to_txt(transcript: Transcript, layout: Layout) -> str:
    """One segment a line, as Whisper writes it; an empty line where nothing was said."""
    return "\n".join(filter(None, (plain(segment.text) for segment in transcript.segments))) + "\n"


def to_srt(transcript: Transcript, layout: Layout) -> str:
    """SubRip: numbered cues, HH:MM:SS,mmm."""
    blocks = []
    for number, cue in enumerate(cues(transcript.segments, layout), 1):
        times = f"{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}"
        blocks.append("\n".join([str(number), times, *(line.replace("-->", "->") for line in cue.lines)]) + "\n")
    return "\n".join(blocks)


def to_vtt(transcript: Transcript, layout: Layout) -> str:
    """WebVTT, https://www.w3.org/TR/webvtt1/: & < > escaped, which also keeps --> out of the text."""
    blocks = ["WEBVTT\n"]
    for cue in cues(transcript.segments, layout):
        escaped = (line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in cue.lines)
        blocks.append("\n".join([f"{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}", *escaped]) + "\n")
    return "\n".join(blocks)


def to_tsv(transcript: Transcript, layout: Layout) -> str:
    """One segment a line: start and end in milliseconds, text; Whisper's columns."""
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
