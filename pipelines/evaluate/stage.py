"""Stage three: run a provider over an evaluation set, into a folder that can be scored again without either.

    <output>/settings.json      written first: what is evaluated, on what, how. Another evaluation is refused here.
    <output>/predictions.jsonl  grows line by line; sorted like the set at the end
    <output>/eval.json          word errors of the headline; with summary.json, report.md and report.html written last

A killed evaluation resumes with the utterances that have no line yet; nothing is decoded twice. Failures are counted
and never scored as text. Scores are computed from the first two files alone.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache.create import compare_fields
from pipelines.errors import EvaluationError
from pipelines.evaluate.eval_sets import EvalSet, Utterance
from pipelines.evaluate.normalizers import open_normalizer, text_policy
from pipelines.evaluate.predictions import Prediction, claimed, drop_torn_line, read_predictions, write_predictions
from pipelines.evaluate.providers.base import Provider, ProviderOptions
from pipelines.evaluate.report.report import write_reports
from pipelines.evaluate.summary import Settings, Summary, load_settings, save_settings, save_summary, summarize
from pipelines.files import write_text

# What names an evaluation's folder, and how.
_NAMED_BY = {"num_beams": "beams", "max_new_tokens": "tokens", "length_penalty": "penalty", "ctc_nbest": "nbest"}
_MAX_NAMED = 3  # differing settings listed in an error


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How predictions are scored; `compare_with` is the folder (or predictions file) of another evaluation."""

    normalizer: str = "recipe"
    compare_with: Path | None = None


