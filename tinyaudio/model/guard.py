"""Detecting faulty outputs of the language model: loops, refusals, implausibly long text, truncation.

An output is judged by its text, the length of its audio and whether it ended by itself; nothing is decoded here. Each
kind of fault has a code. `recognize` decodes a faulty output once more with other settings and reports both outcomes.
"""

import math
import re
import zlib

# One code per event in `Transcript.warnings`. With "_retried" appended: a second decoding was clean and is the text.
CODES = {
    "no_speech": "no speech was found; the language model was not run",
    "repetition": "repeated phrase detected; the text was cut before the repetition",
    "refusal": "the output reads like the reply of a chat assistant; it is returned unchanged",
    "empty": "speech was detected but almost no text was produced; words are missing",
    "truncated": "the output did not end within its token budget; words may be missing at its end",
    "implausible_rate": "more text than can be spoken in that time; it may be invented",
    "no_pause": "no pause within the model's window; overlapping windows were joined",
    "input_truncated": "the file is shorter than its header says, or lacks its end mark; the rest is missing",
    "input_damaged": "parts of the file cannot be decoded; what was said there is missing",
    "channels_cancel": "channels of the file cancel each other; one of them was inverted before they were mixed",
    "several_tracks": "the file has several audio tracks; the default one was used, --track N (track=N) uses another",
    "unheard": "words were written where the encoder heard nothing; they may be invented",
    "missing": "the encoder heard letters where nothing was written; words may be missing",
    "seam": "overlapping windows have no word in common; a word may be doubled or lost where they were joined",
}
RETRIED = "_retried"
FAULTS = ("repetition", "refusal", "truncated", "empty", "implausible_rate")  # found by `judge`, the most serious first
EVENTS = frozenset(CODES) | {fault + RETRIED for fault in FAULTS}  # every code that `Transcript.warnings` may contain

# 4.2 tokens a second is fast English speech in a large vocabulary (330 words/min at 1.3 tokens a word: 7.2); rare words
# and small vocabularies need more. Source for the form: Moonshine's harness caps at 6.5 tokens a second plus 2.
TOKENS_PER_SECOND, SPARE_TOKENS = 10, 16
MAX_CHARACTERS_PER_SECOND = 35  # the fastest recorded speakers reach about 11 syllables, 30 to 35 characters, a second
SPARE_CHARACTERS = 20
MIN_LETTERS_PER_SECOND = 1  # of speech, once it is longer than `MIN_SPEECH_S`; slow speech has ten
MIN_SPEECH_S = 1.0  # a cough is shorter
MAX_COMPRESSION_RATIO = 2.4  # of the text by zlib; the threshold of openai/whisper (transcribe.py)
MIN_COMPRESSED_LENGTH = 120  # characters; shorter text compresses badly in any case
# How often a phrase of so many words must follow itself to be a loop; people do say "no no no".
MAX_REPEATS = {1: 6, 2: 5, 3: 4}
MAX_REPEATS_OF_LONGER = 3
LONGEST_LOOP = 20  # words

_CANNOT = r"i(?: can ?not| can't|(?: am|'m) (?:unable|not able) to| (?:do not|don't) have the ability to)"
_AUDIO = r"(?:audio|recordings?)"
# People say that they cannot hear someone or access a building, and that they are AI researchers. So each pattern
# requires an object or an ending that only an assistant would use.
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
# The same few characters ten times in a row, as tokens without a space between them give it: "::::::::", "hahahahaha".
_STUTTER = re.compile(r"(\S{1,8}?)\1{9,}")


def token_budget(duration_s: float, max_new_tokens: int) -> int:
    """Return how many tokens the transcript of so many seconds may have; at most `max_new_tokens`."""
    return max(1, min(max_new_tokens, SPARE_TOKENS + math.ceil(TOKENS_PER_SECOND * duration_s)))


def judge(text: str, duration_s: float, is_complete: bool, speech_s: float = 0.0) -> str | None:
    """Find the fault of an output.

    Args:
        duration_s: of the audio it should be the transcript of.
        is_complete: whether it ended by itself, with end-of-text.
        speech_s: seconds of the audio with speech; 0 if voice activity was not measured.

    Returns:
        The most serious of `FAULTS`; None for a sound output.
    """
    if find_loop(text) is not None or _STUTTER.search(text):
        return "repetition"
    if len(text) >= MIN_COMPRESSED_LENGTH:
        data = text.encode()
        if len(data) / len(zlib.compress(data)) > MAX_COMPRESSION_RATIO:
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


def find_loop(text: str) -> tuple[int, int] | None:
    """Find the first phrase that follows itself too often.

    Returns:
        Index of the word where the loop begins, and the phrase's length in words; None without a loop.
    """
    words = [re.sub(r"[^\w']", "", word).lower() or word for word in text.split()]
    for begin in range(len(words)):
        for length in range(1, min(LONGEST_LOOP, (len(words) - begin) // 2) + 1):
            phrase, count = words[begin : begin + length], 1
            while words[begin + count * length : begin + (count + 1) * length] == phrase:
                count += 1
            if count >= MAX_REPEATS.get(length, MAX_REPEATS_OF_LONGER):
                return begin, length
    return None


def cut_loop(text: str) -> str:
    """Keep a looping phrase once and drop all text after it. A text without a loop is returned unchanged."""
    text = _STUTTER.sub(r"\1", text)
    found = find_loop(text)
    return text if found is None else " ".join(text.split()[: sum(found)])
