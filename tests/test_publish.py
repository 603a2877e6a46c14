import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import prediction
from fake_hub import FakeHub, serving
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from pipelines.errors import PublishError
from pipelines.evaluate.predictions import Prediction, write_predictions
from pipelines.evaluate.stage import Scoring, score_again
from pipelines.evaluate.summary import Settings, load_summary, save_settings
from pipelines.publish.stage import publish, read_model
from pipelines.recipes import load_recipe
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration

PUBLISHED = {"encoder_id": "facebook/hubert-large-ls960-ft", "decoder_id": "HuggingFaceTB/SmolLM3-3B-Base"}


def add_evaluation(run: Path, name: str, answers: list[Prediction], **changes: Any) -> None:
    folder = run / "eval" / name
    folder.mkdir(parents=True)
    digest = read_model(run).projector_digest
    model = {"name": "run", "projector_digest": digest, "decoding": {"num_beams": 4, "guard": True}}
    scored = {"corpus": "corpus", "split": name, "max_samples": None, "seed": None}
    settings = {"provider": "tinyaudio", "model": model, "scored": scored, **changes}
    save_settings(folder / "settings.json", Settings(**settings))
    write_predictions(folder / "predictions.jsonl", answers)
    score_again(folder, folder, Scoring())


@pytest.fixture
def run(checkpoint: Path) -> Path:
    load_recipe("demo", ["corpus.path=/somewhere/secret/corpus"]).save(checkpoint / "recipe.toml")
    report = {"steps": 500, "loss": 0.1234, "seconds": 41.0, "audio_s": 7200.0}
    state = {"store": "/somewhere/secret/store", "report": report}
    (checkpoint / "run.json").write_text(json.dumps(state))
    answers = [prediction(i, "the cat sat on the mat", "the cat sat on a mat") for i in range(30)]
    add_evaluation(checkpoint, "test", [*answers, *(prediction(100 + i, "a dog ran", "a dog ran") for i in range(20))])
    return checkpoint


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(FakeHub()) as service:
        yield service


def card_of(run: Path, **options: Any) -> ModelCard:
    done = publish(run, "someone/tiny", dry_run=True, **options)
    return ModelCard.load(done.folder / "README.md")


def test_a_dry_run_makes_a_complete_folder(run: Path) -> None:
    done = publish(run, "someone/tiny", dry_run=True)
    assert done.url is None
    expected = {
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_tinyaudio.py",
        "samples.jsonl",
        "recipe.toml",
        "evaluations/test/summary.json",
        "evaluations/test/report.md",
    }
    assert expected <= set(done.files)
    assert "run.json" not in done.files
    assert {str(path.relative_to(done.folder)) for path in done.folder.rglob("*") if path.is_file()} == set(done.files)


def test_nothing_published_names_the_machine(run: Path) -> None:
    done = publish(run, "someone/tiny", dry_run=True)
    for name in done.files:
        content = (done.folder / name).read_bytes()
        for secret in (b"/somewhere/secret", str(run.parent).encode(), os.fsencode(Path.cwd()) + b"/"):
            assert secret not in content, f"{name} names {secret!r}"


def test_the_card_carries_the_measured_numbers_as_model_index(run: Path) -> None:
    card = card_of(run, **PUBLISHED)
    summary = load_summary(run / "eval" / "test" / "summary.json")
    assert summary.headline.wer == 30 / (30 * 6 + 20 * 3)
    assert card.data.eval_results is not None
    found = {(one.metric_type, one.metric_name): one.metric_value for one in card.data.eval_results}
    wer = next(value for (kind, name), value in found.items() if kind == "wer" and "recipe" in name)
    assert wer == 12.5
    assert all("4 beams" in name for _, name in found)
    assert card.data.base_model == ["facebook/hubert-large-ls960-ft", "HuggingFaceTB/SmolLM3-3B-Base"]
    assert card.data.to_dict()["pipeline_tag"] == "automatic-speech-recognition"
    assert "12.50 %" in card.text


def test_the_card_counts_the_projectors_parameters(run: Path) -> None:
    model = read_model(run)
    expected = 32 * 5 * 40 + 40 + 40 * 48 + 48  # two linear layers with biases, of the tiny model in conftest.py
    assert model.num_parameters == expected
    assert f"{expected:,} parameters" in card_of(run).text


