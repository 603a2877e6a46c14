"""Evaluations from outside: killed, from a store, of other systems, and through the command line."""

import json
import os
import shutil
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    HubertForCTC,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)
from typer.testing import CliRunner

from pipelines.errors import EvaluationError
from pipelines.eval_sets import open_eval_set
from pipelines.evaluate import evaluate
from pipelines.providers import Clip, ProviderOptions, open_provider, provider_names
from pipelines.recipes import Columns, CorpusSection, Recipe, load_recipe
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
from pipelines.recipes import Columns, CorpusSection, Recipe, load_recipe

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


def test_a_checkpoint_killed_in_the_middle_decodes_nothing_twice(
    corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tinyaudio", "eval", str(checkpoint), "--corpus", str(corpus), "--device", "cpu"]
    command += ["--batch-size", "1", "--num-beams", "8", "--output"]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}

    def start(output: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, str(tmp_path / output)], env=environment, stderr=subprocess.DEVNULL)

    def lines(output: str) -> list[str]:
        path = tmp_path / output / "predictions.jsonl"
        return path.read_text().splitlines(keepends=True) if path.exists() else []

    killed = start("killed")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(lines("killed")) < 3:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = [line for line in lines("killed") if line.endswith("\n")]
    assert 3 <= len(before) < NUM_CLIPS
    assert start("killed").wait(120) == 0
    assert start("whole").wait(120) == 0
    assert set(before) <= set(lines("killed")), "with the times of the first process: not decoded again"
    whole, resumed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
    for summary in (whole, resumed):
        del summary["timing"]
    assert whole == resumed
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


