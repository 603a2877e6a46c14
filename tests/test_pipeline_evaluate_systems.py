"""Evaluations from outside: killed, from a store, of other systems, and through the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import typer
from conftest import tiny_hubert_config
from transformers import HubertForCTC, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from typer.testing import CliRunner

from pipelines.errors import EvaluationError
from pipelines.eval_sets import named_sections, open_eval_set
from pipelines.evaluate import evaluate
from pipelines.providers import Clip, ProviderOptions, open_provider, provider_names
from pipelines.recipes import CorpusSection
from tinyaudio import cli_eval

NUM_CLIPS = 12


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    split = tmp_path / "corpus" / "test"
    split.mkdir(parents=True)
    rng = np.random.default_rng(1)
    rows = ["file_name,id,text"]
    for i in range(NUM_CLIPS):
        soundfile.write(split / f"{i}.wav", 0.1 * rng.standard_normal(9_000 + 700 * i), 16_000)
        rows.append(f"{i}.wav,utt-{i},a cat and a dog {i}")
    (split / "metadata.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "corpus"


@pytest.fixture(scope="session")
def ctc_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ctc")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    torch.manual_seed(4)
    HubertForCTC(tiny_hubert_config(vocab_size=len(letters))).save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    Wav2Vec2Processor(extractor, Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))).save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def run_eval(*arguments: str) -> Any:
    app = typer.Typer()
    app.callback()(lambda: None)
    cli_eval.add_to(app)
    return CliRunner().invoke(app, ["eval", *arguments])


def numbers(result: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def answers(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return {line["utterance_id"]: line["pred_text"] for line in lines}


SLOW_SYSTEM = """
import sys, time
from pathlib import Path
from pipelines.eval_sets import open_eval_set
from pipelines.evaluate import evaluate
from pipelines.providers import Answer
from pipelines.recipes import CorpusSection

class Slow:
    name = "slow"
    def identity(self): return {"version": 1}
    def environment(self): return {}
    def transcribe(self, clips):
        for clip in clips:
            time.sleep(0.05)
            with open(sys.argv[3], "a") as asked: asked.write(clip.utterance_id + "\\n")
            yield Answer(utterance_id=clip.utterance_id, text=f"a cat and a frog {len(clip.samples)}", time_s=0.05)

