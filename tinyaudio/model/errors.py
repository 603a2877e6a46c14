"""What can go wrong on the way from samples to text.

    TinyAudioError                  one line for a person: what was found, what was expected, what to do
    +-- AudioError (ValueError)     this input cannot be turned into samples
    +-- ModelError (ValueError)     this model folder, id or combination of parts cannot be used
    +-- MissingModelError (FileNotFoundError)

Everything raised on purpose by this package is one of these; anything else is a bug and keeps its traceback.
"""


class TinyAudioError(Exception):
    """Base of the errors a user can act on."""


class AudioError(TinyAudioError, ValueError):
    """An input that cannot be decoded into samples."""


class ModelError(TinyAudioError, ValueError):
    """A model whose parts are missing, altered or do not fit together."""


class MissingModelError(ModelError, FileNotFoundError):
    """No model where one was named or expected."""
