"""The command line: help, errors on one line with a next step, exit codes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_folder_corpus
from trainings import files_of_at_most

from pipelines.train.runs import Run
from tinyaudio import cli

ROOT = Path(__file__).parent.parent


def commands() -> list[list[str]]:
    """Every command and sub-command that the app has, found by walking it."""
    import typer

    from tinyaudio.cli.app import app

    found: list[list[str]] = [[]]

    def walk(group: object, path: list[str]) -> None:
        for name, command in getattr(group, "commands", {}).items():
            found.append([*path, name])
            walk(command, [*path, name])

    walk(typer.main.get_command(app), [])
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_explains_itself(command):
    from typer.testing import CliRunner

    from tinyaudio.cli.app import app

    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_help_lists_the_commands_in_the_order_a_newcomer_needs_them(tinyaudio):
    listed = tinyaudio("--help").stdout.split("  -h, --help")[1].splitlines()
    names = [line.split()[0] for line in listed if line.startswith("  ") and line[2] != " " and "Show this" not in line]
    assert names == "demo transcribe doctor serve extract train eval ablate runs store publish bench".split()
    assert [line for line in listed if line.endswith(":")] == ["Try:", "Train:", "Store and publish:", "Measure:"]
    assert set(names) == {command[0] for command in commands() if command}


@pytest.mark.parametrize("columns", ["80", "100"])
@pytest.mark.parametrize("group", [[], ["store"], ["bench"]], ids=" ".join)
def test_help_cuts_no_description_off_and_is_plain_text_in_a_pipe(tinyaudio, group, columns):
    shown = tinyaudio(*group, "--help", COLUMNS=columns).stdout
    assert "..." not in shown.replace("COMMAND [ARGS]...", "")
    assert shown.isascii()
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= int(columns)


def test_make_help_has_the_same_groups():
    shown = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    targets = [line.split()[1] for line in shown.splitlines() if line.startswith("  make ")]
    assert targets[:9] == "help setup demo transcribe serve extract train-projector eval ablate".split()
    assert "..." not in shown


def test_help_imports_no_torch():
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom tinyaudio.cli.app import app\n"
        f"for words in {commands()}: assert CliRunner().invoke(app, [*words, '--help']).exit_code == 0\n"
        "print(sys.modules.keys() & {'torch', 'transformers', 'zarr', 'datasets', 'numpy', 'soundfile'})"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["extract", "--set", "train.stesp=3"], 2, ["train.stesp", "did you mean 'steps'"]),
        (["extract", "--recipe", "dmo"], 2, ["did you mean 'demo'"]),
        (["extract", "--set", "corpus.path=/nonexistent"], 1, ["/nonexistent", "does not exist"]),
        (["extract", "--shard", "3/3"], 2, ["i/N"]),
        (["train", "--store", "/nonexistent/store"], 1, ["/nonexistent/store", "tinyaudio extract"]),
        (["transcribe", "--model", "/nonexistent/model", __file__], 1, ["/nonexistent/model"]),
        (["transcribe"], 2, ["Usage"]),
        (["nonsense"], 2, ["nonsense"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_wrong_input_is_one_clear_line(tinyaudio, arguments, exit_code, words):
    result = tinyaudio(*arguments)
    assert result.returncode == exit_code, result.stderr
    for word in words:
        assert word in result.stderr
    if exit_code == 1:
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_stages_end_with_one_json_object_and_say_when_there_is_nothing_to_do(tinyaudio, recipe_file, tmp_path):
    given = ("--recipe", recipe_file, "--store", tmp_path / "store")
    plan = tinyaudio("extract", *given, "--plan", "--json")
    assert json.loads(plan.stdout.splitlines()[-1])["utterances"] == 48
    assert not (tmp_path / "store").exists()
    first = tinyaudio("extract", *given, "--json")
    assert json.loads(first.stdout.splitlines()[-1])["utterances"] == 48, first.stderr
    trained = tinyaudio("train", *given, "--run", "run", "--json")
    assert json.loads(trained.stdout.splitlines()[-1])["steps"] == 6, trained.stderr
    again = tinyaudio("train", *given, "--run", "run")
    assert again.returncode == 0
    assert "nothing to do" in again.stderr


def test_interrupt_exits_130_with_one_line(recipe_file, corpus_folder, noise, tmp_path):
    import signal

    write_folder_corpus(tmp_path / "large", noise, {"train": 2000, "dev": 1})  # more than is done in a moment
    store = tmp_path / "store"
    command = [sys.executable, "-m", "tinyaudio", "extract", "--recipe", str(recipe_file), "--store", str(store)]
    command += ["--set", f"corpus.path={tmp_path / 'large'}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while not any(store.glob("commits/*.json")):  # all imports are done by then
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.strip() == "tinyaudio: interrupted; run the same command again to resume"


def test_interrupt_inside_exec_exits_130_too(tmp_path):
    """As while torch is imported; `python -m` would end by the signal itself."""
    (tmp_path / "interrupted.py").write_text(
        "import tinyaudio.cli.app as cli\n"
        "def app(**_):\n"
        "    try: exec('raise KeyboardInterrupt')\n"
        "    except KeyboardInterrupt: raise SystemExit(130)\n"
        "cli.app = app\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    assert subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 130


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(("command", "option"), [("extract", "--store"), ("train", "--run")])
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_made(tinyaudio, command, option, recipe_file, tmp_path):
    made = tmp_path / "folder" / "made"
    done = tinyaudio(command, "--recipe", recipe_file, option, made, "--device", "cuda")
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "'cuda' cannot be used" in done.stderr
    assert not made.parent.exists()


def test_a_run_that_cannot_be_written_is_one_line_and_leaves_no_torn_recipe(
    tinyaudio, recipe_file, store, tmp_path, monkeypatch
):
    given = ("--recipe", recipe_file, "--store", store, "--run")
    (tmp_path / "file").touch()
    done = tinyaudio("train", *given, tmp_path / "file/run")
    assert done.returncode == 1, done.stderr
    assert f"tinyaudio: Not a directory: '{tmp_path / 'file/run'}'. Name another path" in done.stderr.splitlines()[-1]
    begin = Run.begin

    def limited(*arguments):
        with files_of_at_most(100):
            begin(*arguments)

    monkeypatch.setattr(Run, "begin", limited)
    done = tinyaudio("train", *given, tmp_path / "run")
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("tinyaudio: File too large: ")
    assert "recipe.toml'. Free some space" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []


def test_only_places_that_cannot_be_used_lose_their_traceback(monkeypatch, capsys):
    import errno

    from tinyaudio.cli import app as cli

    def outcome(error: Exception) -> str:
        def fail(**_: object) -> None:
            raise error

        monkeypatch.setattr(cli, "app", fail)
        with pytest.raises((SystemExit, type(error))) as caught:
            cli.main()
        return capsys.readouterr().err if caught.type is SystemExit else "traceback"

    assert outcome(OSError(errno.ENOSPC, "No space left")).startswith("tinyaudio: No space left. Free some space and ")
    assert outcome(OSError(errno.EROFS, "Read-only", "/x")).startswith("tinyaudio: Read-only: '/x'. Name another path")
    for bug in (
        OSError("no errno"),
        OSError(errno.EACCES, "no name"),
        OSError(errno.ENOENT, "gone", "/x"),
        KeyError(1),
    ):
        assert outcome(bug) == "traceback"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["export", "store", "small", "--split", "nosuch"], 2, "expected one of dev, train"),
        (["export", "store", "./store"], 2, "'store' is the source"),
        (["info", "run"], 1, "found a run: 'run'. It was trained on 'data/mine'"),
    ],
    ids=["unknown split", "onto itself", "a run"],
)
def test_what_a_store_command_cannot_take_is_named(tinyaudio, arguments, exit_code, words, store, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"store": "data/mine"}')
    done = tinyaudio("store", *arguments)
    assert (done.returncode, done.stdout) == (exit_code, ""), done.stderr
    assert words in done.stderr
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("UNSET", "", "expandable_segments:True"),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:64", "max_split_size_mb:64"),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64", None),
    ],
)
def test_the_memory_of_a_gpu_grows_in_segments_unless_the_user_says_otherwise(monkeypatch, name, value, expected):
    monkeypatch.setattr(os, "environ", {key: kept for key, kept in os.environ.items() if "ALLOC_CONF" not in key})
    os.environ[name] = value
    monkeypatch.setattr(sys, "argv", ["tinyaudio", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
