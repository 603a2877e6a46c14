"""Evaluate: a provider over an evaluation set, into a folder that can be scored again without either.

    <output>/settings.json      written first: what is evaluated, on what, how. Another evaluation is refused here.
    <output>/predictions.jsonl  grows line by line; at the end sorted as the set is
    <output>/eval.json          word errors of the headline; with summary.json, report.md and report.html written last

Killed and started again, it goes on with the utterances that have no line yet; nothing is decoded twice. Failures are
counted and never scored as text. Scores are made from the first two files alone.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.errors import EvaluationError
from pipelines.evaluate.eval_sets import EvalSet, Utterance
from pipelines.evaluate.normalizers import open_normalizer, text_policy
from pipelines.evaluate.predictions import (
    Prediction,
    appending,
    claimed,
    drop_torn_line,
    read_predictions,
    write_predictions,
)
from pipelines.evaluate.providers.base import Answer, Provider, ProviderOptions
from pipelines.evaluate.report.report import write_reports
from pipelines.evaluate.summary import Settings, Summary, load_settings, save_settings, save_summary, summarize
from pipelines.files import write_text
from pipelines.scoring import WordErrors
from tinyaudio.model.errors import AudioError

OnProgress = Callable[[int, int], None]
OnMissing = Callable[[Sequence[Utterance]], None]
_NAMED_BY = {"num_beams": "beams", "max_new_tokens": "tokens", "length_penalty": "penalty"}  # in a folder's name
_MAX_NAMED = 3  # differing settings spelt out in an error


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How predictions are scored; `compare_with` is the folder (or predictions file) of another evaluation."""

    normalizer: str = "recipe"
    merge_compounds: bool = False
    compare_with: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation: its folder, what was answered, and the summary."""

    output: Path
    predictions: tuple[Prediction, ...]
    summary: Summary
    num_resumed: int  # answers that an earlier, interrupted call had left

    @property
    def word_errors(self) -> WordErrors:
        return self.summary.headline.word_errors


def evaluate(
    provider: Provider,
    eval_set: EvalSet,
    output: Path,
    *,
    scoring: Scoring = Scoring(),
    trained_on: str | None = None,
    retry_failed: bool = False,
    on_missing: OnMissing | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Transcribe a set and score it.

    Args:
        provider: the system; loaded once, it may serve several sets.
        eval_set: what to score.
        output: folder; made if missing, gone on with if it holds a part of this very evaluation.
        scoring: normaliser and comparison; can be changed later with `score_again`.
        trained_on: corpus of the training recipe, for the note on contamination.
        retry_failed: try utterances again that failed in an earlier call.
        on_missing: called once, when the folder is ours, with what has no answer yet; it may raise to stop.
        on_progress: called with (utterances done, utterances in all).

    Raises:
        EvaluationError: the folder holds another evaluation, or `scoring` names something that is not there.
    """
    _check_scoring(scoring, eval_set, output)
    settings = _settings(provider, eval_set, trained_on)
    output.mkdir(parents=True, exist_ok=True)
    with claimed(output):
        _claim(output / "settings.json", settings)
        done = _earlier(output / "predictions.jsonl", retry_failed)
        num_resumed = len(done)
        missing = [one for one in eval_set.utterances if one.utterance_id not in done]
        if on_missing is not None:
            on_missing(missing)
        if missing:
            _note_environment(output / "settings.json", settings)
            _answer(provider, eval_set, missing, output / "predictions.jsonl", done, on_progress)
        predictions = tuple(done[one.utterance_id] for one in eval_set.utterances)
        write_predictions(output / "predictions.jsonl", predictions)
        summary = score_again(output, output, scoring)
    return Evaluation(output=output, predictions=predictions, summary=summary, num_resumed=num_resumed)


def check_output(output: Path) -> None:
    """Find out whether a folder can be written, or made, before a model is loaded for it; nothing stays there.

    Raises:
        EvaluationError: it cannot.
    """
    try:
        there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        with tempfile.TemporaryDirectory(dir=there, prefix=".tinyaudio-"):
            pass
    except OSError as error:
        raise EvaluationError(
            f"{str(output)!r} cannot be written ({error.strerror}); name another folder with --output"
        ) from error


