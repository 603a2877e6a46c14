"""Exceptions of the pipelines. Every message is one line and names the next step."""

MAX_LINE = 200  # characters of another library's message


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, cut to `MAX_LINE`; its type if it has no message."""
    return " ".join(str(error).split())[:MAX_LINE] or type(error).__name__


class PipelineError(Exception):
    """Base of the errors that a user of the stages can act on."""


class RecipeError(PipelineError, ValueError):
    """A recipe that does not exist, does not parse, or has an invalid value. The command line exits with 2."""


class CorpusError(PipelineError, ValueError):
    """A corpus that is missing, or whose layout is unknown."""


class SourceError(CorpusError):
    """A damaged file of a corpus; its utterances go to quarantine."""


class FetchError(PipelineError, OSError):
    """The network failed for as long as the recipe waits. The data are not at fault."""


class RunError(PipelineError, ValueError):
    """A run that cannot start, resume or be found."""


class TooManyBadError(PipelineError, ValueError):
    """More utterances could not be stored than `extract.max_bad` allows."""


class EvaluationError(PipelineError, ValueError):
    """An evaluation that cannot start, resume or be read."""


class PublishError(PipelineError, ValueError):
    """A run that cannot be published as it is."""
