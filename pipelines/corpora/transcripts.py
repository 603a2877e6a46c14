"""The recipe's text policy: what is removed from a transcript before it becomes a training target."""

import re
import unicodedata

from pipelines.recipes.recipe import CorpusSection

_BETWEEN_DIGITS = re.compile(r"(?<=\d)[.,:](?=\d)")
_IN_WORD = re.compile(r"(?<=\w)['\u2019](?=\w)")
_MAYBE_PUNCTUATION = re.compile(r"[^\w\s]|_")  # all punctuation and symbols; `_keep` excepts some
_TAG = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]")


def prepare_transcript(text: str | None, corpus: CorpusSection) -> str:
    """Apply a recipe's text policy, which is part of a store's fingerprint, and fold white space.

    Args:
        text: unchanged from the corpus; None counts as empty.
        corpus: `text_tags` "remove" drops annotations such as <COMMA> or [noise], before anything else; `text_case`
            "lower" lower-cases; `text_punctuation` "remove" drops punctuation and symbols, except apostrophes inside
            words (it's) and separators inside numbers (3.5, 10:30).
    """
    text = text or ""
    if corpus.text_tags == "remove":
        text = _TAG.sub(" ", text)
    if corpus.text_punctuation == "remove":
        text = _MAYBE_PUNCTUATION.sub(lambda match: _keep(match.string, match.start()), text)
    if corpus.text_case == "lower":
        text = text.lower()
    return " ".join(text.split())


def _keep(text: str, i: int) -> str:
    if unicodedata.category(text[i])[0] not in "PS":
        return text[i]
    if _IN_WORD.match(text, i):
        return "'"
    return text[i] if _BETWEEN_DIGITS.match(text, i) else " "
