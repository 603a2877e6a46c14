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
from pipelines import batches as batches_module
from pipelines import train as train_module
from pipelines import trainer as trainer_module
from pipelines.batches import Dequantizer, TrainingBatches
from pipelines.corpora import open_corpus
from pipelines.dev_set import DevSet
from pipelines.errors import RunError
from pipelines.extract import extract, wanted_splits
from pipelines.recipes import load_recipe
from pipelines.rehearsal import rehearse
from pipelines.runs import Run
from pipelines.train import train
from pipelines.trainer import ProjectorTrainer
from pipelines.watch import Watch
from tinyaudio.errors import ModelError

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
    stage_two(recipe_file, store, tmp_path / "run", resume=True)
    assert same_weights(whole, tmp_path / "run")
    assert logged(tmp_path / "run", "dev_wer") == logged(whole, "dev_wer"), "and made up for"


@pytest.mark.parametrize("moment", ["step", "evaluation"])
def test_sigterm_at_the_end_is_no_finish_without_its_word_errors(
    recipe_file, store, whole, tmp_path, monkeypatch, moment
):
    lines: list[str] = []
    with monkeypatch.context() as patch:
        if moment == "step":
            strike(patch, "step", 6, terminate)
        else:
            listen, calls = DevSet.listen, iter(range(9))
            patch.setattr(DevSet, "listen", lambda *a: (terminate() if next(calls) == 1 else None, listen(*a))[1])
        report = stage_two(recipe_file, store, tmp_path / "run", lines=lines)
    assert (report.is_finished, report.steps) == (False, 6)
    assert "stopped at step 6 of 6, saved; go on with" in lines[-1]
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
        patch.setattr(batches_module, "tokenize", lambda *_: pytest.fail("tokenised again"))
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
    with pytest.raises(RunError, match=r"holds 40 utterances of split 'train' and held 39 when the run was last saved"):
        stage_two(recipe_file, store, tmp_path / "run", resume=True)


