"""The sources of a mixed corpus, by the form of utterance ids, and where test data overlap with training data.

LoquaciousSet has no source column, but its ids keep the form of each source. Forms that appear in the scripts that
made the set are told apart; all others share one label.

Source of the forms: speechbrain/speechbrain @ 2ff8fec, recipes/LargeScaleASR/dataset_preparation/preparation_scripts
(librispeech_prepare.py: the FLAC's name; common_voice_prepare.py: the clip's name; voxpopuli_prepare.py: the segment's
name, which begins with the session's date).
"""

import re
from pathlib import Path

_LOQUACIOUS = ("loquaciousset", "largescaleasr")  # names of one set on the hub, and of folders with a copy of it
_FORMS = (
    (re.compile(r"^\d+-\d+-\d+$"), "librispeech"),
    (re.compile(r"^common_voice_[a-z]+_\d+"), "commonvoice"),
    (re.compile(r"^\d{8}-\d{4}-PLENARY"), "voxpopuli"),
)
UNKNOWN_FORM = "yodas-or-peoples-speech"

_LIBRIVOX = (
    "LoquaciousSet's train splits contain LibriHeavy, which comes from LibriVox, as LibriSpeech's test sets do: books "
    "or speakers may be in both. This model's LibriSpeech numbers (a third of LoquaciousSet's test hours) may be too "
    "good."
)
_ENCODER = "The encoder was fine-tuned on LibriSpeech's 960 training hours; LibriSpeech test data is in its own domain."


def is_loquacious(corpus: str | None) -> bool:
    """Recognise LoquaciousSet by its hub id, or by the name of the folder that contains a copy."""
    return Path(corpus or "").name.lower() in _LOQUACIOUS


def source_of(corpus: str, utterance_id: str) -> str | None:
    """Return the source of an utterance by the form of its id; None for other corpora than LoquaciousSet."""
    if not is_loquacious(corpus):
        return None
    return next((name for form, name in _FORMS if form.match(utterance_id)), UNKNOWN_FORM)


def contamination_notes(trained_on: str | None, encoder_id: str | None, scored_on: str) -> list[str]:
    """Describe overlaps between training and test data that a reader of an error rate must know.

    Args:
        trained_on: corpus of the training recipe, if known.
        encoder_id: hub id of the frozen encoder, if known.
        scored_on: corpus of this evaluation, followed by its config if it has one.
    """
    has_librispeech = is_loquacious(scored_on.split(" ")[0]) or "librispeech" in scored_on.lower()
    notes = [_LIBRIVOX] if has_librispeech and is_loquacious(trained_on) else []
    return notes + ([_ENCODER] if has_librispeech and "ls960" in (encoder_id or "") else [])
