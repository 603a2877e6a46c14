"""The exceptions that this package raises on purpose; any other exception is a bug and keeps its traceback.

Every message is one line: what was expected, what was found, what to do.
"""

MAX_REASON_LENGTH = 200  # characters of another library's message that are quoted in ours


class TinyAudioError(Exception):
    """Base of the errors a user can act on."""


class AudioError(TinyAudioError, ValueError):
    """An input that cannot be decoded into samples."""


class ModelError(TinyAudioError, ValueError):
    """A model whose parts are missing, changed or do not fit together."""


class MissingModelError(ModelError, FileNotFoundError):
    """There is no model where one was named or expected."""


def is_missing_revision(error: BaseException | None) -> bool:
    """Return whether the cause of an error is a revision that a repository of the hub does not have."""
    while error is not None:
        if type(error).__name__ == "RevisionNotFoundError":  # huggingface_hub's, which takes half a second to import
            return True
        error = error.__cause__ or error.__context__
    return False


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, cut to `MAX_REASON_LENGTH`; its type's name if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON_LENGTH else f"{text[: MAX_REASON_LENGTH - 3]}..."
