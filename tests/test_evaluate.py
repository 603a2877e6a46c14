import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from evaluations import answers, run_eval

from pipelines.errors import EvaluationError
from pipelines.evaluate.eval_sets import Clip, EvalSet, Utterance, open_eval_set, unique_names
from pipelines.evaluate.predictions import Prediction, claimed, read_predictions, write_predictions
from pipelines.evaluate.providers.base import ProviderOptions
from pipelines.evaluate.providers.tinyaudio import TinyAudioProvider
from pipelines.evaluate.stage import Scoring, evaluate, read_evaluation, score_again
from pipelines.evaluate.summary import load_summary, summarize
from pipelines.recipes.recipe import CorpusSection

WORDS = ["the cat sat", "a dog ran off", "", "one", "two three four five", "it rained on the hill"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An audiofolder corpus of six recordings with distinct lengths and two sources."""
    split = tmp_path / "corpus" / "test"
    split.mkdir(parents=True)
    rng = np.random.default_rng(3)
    with (split / "metadata.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["file_name", "id", "text", "source", "sex"])
        for i, words in enumerate(WORDS):
            samples = 0.1 * rng.standard_normal(8_000 + 1_600 * i)
            soundfile.write(split / f"{i}.wav", samples, 16_000)
            rows.writerow([f"{i}.wav", f"utt-{i}", words, ["read", "talk"][i % 2], ["female", "male"][i % 2]])
    return tmp_path / "corpus"


def eval_set(folder: Path, **choice: Any) -> EvalSet:
    return open_eval_set(CorpusSection(path=str(folder)), split=choice.pop("split", "test"), **choice)


@dataclass
class Parrot:
    """Answers from a list; remembers what it was asked; may die after some answers or fail on some clips."""

    texts: dict[str, str]
    fails: dict[str, str] = field(default_factory=dict)
    dies_after: int | None = None
    version: int = 1
    name: str = "parrot"
    asked: list[str] = field(default_factory=list)

    def identity(self) -> dict[str, Any]:
        return {"version": self.version}

    def environment(self) -> dict[str, Any]:
        return {}

    def transcribe(self, clips: Sequence[Clip]) -> Iterator[Prediction]:
        for clip in clips:
            if self.dies_after is not None and len(self.asked) >= self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(clip.utterance_id)
            name, error = clip.utterance_id, self.fails.get(clip.utterance_id)
            yield clip.answer(None if error else self.texts[name], time_s=0.1, error=error)


def parrot(**changes: Any) -> Parrot:
    return Parrot({f"utt-{i}": words.replace("cat", "rat") for i, words in enumerate(WORDS)}, **changes)


def test_word_errors_are_counted_over_the_whole_set(folder: Path, tmp_path: Path) -> None:
    done = evaluate(parrot(), eval_set(folder), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert written == done.word_errors.to_dict()
    assert written["substitutions"] == 1
    assert written["words"] == sum(len(words.split()) for words in WORDS)
    assert written["wer"] == pytest.approx(1 / written["words"])
    assert (written["utterances"], written["failed"]) == (6, 0)


def test_predictions_carry_the_leaderboards_five_fields(folder: Path, tmp_path: Path) -> None:
    evaluate(parrot(), eval_set(folder), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [list(line)[:5] for line in lines] == [["audio_filepath", "duration", "time", "text", "pred_text"]] * 6
    assert lines[0]["pred_text"] == "the rat sat"
    assert lines[0]["text"] == "the cat sat"
    assert lines[0]["duration"] == pytest.approx(0.5)
    assert {line["source"] for line in lines} == {"read", "talk"}


def test_a_failed_clip_is_counted_and_never_scored_as_text(folder: Path, tmp_path: Path) -> None:
    done = evaluate(parrot(fails={"utt-4": "out of order"}), eval_set(folder), tmp_path / "out")
    assert done.word_errors.failed == 1
    assert done.word_errors.deletions == 0
    assert done.word_errors.utterances == 5
    assert "1 FAILED" in str(done.word_errors)


def test_undecodable_audio_is_a_failure_with_its_reason(folder: Path, tmp_path: Path) -> None:
    (folder / "test" / "1.wav").write_bytes(b"not audio at all")
    done = evaluate(parrot(), eval_set(folder), tmp_path / "out")
    [failed] = done.failures
    assert failed.utterance_id == "utt-1"
    assert "not readable as audio" in failed.error


def test_cut_and_damaged_recordings_are_scored_counted_and_named(folder: Path, tmp_path: Path) -> None:
    """A wav without its end, an Ogg without its last page, a FLAC with noise in it; the others are whole."""
    split = folder / "test"
    (split / "0.wav").write_bytes((split / "0.wav").read_bytes()[:-6000])
    samples, rate = soundfile.read(split / "3.wav")
    for number, kind in ((3, "OGG"), (5, "FLAC")):
        soundfile.write(split / f"{number}.wav", np.tile(samples, 9), rate, format=kind)
    cut = (split / "3.wav").read_bytes()
    (split / "3.wav").write_bytes(cut[: len(cut) // 2])
    damaged = bytearray((split / "5.wav").read_bytes())
    damaged[40_000:40_500] = bytes(500)
    (split / "5.wav").write_bytes(damaged)
    done = evaluate(parrot(), eval_set(folder), tmp_path / "out")
    assert done.word_errors.utterances == 6
    assert done.analysis.rates.guard_codes == {"input_damaged": 1, "input_truncated": 2}
    assert done.notes[0].startswith("3 of 6 recordings are cut short or damaged")
    assert "utt-0, utt-3, utt-5." in done.notes[0]
    assert done.notes[0] in (tmp_path / "out" / "report.md").read_text()
    assert score_again(tmp_path / "out", tmp_path / "again", Scoring()).notes == done.notes
    assert [one.warnings for one in read_predictions(tmp_path / "out" / "predictions.jsonl")][1] == ()


def test_an_interrupted_evaluation_resumes_and_transcribes_nothing_twice(folder: Path, tmp_path: Path) -> None:
    evaluate(parrot(), eval_set(folder), tmp_path / "undisturbed")
    first = parrot(dies_after=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, eval_set(folder), tmp_path / "out")
    with (tmp_path / "out" / "predictions.jsonl").open("a") as stream:
        stream.write('{"audio_filepath": "torn')
    second = parrot()
    evaluate(second, eval_set(folder), tmp_path / "out")
    assert sorted(first.asked + second.asked) == [f"utt-{i}" for i in range(6)]
    assert len(second.asked) == 4
    files = [tmp_path / name / "predictions.jsonl" for name in ("out", "undisturbed")]
    assert read_predictions(files[0]) == read_predictions(files[1])
    third = parrot()
    evaluate(third, eval_set(folder), tmp_path / "out")
    assert third.asked == []


def test_failures_stay_failures_until_a_retry_is_asked_for(folder: Path, tmp_path: Path) -> None:
    evaluate(parrot(fails={"utt-4": "busy"}), eval_set(folder), tmp_path / "out")
    again = parrot()
    assert evaluate(again, eval_set(folder), tmp_path / "out").word_errors.failed == 1
    assert again.asked == []
    assert evaluate(again, eval_set(folder), tmp_path / "out", retry_failed=True).word_errors.failed == 0
    assert again.asked == ["utt-4"]


def test_an_evaluation_that_is_declined_before_it_starts_changes_nothing(folder: Path, tmp_path: Path) -> None:
    evaluate(parrot(fails={"utt-4": "busy"}), eval_set(folder), tmp_path / "out")
    before = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    asked: list[list[str]] = []

    def say_no(missing: Sequence[Utterance]) -> None:
        asked.append([one.utterance_id for one in missing])
        with pytest.raises(EvaluationError, match="another process"), claimed(tmp_path / "out"):
            pass  # this process holds the folder while a provider is asked
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(parrot(), eval_set(folder), tmp_path / "out", retry_failed=True, on_missing=say_no)
    assert asked == [["utt-4"]]
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == before


def test_what_scoring_would_refuse_is_refused_before_anything_is_transcribed(folder: Path, tmp_path: Path) -> None:
    evaluate(parrot(), eval_set(folder, max_samples=1), tmp_path / "one")
    [asked] = read_predictions(tmp_path / "one" / "predictions.jsonl")
    stranger = replace(asked, utterance_id="another", audio_filepath="another")
    write_predictions(tmp_path / "strangers.jsonl", [stranger])
    system = parrot()
    for scoring, message in (
        (Scoring(normalizer="wisper"), "no normaliser 'wisper'"),
        (Scoring(compare_with=tmp_path / "nowhere"), "no predictions at"),
        (Scoring(compare_with=tmp_path / "out"), "cannot be compared with itself"),
        (Scoring(compare_with=tmp_path / "strangers.jsonl"), "has no utterance in common"),
    ):
        with pytest.raises(EvaluationError, match=message):
            evaluate(system, eval_set(folder), tmp_path / "out", scoring=scoring)
    assert system.asked == []
    assert not (tmp_path / "out").exists()


def test_ids_are_made_unique_and_the_change_is_counted(folder: Path, tmp_path: Path) -> None:
    metadata = folder / "test" / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("utt-3", "utt-2").replace("utt-5", "utt-2"))
    found = eval_set(folder)
    assert [one.utterance_id for one in found.utterances] == ["utt-0", "utt-1", "utt-2", "utt-2#2", "utt-4", "utt-2#3"]
    assert (found.num_renamed, found.identity()["renamed_ids"]) == (2, 2)
    system = Parrot({one.utterance_id: "x" for one in found.utterances})
    assert evaluate(system, found, tmp_path / "out").word_errors.utterances == 6
    assert "renamed_ids | 2 |" in (tmp_path / "out" / "report.md").read_text().replace("\\", "")


def test_what_is_on_disk_scores_as_what_was_answered(folder: Path, tmp_path: Path) -> None:
    """Text is kept to the letter: line ends of any kind, quotes, empty answers, letters outside ASCII."""
    odd = ["\u2028the cat", 'a\r\ndog "ran" off', "\x85", "", "two\tthree  four\u00a0five", "it's \u00e9t\u00e9\\n"]
    system = Parrot({f"utt-{i}": text for i, text in enumerate(odd)}, fails={"utt-1": "l\u2019\u00e9chec\n"})
    done = evaluate(system, eval_set(folder), tmp_path / "out", trained_on="somewhere")
    settings, predictions = read_evaluation(tmp_path / "out")
    assert [one.pred_text for one in predictions if not one.is_failed] == [odd[0], *odd[2:]]
    assert done == summarize(settings, predictions)
    assert done == load_summary(tmp_path / "out" / "summary.json")
    assert done == score_again(tmp_path / "out", tmp_path / "again", Scoring())


def test_an_evaluation_made_by_an_earlier_version_is_still_read(folder: Path, tmp_path: Path) -> None:
    """Stored features and merged compounds are gone; folders that were made with them are scored and compared."""
    evaluate(parrot(), eval_set(folder), tmp_path / "old")
    for name, change in {
        "settings.json": lambda content: content["scored"].update(provenance=None, store_fingerprint="0" * 64),
        "summary.json": lambda content: content["scores"][0].update(merge_compounds=False),
    }.items():
        content = json.loads((tmp_path / "old" / name).read_text())
        change(content)
        (tmp_path / "old" / name).write_text(json.dumps(content))
    assert load_summary(tmp_path / "old" / "summary.json").word_errors.errors == 1
    assert score_again(tmp_path / "old", tmp_path / "again", Scoring()).word_errors.errors == 1
    done = evaluate(parrot(), eval_set(folder), tmp_path / "new", scoring=Scoring(compare_with=tmp_path / "old"))
    assert done.comparison is not None
    assert (done.comparison.utterances, done.comparison.num_tied) == (6, 6)


def test_another_evaluation_in_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    evaluate(parrot(), eval_set(folder), tmp_path / "out")
    with pytest.raises(EvaluationError, match=r"contains another evaluation \(model.version 1 there, 2 now\)"):
        evaluate(parrot(version=2), eval_set(folder), tmp_path / "out")
    with pytest.raises(EvaluationError, match=r"\(set.max_samples None there, 2 now; set.seed None there, 0 now\)"):
        evaluate(parrot(), eval_set(folder, max_samples=2), tmp_path / "out")


def test_two_processes_do_not_evaluate_into_one_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with claimed(tmp_path / "out"), pytest.raises(EvaluationError, match="another process evaluates into"):
        evaluate(parrot(), eval_set(folder), tmp_path / "out")
    assert evaluate(parrot(), eval_set(folder), tmp_path / "out").word_errors.utterances == 6


def test_a_sample_is_random_seeded_and_part_of_a_larger_one(folder: Path) -> None:
    def chosen(**choice: Any) -> list[str]:
        return [one.utterance_id for one in eval_set(folder, **choice).utterances]

    assert chosen(max_samples=3) == chosen(max_samples=3)
    assert set(chosen(max_samples=2)) < set(chosen(max_samples=4))
    assert len({tuple(chosen(max_samples=3, seed=seed)) for seed in range(8)}) > 1
    assert chosen(max_samples=100) == chosen()


def test_a_source_can_be_scored_alone(folder: Path) -> None:
    assert {one.source for one in eval_set(folder, source="talk").utterances} == {"talk"}
    with pytest.raises(EvaluationError, match="has no utterance of source 'radio'; its sources: read, talk"):
        eval_set(folder, source="radio")


def test_a_prediction_is_an_answer_or_a_failure_and_never_both() -> None:
    common = {"audio_filepath": "a", "duration": 1.0, "time": 0.1, "text": "x", "utterance_id": "a"}
    with pytest.raises(ValueError, match="expected exactly one"):
        Prediction(**common, pred_text="", error="late")
    with pytest.raises(ValueError, match="expected exactly one"):
        Prediction(**common, pred_text=None)


def test_leaderboard_files_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "MODEL_x_DATASET_y.jsonl"
    line = {"audio_filepath": "s0", "duration": 1.5, "time": 0.1, "text": "Hi", "pred_text": ""}
    path.write_text(json.dumps(line) + "\n")
    [one] = read_predictions(path)
    assert (one.utterance_id, one.pred_text, one.is_failed) == ("s0", "", False)
    path.write_text('{"text": "Hi"}\n')
    with pytest.raises(EvaluationError, match="line 1 is not a prediction"):
        read_predictions(path)


def test_a_cut_recording_is_named_on_the_command_line(folder: Path, checkpoint: Path) -> None:
    whole = (folder / "test" / "4.wav").read_bytes()
    (folder / "test" / "4.wav").write_bytes(whole[: len(whole) // 2])
    result = run_eval(str(checkpoint), "--corpus", str(folder), "--num-beams", "1", "--output", str(folder / "out"))
    assert result.exit_code == 0, result.output
    assert "1 of 6 recordings are cut short or damaged" in result.stderr
    assert "utt-4." in result.stderr


def test_batch_size_changes_no_answer(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    texts = []
    for batch_size in (1, 4):
        options = ProviderOptions(model=str(checkpoint), device="cpu", batch_size=batch_size, max_new_tokens=12)
        evaluate(TinyAudioProvider.load(options), eval_set(folder), tmp_path / str(batch_size))
        texts.append(answers(tmp_path / str(batch_size)))
    assert texts[0] == texts[1]


def test_unique_names_collide_with_nothing() -> None:
    assert unique_names(["a", "a", "a#2", "a"]) == (["a", "a#2", "a#2#2", "a#3"], 3)


def test_a_row_without_id_goes_by_its_place(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": b"", "path": None}] * 2
    pq.write_table(
        pa.table({"ID": [None, "x"], "wav": cells, "text": ["a", "b"], "duration": [1.0, 1.0]}),
        tmp_path / "test-00000.parquet",
    )
    found = eval_set(tmp_path)
    assert [one.utterance_id for one in found.utterances] == ["test/test:0:0:0", "x"]
    assert found.num_renamed == 1


def test_a_summary_states_what_was_computed_with_what(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    options = ProviderOptions(model=str(checkpoint), device="cpu", num_beams=1, max_new_tokens=4)
    evaluate(TinyAudioProvider.load(options), eval_set(folder), tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["bootstrap"] == {"replications": 10_000, "seed": 0}
    [environment] = summary["settings"]["environments"]
    assert {"soundfile", "soxr", "av", "torch", "transformers", "batch_size"} <= set(environment)
    assert environment["encoder_precision"] == "float32"
    assert environment["audio"] == "16 kHz mono, float32 samples"
    assert {"jiwer", "kaldialign", "whisper-normalizer", "python", "tinyaudio"} <= set(summary["versions"])
