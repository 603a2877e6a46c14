"""`tinyaudio eval`: what is scored, compared, refused and paid for."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import soundfile
import typer
from evaluations import NUM_CLIPS, noise_clips, numbers, run_eval  # noqa: F401 (a fixture)

from pipelines.errors import EvaluationError
from pipelines.evaluate import eval_sets
from pipelines.recipes import load_recipe
from pipelines.recipes.recipe import Columns
from tinyaudio.cli import demo
from tinyaudio.cli import evaluate as cli_eval
from tinyaudio.model.errors import MissingModelError


@pytest.mark.parametrize(("typed", "rate"), [("5%", 0.05), ("0.05", 0.05), ("250 %", 2.5), ("0", 0.0), ("1", 1.0)])
def test_rates_can_be_typed_as_percent_or_fraction(typed: str, rate: float) -> None:
    assert cli_eval.parse_rate(typed) == pytest.approx(rate)


@pytest.mark.parametrize("typed", ["5", "five", "-1%", "-0.1", ""])
def test_a_rate_that_may_mean_something_else_is_refused(typed: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected"):
        cli_eval.parse_rate(typed)


def test_another_corpus_brings_its_own_columns_and_overrides_come_last(corpus: Path) -> None:
    choose = cli_eval.choose_corpus
    hub = choose("loquacious-small", "someone/else", [])
    assert (hub.name, hub.config, hub.revision, hub.columns) == ("someone/else", None, None, Columns())
    assert (hub.text_case, hub.text_punctuation) == ("lower", "remove"), "the model's own text policy"
    settings = ["corpus.config=en", "corpus.columns.id=path", "corpus.text_case=keep"]
    hub = choose("loquacious-small", "someone/else", settings)
    assert (hub.config, hub.columns.id, hub.text_case) == ("en", "path", "keep")
    named = choose("loquacious-small", "loquacious", ["corpus.config=clean"])
    assert (named.name, named.config) == ("speechbrain/LoquaciousSet", "clean")
    same = choose("loquacious-small", "speechbrain/LoquaciousSet", [])
    assert same.revision is not None, "the recipe's own corpus stays at the recipe's commit"
    local = choose("gigaspeech", str(corpus), [])
    assert (local.path, local.name, local.revision, local.columns.id) == (str(corpus), None, None, "segment_id")


def test_a_model_without_recipe_requires_a_corpus(checkpoint: Path, ctc_folder: Path) -> None:
    for arguments in ([str(checkpoint)], [str(ctc_folder), "--provider", "hf"], ["--provider", "assemblyai"]):
        with pytest.raises(EvaluationError, match=r"has no recipe.toml; name a --corpus or a --recipe"):
            raise run_eval(*arguments).exception


def test_the_command_compares_rescores_and_fails_over_a_limit(corpus: Path, checkpoint: Path, tmp_path: Path) -> None:
    common = ["--corpus", str(corpus), "--max-new-tokens", "8", "--device", "cpu", "--json"]
    first = run_eval(str(checkpoint), *common, "--num-beams", "1", "--output", str(tmp_path / "a"))
    assert first.exit_code == 0, first.output
    assert {"wer", "substitutions", "deletions", "insertions", "words", "utterances", "failed"} <= numbers(first).keys()
    assert (tmp_path / "a" / "eval.json").is_file()
    second = run_eval(
        str(checkpoint), *common, "--num-beams", "2", "--output", str(tmp_path / "b"), "--compare", str(tmp_path / "a")
    )
    assert second.exit_code == 0, second.output
    assert "of resamples" in second.stdout
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["comparison"]["utterances"] == NUM_CLIPS
    rescored = run_eval("--rescore", str(tmp_path / "a"), "--output", str(tmp_path / "c"), "--json")
    assert {**numbers(first), "output": ""} == {**numbers(rescored), "output": ""}
    assert "summary.json, report.md and report.html: " in rescored.output
    assert "predictions, summary.json" not in rescored.output
    file = run_eval("--rescore", str(tmp_path / "a" / "predictions.jsonl"), "--json")
    assert numbers(file)["output"] == str(tmp_path / "a"), "the file of an evaluation means the evaluation"
    ignored = run_eval(str(checkpoint), "--rescore", str(tmp_path / "a"), "--split", "dev")
    assert (ignored.exit_code, "omit MODEL, --split" in " ".join(ignored.output.split())) == (2, True)
    again = run_eval(str(checkpoint), *common, "--num-beams", "1", "--output", str(tmp_path / "a"))
    assert "already contains every answer" in again.output
    assert numbers(again) == numbers(first)
    assert run_eval("--rescore", str(tmp_path / "a"), "--fail-over", "0.01%").exit_code == 1
    assert run_eval("--rescore", str(tmp_path / "a"), "--fail-over", "1000%").exit_code == 0
    assert run_eval("--rescore", str(tmp_path / "a"), "--fail-over", "5").exit_code == 2


def _set_default(checkpoint: Path, **decoding: Any) -> None:
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **decoding}))


def test_other_decoding_settings_go_to_another_folder(corpus: Path, checkpoint: Path) -> None:
    _set_default(checkpoint, max_new_tokens=8, num_beams=2)
    common = [str(checkpoint), "--corpus", str(corpus), "--max-samples", "2", "--device", "cpu", "--json"]
    for asked, name in {
        (): "corpus-test-2-seed0",
        ("--num-beams", "2", "--max-new-tokens", "8", "--length-penalty", "1"): "corpus-test-2-seed0",
        ("--length-penalty", "0.5"): "corpus-test-2-seed0-penalty0.5",
        ("--num-beams", "1", "--max-new-tokens", "4"): "corpus-test-2-seed0-beams1-tokens4",
    }.items():
        result = run_eval(*common, *asked)
        assert result.exit_code == 0, result.output
        assert Path(numbers(result)["output"]).name == name


def test_what_the_demo_evaluated_is_not_decoded_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _set_default(checkpoint, max_new_tokens=4, num_beams=demo.BEAMS)
    recipe = load_recipe("demo")
    recipe.save(checkpoint / "recipe.toml")
    monkeypatch.setattr(eval_sets, "open_eval_set", partial(eval_sets.open_eval_set, max_samples=2))
    for num_beams in (1, demo.BEAMS):
        demo.score(recipe, checkpoint, "test_unseen", num_beams)
    names = {"demo-test_unseen-2-seed0", "demo-test_unseen-2-seed0-beams1"}
    assert {path.name for path in (checkpoint / "eval").iterdir()} == names
    result = run_eval(str(checkpoint), "--split", "test_unseen", "--max-samples", "2")
    assert "already contains every answer" in result.output
    assert "on demo test_unseen" in result.output


def test_a_folder_that_cannot_be_made_is_refused_before_the_model_is_loaded(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("pipelines.evaluate.providers.registry.open_provider", lambda *_: pytest.fail("loaded"))
    result = run_eval(str(checkpoint), "--corpus", str(corpus), "--output", str(tmp_path / "file" / "x"))
    with pytest.raises(NotADirectoryError, match=r"file/x'"):
        raise result.exception


def test_without_a_model_eval_names_no_option_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINYAUDIO_MODEL", raising=False)
    result = run_eval()
    with pytest.raises(MissingModelError, match="Name a run folder or a hub id, or") as raised:
        raise result.exception
    assert "--" not in str(raised.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_length_penalty_that_is_not_a_number_is_refused(checkpoint: Path, corpus: Path, value: str) -> None:
    result = run_eval(str(checkpoint), "--corpus", str(corpus), "--length-penalty", value)
    assert result.exit_code == 2
    assert f"--length-penalty {value}: expected a number" in result.output


def test_a_run_to_compare_with_means_its_own_answers_to_the_same_set(
    corpus: Path, checkpoint: Path, ctc_folder: Path, tmp_path: Path
) -> None:
    common = ["--corpus", str(corpus), "--device", "cpu", "--json"]
    _set_default(checkpoint, max_new_tokens=8)
    ours = run_eval(str(checkpoint), *common)
    assert ours.exit_code == 0, ours.output
    assert Path(numbers(ours)["output"]) == checkpoint / "eval" / "corpus-test"
    control = run_eval(str(ctc_folder), "--provider", "ctc", *common, "--compare", str(checkpoint))
    assert control.exit_code == 0, control.output
    assert f"against {checkpoint.name}" in control.stdout
    (ctc_folder / "eval" / "corpus-test-ctc" / "predictions.jsonl").unlink()
    other = run_eval(str(ctc_folder), "--provider", "ctc", *common, "--compare", str(checkpoint), "--split", "test",
                     "--max-samples", "3", "--output", str(tmp_path / "x"))  # fmt: skip
    with pytest.raises(EvaluationError, match=r"no predictions at .*corpus-test-3-seed0"):
        raise other.exception


def test_an_utterance_without_answer_makes_the_command_fail(corpus: Path, checkpoint: Path, tmp_path: Path) -> None:
    (corpus / "test" / "3.wav").write_bytes(b"RIFF")
    result = run_eval(str(checkpoint), "--corpus", str(corpus), "--num-beams", "1", "--max-new-tokens", "4", "--json")
    assert result.exit_code == 1
    assert numbers(result)["failed"] == 1
    assert "1 utterances have no answer" in result.output


def test_paying_needs_a_yes(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSEMBLYAI_API_KEY", "fake")
    result = run_eval("--provider", "assemblyai", "--corpus", str(corpus), "--output", str(tmp_path / "out"))
    assert "12 clips, 0.00 h: about $0.00 (list price of 2026-10-07)" in result.output
    with pytest.raises(EvaluationError, match="without confirmation; pass --yes to run non-interactively"):
        raise result.exception


def test_an_unknown_corpus_is_one_clear_line(checkpoint: Path) -> None:
    result = run_eval(str(checkpoint), "--corpus", "librispech")
    with pytest.raises(EvaluationError, match="no corpus 'librispech'; expected a folder, a hub data set, or one of"):
        raise result.exception


def test_what_drafts_did_is_reported(spoken: Any, with_head: Any, processor: Any, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "test").mkdir(parents=True)
    rows = [f"{i}.wav,{transcript}" for i, (_, transcript) in enumerate(spoken[:4])]
    (corpus / "test" / "metadata.csv").write_text("\n".join(["file_name,text", *rows]) + "\n")
    for i, (samples, _) in enumerate(spoken[:4]):
        soundfile.write(corpus / "test" / f"{i}.wav", samples, 16_000)
    with_head.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    common = [str(tmp_path / "model"), "--corpus", str(corpus), "--max-new-tokens", "8", "--device", "cpu", "--json"]
    with_drafts = run_eval(*common, "--num-beams", "1", "--output", str(tmp_path / "a"))
    assert with_drafts.exit_code == 0, with_drafts.output
    found = numbers(with_drafts)["drafts"]
    lines = [json.loads(line) for line in (tmp_path / "a" / "predictions.jsonl").read_text().splitlines()]
    passes, tokens = (sum(line[name] for line in lines) for name in ("num_passes", "num_tokens"))
    assert found["utterances"] == 4
    assert found["passes_per_utterance"] == passes / 4
    assert found["passes_per_token"] == passes / tokens
    assert found["accepted_share"] == sum(line["num_accepted"] for line in lines) / tokens
    assert f"{passes / 4:.2f} decoder passes an utterance with drafts" in with_drafts.stdout
    assert "of the tokens were drafted" in (tmp_path / "a" / "report.md").read_text()
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["environments"][0]["draft"] == "encoder"
    again = run_eval("--rescore", str(tmp_path / "a"), "--output", str(tmp_path / "c"), "--json")
    assert numbers(again)["drafts"] == found

    without = run_eval(*common, "--num-beams", "1", "--draft", "none", "--output", str(tmp_path / "b"))
    assert numbers(without)["drafts"] is None
    assert numbers(without)["wer"] == numbers(with_drafts)["wer"]
    resumed = run_eval(*common, "--num-beams", "1", "--draft", "none", "--output", str(tmp_path / "a"))
    assert "already contains every answer" in resumed.output, "drafts change no answer"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--draft", "fast"), "expected one of auto, projector, encoder, none"),
        (("--draft", "encoder", "--num-beams", "4"), "expected --num-beams 1, found 4"),
        (("--draft", "encoder", "--num-beams", "1"), "expected an encoder with a CTC head"),
        (("--draft", "encoder"), "expects greedy decoding, found 4 beams"),
        (("--draft", "none", "--no-guard"), "the model alone takes no drafts"),
        (("--draft", "none", "--provider", "ctc"), "does not take --draft"),
    ],
)
def test_a_draft_that_cannot_be_used_is_refused(
    corpus: Path, checkpoint: Path, tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    result = run_eval(str(checkpoint), "--corpus", str(corpus), "--output", str(tmp_path / "out"), *options)
    assert result.exit_code != 0
    assert reason in f"{result.output} {result.exception}"
    assert not (tmp_path / "out").exists(), "nothing is left of an evaluation that did not begin"