def evaluation_name(provider: str, eval_set: EvalSet, options: ProviderOptions) -> str:
    """Name an evaluation's folder by the set and by what is asked for differently from the model's own defaults.

    What is asked for and is the default anyway changes no name: "--num-beams 4" of a model that has 4 is the same.
    """
    own = _own_decoding(options.model)
    asked = {name: getattr(options, name) for name in _NAMED_BY}
    parts = [f"{_NAMED_BY[name]}{value:g}" for name, value in asked.items() if value not in (None, own.get(name))]
    how = "stored" if eval_set.corpus is None else None if options.guard else "unguarded"
    system = None if provider == "tinyaudio" else provider
    return "-".join(part for part in (eval_set.name, *parts, how, system) if part)


def _own_decoding(model: str | None) -> dict[str, Any]:
    """Read a local model's own decoding settings; empty for one on the hub, which is not fetched for its name."""
    path = None if model is None else Path(model) / "generation_config.json"
    return dict(json.loads(path.read_text())) if path is not None and path.is_file() else {}


def _check_scoring(scoring: Scoring, eval_set: EvalSet, output: Path) -> None:
    """Refuse before anything is decoded or paid for what `score_again` would refuse afterwards."""
    open_normalizer(scoring.normalizer, eval_set.section)
    other = _open_other(scoring, output)
    if other is None:
        return
    if {one.utterance_id for one in other[1]}.isdisjoint(one.utterance_id for one in eval_set.utterances):
        raise EvaluationError(
            f"{str(scoring.compare_with)!r} has no utterance in common with {eval_set.name!r}; expected the same set"
        )


def _open_other(scoring: Scoring, source: Path) -> tuple[Settings, list[Prediction]] | None:
    if scoring.compare_with is None:
        return None
    if _predictions_in(scoring.compare_with).resolve() == _predictions_in(source).resolve():
        raise EvaluationError(f"{str(source)!r} cannot be compared with itself; name another evaluation")
    return read_evaluation(scoring.compare_with)


def _predictions_in(source: Path) -> Path:
    return source if source.is_file() else source / "predictions.jsonl"


def _answer(
    provider: Provider,
    eval_set: EvalSet,
    missing: Sequence[Utterance],
    path: Path,
    done: dict[str, Prediction],
    on_progress: OnProgress | None,
) -> None:
    """Ask for what is missing, line by line into the file and into `done`."""
    write_predictions(path, done.values())  # without the failures that are tried again
    with appending(path) as log:
        for one in _predict(provider, eval_set, [one.utterance_id for one in missing]):
            log.add(one)
            done[one.utterance_id] = one
            if on_progress is not None:
                on_progress(len(done), len(eval_set.utterances))


def score_again(source: Path, output: Path, scoring: Scoring) -> Summary:
    """Score an evaluation's predictions, without model or corpus, and write all that follows from them.

    Args:
        source: folder of an evaluation, or a predictions file (the leaderboard's too).
        output: folder for eval.json, summary.json, report.md and report.html.
        scoring: how.

    Raises:
        EvaluationError: no predictions there, no such normaliser, a comparison with another set or with itself, or a
            folder that cannot be written.
    """
    check_output(output)
    settings, predictions = read_evaluation(source)
    other = _open_other(scoring, source)
    summary = summarize(
        settings, predictions, normalizer=scoring.normalizer, merge_compounds=scoring.merge_compounds, other=other
    )
    output.mkdir(parents=True, exist_ok=True)
    save_summary(output / "summary.json", summary)
    write_reports(output, summary)
    counts = summary.headline.word_errors.to_dict()
    finite = {key: value if math.isfinite(value) else None for key, value in counts.items()}
    write_text(output / "eval.json", json.dumps(finite, indent=2) + "\n")
    return summary


def read_evaluation(source: Path) -> tuple[Settings, list[Prediction]]:
    """Read predictions with the settings that lie beside them; without settings, texts are taken as they are.

    Raises:
        EvaluationError: no predictions there, or files that are not readable.
    """
    path = _predictions_in(source)
    predictions = read_predictions(path)
    beside = path.with_name("settings.json")
    if beside.is_file():
        return load_settings(beside), predictions
    return Settings(provider="predictions", model={"name": path.stem}, scored={"corpus": "unknown"}), predictions