def test_gradient_that_is_not_finite_under_a_finite_loss_saves_nothing(recipe_file, store, tmp_path, monkeypatch):
    compute = ProjectorTrainer.compute_loss

    def poison(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        zero = sum(weight.sum() for weight in model.projector.parameters()) * 0
        return loss + zero.sqrt() if self.state.global_step == 1 else loss  # sqrt(0) is 0, its slope is not

    monkeypatch.setattr(ProjectorTrainer, "compute_loss", poison)
    with pytest.raises(RunError, match=r"projector weights are not finite after step 2, on utterances train/\d+.wav, "):
        stage_two(recipe_file, store, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


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
    with pytest.raises(RunError, match=r"corpus.dev_split was 'dev' and is 'test'"):
        stage_two(recipe_file, store, tmp_path / "run", "corpus.dev_split=test", resume=True)
    assert stage_two(recipe_file, store, tmp_path / "run", "train.log_every=1", resume=True).is_finished


@pytest.mark.parametrize("resume", [False, True])
def test_finished_run_asked_for_something_else_is_no_success(recipe_file, store, whole, resume):
    with pytest.raises(RunError, match=r"train.seed was 0 and is 1"):
        stage_two(recipe_file, store, whole, "train.seed=1", resume=resume)
    lines: list[str] = []
    assert stage_two(recipe_file, store, whole, resume=resume, lines=lines).is_finished
    assert "is finished; nothing to do" in lines[0]


def test_only_the_first_process_speaks(recipe_file, store, whole, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    lines: list[str] = []
    stage_two(recipe_file, store, whole, lines=lines)
    assert lines == []


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ("train.liger=true", ModelError, r"train.liger needs a GPU; found device 'cpu'"),
        ("train.accumulate=1", RunError, r"train.accumulate is 1 and there are 3 processes; expected a multiple of 3"),
        ("train.report_to=['nobody']", RunError, r"names nobody, which is not installed"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_loaded(
    recipe_file, store, tmp_path, monkeypatch, override, kind, message
):
    monkeypatch.setenv("WORLD_SIZE", "3" if "accumulate" in override else "1")
    monkeypatch.setattr(train_module, "build_model", lambda *_, **__: pytest.fail("loaded a model"))
    with pytest.raises(kind, match=message):
        stage_two(recipe_file, store, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_a_gpu_by_its_number_is_refused_with_what_to_do(recipe_file, store, tmp_path):
    with pytest.raises(RunError, match=r"device 'cuda:1'; expected cuda, cpu or auto. Set CUDA_VISIBLE_DEVICES=1"):
        train(load_recipe(str(recipe_file)), store, Run(tmp_path / "run"), device="cuda:1", say=print)


def test_latest_is_a_link_in_runs_and_nowhere_else(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(str(recipe_file))
    for folder in (Path("runs/mine"), Path("elsewhere/other")):
        Run(folder.resolve()).begin(recipe, {})
    assert Path("runs/latest").resolve() == Path("runs/mine").resolve()
    assert not Path("elsewhere/latest").exists()


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


def test_without_a_dev_split_it_says_so_once_and_the_loss_tells_who_is_deaf(recipe_file, store, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.watch.CLICK_UTTERANCES", 20)
    lines: list[str] = []
    report = stage_two(recipe_file, store, tmp_path / "run", "corpus.dev_split=absent", lines=lines)
    assert report.is_finished
    assert report.dev_wer is None
    assert len([line for line in lines if "nothing will be evaluated" in line]) == 1
    assert len([line for line in lines if "hardly depend on the audio" in line]) == 1
    monkeypatch.setattr("pipelines.watch.CLICK_LOSS", 100.0)
    lines.clear()
    stage_two(recipe_file, store, tmp_path / "heard", "corpus.dev_split=absent", lines=lines)
    assert not [line for line in lines if line.startswith("warning")]


def test_rehearsal_does_one_step_of_everything_and_asks_nothing(recipe_file, store, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _="": pytest.fail("asked a question on stdin"))
    lines: list[str] = []
    done = rehearse(
        load_recipe(str(recipe_file), ["train.overfit_utterances=3"]), store, device="cpu", say=lines.append
    )
    assert any("stopped at step 1 of 2" in line for line in lines)
    assert "trained, evaluated, saved, loaded and resumed" in str(done)
    assert (done.to_dict()["steps"], done.peak_memory_bytes > 0) == (2, True)


def test_rehearsal_trains_and_evaluates_on_what_takes_most_memory(recipe_file, store, monkeypatch):
    made, heard = [], []
    make, transcribe = TrainingBatches.__init__, DevSet.transcribe
    monkeypatch.setattr(TrainingBatches, "__init__", lambda self, *a, **k: (made.append(self), make(self, *a, **k))[1])
    monkeypatch.setattr(DevSet, "transcribe", lambda self, *a: (heard.append(self), transcribe(self, *a))[1])
    monkeypatch.setattr("pipelines.dev_set.BATCH_FRAMES", 120)
    rehearse(load_recipe(str(recipe_file)), store, device="cpu", say=lambda _: None)
    batches, dev = made[0], heard[0]
    left_out = np.setdiff1d(np.arange(len(batches.reader)), batches.chosen)
    assert batches.costs[batches.chosen].min() >= batches.costs[left_out].max()
    assert all(sorted(batches.positions(number)) == batches.chosen.tolist() for number in range(2))
    assert (len(batches.chosen) + 1) * batches.costs.max() > 300, "no more would fit"
    frames = dev.reader.num_frames
    assert 1 < len(dev.positions) < 5
    assert len(dev.positions) * int(frames[dev.positions].max()) <= 120


def test_rehearsal_under_torchrun_is_refused_instead_of_hanging(recipe_file, store, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"--dev-run under 2 processes; expected one"):
        rehearse(load_recipe(str(recipe_file)), store, device="cpu")


def test_overfitting_that_fails_says_so_as_often_as_it_is_asked(recipe_file, store, tmp_path):
    for _ in range(2):
        with pytest.raises(RunError, match=r"3 utterances were not learnt by heart in 6 steps"):
            stage_two(recipe_file, store, tmp_path / "run", "train.overfit_utterances=3")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["is_finished"]


def test_a_few_utterances_are_learnt_by_heart(tmp_path):
    """On the bundled stand-ins, whose decoder can write: near-zero word errors, and an end as soon as they are zero."""
    recipe = load_recipe("demo", ["corpus.dev_split=none", "train.overfit_utterances=8", "train.eval_every=25"])
    store = tmp_path / "store"
    extract(recipe, store, splits=["dev"], device="cpu")
    recipe = recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"train_split": "dev"})})
    report = train(recipe, store, Run(tmp_path / "run"), device="cpu", say=print)
    assert report.is_finished
    assert report.dev_wer is not None
    assert report.dev_wer <= train_module.OVERFIT_WER
    assert report.steps < recipe.train.steps


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile wants a C++ compiler")
def test_compiled_decoder_gives_the_same_losses(recipe_file, store, tmp_path):
    """Minutes of compiling for two steps."""
    short = ("train.steps=2", "train.log_every=1", "corpus.dev_split=absent")
    stage_two(recipe_file, store, tmp_path / "plain", *short)
    stage_two(recipe_file, store, tmp_path / "compiled", *short, "train.compile=true")
    expected, found = logged(tmp_path / "plain", "loss"), logged(tmp_path / "compiled", "loss")
    assert list(found) == [1, 2]
    assert all(abs(found[step] - expected[step]) < 1e-4 for step in expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "more", [[], ["train.compile=true"], ["train.liger=true"], ["train.gradient_checkpointing=true"]]
)
def test_four_steps_on_a_gpu_follow_the_cpu(recipe_file, store, tmp_path, more):
    """bf16 autocast, pinned batches, a fused optimizer; compiled, with Liger, and with activations checkpointed."""
    if "train.liger=true" in more:
        pytest.importorskip("liger_kernel")
    settings = ["train.steps=4", "train.log_every=1", *more]
    train(load_recipe(str(recipe_file), settings), store, Run(tmp_path / "gpu"), device="cuda", say=print)
    stage_two(recipe_file, store, tmp_path / "cpu", "train.steps=4", "train.log_every=1")
    expected, found = logged(tmp_path / "cpu", "loss"), logged(tmp_path / "gpu", "loss")
    assert list(found) == [1, 2, 3, 4]
    assert all(abs(found[step] - expected[step]) < 0.02 * expected[step] for step in expected)


def invoke(*arguments):
    from typer.testing import CliRunner

    from tinyaudio.cli import app

    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_dev_run_prints_json_and_refuses_what_it_would_ignore(recipe_file, store, monkeypatch):
    common = ("--recipe", recipe_file, "--store", store, "--device", "cpu", "--dev-run")
    done = invoke(*common, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 2
    for more in (["--run", "mine"], ["--resume"], ["--overfit", 3]):
        refused = invoke(*common, *more)
        assert refused.exit_code == 2
        assert "goes without --run, --resume and --overfit" in refused.output


def test_interrupt_says_how_to_go_on(recipe_file, store, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "build_model", interrupt)
    done = invoke("--recipe", recipe_file, "--store", store, "--device", "cpu", "--run", tmp_path / "run")
    assert done.exit_code == 130
    assert f"the same command with --run {tmp_path / 'run'} --resume goes on" in done.output


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
