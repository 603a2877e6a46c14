"""Evaluate: a provider over an evaluation set, into a folder that can be scored again without either.

    <output>/settings.json      written first: what is evaluated, on what, how. Another evaluation is refused here.
    <output>/predictions.jsonl  grows line by line; at the end sorted as the set is
    <output>/eval.json          written last: word errors over the set

Killed and started again, it goes on with the utterances that have no line yet; nothing is decoded twice. Failures are
counted and never scored as text.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.errors import EvaluationError
from pipelines.eval_sets import EvalSet, Utterance
from pipelines.predictions import (
    Prediction,
    appending,
    drop_torn_line,
    read_predictions,
    replace_text,
    write_predictions,
)
from pipelines.providers import Answer, Clip, Provider
from pipelines.recipes import CorpusSection
from pipelines.scoring import WordErrors, count_word_errors
from pipelines.transcripts import prepare_transcript
from tinyaudio.audio import SAMPLING_RATE
from tinyaudio.errors import AudioError

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation: its folder, what was answered, and the word errors."""

    output: Path
    predictions: tuple[Prediction, ...]
    word_errors: WordErrors
    num_resumed: int  # answers that an earlier, interrupted call had left


def evaluate(
    provider: Provider,
    eval_set: EvalSet,
    output: Path,
    *,
    retry_failed: bool = False,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Transcribe a set and count its word errors.

    Args:
        provider: the system; loaded once, it may serve several sets.
        eval_set: what to score.
        output: folder; made if missing, gone on with if it holds a part of this very evaluation.
        retry_failed: try utterances again that failed in an earlier call.
        on_progress: called with (utterances done, utterances in all).

    Raises:
        EvaluationError: the folder holds another evaluation.
    """
    output.mkdir(parents=True, exist_ok=True)
    _claim(output / "settings.json", provider, eval_set)
    path = output / "predictions.jsonl"
    done = _earlier(path, retry_failed)
    num_resumed = len(done)
    missing = [one.utterance_id for one in eval_set.utterances if one.utterance_id not in done]
    if missing:
        with appending(path) as log:
            for one in _predict(provider, eval_set, missing):
                log.add(one)
                done[one.utterance_id] = one
                if on_progress is not None:
                    on_progress(len(done), len(eval_set.utterances))
    predictions = tuple(done[one.utterance_id] for one in eval_set.utterances)
    write_predictions(path, predictions)
    errors = word_errors(predictions, eval_set.section)
    replace_text(output / "eval.json", json.dumps(errors.to_dict(), indent=2) + "\n")
    return Evaluation(output=output, predictions=predictions, word_errors=errors, num_resumed=num_resumed)


def word_errors(predictions: Sequence[Prediction], section: CorpusSection) -> WordErrors:
    """Count word errors under the recipe's own text policy, on both sides; failures are counted apart."""
    answered = [(one.text, one.pred_text) for one in predictions if one.pred_text is not None]
    return count_word_errors(
        [prepare_transcript(text, section) for text, _ in answered],
        [prepare_transcript(text, section) for _, text in answered],
        failed=len(predictions) - len(answered),
    )


def _claim(path: Path, provider: Provider, eval_set: EvalSet) -> None:
    """Say in a folder what it is for, or check that it is for this."""
    wanted: dict[str, Any] = {
        "provider": provider.name,
        "model": provider.identity(),
        "set": eval_set.identity(),
    }
    wanted = json.loads(json.dumps(wanted))
    if not path.is_file():
        replace_text(path, json.dumps(wanted, indent=2) + "\n")
        return
    found = json.loads(path.read_text())
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        raise EvaluationError(
            f"{str(path.parent)!r} holds another evaluation ({', '.join(differing)} differ: see settings.json); "
            "name another folder with --output, or delete this one"
        )


def _earlier(path: Path, retry_failed: bool) -> dict[str, Prediction]:
    drop_torn_line(path)
    if not path.is_file():
        return {}
    found = read_predictions(path)
    kept = [one for one in found if not (retry_failed and one.is_failed)]
    if len(kept) < len(found):
        write_predictions(path, kept)
    return {one.utterance_id: one for one in kept}


def _predict(provider: Provider, eval_set: EvalSet, missing: Sequence[str]) -> Iterator[Prediction]:
    for window in eval_set.load(missing):
        known = {utterance.utterance_id: utterance for utterance, _ in window}
        clips = []
        for utterance, samples in window:
            if utterance.transcript is None:
                yield _failure(utterance, "no reference transcript in the corpus")
            elif isinstance(samples, AudioError):
                yield _failure(utterance, str(samples))
            else:
                known[utterance.utterance_id] = replace(utterance, duration_s=len(samples) / SAMPLING_RATE)
                clips.append(Clip(utterance_id=utterance.utterance_id, samples=samples))
        unanswered = {clip.utterance_id for clip in clips}
        for answer in provider.transcribe(clips):
            unanswered.remove(answer.utterance_id)
            yield _prediction(known[answer.utterance_id], answer)
        for name in sorted(unanswered):
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