@pytest.fixture(scope="session")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper of the real class: multilingual, windows of 30 s, timestamps in steps of 0.02 s."""
    folder = tmp_path_factory.mktemp("whisper")
    start = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
    start += ["<|startofprev|>", "<|nospeech|>", "<|notimestamps|>", *(f"<|{i / 50:.2f}|>" for i in range(1501))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    base.pre_tokenizer, base.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = WhisperTokenizerFast(tokenizer_object=base, unk_token="<|endoftext|>", bos_token="<|endoftext|>",
                                     eos_token="<|endoftext|>", pad_token="<|endoftext|>")  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": start[:9]})
    tokenizer.add_tokens(start[9:])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in start}
    eos = ids["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=80,
        pad_token_id=eos, bos_token_id=eos, eos_token_id=eos, decoder_start_token_id=ids["<|startoftranscript|>"],
        max_target_positions=64,
    )  # fmt: skip
    torch.manual_seed(6)
    model = WhisperForConditionalGeneration(config)
    settings = {
        "is_multilingual": True,
        "lang_to_id": {name: ids[name] for name in ("<|en|>", "<|de|>")},
        "task_to_id": {name: ids[f"<|{name}|>"] for name in ("translate", "transcribe")},
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "max_initial_timestamp_index": 50,
        "_from_model_config": False,
    }
    for name, value in settings.items():  # `update` would drop what plain generation configurations lack
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def test_whisper_is_told_the_language_and_takes_clips_beyond_its_window(
    whisper_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    generate = WhisperForConditionalGeneration.generate

    def listen(self: Any, *inputs: Any, **options: Any) -> Any:
        told.append(options)
        return generate(self, *inputs, **options)

    monkeypatch.setattr(WhisperForConditionalGeneration, "generate", listen)
    rng = np.random.default_rng(2)
    clips = [
        Clip(utterance_id=str(seconds), samples=(0.1 * rng.standard_normal(16_000 * seconds)).astype(np.float32))
        for seconds in (2, 3, 34)
    ]
    provider = open_provider("hf", ProviderOptions(model=str(whisper_folder), device="cpu", max_new_tokens=8))
    answers = {answer.utterance_id: answer for answer in provider.transcribe(clips)}
    assert {name: answer.error for name, answer in answers.items()} == {"2": None, "3": None, "34": None}
    assert [options.get("return_timestamps", False) for options in told] == [True, False]
    assert {(options["language"], options["task"]) for options in told} == {("en", "transcribe")}
    assert provider.identity()["decoding"] == {"language": "en", "task": "transcribe", "max_new_tokens": 8}


def test_an_encoder_with_group_norm_answers_the_same_in_any_batch(
    corpus: Path, tmp_path: Path, ctc_folder: Path
) -> None:
    folder = tmp_path / "group"
    shutil.copytree(ctc_folder, folder, ignore=shutil.ignore_patterns("eval"))
    torch.manual_seed(5)
    HubertForCTC(
        tiny_hubert_config(vocab_size=32, feat_extract_norm="group", do_stable_layer_norm=False)
    ).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(folder)
    found = open_eval_set(CorpusSection(path=str(corpus)), split="test")
    clips = [clip for window in found.load({f"utt-{i}" for i in range(4)}) for _, clip in window]
    texts = []
    for batch_size in (1, 4):
        provider = open_provider("hf", ProviderOptions(model=str(folder), device="cpu", batch_size=batch_size))
        texts.append({answer.utterance_id: answer.text for answer in provider.transcribe(clips)})
    assert texts[0] == texts[1]


def test_providers_are_named_and_others_refused() -> None:
    assert provider_names() == ["tinyaudio", "ctc", "hf", "assemblyai"]
    with pytest.raises(EvaluationError, match="no provider 'deepgram'; expected one of tinyaudio, ctc"):
        open_provider("deepgram", ProviderOptions())


def test_a_provider_refuses_options_that_it_would_ignore(ctc_folder: Path) -> None:
    with pytest.raises(
        EvaluationError, match="provider 'ctc' does not take --num-beams; it takes --revision, --device"
    ):
        open_provider("ctc", ProviderOptions(model=str(ctc_folder), num_beams=4))
    with pytest.raises(EvaluationError, match="provider 'hf' does not take --no-guard"):
        open_provider("hf", ProviderOptions(model=str(ctc_folder), guard=False))
    with pytest.raises(EvaluationError, match="provider 'assemblyai' does not take --batch-size"):
        open_provider("assemblyai", ProviderOptions(api_key="x", batch_size=2))
    with pytest.raises(EvaluationError, match="provider 'tinyaudio' does not take --api-key, --concurrency"):
        open_provider("tinyaudio", ProviderOptions(api_key="x", concurrency=2))


@pytest.mark.parametrize(("typed", "rate"), [("5%", 0.05), ("0.05", 0.05), ("250 %", 2.5), ("0", 0.0), ("1", 1.0)])
def test_rates_can_be_typed_as_percent_or_fraction(typed: str, rate: float) -> None:
    assert cli_eval._rate(typed) == pytest.approx(rate)


@pytest.mark.parametrize("typed", ["5", "five", "-1%", "-0.1", ""])
def test_a_rate_that_may_mean_something_else_is_refused(typed: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected"):
        cli_eval._rate(typed)


def request(model: str | None, **choice: Any) -> Any:
    options = {"provider": "tinyaudio", "revision": None, "recipe": None, "corpus": None, "settings": []}
    return cli_eval._Request(model, **{**options, **choice})


def test_another_corpus_brings_its_own_columns_and_overrides_come_last(checkpoint: Path, corpus: Path) -> None:
    recipe = {"recipe": "loquacious-small"}
    hub = request(str(checkpoint), corpus="someone/else", **recipe).section
    assert (hub.name, hub.config, hub.revision, hub.columns) == ("someone/else", None, None, Columns())
    assert (hub.text_case, hub.text_punctuation) == ("lower", "remove"), "the model's own text policy"
    settings = ["corpus.config=en", "corpus.columns.id=path", "corpus.text_case=keep"]
    hub = request(str(checkpoint), corpus="someone/else", settings=settings, **recipe).section
    assert (hub.config, hub.columns.id, hub.text_case) == ("en", "path", "keep")
    named = request(str(checkpoint), corpus="loquacious", settings=["corpus.config=clean"], **recipe).section
    assert (named.name, named.config) == ("speechbrain/LoquaciousSet", "clean")
    same = request(str(checkpoint), corpus="speechbrain/LoquaciousSet", **recipe).section
    assert same.revision is not None, "the recipe's own corpus stays at the recipe's commit"
    local = request(str(checkpoint), corpus=str(corpus), recipe="gigaspeech").section
    assert (local.path, local.name, local.revision, local.columns.id) == (str(corpus), None, None, "segment_id")


def test_a_model_without_recipe_is_not_scored_on_whatever_is_at_hand(checkpoint: Path, ctc_folder: Path) -> None:
    for model, provider in ((str(checkpoint), "tinyaudio"), (str(ctc_folder), "hf"), (None, "assemblyai")):
        with pytest.raises(
            EvaluationError, match=r"brings no recipe.toml; say what to score with --corpus or --recipe"
        ):
            request(model, provider=provider)


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
    rescored = run_eval("--rescore", str(tmp_path / "a"), "--output", str(tmp_path / "c"), "--json")
    assert {**numbers(first), "output": ""} == {**numbers(rescored), "output": ""}
    assert "summary.json, report.md and report.html: " in rescored.output
    assert "predictions, summary.json" not in rescored.output
    file = run_eval("--rescore", str(tmp_path / "a" / "predictions.jsonl"), "--json")
    assert numbers(file)["output"] == str(tmp_path / "a"), "the file of an evaluation means the evaluation"
    ignored = run_eval(str(checkpoint), "--rescore", str(tmp_path / "a"), "--split", "dev")
    assert (ignored.exit_code, "leave out MODEL, --split" in " ".join(ignored.output.split())) == (2, True)
    again = run_eval(str(checkpoint), *common, "--num-beams", "1", "--output", str(tmp_path / "a"))
    assert "holds every answer already" in again.output
    assert numbers(again) == numbers(first)
    assert run_eval("--rescore", str(tmp_path / "a"), "--fail-over", "0.01%").exit_code == 1
    assert run_eval("--rescore", str(tmp_path / "a"), "--fail-over", "1000%").exit_code == 0
    assert run_eval("--rescore", str(tmp_path / "a"), "--fail-over", "5").exit_code == 2


def test_a_run_to_compare_with_means_its_own_answers_to_the_same_set(
    corpus: Path, checkpoint: Path, ctc_folder: Path, tmp_path: Path
) -> None:
    common = ["--corpus", str(corpus), "--device", "cpu", "--json"]
    ours = run_eval(str(checkpoint), *common, "--max-new-tokens", "8")
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
    with pytest.raises(EvaluationError, match="nobody is here to say yes; add --yes to pay"):
        raise result.exception


def test_a_corpus_that_is_nowhere_is_one_clear_line(checkpoint: Path) -> None:
    result = run_eval(str(checkpoint), "--corpus", "librispech")
    with pytest.raises(EvaluationError, match="no corpus 'librispech'; expected a folder, a hub data set, or one of"):
        raise result.exception


def extracted(recipe: Recipe, store: Path) -> None:
    from pipelines.corpora import open_corpus
    from pipelines.extract import extract, wanted_splits

    splits, _ = wanted_splits(recipe, open_corpus(recipe.corpus), None)
    extract(recipe, store, splits=splits, device="cpu")


def trained(recipe: Recipe, store: Path, run: Path) -> None:
    from pipelines.runs import Run
    from pipelines.train import train

    train(recipe, store, Run(run), device="cpu", say=lambda _: None)


def test_what_a_store_leaves_out_is_counted_as_failed_with_its_reason(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file), ["train.steps=2", "corpus.max_duration_s=1.0", "extract.max_bad=0.5"])
    dev = Path(str(recipe.corpus.path)) / "dev"
    (dev / "001.wav").write_bytes(b"RIFF")
    folder = Path(str(recipe.corpus.path)).rename(tmp_path / "LoquaciousSet")
    recipe = recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"path": str(folder)})})
    extracted(recipe, tmp_path / "store")
    trained(recipe, tmp_path / "store", tmp_path / "run")
    result = run_eval(
        *[str(tmp_path / "run"), "--split", "dev", "--num-beams", "1", "--max-new-tokens", "4", "--device", "cpu"],
        *["--from-store", str(tmp_path / "store"), "--json"],
    )
    assert result.exit_code == 1
    summary = json.loads((Path(numbers(result)["output"]) / "summary.json").read_text())
    # 0.30 to 1.21 s: two are longer than 1 s, one cannot be read
    assert sorted(one["error"] for one in summary["failures"]) == [
        "not in the store: too_long",
        "not in the store: too_long",
        "not in the store: undecodable",
    ]
    assert (numbers(result)["utterances"], numbers(result)["failed"]) == (5, 3)
    assert summary["timing"]["rtfx"] is None, "the encoder's time is missing"
    [source] = summary["analysis"]["breakdowns"]["source"]
    assert (source["name"], source["word_errors"]["failed"]) == ("yodas-or-peoples-speech", 3)


def test_stored_features_give_the_transcripts_of_raw_audio(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file), ["train.steps=2"])
    extracted(recipe, tmp_path / "store")
    trained(recipe, tmp_path / "store", tmp_path / "run")
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
    extracted(load_recipe(str(recipe_file)), tmp_path / "store")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "encoder_digest": "0" * 64}))
    result = run_eval(
        str(checkpoint), "--recipe", str(recipe_file), "--split", "dev", "--from-store", str(tmp_path / "store")
    )
    assert result.exit_code != 0
    assert "weights" in str(result.exception)