def test_the_card_states_no_rate_that_the_evaluations_did_not_give(run: Path) -> None:
    summary = load_summary(run / "eval" / "test" / "summary.json")
    measured = set()
    for score in summary.scores:
        assert score.interval is not None
        for rate in (score.wer, score.cer, score.interval.low, score.interval.high):
            measured.add(f"{100 * rate:.2f}")
        counts = score.word_errors
        measured |= {
            f"{100 * n / counts.words:.2f}" for n in (counts.substitutions, counts.deletions, counts.insertions)
        }
    text = card_of(run).text
    stated = set(re.findall(r"(\d+\.\d\d)(?= %| to |\]| \||\\| [DI]\b)", text))
    assert stated
    assert stated <= measured


def test_a_run_without_evaluation_says_so_and_states_no_rate(run: Path) -> None:
    for path in (run / "eval" / "test").iterdir():
        path.unlink()
    card = card_of(run)
    assert "This model was not evaluated." in card.text
    assert card.data.eval_results is None
    assert "WER" not in card.text.replace("wer", "")


def test_failures_and_samples_stay_out_of_the_model_index_and_are_marked(run: Path) -> None:
    answers = [prediction(i, "one two three", "one two three") for i in range(10)]
    add_evaluation(run, "broken", [*answers, prediction(99, "lost", None)])
    sampled = {"corpus": "corpus", "split": "sampled", "max_samples": 10, "seed": 0}
    add_evaluation(run, "sampled", answers, scored=sampled)
    card = card_of(run)
    assert card.data.eval_results is not None
    assert {one.dataset_split for one in card.data.eval_results} == {"test"}
    assert "0.00 %\\*" in card.text
    assert "| 10 (sample of 10) |" in card.text
    assert "the rate covers only the others" in card.text


def test_two_evaluations_of_one_split_are_told_apart_in_the_model_index(run: Path) -> None:
    answers = [prediction(i, "one two three", "one two four") for i in range(10)]
    digest = read_model(run).projector_digest
    model = {"name": "run", "projector_digest": digest}
    whole = {"corpus": "corpus", "split": "test", "max_samples": None, "seed": None, "source": None}
    add_evaluation(run, "plain", answers, scored=whole, model={**model, "decoding": {"num_beams": 4, "guard": False}})
    add_evaluation(run, "part", answers, scored={**whole, "source": "read"})
    card = card_of(run)
    assert card.data.eval_results is not None
    recipe = {one.metric_name: one.metric_value for one in card.data.eval_results if "WER, recipe" in one.metric_name}
    assert [name.split("), ")[1] for name in recipe] == ["4 beams, unguarded", "4 beams"]
    assert sorted(recipe.values()) == [12.5, 33.33]
    names = [one.metric_name for one in card.data.eval_results]
    assert len(set(names)) == len(names)
    assert "10 (one source)" in card.text


def test_the_card_has_one_row_of_a_set_a_system_and_a_decoding(run: Path) -> None:
    known = {"provenance": {"files_digest": "0" * 64}}
    whole = {"corpus": "demo", **known, "split": "test", "max_samples": None, "seed": None}
    for path in (run / "eval" / "test").iterdir():
        path.unlink()
    older = [prediction(i, "the cat sat on the mat", "the cat sat") for i in range(50)]
    add_evaluation(run, "a-older", older, scored={**whole, "corpus": "its-former-name"})
    add_evaluation(run, "a-sample", [prediction(1, "a b c d", "a b c x")], scored={**whole, "max_samples": 1})
    answers = [prediction(i, f"sentence number {i}", f"sentence numbers {i}") for i in range(50)]
    digest = read_model(run).projector_digest
    renamed = {"name": "renamed", "projector_digest": digest, "decoding": {"num_beams": 4, "guard": True}}
    add_evaluation(run, "a-newer", answers, scored=whole, model=renamed)
    greedy = {"name": "run", "projector_digest": digest, "decoding": {"num_beams": 1, "guard": True}}
    add_evaluation(run, "greedy", answers, scored=whole, model=greedy)
    done = publish(run, "someone/tiny", dry_run=True)
    card = ModelCard.load(done.folder / "README.md")
    assert card.text.count("| tinyaudio, 4 beams | recipe |") == 1
    assert card.text.count("| tinyaudio, greedy | recipe |") == 1
    assert "its-former-name" not in card.text, "the older of two as large"
    assert "demo test, 4 beams: WER 33.33 %" in card.text
    assert "sample of 1" not in card.text, "the smaller"
    assert {name.split("/")[1] for name in done.files if name.startswith("evaluations/")} == {"a-newer", "greedy"}
    references = [json.loads(line)["reference"] for line in (done.folder / "samples.jsonl").read_text().splitlines()]
    assert len(references) == len(set(references)) == 5


