"""A full disk during a checkpoint: one line, nothing half-written, and the run resumes once there is space."""

import errno

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from trainings import extracted, files_of_at_most, module_recipe, same_weights, stage_two  # noqa: F401 (fixtures)

from pipelines.errors import RunError
from pipelines.files import full_disk
from pipelines.train.trainer import ProjectorTrainer
from tinyaudio.cli.app import _one_line

WRITERS = {
    "safetensors": lambda path: save_file({"a": torch.zeros(100_000)}, path),
    "torch": lambda path: torch.save({"a": torch.zeros(100_000)}, path),
    "torch, many": lambda path: torch.save([torch.zeros(1000) for _ in range(50)], path),
    "torch, before 1.6": lambda path: torch.save(
        {"a": torch.zeros(100_000)}, path, _use_new_zipfile_serialization=False
    ),
    "text": lambda path: path.write_text("x" * 400_000),
    "numpy": lambda path: np.save(path.open("wb"), np.zeros(100_000)),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_writer_s_own_error_is_a_full_disk(tmp_path, writer):
    with files_of_at_most(20_000), pytest.raises(Exception, match=r".") as raised:
        WRITERS[writer](tmp_path / "file")
    assert full_disk(raised.value)
    assert "Free some space and run the same command again" in str(_one_line(raised.value))


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EACCES, "denied"), RuntimeError("PytorchStreamReader failed"), ValueError("(os error 28)")],
)
def test_other_errors_are_not_a_full_disk(error):
    assert full_disk(error) is None


def test_a_full_disk_during_a_checkpoint_loses_nothing(recipe_file, tmp_path, monkeypatch):
    store, run = extracted(recipe_file), tmp_path / "run"
    stage_two(recipe_file, store, tmp_path / "whole")
    write = ProjectorTrainer._write_checkpoint

    def fill_the_disk(self, model, trial, staged, target):
        with files_of_at_most(limit if self.state.global_step == 4 else 1 << 40):
            write(self, model, trial, staged, target)

    limit = 0
    monkeypatch.setattr(ProjectorTrainer, "_write_checkpoint", fill_the_disk)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole/checkpoints/checkpoint-6").iterdir()}
    for name in ("model.safetensors", "optimizer.pt"):
        limit = sizes[name] - 1
        with pytest.raises(RunError, match=r"checkpoint-4' cannot be written: .*Free some space, .*--resume") as raised:
            stage_two(recipe_file, store, run, resume=run.exists())
        assert "\n" not in str(raised.value)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    stage_two(recipe_file, store, run, resume=True)
    assert same_weights(tmp_path / "whole", run)
