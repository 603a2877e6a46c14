"""What can go wrong between the stages; every message is one line with the next step."""


class PipelineError(Exception):
    """Base of the errors a user of the stages can act on."""


class RecipeError(PipelineError, ValueError):
    """A recipe that does not exist, does not parse, or says something it cannot mean. The command line exits 2."""


class CorpusError(PipelineError, ValueError):
    """A corpus that is missing, or not in a layout that can be read."""


class SourceError(CorpusError):
    """A file of a corpus that is damaged; its utterances go to quarantine."""


class FetchError(PipelineError, OSError):
    """The network did not give what was asked for, for as long as the recipe waits; nothing is wrong with the data."""


class DiskError(PipelineError, OSError):
    """Too little room for the next shard."""


class RunError(PipelineError, ValueError):
    """A run that cannot start, go on or be found."""


class TooManyBadError(PipelineError, ValueError):
    """More utterances could not be stored than `extract.max_bad` allows."""


class EvaluationError(PipelineError, ValueError):
    """An evaluation that cannot start, go on, or be read."""


class PublishError(PipelineError, ValueError):
    """A run that cannot be published as it is."""