evaluate(Slow(), open_eval_set(CorpusSection(path=sys.argv[1]), split="test"), Path(sys.argv[2]))
"""


def test_a_killed_evaluation_ends_like_an_undisturbed_one_and_decodes_nothing_twice(
    corpus: Path, tmp_path: Path
) -> None:
    def start(output: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-c",
            SLOW_SYSTEM,
            str(corpus),
            str(tmp_path / output),
            str(tmp_path / f"{output}.asked"),
        ]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path.cwd())})

    whole = start("whole")
    killed = start("killed")
    asked = tmp_path / "killed.asked"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (asked.exists() and len(asked.read_text().split()) >= 5):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    logged = len((tmp_path / "killed" / "predictions.jsonl").read_bytes().split(b"\n")) - 1
    assert 4 <= logged < NUM_CLIPS
    assert start("killed").wait(60) == 0
    assert whole.wait(60) == 0
    # the clip in flight when the kill came may be asked for again; none that had an answer on the disk is
    assert len(asked.read_text().split()) <= NUM_CLIPS + 1
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")]
    assert summaries[0] == summaries[1]
    assert answers(tmp_path / "whole") == answers(tmp_path / "killed")


def test_the_encoders_own_head_is_a_control(corpus: Path, ctc_folder: Path, tmp_path: Path) -> None:
    texts = []
    for batch_size in (1, 5):
        provider = open_provider("ctc", ProviderOptions(model=str(ctc_folder), device="cpu", batch_size=batch_size))
        done = evaluate(
            provider, open_eval_set(CorpusSection(path=str(corpus)), split="test"), tmp_path / str(batch_size)
        )
        texts.append([one.pred_text for one in done.predictions])
    assert texts[0] == texts[1]
    assert not any("<" in str(text) for text in texts[0])


def test_an_encoder_without_a_head_is_refused(encoder_folder: Path) -> None:
    with pytest.raises(EvaluationError, match="has no CTC head"):
        open_provider("ctc", ProviderOptions(model=str(encoder_folder)))


def test_any_hub_model_runs_through_the_stock_pipeline_and_agrees_with_our_control(
    corpus: Path, ctc_folder: Path
) -> None:
    clips = [clip for window in open_eval_set(CorpusSection(path=str(corpus)), split="test").load(
        {f"utt-{i}" for i in range(4)}) for _, clip in window if isinstance(clip, Clip)]  # fmt: skip
    options = ProviderOptions(model=str(ctc_folder), device="cpu", batch_size=1)
    ours, theirs = (
        {answer.utterance_id: answer.text for answer in open_provider(name, options).transcribe(clips)}
        for name in ("ctc", "hf")
    )
    assert len(theirs) == 4
    for name, text in theirs.items():
        assert text is not None
        for token in ("<pad>", "<s>", "</s>", "<unk>"):
            text = text.replace(token, "")
        assert " ".join(text.split()) == ours[name]


def test_providers_are_named_and_others_refused() -> None:
    assert provider_names() == ["tinyaudio", "ctc", "hf", "assemblyai"]
    with pytest.raises(EvaluationError, match="no provider 'deepgram'; expected one of tinyaudio, ctc"):
        open_provider("deepgram", ProviderOptions())


def test_named_test_sets_are_valid() -> None:
    assert {"loquacious", "librispeech-clean", "librispeech-other", "gigaspeech", "common-voice"} == set(
        named_sections()
    )


def test_the_command_compares_rescores_and_fails_over_a_limit(corpus: Path, checkpoint: Path, tmp_path: Path) -> None:
    common = ["--corpus", str(corpus), "--max-new-tokens", "8", "--device", "cpu", "--json"]
    first = run_eval(str(checkpoint), *common, "--num-beams", "1", "--output", str(tmp_path / "a"))
    assert first.exit_code == 0, first.output
    second = run_eval(
        str(checkpoint), *common, "--num-beams", "2", "--output", str(tmp_path / "b"), "--compare", str(tmp_path / "a")
    )
    assert second.exit_code == 0, second.output
    assert "of resamples" in second.stdout
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["comparison"]["utterances"] == NUM_CLIPS
    (tmp_path / "other" / "eval").mkdir(parents=True)
    (tmp_path / "a").rename(tmp_path / "other" / "eval" / "b")  # another run's evaluation of the same set
    by_run = run_eval(
        str(checkpoint),
        *common,
        "--num-beams",
        "2",
        "--output",
        str(tmp_path / "b"),
        "--compare",
        str(tmp_path / "other"),
    )
    assert by_run.stdout.splitlines()[:-1] == second.stdout.splitlines()[:-1]
    (tmp_path / "other" / "eval" / "b").rename(tmp_path / "a")
    rescored = run_eval("--rescore", str(tmp_path / "a"), "--output", str(tmp_path / "c"), "--json")
    assert {**numbers(first), "output": ""} == {**numbers(rescored), "output": ""}
    again = run_eval(str(checkpoint), *common, "--num-beams", "1", "--output", str(tmp_path / "a"))
    assert "holds every answer already" in again.output
    assert numbers(again) == numbers(first)
    assert run_eval("--rescore", str(tmp_path / "a"), "--fail-over", "0.0001").exit_code == 1
    assert run_eval("--rescore", str(tmp_path / "a"), "--fail-over", "1000").exit_code == 0


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
    with pytest.raises(EvaluationError, match="nobody is here to say yes; add --yes to pay"):
        raise result.exception


def test_a_corpus_that_is_nowhere_is_one_clear_line(checkpoint: Path) -> None:
    result = run_eval(str(checkpoint), "--corpus", "librispech")
    with pytest.raises(EvaluationError, match="no corpus 'librispech'; expected a folder, a hub data set, or one of"):
        raise result.exception


def test_stored_features_give_the_transcripts_of_raw_audio(recipe_file: Path, tmp_path: Path) -> None:
    from pipelines.corpora import open_corpus
    from pipelines.extract import extract, wanted_splits
    from pipelines.recipes import load_recipe
    from pipelines.runs import Run
    from pipelines.train import train

    recipe = load_recipe(str(recipe_file), ["train.steps=2"])
    splits, _ = wanted_splits(recipe, open_corpus(recipe.corpus), None)
    extract(recipe, tmp_path / "store", splits=splits, device="cpu")
    train(recipe, tmp_path / "store", Run(tmp_path / "run"), device="cpu", say=lambda _: None)
    common = [str(tmp_path / "run"), "--split", "dev", "--num-beams", "1", "--max-new-tokens", "12", "--device", "cpu"]
    raw = run_eval(*common, "--no-guard", "--json")
    assert raw.exit_code == 0, raw.output
    stored = run_eval(*common, "--from-store", str(tmp_path / "store"), "--json")
    assert stored.exit_code == 0, stored.output
    folders = [Path(numbers(result)["output"]) for result in (raw, stored)]
    assert folders[0] != folders[1]
    # references lie in the store as the recipe's text policy leaves them; answers must be the same to the letter
    assert answers(folders[0]) == answers(folders[1])
    assert {**numbers(raw), "output": ""} == {**numbers(stored), "output": ""}


def test_a_store_of_another_encoder_is_refused(recipe_file: Path, checkpoint: Path, tmp_path: Path) -> None:
    from pipelines.corpora import open_corpus
    from pipelines.extract import extract, wanted_splits
    from pipelines.recipes import load_recipe

    recipe = load_recipe(str(recipe_file))
    splits, _ = wanted_splits(recipe, open_corpus(recipe.corpus), "dev")
    extract(recipe, tmp_path / "store", splits=splits, device="cpu")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "encoder_digest": "0" * 64}))
    result = run_eval(
        str(checkpoint), "--recipe", str(recipe_file), "--split", "dev", "--from-store", str(tmp_path / "store")
    )
    assert result.exit_code != 0
    assert "weights" in str(result.exception)