def evaluate(
    provider: Provider,
    eval_set: EvalSet,
    output: Path,
    *,
    scoring: Scoring = Scoring(),
    trained_on: str | None = None,
    retry_failed: bool = False,
    on_missing: Callable[[Sequence[Utterance]], None] = lambda missing: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Transcribe a set and score it.

    Args:
        provider: the system; loaded once, it may serve several sets.
        output: folder; created if missing, resumed if it contains part of this very evaluation.
        scoring: normaliser and comparison; can be changed later with `score_again`.
        trained_on: corpus of the training recipe, for the note on contamination.
        retry_failed: try utterances again that failed in an earlier call.
        on_missing: called once, while the folder is locked, with the utterances that have no answer yet; it may raise
            to stop before anything is changed.
        on_progress: called with (utterances done, utterances in all).

    Raises:
        EvaluationError: the folder contains another evaluation or is in use by another process, or `scoring` names
            something that does not exist.
        OSError: the folder cannot be written.
    """
    # Whatever scoring would refuse at the end is refused now, before anything is decoded or paid for.
    open_normalizer(scoring.normalizer, eval_set.section)
    other = _read_other(scoring, output)
    ids = {one.utterance_id for one in eval_set.utterances}
    if other is not None and ids.isdisjoint(one.utterance_id for one in other[1]):
        raise EvaluationError(
            f"{str(scoring.compare_with)!r} has no utterance in common with {eval_set.name!r}; expected the same set"
        )

    environment = _as_json({**provider.environment(), **eval_set.environment()})
    settings = Settings(
        provider=provider.name,
        model=_as_json(provider.identity()),
        scored=_as_json(eval_set.identity()),
        text_policy=text_policy(eval_set.section),
        trained_on=trained_on,
        environments=(environment,),
    )
    output.mkdir(parents=True, exist_ok=True)
    with claimed(output):
        # A folder belongs to one evaluation.
        if (output / "settings.json").is_file():
            found = load_settings(output / "settings.json")
            _check_same(found, settings, output)
            settings = found
        else:
            save_settings(output / "settings.json", settings)

        # What an earlier call has answered is kept.
        path = output / "predictions.jsonl"
        drop_torn_line(path)
        earlier = read_predictions(path) if path.is_file() else []
        done = {one.utterance_id: one for one in earlier if not (retry_failed and one.is_failed)}
        missing = [one for one in eval_set.utterances if one.utterance_id not in done]
        on_missing(missing)

        # The rest is answered, one line at a time.
        if missing:
            if environment not in settings.environments:
                settings = replace(settings, environments=(*settings.environments, environment))
                save_settings(output / "settings.json", settings)
            write_predictions(path, done.values())  # without the failures that are tried again
            with path.open("a", encoding="utf-8", newline="\n") as log:
                for one in _transcribe(provider, eval_set, {one.utterance_id for one in missing}):
                    log.write(one.to_line())
                    log.flush()
                    done[one.utterance_id] = one
                    on_progress(len(done), len(ids))

        write_predictions(path, [done[one.utterance_id] for one in eval_set.utterances])
        return score_again(output, output, scoring)


def _transcribe(provider: Provider, eval_set: EvalSet, ids: Collection[str]) -> Iterator[Prediction]:
    for clips, failures in eval_set.load(ids):
        yield from failures
        waiting = {clip.utterance_id: clip for clip in clips}
        for one in provider.transcribe(clips):
            del waiting[one.utterance_id]
            yield one
        for clip in waiting.values():
            yield clip.answer(None, error=f"provider {provider.name!r} gave no answer")


def _check_same(found: Settings, asked: Settings, output: Path) -> None:
    """Refuse to mix two evaluations; a model by another name is the same model if everything else is."""
    old, new = (
        {
            "provider": one.provider,
            "model": {key: value for key, value in one.model.items() if key != "name"},
            "set": one.scored,
        }
        for one in (found, asked)
    )
    differences = compare_fields(old, new)
    if differences:
        named = [f"{key} {there!r} there, {now!r} now" for key, (there, now) in differences.items()]
        more = f"; {len(named) - _MAX_NAMED} more in settings.json" if len(named) > _MAX_NAMED else ""
        raise EvaluationError(
            f"{str(output)!r} contains another evaluation ({'; '.join(named[:_MAX_NAMED])}{more}). "
            "Name another folder with --output, or delete this one"
        )


def _as_json(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table as it will be read back from a file, so that the two can be compared."""
    loaded: dict[str, Any] = json.loads(json.dumps(table))
    return loaded


def evaluation_name(provider: str, eval_set: EvalSet, options: ProviderOptions) -> str:
    """Name an evaluation's folder by the set and by the options that differ from the model's own defaults.

    An option that equals the default changes no name: "--num-beams 4" for a model whose default is 4 is the same
    evaluation. The defaults of a model on the hub are not fetched.
    """
    own: dict[str, Any] = {}
    config = Path(options.model or "") / "generation_config.json"
    if options.model is not None and config.is_file():
        own = json.loads(config.read_text())
    parts = [eval_set.name]
    for name, short in _NAMED_BY.items():
        value = getattr(options, name)
        if value not in (None, own.get(name)):
            parts.append(f"{short}{value:g}")
    if not options.guard:
        parts.append("unguarded")
    if provider != "tinyaudio":
        parts.append(provider)
    return "-".join(parts)


def score_again(source: Path, output: Path, scoring: Scoring) -> Summary:
    """Score an evaluation's predictions, without model or corpus, and write all files that follow from them.

    Args:
        source: folder of an evaluation, or a predictions file (the leaderboard's too).
        output: folder for eval.json, summary.json, report.md and report.html.

    Raises:
        EvaluationError: no predictions, no such normaliser, or a comparison with another set or with itself.
        OSError: the folder cannot be written.
    """
    settings, predictions = read_evaluation(source)
    other = _read_other(scoring, source)
    summary = summarize(settings, predictions, normalizer=scoring.normalizer, other=other)
    output.mkdir(parents=True, exist_ok=True)
    save_summary(output / "summary.json", summary)
    write_reports(output, summary)
    counts = summary.word_errors.to_dict()
    finite = {key: value if math.isfinite(value) else None for key, value in counts.items()}
    write_text(output / "eval.json", json.dumps(finite, indent=2) + "\n")
    return summary


def read_evaluation(source: Path) -> tuple[Settings, list[Prediction]]:
    """Read predictions and the settings beside them; without, texts are scored as they are. Errors as `score_again`."""
    path = _predictions_file(source)
    predictions = read_predictions(path)
    beside = path.with_name("settings.json")
    if beside.is_file():
        return load_settings(beside), predictions
    return Settings(provider="predictions", model={"name": path.stem}, scored={"corpus": "unknown"}), predictions


def _read_other(scoring: Scoring, source: Path) -> tuple[Settings, list[Prediction]] | None:
    if scoring.compare_with is None:
        return None
    if _predictions_file(scoring.compare_with).resolve() == _predictions_file(source).resolve():
        raise EvaluationError(f"{str(source)!r} cannot be compared with itself; name another evaluation")
    return read_evaluation(scoring.compare_with)


def _predictions_file(source: Path) -> Path:
    return source if source.is_file() else source / "predictions.jsonl"
