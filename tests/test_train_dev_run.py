"""Before a long run: one step of everything, an overfit check, what the command says."""

import json
import weakref

import numpy as np
import pytest
import torch
from trainings import module_recipe, module_store, stage_two  # noqa: F401 (fixtures)

from pipelines.errors import RunError
from pipelines.extract.stage import extract
from pipelines.recipes import load_recipe
from pipelines.train import stage as train_module
from pipelines.train.batches import TrainingBatches
from pipelines.train.dev_run import dev_run
from pipelines.train.dev_set import DevSet
from pipelines.train.meter import release_memory
from pipelines.train.runs import Run
from pipelines.train.stage import train
from pipelines.train.trainer import ProjectorTrainer
from tinyaudio.model import frozen


def test_dev_run_does_one_step_of_everything_and_asks_nothing(recipe_file, store, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _="": pytest.fail("asked a question on stdin"))
    lines: list[str] = []
    done = dev_run(load_recipe(str(recipe_file), ["train.overfit_utterances=3"]), store, device="cpu", say=lines.append)
    assert [line.split()[1] for line in lines if "loss " in line] == ["1/2", "2/2"], lines
    assert not any("--resume" in line for line in lines), "the folder is temporary"
    assert "trained, evaluated, saved, loaded and resumed" in str(done)
    assert (done.to_dict()["steps"], done.peak_memory_bytes > 0) == (2, True)


def test_dev_run_holds_one_decoder_at_a_time_and_measures_the_peak_of_each_part(recipe_file, store, monkeypatch):
    """At full size a second one is 6.2 GB, which the report would count too."""
    made, alive, load = weakref.WeakSet(), [], frozen.load_decoder

    def load_decoder(*arguments):
        alive.append(len(made))
        decoder = load(*arguments)
        made.add(decoder)
        return decoder

    for module in ("pipelines.train.model", "tinyaudio.model.modeling_tinyaudio"):
        monkeypatch.setattr(f"{module}.load_decoder", load_decoder)
    peaks = iter([7, 5])
    monkeypatch.setattr(train_module, "peak_memory_bytes", lambda device: next(peaks))
    report = dev_run(load_recipe(str(recipe_file)), store, device="cpu", say=lambda _: None)
    assert alive == [0, 0, 0], "trained, resumed, loaded as a user would"
    assert report.peak_memory_bytes == 7


def test_released_memory_of_a_gpu_begins_a_new_peak(monkeypatch):
    calls = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: calls.append(name))
    release_memory(torch.device("cpu"))
    assert calls == []
    release_memory(torch.device("cuda"))
    assert calls == ["empty_cache", "reset_peak_memory_stats"]


def test_dev_run_trains_and_evaluates_on_what_takes_most_memory(recipe_file, store, monkeypatch):
    made, evaluated = [], []
    make, transcribe = TrainingBatches.__init__, DevSet.transcribe
    monkeypatch.setattr(TrainingBatches, "__init__", lambda self, *a, **k: (made.append(self), make(self, *a, **k))[1])
    monkeypatch.setattr(DevSet, "transcribe", lambda self, *a: (evaluated.append(self), transcribe(self, *a))[1])
    monkeypatch.setattr("pipelines.train.dev_set.BATCH_FRAMES", 120)
    dev_run(load_recipe(str(recipe_file)), store, device="cpu", say=lambda _: None)
    batches, dev = made[0], evaluated[0]
    left_out = np.setdiff1d(np.arange(len(batches.reader)), batches.chosen)
    assert batches.costs[batches.chosen].min() >= batches.costs[left_out].max()
    assert all(sorted(batches.positions(number)) == batches.chosen.tolist() for number in range(2))
    assert (len(batches.chosen) + 1) * batches.costs.max() > 300, "no more would fit"
    frames = dev.reader.num_frames
    assert 1 < len(dev.positions) < 5
    assert len(dev.positions) * int(frames[dev.positions].max()) <= 120


def test_dev_run_under_torchrun_is_refused_instead_of_hanging(recipe_file, store, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"--dev-run with 2 processes; expected one"):
        dev_run(load_recipe(str(recipe_file)), store, device="cpu")


def test_a_failed_overfit_check_is_reported_at_every_call(recipe_file, store, tmp_path):
    for _ in range(2):
        with pytest.raises(RunError, match=r"overfit check failed: WER is .* after 6 steps on 3 utterances"):
            stage_two(recipe_file, store, tmp_path / "run", "train.overfit_utterances=3")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["is_finished"]


def test_a_few_utterances_are_overfitted(tmp_path):
    """On the bundled models, whose decoder can write: near-zero word errors, and an end as soon as they are zero."""
    alone = ["train.ctc_steps=0", "train.ctc_weight=0"]
    few = ["corpus.dev_split=none", "train.overfit_utterances=8", "train.eval_every=25"]
    recipe = load_recipe("demo", [*few, *alone])
    store = tmp_path / "store"
    extract(recipe, store, splits=["dev"], device="cpu")
    recipe = recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"train_split": "dev"})})
    report = train(recipe, store, Run(tmp_path / "run"), device="cpu", say=print)
    assert report.is_finished
    assert report.dev_wer is not None
    assert report.dev_wer <= train_module.OVERFIT_WER
    assert report.steps < recipe.train.steps


def invoke(*arguments):
    from typer.testing import CliRunner

    from tinyaudio.cli.app import app

    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_dev_run_prints_json_and_refuses_what_it_would_ignore(recipe_file, store, monkeypatch):
    common = ("--recipe", recipe_file, "--store", store, "--device", "cpu", "--dev-run")
    done = invoke(*common, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 2
    for more in (["--run", "mine"], ["--resume"], ["--overfit", 3]):
        refused = invoke(*common, *more)
        assert refused.exit_code == 2
        assert "omit --run, --resume and --overfit" in refused.output


def test_interrupt_prints_how_to_resume(recipe_file, store, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "build_model", interrupt)
    done = invoke("--recipe", recipe_file, "--store", store, "--device", "cpu", "--run", tmp_path / "run")
    assert done.exit_code == 130
    assert f"run the same command with --run {tmp_path / 'run'} --resume to resume" in done.output


@pytest.mark.parametrize(("steps", "expected"), [(300, [True, False]), (0, [True, True])])
def test_a_dev_run_takes_a_step_of_each_phase(recipe_file, store, monkeypatch, steps, expected):
    """Not all the steps of a long CTC phase."""
    seen: list[bool] = []
    compute = ProjectorTrainer.compute_loss

    def counted(self, *arguments, **options):
        seen.append(self.state.global_step < self.settings.ctc_steps)
        return compute(self, *arguments, **options)

    monkeypatch.setattr(ProjectorTrainer, "compute_loss", counted)
    recipe = load_recipe(str(recipe_file), ["train.ctc_steps=500", f"train.steps={steps}"])
    assert dev_run(recipe, store, device="cpu").steps == 2
    assert seen == expected
