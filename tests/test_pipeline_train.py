"""Stage two on tiny random parts: exact under every way of stopping, and seen while it learns."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NoiseMaker, write_folder_corpus, write_recipe
from safetensors.torch import load_file

from cache import FeatureReader, FeatureStore
from pipelines import trainer as trainer_module
from pipelines.batches import Dequantizer
from pipelines.corpora import open_corpus
from pipelines.errors import RunError
from pipelines.extract import extract, wanted_splits
from pipelines.recipes import load_recipe
from pipelines.rehearsal import rehearse
from pipelines.runs import Run
from pipelines.train import train
from pipelines.watch import Watch

# The same as `tinyaudio train`, in a process that can be killed.
PROCESS = """
import sys
from pathlib import Path
from pipelines.recipes import load_recipe
from pipelines.runs import Run
from pipelines.train import train
recipe_file, store, folder = sys.argv[1:]
resume = Run(Path(folder)).state != {}
train(load_recipe(recipe_file), Path(store), Run(Path(folder)), resume=resume, device="cpu", say=print)
"""


def start(recipe_file: Path, store: Path, run: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", PROCESS, *map(str, (recipe_file, store, run))]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Killed(BaseException):
    """Ends train() on the spot; nothing catches it, so the disk is left as kill -9 would leave it."""


def strike(monkeypatch, place: str, step: int, blow) -> None:
    """Call `blow` in the middle of a step, or halfway through writing its checkpoint."""
    on_step_end, flush = Watch.on_step_end, trainer_module._flush

    def in_step(self, args, state, control, **kwargs):
        if state.global_step == step:
            blow()
        on_step_end(self, args, state, control, **kwargs)

    def in_save(folder):
        if folder.name == f"checkpoint-{step}":
            (folder / "optimizer.pt").write_bytes(b"torn")
            blow()
        flush(folder)

    monkeypatch.setattr(Watch, "on_step_end", in_step if place == "step" else on_step_end)
    monkeypatch.setattr(trainer_module, "_flush", in_save if place == "save" else flush)


def kill():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def stage_two(recipe_file: Path, store: Path, run: Path, *overrides: str, resume: bool = False, lines=None):
    say = (lambda _: None) if lines is None else lines.append
    recipe = load_recipe(str(recipe_file), overrides)
    return train(recipe, store, Run(run), resume=resume, device="cpu", say=say)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, encoder_folder, decoder_folder):
    root = tmp_path_factory.mktemp("tiny")
    write_folder_corpus(root / "corpus", NoiseMaker(seed=0), {"train": 40, "dev": 8})
    return write_recipe(root / "tiny.toml", root / "corpus", encoder_folder, decoder_folder)


@pytest.fixture(scope="module")
def store(recipe_file):
    recipe, path = load_recipe(str(recipe_file)), recipe_file.with_name("store")
    extract(recipe, path, splits=wanted_splits(recipe, open_corpus(recipe.corpus), None)[0], device="cpu")
    return path


@pytest.fixture(scope="module")
def whole(recipe_file, store):
    """An undisturbed run."""
    lines: list[str] = []
    stage_two(recipe_file, store, recipe_file.with_name("whole"), lines=lines)
    recipe_file.with_name("lines.txt").write_text("\n".join(lines))
    return recipe_file.with_name("whole")


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return all(torch.equal(a[key], b[key]) for key in a)


def logged(run: Path, key: str) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in Run(run).metrics() if key in entry}


def test_killed_training_goes_on_bit_identical_wherever_it_died(recipe_file, store, whole, tmp_path, monkeypatch):
    """Between checkpoints, and halfway through writing one; the data order and the metrics never restart."""
    run = tmp_path / "killed"
    for place, step in (("step", 1), ("save", 4), ("step", 5)):
        with monkeypatch.context() as patch:
            strike(patch, place, step, kill)
            with pytest.raises(Killed):
                stage_two(recipe_file, store, run, resume=run.exists())
    report = stage_two(recipe_file, store, run, resume=True)
    assert same_weights(whole, run)
    assert logged(whole, "loss") == logged(run, "loss")
    assert logged(whole, "dev_wer") == logged(run, "dev_wer")
    assert [entry["step"] for entry in Run(run).metrics() if "loss" in entry] == [2, 4, 6]
    expected = Run(whole).state["report"]
    assert (report.num_utterances, report.audio_s) == (expected["num_utterances"], expected["audio_s"])


def test_a_resumed_run_asks_for_the_decoder_it_began_with(recipe_file, store, tmp_path, monkeypatch):
    """No recipe needs to pin it: the commit is in run.json, and the branch may move."""
    run, asked = tmp_path / "run", []
    with monkeypatch.context() as patch:
        strike(patch, "step", 3, kill)
        with pytest.raises(Killed):
            stage_two(recipe_file, store, run)
        assert {"encoder_revision", "decoder_revision"} <= Run(run).state.keys()
        Run(run).update({"decoder_revision": "0" * 40})
        patch.setattr("pipelines.train.build_model", lambda recipe, *_, **__: asked.append(recipe.decoder) or kill())
        with pytest.raises(Killed):
            stage_two(recipe_file, store, run, resume=True)
    assert [decoder.revision for decoder in asked] == ["0" * 40]


def test_sigkill_leaves_no_trace(recipe_file, store, whole, tmp_path):
    kill_at_random(recipe_file, store, whole, tmp_path / "killed", kills=1)


@pytest.mark.slow
def test_twenty_sigkills_leave_no_trace(recipe_file, store, tmp_path):
    text = recipe_file.read_text().replace("steps = 6", "steps = 30").replace("every = 2", "every = 1")
    recipe_file = tmp_path / "long.toml"
    recipe_file.write_text(text)
    stage_two(recipe_file, store, tmp_path / "whole")
    kill_at_random(recipe_file, store, tmp_path / "whole", tmp_path / "killed", kills=20)


def kill_at_random(recipe_file: Path, store: Path, whole: Path, run: Path, kills: int) -> None:
    """SIGKILL at random moments, each time at least one logged step further, whatever the process is doing."""
    random = np.random.default_rng(4)
    for _ in range(kills):
        before, process, deadline = len(Run(run).metrics()), start(recipe_file, store, run), time.monotonic() + 240
        while process.poll() is None and len(Run(run).metrics()) <= before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    stage_two(recipe_file, store, run, resume=True)
    assert same_weights(whole, run)
    assert logged(whole, "dev_wer") == logged(run, "dev_wer")


def test_sigterm_saves_and_says_how_to_go_on(recipe_file, store, whole, tmp_path, monkeypatch):
    lines: list[str] = []
    with monkeypatch.context() as patch:
        strike(patch, "step", 4, terminate)
        report = stage_two(recipe_file, store, tmp_path / "run", lines=lines)
    assert (report.is_finished, report.steps) == (False, 4)
    assert "stopped at step 4 of 6, saved; go on with" in lines[-1]
    assert "--resume" in lines[-1]
    assert 4 not in logged(tmp_path / "run", "dev_wer"), "the evaluation at step 4 was given up"
    started = time.monotonic()
    stage_two(recipe_file, store, tmp_path / "run", resume=True)
    assert time.monotonic() - started < 10 * (1 + os.getloadavg()[0]), "two steps and two evaluations after a resume"
    assert same_weights(whole, tmp_path / "run")
    assert logged(tmp_path / "run", "dev_wer") == logged(whole, "dev_wer"), "and made up for"


def test_loss_that_is_not_finite_stops_with_the_utterances(recipe_file, store, tmp_path, monkeypatch):
    def poison(self, batch):
        broken = "train/017.wav" in batch["utterance_ids"]
        return batch["features"] * (float("nan") if broken else 1.0)

    monkeypatch.setattr(Dequantizer, "__call__", lambda self, batch: batch["features"].float())
    monkeypatch.setattr(trainer_module.Dequantizer, "__call__", poison)
    monkeypatch.setattr("pipelines.train.DevSet.open", lambda *_: None)
    with pytest.raises(RunError, match=r"loss is nan at step \d+, on utterances .*train/017.wav"):
        stage_two(recipe_file, store, tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
        assert all(torch.isfinite(w).all() for w in load_file(checkpoint / "model.safetensors").values())


def test_drift_is_refused_with_the_keys_and_looking_more_often_is_not(recipe_file, store, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    Run(tmp_path / "run").update({"is_finished": False})
    with pytest.raises(RunError, match=r"projector.hidden_size was 24 and is 32, train.seed was 0 and is 1"):
        stage_two(recipe_file, store, tmp_path / "run", "train.seed=1", "projector.hidden_size=32", resume=True)
    assert stage_two(recipe_file, store, tmp_path / "run", "train.log_every=1", resume=True).is_finished


def test_metrics_say_what_one_wants_to_see(store, whole):
    keys = {key for entry in Run(whole).metrics() for key in entry}
    assert {
        *("loss", "learning_rate", "grad_norm", "projected_rms", "tokens_per_second", "audio_seconds_per_second"),
        *("peak_memory_bytes", "loader_share", "num_utterances", "dev_wer", "dev_loss", "dev_listening_gain"),
    } <= keys
    report = Run(whole).state["report"]
    assert report["encoder_passes"] == 0
    index = FeatureReader(FeatureStore.open(store), split="train").index
    assert 0 < report["audio_s"] < 6 * sum(index["duration_s"].to_pylist())
    lines = whole.with_name("lines.txt").read_text().splitlines()
    assert any("worst:" in line for line in lines)
    assert sum(line.startswith("    ref ") for line in lines) >= 16


def test_curves_reach_tensorboard(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    tags = {tag.split("/")[-1] for tag in events.Tags()["scalars"]}
    assert {"loss", "dev_wer", "projected_rms", "tokens_per_second"} <= tags


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_reporter_that_is_not_installed_is_one_line(recipe_file, store, tmp_path, name):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(RunError, match=rf"names {name}, which is not installed"):
        stage_two(recipe_file, store, tmp_path / "run", f'train.report_to=["{name}"]')


def test_deaf_model_is_warned_about_once_after_60000_utterances(recipe_file, store, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.watch.CLICK_UTTERANCES", 20)
    lines: list[str] = []
    stage_two(recipe_file, store, tmp_path / "run", lines=lines)
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert "hardly depend on the audio" in warning
    assert "train.learning_rate" in warning


def test_rehearsal_does_one_step_of_everything_and_asks_nothing(recipe_file, store, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _="": pytest.fail("asked a question on stdin"))
    lines: list[str] = []
    rehearse(load_recipe(str(recipe_file)), store, device="cpu", say=lines.append)
    assert any("stopped at step 1 of 2" in line for line in lines)
    assert "trained, evaluated, saved, loaded and resumed" in lines[-1]


def test_overfitting_that_fails_says_so(recipe_file, store, tmp_path):
    with pytest.raises(RunError, match=r"3 utterances were not learnt by heart in 6 steps"):
        stage_two(recipe_file, store, tmp_path / "run", "train.overfit_utterances=3")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["is_finished"]


def test_whitened_start_sees_what_the_plain_one_sees_of_whitened_features(recipe_file, store, tmp_path):
    from pipelines.build import build_model
    from pipelines.whitening import feature_statistics

    opened, cpu = FeatureStore.open(store), torch.device("cpu")
    plain, _ = build_model(load_recipe(str(recipe_file)), opened, cpu)
    folded, _ = build_model(load_recipe(str(recipe_file), ["projector.whiten=true"]), opened, cpu)
    reader = FeatureReader(opened, split="train")
    mean, std = feature_statistics(reader)
    rows = [reader.read([i])[0].astype(np.float64) for i in range(len(reader))]
    assert np.allclose(np.concatenate(rows).mean(0), mean, atol=1e-5)
    assert np.allclose(np.concatenate(rows).std(0), std, rtol=1e-4)
    features = torch.from_numpy(rows[3][:40]).float()[None]
    white = (features - torch.from_numpy(mean)) / torch.from_numpy(std)
    assert torch.allclose(folded.projector(features), plain.projector(white), atol=1e-4)
    with pytest.raises(RunError, match=r"expected projector.kind mlp or linear"):
        build_model(load_recipe(str(recipe_file), ["projector.whiten=true", "projector.kind=conv"]), opened, cpu)
