"""A guard against what decoders made of language models do wrong: loops, refusals, runaway text, truncation.

It judges an output by its text, the length of its audio and whether it ended by itself; it decodes nothing. What it
finds is named by a code; `recognize` decodes such an output once more with other settings and reports both outcomes.
"""

import math
import re
import zlib

# One code per event in `Transcript.warnings`. With "_retried" appended: a second decoding was clean, and stands.
CODES = {
    "no_speech": "no speech was found; the language model was not asked",
    "repetition": "the output ran in circles; it was cut before the first repetition",
    "refusal": "the output reads like a chat assistant speaking for itself; it stands as it came",
    "empty": "speech was heard, but hardly a letter was written; words are missing",
    "truncated": "the output did not end within its token budget; words may be missing at its end",
    "implausible_rate": "more text than can be spoken in that time; it may be invented",
    "no_pause": "no pause within the model's window; overlapping windows were joined",
    "input_truncated": "the file ends before its header says, or lacks its end mark; what came behind is missing",
    "seam": "overlapping windows did not agree on a word; one may be doubled or lost where they were joined",
}
RETRIED = "_retried"
FAULTS = ("repetition", "refusal", "truncated", "empty", "implausible_rate")  # what `judge` finds, the gravest first
EVENTS = frozenset(CODES) | {fault + RETRIED for fault in FAULTS}  # all that can stand in `Transcript.warnings`

# 4.2 tokens a second is fast English speech in a large vocabulary (330 words/min at 1.3 tokens a word: 7.2); rare words
# and small vocabularies need more. Source for the form: Moonshine's harness caps at 6.5 tokens a second plus 2.
TOKENS_PER_SECOND, SPARE_TOKENS = 10, 16
MAX_CHARACTERS_PER_SECOND = 35  # the fastest recorded speakers reach about 11 syllables, 30 to 35 characters, a second
SPARE_CHARACTERS = 20
MIN_LETTERS_PER_SECOND = 1  # of speech, once it is longer than `MIN_SPEECH_S`; slow speech has ten
MIN_SPEECH_S = 1.0  # a cough is shorter, and no word
MAX_COMPRESSION_RATIO = 2.4  # of the text by zlib; the threshold of openai/whisper (transcribe.py)
MIN_COMPRESSED_LENGTH = 120  # characters; shorter text compresses badly whatever it says
# How often a phrase of so many words must follow itself to be a loop: people say "no no no", and mean it.
MAX_REPEATS = {1: 6, 2: 5, 3: 4}
MAX_REPEATS_OF_LONGER = 3
LONGEST_LOOP = 20  # words

_CANNOT = r"i(?: can ?not| can't|(?: am|'m) (?:unable|not able) to| (?:do not|don't) have the ability to)"
_AUDIO = r"(?:audio|recordings?)"
# People say that they cannot hear somebody or access a building, and that they are AI researchers: an object or an end
# that only an assistant would speak of is asked for.
_REFUSAL = re.compile(
    r"\b(?:"
    r"as an? (?:(?:large )?language model|ai(?= (?:i|language|model|assistant|system)\b|[,.;]|$))|"
    r"i(?: am|'m) (?:just |only )?an? (?:(?:large )?language model|artificial intelligence|"
    r"ai(?= (?:language|model|assistant|system|chatbot|and|so|but)\b|[,.;]|$))|"
    rf"{_CANNOT} (?:transcribe\b|(?:process|listen to|hear|access|play|open)(?: \w+){{0,4}} {_AUDIO}\b)|"
    rf"{_CANNOT} (?:help|assist)(?: you)? with (?:that|this)\b|"
    rf"please (?:provide|upload|share) (?:the|an|me|your)(?: \w+)?? (?:{_AUDIO}|transcript)\b|"
    rf"(?:the|this) {_AUDIO} (?:is|was|has) not (?:been )?provided|"
    rf"no {_AUDIO} (?:is|was|has been) (?:provided|attached|uploaded)"
    r")",
    re.IGNORECASE,
)
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u02bc\u0060\u00b4"), "'")


def token_budget(duration_s: float, max_new_tokens: int) -> int:
    """Return how many tokens a transcript of so many seconds may take: never more than `max_new_tokens`."""
    return max(1, min(max_new_tokens, SPARE_TOKENS + math.ceil(TOKENS_PER_SECOND * duration_s)))


# The same few characters ten times over, as tokens without a space between them give it: "::::::::", "hahahahaha...".
_STUTTER = re.compile(r"(\S{1,8}?)\1{9,}")


def judge(text: str, duration_s: float, is_complete: bool, speech_s: float = 0.0) -> str | None:
    """Find what is wrong with an output.

    Args:
        text: as decoded.
        duration_s: of the audio it is meant to be the transcript of.
        is_complete: it ended by itself, with end-of-text.
        speech_s: seconds of it in which speech was heard; 0 where nobody listened.

    Returns:
        The gravest of `FAULTS`; None for a sound output.
    """
    if find_loop(text) is not None or _STUTTER.search(text) or compression_ratio(text) > MAX_COMPRESSION_RATIO:
        return "repetition"
    if _REFUSAL.search(text.translate(_APOSTROPHES)):
        return "refusal"
    if not is_complete:
        return "truncated"
    if speech_s > MIN_SPEECH_S and sum(map(str.isalnum, text)) < MIN_LETTERS_PER_SECOND * speech_s:
        return "empty"
    if len(text) > SPARE_CHARACTERS + MAX_CHARACTERS_PER_SECOND * duration_s:
        return "implausible_rate"
    return None


def compression_ratio(text: str) -> float:
    """Return bytes over bytes compressed by zlib; 1 for text too short to tell."""
    if len(text) < MIN_COMPRESSED_LENGTH:
        return 1.0
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def find_loop(text: str) -> tuple[int, int] | None:
    """Find the first phrase that follows itself too often.

    Returns:
        Index of the word where the loop begins, and the phrase's length in words; None where there is none.
    """
    words = _plain_words(text)
    for begin in range(len(words)):
        for length in range(1, min(LONGEST_LOOP, (len(words) - begin) // 2) + 1):
            if _repeats(words, begin, length) >= MAX_REPEATS.get(length, MAX_REPEATS_OF_LONGER):
                return begin, length
    return None


def cut_loop(text: str) -> str:
    """Keep a looping phrase once and drop everything behind it; text without a loop stays as it is."""
    text = _STUTTER.sub(r"\1", text)
    found = find_loop(text)
    if found is None:
        return text
    begin, length = found
    return " ".join(text.split()[: begin + length])


def _repeats(words: list[str], begin: int, length: int) -> int:
    phrase = words[begin : begin + length]
    count = 1
    while words[begin + count * length : begin + (count + 1) * length] == phrase:
        count += 1
    return count


def _plain_words(text: str) -> list[str]:
    return [re.sub(r"[^\w']", "", word).lower() or word for word in text.split()]
