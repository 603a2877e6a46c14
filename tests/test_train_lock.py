"""One training per folder: a second process is refused with who holds it, and a dead one blocks nothing."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.errors import StoreNotFoundError
from pipelines.errors import RunError
from pipelines.recipes import load_recipe
from pipelines.train import stage
from pipelines.train.runs import LOCK, Run

HOLD = """
import sys, time
from pathlib import Path
from pipelines.train.runs import Run
folder, is_run = sys.argv[1:]
run = Run(Path(folder))
with run.held():
    if is_run == "run":
        run.update({"began": "now"})
    print("held", flush=True)
    time.sleep(600)
"""


def hold(folder: Path, is_run: str = "run") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), is_run], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen[str]]:
    process = hold(tmp_path / "run")
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_with_who_holds_the_folder(holder, tmp_path):
    expected = (
        rf"run' is in use: process {holder.pid} on {re.escape(socket.gethostname())}, since 2\d\d\d-.*another --run"
    )
    for _ in range(3):
        with pytest.raises(RunError, match=expected), Run(tmp_path / "run").held():
            pytest.fail("held twice")
    with Run(tmp_path / "other").held():
        pass


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_ended_in_any_way_blocks_nothing(holder, tmp_path, end):
    holder.send_signal(end)
    holder.wait(60)
    assert (tmp_path / "run" / LOCK).exists()
    with Run(tmp_path / "run").held():
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


def test_a_child_that_outlives_its_parent_does_not_hold_the_folder(tmp_path):
    """A fork shares the file; the lock must not be shared too."""

    def parent() -> None:
        with Run(tmp_path / "run").held():
            Run(tmp_path / "run").update({"began": "now"})
            if os.fork() == 0:
                time.sleep(3)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    process.join()
    with Run(tmp_path / "run").held():
        pass


def test_what_began_no_run_leaves_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (tmp_path / "empty").mkdir()
    for name in ("mine", "empty", "new"):
        with Run(tmp_path / name).held():
            assert (tmp_path / name / LOCK).exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "new").exists()


def test_a_holder_that_has_not_said_who_it_is_is_another_process(holder, tmp_path):
    for content in (b"", b"{", b'{"pid": 3}', b"[]", b"\xff"):
        (tmp_path / "run" / LOCK).write_bytes(content)
        with pytest.raises(RunError, match="is in use: another process trains here"), Run(tmp_path / "run").held():
            pytest.fail("held twice")


def test_training_is_refused_before_anything_is_loaded(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "check_settings", lambda _: pytest.fail("it trains"))
    for resume in (False, True):
        with pytest.raises(RunError, match=f"is in use: process {holder.pid} on"):
            stage.train(load_recipe("demo"), tmp_path / "store", Run(tmp_path / "run"), resume=resume)


def test_a_finished_run_answers_although_its_folder_is_held(holder, tmp_path):
    Run(tmp_path / "run").update({"is_finished": True})
    with pytest.raises(StoreNotFoundError, match="does not exist"):  # it begins to look for its store
        stage.train(load_recipe("demo"), tmp_path / "store", Run(tmp_path / "run"))


def test_a_file_system_without_locks_is_left_as_it_is(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("pipelines.train.runs.fcntl.lockf", refuse)
    with Run(tmp_path / "run").held():
        pass
