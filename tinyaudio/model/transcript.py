"""What comes out: a transcript with its segments, its times and everything that went other than planned.

Plain values without torch or audio; writers of subtitles and JSON need nothing else.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One stretch of speech between two pauses.

    Args:
        id: counts from 0 within its transcript.
        start, end: seconds from the beginning of the recording, where speech was heard.
        text: what was said; may be empty.
        warnings: codes of `guard` and `segments`, see `Transcript`.
    """

    id: int
    start: float
    end: float
    text: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """The result for one input.

    Args:
        source: the input's name, as given.
        text: all segments joined by spaces.
        segments: in order of time; none where there is no speech.
        duration_s: length of the recording, in seconds.
        warnings: one code per event, in order of time (`guard.CODES` says what each means).
        error: one line, if the input could not be read to its end; text and segments then hold what came before.
        model, revision, version: what made it.
    """

    source: str
    text: str
    segments: tuple[Segment, ...] = ()
    duration_s: float = 0.0
    warnings: tuple[str, ...] = ()
    error: str | None = None
    model: str | None = None
    revision: str | None = None
    version: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints: Whisper's keys (text, language, segments), and ours."""
        segments = [
            {
                "id": s.id,
                "start": round(s.start, 3),
                "end": round(s.end, 3),
                "text": s.text,
                "warnings": list(s.warnings),
            }
            for s in self.segments
        ]
        return {
            "source": self.source,
            "text": self.text,
            "language": "en",
            "segments": segments,
            "duration": round(self.duration_s, 3),
            "warnings": list(self.warnings),
            "error": self.error,
            "model": self.model,
            "revision": self.revision,
            "version": self.version,
        }
