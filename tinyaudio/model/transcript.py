"""The result of transcription: a transcript with its segments, their times and its warnings.

Plain values without torch or audio, so writers of subtitles and JSON need nothing else.
"""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Word:
    """One word of a segment.

    Args:
        word: as in the segment's text, without spaces.
        start, end: seconds from the beginning of the recording.
        probability: of the word after those before it, by the language model: the mean over its tokens, 0 to 1. None if
            it was not computed.
        acoustic_score: probability of its letters where they are, by the encoder's CTC head: their geometric mean,
            0 to 1. None if the head cannot spell the word.
        is_estimated: whether its time is that between its neighbours, since the head cannot spell or did not hear it.
        is_unheard: whether the head heard nothing where the word should be.
    """

    word: str
    start: float
    end: float
    probability: float | None = None
    acoustic_score: float | None = None
    is_estimated: bool = False
    is_unheard: bool = False


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One stretch of speech between two pauses.

    Args:
        id: counts from 0 within its transcript.
        start, end: seconds from the beginning of the recording, where its speech begins and ends.
        warnings: codes, see `Transcript`.
        words: its words with their times, if they were asked for.
        avg_logprob: the mean logarithm of the language model's probabilities of its tokens and of the end of the text,
            if it was asked for. Where windows overlap, of all that was written for this window.
        no_speech_prob: how little the encoder's CTC head heard, 0 to 1 (`confidence.no_speech_probs`); if it was asked
            for and there is a head.
    """

    id: int
    start: float
    end: float
    text: str
    warnings: tuple[str, ...] = ()
    words: tuple[Word, ...] | None = None
    avg_logprob: float | None = None
    no_speech_prob: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return Whisper's keys and ours; each word has a space before it. What was not asked for is omitted."""
        values: dict[str, Any] = {
            "id": self.id,
            "start": round(self.start, 3),
            "end": round(self.end, 3),
            "text": self.text,
            "warnings": list(self.warnings),
            "words": None if self.words is None else [_word_dict(word) for word in self.words],
            "avg_logprob": _rounded(self.avg_logprob),
            "no_speech_prob": _rounded(self.no_speech_prob),
        }
        return {name: value for name, value in values.items() if value is not None}


def _word_dict(word: Word) -> dict[str, Any]:
    return {
        "word": f" {word.word}",
        "start": round(word.start, 3),
        "end": round(word.end, 3),
        "probability": _rounded(word.probability),
        "acoustic_score": _rounded(word.acoustic_score),
        "is_estimated": word.is_estimated,
        "is_unheard": word.is_unheard,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


@dataclass(frozen=True, kw_only=True)
class DraftCounts:
    """What drafts did for a transcript, see `drafts`; second decodings are not counted.

    Args:
        draft: where they came from, "projector" or "encoder".
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
