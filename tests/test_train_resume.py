"""Training that is killed, stopped by a signal, or given other settings: it resumes bit-identical, or is refused."""

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
from trainings import logged, module_recipe, module_store, same_weights, stage_two  # noqa: F401 (fixtures)

from pipelines.errors import RunError
from pipelines.train import batches as batches_module
from pipelines.train import targets as targets_module
from pipelines.train import trainer as trainer_module
from pipelines.train.callback import TrainingCallback
from pipelines.train.dev_set import DevSet
from pipelines.train.runs import Run

# The same as `tinyaudio train`, in a process that can be killed.
PROCESS = """
import sys
from pathlib import Path
from pipelines.recipes import load_recipe
from pipelines.train.runs import Run
from pipelines.train.stage import train
recipe_file, store, folder = sys.argv[1:]
resume = Run(Path(folder)).state != {}
train(load_recipe(recipe_file), Path(store), Run(Path(folder)), resume=resume, device="cpu", say=print)
"""


@pytest.fixture(scope="module")
def whole(recipe_file, store):
    """An undisturbed run."""
    stage_two(recipe_file, store, recipe_file.with_name("whole"))
    return recipe_file.with_name("whole")


def start(recipe_file: Path, store: Path, run: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", PROCESS, *map(str, (recipe_file, store, run))]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Killed(BaseException):
    """Ends train() on the spot; nothing catches it, so the disk is left as kill -9 would leave it."""


def strike(monkeypatch, place: str, step: int, blow) -> None:
    """Call `blow` in the middle of a step, or halfway through writing its checkpoint."""
    on_step_end, sync = TrainingCallback.on_step_end, trainer_module.sync

    def in_step(self, args, state, control, **kwargs):
        if state.global_step == step:
            blow()
        on_step_end(self, args, state, control, **kwargs)

    def in_save(path):
        if path.parent.name == f"checkpoint-{step}":
            path.with_name("optimizer.pt").write_bytes(b"torn")
            blow()
        sync(path)

    monkeypatch.setattr(TrainingCallback, "on_step_end", in_step if place == "step" else on_step_end)
    monkeypatch.setattr(trainer_module, "sync", in_save if place == "save" else sync)


def kill():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


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
        patch.setattr(
            "pipelines.train.stage.build_model", lambda recipe, *_, **__: asked.append(recipe.decoder) or kill()
        )
        with pytest.raises(Killed):
            stage_two(recipe_file, store, run, resume=True)
    assert [decoder.revision for decoder in asked] == ["0" * 40]


def test_sigkill_leaves_no_trace(recipe_file, store, whole, tmp_path):
    kill_at_random(recipe_file, store, whole, tmp_path / "killed", kills=1)


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["steps = 30", "steps = 15\nctc_steps = 15\nctc_weight = 0.3"], ids=["plain", "ctc"])
def test_twenty_sigkills_leave_no_trace(recipe_file, store, tmp_path, steps):
    text = recipe_file.read_text().replace("steps = 6", steps).replace("every = 2", "every = 1")
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
    assert "stopped at step 4 of 6, saved. Run the same command with --run" in lines[-1]
    assert "--resume" in lines[-1]
    assert 4 not in logged(tmp_path / "run", "dev_wer"), "the evaluation at step 4 was interrupted"
    stage_two(recipe_file, store, tmp_path / "run", resume=True)
    assert same_weights(whole, tmp_path / "run")
    assert logged(tmp_path / "run", "dev_wer") == logged(whole, "dev_wer"), "and repeated after the resume"


@pytest.mark.parametrize("moment", ["step", "evaluation"])
def test_sigterm_at_the_end_is_no_finish_without_its_word_errors(
    recipe_file, store, whole, tmp_path, monkeypatch, moment
):
    lines: list[str] = []
    with monkeypatch.context() as patch:
        if moment == "step":
            strike(patch, "step", 6, terminate)
        else:
            gain, calls = DevSet.audio_gain, iter(range(9))
            patch.setattr(DevSet, "audio_gain", lambda *a: (terminate() if next(calls) == 1 else None, gain(*a))[1])
        report = stage_two(recipe_file, store, tmp_path / "run", lines=lines)
    assert (report.is_finished, report.steps) == (False, 6)
    assert "stopped at step 6 of 6, saved. Run the same command with --run" in lines[-1]
    assert stage_two(recipe_file, store, tmp_path / "run", resume=True).is_finished
    assert logged(tmp_path / "run", "dev_wer") == logged(whole, "dev_wer")
    assert same_weights(whole, tmp_path / "run")


def test_resume_computes_the_order_of_one_epoch_and_tokenises_nothing(recipe_file, store, tmp_path, monkeypatch):
    """Bounded by counting, not by the clock: at real size an order takes seconds, all tokens take minutes."""
    many = ("train.steps=60", "train.eval_every=60", "train.save_every=58", "train.log_every=20")
    with monkeypatch.context() as patch:
        strike(patch, "step", 59, kill)
        with pytest.raises(Killed):
            stage_two(recipe_file, store, tmp_path / "run", *many)
    epochs: list[int] = []
    order = batches_module.epoch_order
    with monkeypatch.context() as patch:
        patch.setattr(batches_module, "epoch_order", lambda *a, **k: (epochs.append(k["epoch"]), order(*a, **k))[1])
        patch.setattr(targets_module, "tokenize", lambda *_: pytest.fail("tokenised again"))
        stage_two(recipe_file, store, tmp_path / "run", *many, resume=True)
    assert len(epochs) == 1
    assert epochs[0] > 3, "a late epoch, and none of those before it"
    stage_two(recipe_file, store, tmp_path / "whole", *many)
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def test_split_that_grew_since_the_last_save_is_refused(recipe_file, store, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    Run(tmp_path / "run").update({"is_finished": False})
    progress = tmp_path / "run" / "checkpoints" / "checkpoint-6" / "progress.json"
    progress.write_text(json.dumps({**json.loads(progress.read_text()), "utterances_in_split": 39}))
    with pytest.raises(RunError, match=r"split 'train' of .* has 40 utterances; expected 39 as at the last checkpoint"):
        stage_two(recipe_file, store, tmp_path / "run", resume=True)


def test_drift_is_refused_with_the_keys_and_looking_more_often_is_not(recipe_file, store, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    Run(tmp_path / "run").update({"is_finished": False})
    with pytest.raises(RunError, match=r"projector.hidden_size was 24 and is 32, train.seed was 0 and is 1"):
        stage_two(recipe_file, store, tmp_path / "run", "train.seed=1", "projector.hidden_size=32", resume=True)
    with pytest.raises(RunError, match=r"corpus.dev_split was 'dev' and is 'test'"):
        stage_two(recipe_file, store, tmp_path / "run", "corpus.dev_split=test", resume=True)
    assert stage_two(recipe_file, store, tmp_path / "run", "train.log_every=1", resume=True).is_finished


@pytest.mark.parametrize("resume", [False, True])
def test_finished_run_asked_for_something_else_is_no_success(recipe_file, store, whole, resume):
    with pytest.raises(RunError, match=r"train.seed was 0 and is 1"):
        stage_two(recipe_file, store, whole, "train.seed=1", resume=resume)
    lines, before = [], (whole / "model.safetensors").stat().st_mtime_ns
    assert stage_two(recipe_file, store, whole, resume=resume, lines=lines).is_finished
    assert "is finished; nothing to do" in lines[0]
    assert (whole / "model.safetensors").stat().st_mtime_ns == before
