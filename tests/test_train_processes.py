"""Stage two on several processes: the same global batches, the same losses, and no process waits for ever."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from trainings import module_recipe, module_store  # noqa: F401 (fixtures)

from pipelines.recipes import load_recipe
from pipelines.train.runs import Run
from pipelines.train.stage import train
from pipelines.train.trainer import ProjectorTrainer

OVERRIDES = ["train.accumulate=2", "train.log_every=1", "train.report_to=[]"]


def start_two(recipe_file: Path, store: Path, run: Path, *more: str) -> subprocess.Popen:
    settings = [part for override in OVERRIDES for part in ("--set", override)]
    arguments = ["--recipe", recipe_file, "--store", store, "--run", run, "--device", "cpu", *settings, *more]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, "-m", "--", "tinyaudio", "train", *map(str, arguments)],  # else torchrun takes --run for its own
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_take_the_steps_of_one(recipe_file, store, tmp_path):
    """With more batches than an epoch has, so that its end is crossed; losses to 1e-5, weights as near."""
    both = start_two(recipe_file, store, tmp_path / "two")
    _, errors = both.communicate(timeout=300)
    assert both.returncode == 0, errors
    train(load_recipe(str(recipe_file), OVERRIDES), store, Run(tmp_path / "one"), device="cpu", say=lambda _: None)
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    for key in ("loss", "grad_norm", "dev_wer", "dev_loss"):
        expected = {e["step"]: e[key] for e in one.metrics() if key in e}
        found = {e["step"]: e[key] for e in two.metrics() if key in e}
        assert expected.keys() == found.keys()
        assert all(abs(found[step] - expected[step]) < 1e-5 * max(1, expected[step]) for step in expected), key
    for key in ("num_utterances", "audio_s", "steps"):
        assert abs(two.state["report"][key] - one.state["report"][key]) < 1e-6
    a, b = (load_file(run.folder / "model.safetensors") for run in (one, two))
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


def test_only_the_main_process_writes_the_model(tmp_path):
    """transformers 5 calls `_save` in every process; two writers once left a torn processor_config.json."""
    other = SimpleNamespace(args=SimpleNamespace(should_save=False, output_dir=str(tmp_path)))
    ProjectorTrainer._save(other, str(tmp_path / "checkpoint"))
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.slow
def test_processes_stop_together_and_another_number_goes_on(recipe_file, store, tmp_path):
    """SIGTERM to one process alone; one process finishes what two began, as if nothing had happened."""
    both = start_two(recipe_file, store, tmp_path / "two", "--set", "train.steps=60")
    deadline = time.monotonic() + 120
    while len(Run(tmp_path / "two").metrics()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(both.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGTERM)
    output, errors = both.communicate(timeout=300)
    assert both.returncode == 0, errors
    assert "steps" in output
    recipe = load_recipe(str(recipe_file), [*OVERRIDES, "train.steps=60"])
    report = train(recipe, store, Run(tmp_path / "two"), resume=True, device="cpu", say=lambda _: None)
    train(recipe, store, Run(tmp_path / "one"), device="cpu", say=lambda _: None)
    assert report.is_finished
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)
