"""The result of transcription: a transcript with its segments, their times and its warnings.

Plain values without torch or audio, so writers of subtitles and JSON need nothing else.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Word:
    """One word of a segment.

    Args:
        word: as in the segment's text, without spaces.
        start, end: seconds from the beginning of the recording.
        probability: of its letters where they were heard, by the encoder's CTC head: their geometric mean, 0 to 1.
        is_estimated: whether its time is that between its neighbours, since the head cannot spell it; its probability
            is then 0.
    """

    word: str
    start: float
    end: float
    probability: float
    is_estimated: bool = False


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One stretch of speech between two pauses.

    Args:
        id: counts from 0 within its transcript.
        start, end: seconds from the beginning of the recording, where its speech begins and ends.
        text: may be empty.
        warnings: codes, see `Transcript`.
        words: its words with their times, if they were asked for.
    """

    id: int
    start: float
    end: float
    text: str
    warnings: tuple[str, ...] = ()
    words: tuple[Word, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return Whisper's keys and ours; `words` only if they were asked for, each with a space before it."""
        values = asdict(self) | {
            "start": round(self.start, 3),
            "end": round(self.end, 3),
            "warnings": list(self.warnings),
            "words": [
                {
                    "word": f" {word.word}",
                    "start": round(word.start, 3),
                    "end": round(word.end, 3),
                    "probability": round(word.probability, 4),
                    "is_estimated": word.is_estimated,
                }
                for word in self.words or ()
            ],
        }
        if self.words is None:
            del values["words"]
        return values


@dataclass(frozen=True, kw_only=True)
class DraftCounts:
    """What drafts did for a transcript, see `drafts`; second decodings are not counted.

    Args:
        draft: the kind of drafter.
        num_passes: passes of the decoder, of all segments together.
        num_tokens: that it wrote, each end-of-text included. num_accepted: those of them that were drafted.
    """

    draft: str
    num_passes: int
    num_tokens: int
    num_accepted: int

    def __add__(self, other: "DraftCounts") -> "DraftCounts":
        return replace(
            self,
            num_passes=self.num_passes + other.num_passes,
            num_tokens=self.num_tokens + other.num_tokens,
            num_accepted=self.num_accepted + other.num_accepted,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, and how many passes a token took and which share of the tokens was drafted."""
        return {
            "draft": self.draft,
            "passes": self.num_passes,
            "tokens": self.num_tokens,
            "accepted": self.num_accepted,
            "passes_per_token": round(self.num_passes / max(1, self.num_tokens), 4),
            "accepted_share": round(self.num_accepted / max(1, self.num_tokens), 4),
        }


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """The result for one input.

    Args:
        source: the input's name, as given.
        text: all segments joined by spaces.
        segments: in order of time; empty without speech.
        duration_s: length of the recording, seconds.
        warnings: one code per event, in order of time (`guard.CODES` explains each).
        error: one line, if the input could not be read to its end; text and segments are then of the part before.
        drafts: what drafts did, if any were checked.
        model, revision, version: the model, its hub commit and the version of tinyaudio that made it.
    """

    source: str
    text: str
    segments: tuple[Segment, ...] = ()
    duration_s: float = 0.0
    warnings: tuple[str, ...] = ()
    error: str | None = None
    drafts: DraftCounts | None = None
    model: str | None = None
    revision: str | None = None
    version: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints: Whisper's keys (text, language, segments) and ours.

        `drafts` is there only if drafts were checked.
        """
        values = {
            "source": self.source,
            "text": self.text,
            "language": "en",
            "segments": [segment.to_dict() for segment in self.segments],
            "duration": round(self.duration_s, 3),
            "warnings": list(self.warnings),
            "error": self.error,
            "model": self.model,
            "revision": self.revision,
            "version": self.version,
        }
        return values if self.drafts is None else values | {"drafts": self.drafts.to_dict()}