def _settings(provider: Provider, eval_set: EvalSet, trained_on: str | None) -> Settings:
    made = Settings(
        provider=provider.name,
        model=provider.identity(),
        scored=eval_set.identity(),
        text_policy=text_policy(eval_set.section),
        trained_on=trained_on,
        environments=({**provider.environment(), **eval_set.environment()},),
    )
    # as it will be read back, so that the two can be compared
    as_json = {name: json.loads(json.dumps(getattr(made, name))) for name in ("model", "scored", "environments")}
    return replace(made, **{**as_json, "environments": tuple(as_json["environments"])})


def _claim(path: Path, wanted: Settings) -> None:
    """Say in a folder what it is for, or check that it is for this."""
    if not path.is_file():
        save_settings(path, wanted)
        return
    found = load_settings(path)
    old, new = _flat(_compared(found)), _flat(_compared(wanted))
    differing = [
        f"{key} {old.get(key)!r} there, {new.get(key)!r} now" for key in {**old, **new} if old.get(key) != new.get(key)
    ]
    if differing:
        more = f"; {len(differing) - _MAX_NAMED} more in settings.json" if len(differing) > _MAX_NAMED else ""
        raise EvaluationError(
            f"{str(path.parent)!r} holds another evaluation ({'; '.join(differing[:_MAX_NAMED])}{more}); "
            "name another folder with --output, or delete this one"
        )


def _compared(settings: Settings) -> dict[str, Any]:
    """Return what makes an evaluation what it is; a model by another name is the same model if all else is."""
    model = {key: value for key, value in settings.model.items() if key != "name"}
    return {"provider": settings.provider, "model": model, "set": settings.scored}


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables: {"model.decoding.num_beams": 4}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _note_environment(path: Path, wanted: Settings) -> None:
    """Add what answers are computed on from now on, if it is not what it was."""
    found = load_settings(path)
    if wanted.environments[0] not in found.environments:
        save_settings(path, replace(found, environments=(*found.environments, *wanted.environments)))


def _earlier(path: Path, retry_failed: bool) -> dict[str, Prediction]:
    """Read the answers of an earlier call; a line torn by a kill is cut off."""
    drop_torn_line(path)
    if not path.is_file():
        return {}
    return {one.utterance_id: one for one in read_predictions(path) if not (retry_failed and one.is_failed)}


def _predict(provider: Provider, eval_set: EvalSet, missing: Sequence[str]) -> Iterator[Prediction]:
    for window in eval_set.load(missing):
        known: dict[str, Utterance] = {}
        clips = []
        for utterance, clip in window:
            if utterance.transcript is None:
                yield _failure(utterance, "no reference transcript in the corpus")
            elif isinstance(clip, AudioError):
                yield _failure(utterance, str(clip))
            else:
                known[utterance.utterance_id] = replace(utterance, duration_s=clip.duration_s)
                clips.append(clip)
        waiting = {clip.utterance_id for clip in clips}
        for answer in provider.transcribe(clips):
            waiting.remove(answer.utterance_id)
            yield _prediction(known[answer.utterance_id], answer)
        for name in sorted(waiting):
            yield _failure(known[name], f"provider {provider.name!r} gave no answer")


def _failure(utterance: Utterance, error: str) -> Prediction:
    return _prediction(utterance, Answer(utterance_id=utterance.utterance_id, text=None, time_s=0.0, error=error))


def _prediction(utterance: Utterance, answer: Answer) -> Prediction:
    return Prediction(
        audio_filepath=utterance.source_id,
        duration=round(utterance.duration_s or 0.0, 4),
        time=round(answer.time_s, 6),
        text=utterance.transcript or "",
        pred_text=answer.text,
        utterance_id=utterance.utterance_id,
        speaker=utterance.speaker,
        sex=utterance.sex,
        source=utterance.source,
        error=answer.error,
        warnings=answer.warnings,
        provider_id=answer.provider_id,
    )