def test_no_text_of_a_corpus_or_a_model_becomes_markup(run: Path) -> None:
    hostile = "<script>x</script> | `a` *b* [c](d) ![e](f) &lt; ~~g~~ $h$ www.x.org https://y.org\n## h"
    answers = [prediction(i, f"{hostile} one", f"{hostile} two") for i in range(10)]
    shutil.rmtree(run / "eval" / "test")
    add_evaluation(run, hostile.replace("/", "")[:40], answers)
    text = card_of(run).text
    page = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    assert page.count("<h2>") == text.count("\n## ") == 10
    assert not re.search(r"<(script|img|s|em|a)\b", page)
    [cell, *_] = re.findall(r"<td[^>]*>(.* two)</td>", page)
    assert html.unescape(cell) == " ".join(hostile.split()) + " two"


def test_another_system_stands_beside_the_model(run: Path) -> None:
    answers = [prediction(i, "the cat sat", "the cat") for i in range(10)]
    add_evaluation(run, "test-ctc", answers, provider="ctc", model={"name": "hubert", "decoding": "greedy"})
    assert "| ctc, greedy |" in card_of(run).text


def test_an_evaluation_of_other_weights_is_refused(run: Path) -> None:
    answers = [prediction(i, "a b", "a b") for i in range(5)]
    add_evaluation(run, "old", answers, model={"projector_digest": "0" * 64, "decoding": {"num_beams": 4}})
    with pytest.raises(PublishError, match="is of other weights \\(000000000000\\)"):
        publish(run, "someone/tiny", dry_run=True)


def test_energy_is_computed_from_measured_time_and_a_stated_power(run: Path) -> None:
    assert "No power was stated" in card_of(run).text
    card = card_of(run, power_watts=300.0, grams_per_kwh=100.0)
    assert "41 s at a stated 300 W: 0.00342 kWh" in card.text
    assert "a stated 100 g of CO2 per kWh that is 0.342 g" in card.text
    assert card.data.to_dict()["co2_eq_emissions"]["emissions"] == pytest.approx(0.34167, abs=1e-4)


def test_local_parts_are_named_on_the_card_and_not_published(run: Path) -> None:
    assert "local folders, not published models" in card_of(run).text
    with pytest.raises(PublishError, match=r"expected published frozen parts.*--encoder-id"):
        publish(run, "someone/tiny", dry_run=False)


def test_weights_that_do_not_fit_are_refused(run: Path) -> None:
    from safetensors.torch import save_file

    save_file({"projector.wrong": torch.zeros(1)}, run / "model.safetensors")
    with pytest.raises(PublishError, match=r"does not fit config.json"):
        publish(run, "someone/tiny", dry_run=True)


def test_a_ctc_head_beside_the_projector_is_not_counted(run: Path, model: TinyAudioForConditionalGeneration) -> None:
    before = read_model(run)
    model.add_token_ctc(torch.arange(20, 60))
    model.save_pretrained(run)
    assert read_model(run).num_parameters == before.num_parameters
    assert read_model(run).projector_digest == before.projector_digest


def test_a_folder_without_model_and_a_bad_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"lacks config.json, model.safetensors"):
        publish(tmp_path, "someone/tiny", dry_run=True)
    for name in ("tiny", "a/b/c", "some/one`\n<b>"):
        with pytest.raises(PublishError, match="expected a repository as owner/name"):
            publish(tmp_path, name, dry_run=True)


def test_publishing_to_a_hub_uploads_what_the_dry_run_showed(run: Path, hub: FakeHub) -> None:
    command = [sys.executable, "-m", "tinyaudio", "publish", str(run), "--repo", "someone/tiny", "--token", "hf_fake"]
    command += ["--encoder-id", PUBLISHED["encoder_id"], "--decoder-id", PUBLISHED["decoder_id"], "--json"]
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    [files] = hub.repos.values()
    assert set(files) >= set(printed["files"])
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert set(hub.validated) == {files["README.md"].decode()}  # ours, and the client's own on the way
    assert json.loads(files["config.json"])["encoder_id"] == "facebook/hubert-large-ls960-ft"


def test_a_hub_that_refuses_is_one_line_and_the_folder_stays(run: Path, hub: FakeHub) -> None:
    hub.refuses = True
    command = [sys.executable, "-m", "tinyaudio", "publish", str(run), "--repo", "another/tiny", "--token", "hf_fake"]
    command += ["--encoder-id", PUBLISHED["encoder_id"], "--decoder-id", PUBLISHED["decoder_id"]]
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("tinyaudio: ")]
    assert "the upload to 'another/tiny' failed" in line
    assert "403" in line
    assert "run this command again" in line
    assert "Traceback" not in done.stderr
    assert hub.repos == {}
    assert (run / "publish" / "README.md").is_file()
