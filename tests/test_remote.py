"""Every remote recipe, run against replacements of what it starts; every option checked against the real command."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parent.parent
REMOTE = ROOT / "pipelines" / "remote"
SCRIPTS = sorted(path.name for path in REMOTE.iterdir() if path.suffix in (".sh", ".sbatch"))

# Writes down its name, arguments and a few variables; sbatch answers with a job number, as --parsable does.
REPLACEMENT = """#!{python}
import json, os, sys, time
from pathlib import Path
log = Path({log!r})
count = len(log.read_text().splitlines()) if log.exists() else 0
seen = {{key: os.environ.get(key) for key in ("STAGES", "SHARD", "WORK", "RECIPE", "RUN", "REPO", "GPUS")}}
with log.open("a") as stream:
    stream.write(json.dumps({{"name": {name!r}, "arguments": sys.argv[1:], "seen": seen}}) + "\\n")
if {name!r} == "sbatch":
    print(100 + count)
if os.environ.get("SLOW") == {name!r}:
    time.sleep(30)
if {name!r} == "tinyaudio" and sys.argv[1] == "eval" and "EVAL" in os.environ:
    if os.environ["EVAL"] == "failed clip":
        folder = Path(sys.argv[2]) / "eval" / "test"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text("{{}}")
    sys.exit(1)
"""


class Machine:
    """A folder on PATH with replacements, and the calls that they recorded."""

    def __init__(self, folder: Path, programs: list[str]) -> None:
        self.log, self.bin = folder / "log.jsonl", folder / "bin"
        self.bin.mkdir()
        for name in programs:
            path = self.bin / name
            path.write_text(REPLACEMENT.format(python=sys.executable, log=str(self.log), name=name))
            path.chmod(0o755)

    def settings(self, **variables: str) -> dict[str, str]:
        return {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/"), **variables}

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [str(shutil.which("bash")), str(REMOTE / script)]
        return subprocess.run(
            command, env=self.settings(**variables), capture_output=True, text=True, timeout=60, check=False
        )

    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def commands(self) -> list[list[str]]:
        return [[call["name"], *call["arguments"]] for call in self.calls()]


def documents() -> list[Path]:
    """List the files that may contain a torchrun command."""
    found = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *REMOTE.iterdir(), *ROOT.glob("tinyaudio/cli/*.py")]
    return [path for path in sorted(found) if "torchrun --" in path.read_text()]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, ["tinyaudio", "torchrun", "sbatch", "scontrol", "hf"])


def check_command(words: list[str]) -> None:
    """Parse a `tinyaudio ...` command line with the real command, without running it."""
    from tinyaudio.cli.app import app

    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    command.make_context(words[0], list(words[1:]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(REMOTE / script)], check=True, capture_output=True)


def test_stages_run_in_order_with_options_that_exist(machine: Machine, tmp_path: Path) -> None:
    done = machine.run("run_stages.sh", RECIPE="demo", WORK=str(tmp_path), REPO="me/tiny")
    assert done.returncode == 0, done.stderr
    store, run = f"{tmp_path}/data/demo", f"{tmp_path}/runs/demo"
    assert machine.commands() == [
        ["tinyaudio", "extract", "--recipe", "demo", "--store", store, "--shard", "0/1"],
        ["tinyaudio", "train", "--recipe", "demo", "--store", store, "--run", run],
        ["tinyaudio", "eval", run],
        ["tinyaudio", "eval", run, "--provider", "ctc"],
        ["tinyaudio", "publish", run, "--repo", "me/tiny"],
    ]
    for _, *words in machine.commands():
        check_command(words)


def test_a_clip_without_answer_does_not_stop_the_stages_and_an_error_does(machine: Machine, tmp_path: Path) -> None:
    everything = {"WORK": str(tmp_path), "REPO": "me/tiny", "STAGES": "eval publish"}
    done = machine.run("run_stages.sh", **everything, EVAL="failed clip")
    assert done.returncode == 0, done.stderr
    assert [command[1] for command in machine.commands()] == ["eval", "eval", "publish"]
    assert "some clips have no answer" in done.stderr
    machine.log.unlink()
    done = machine.run("run_stages.sh", **everything, EVAL="error")  # with the summaries of before still there
    assert done.returncode == 1
    assert [command[1] for command in machine.commands()] == ["eval"]


def test_a_second_start_resumes_training(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "run.json").write_text("{}")
    machine.run("run_stages.sh", WORK=str(tmp_path), STAGES="train")
    [command] = machine.commands()
    assert command[-1] == "--resume"
    check_command(command[1:])


def test_several_gpus_go_through_torchrun_which_hands_every_option_on(machine: Machine, tmp_path: Path) -> None:
    """Its own parser reads what run_stages.sh passes; without `--` it would take --run for its --run-path."""
    machine.run("run_stages.sh", WORK=str(tmp_path), GPUS="8", STAGES="extract train")
    assert [command[7] for command in machine.commands()] == ["extract", "train"]
    for command in machine.commands():
        assert command[:7] == ["torchrun", "--standalone", "--nproc-per-node", "8", "-m", "--", "tinyaudio"]
        check_command(command[7:])
        parsed = get_args_parser().parse_args(command[1:])
        assert (parsed.module, parsed.nproc_per_node, parsed.training_script) == (True, "8", "tinyaudio")
        assert parsed.training_script_args == command[7:]
        assert not parsed.run_path


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_torchrun_line_that_we_print_reaches_tinyaudio(path: Path) -> None:
    """In the README, in the recipes and in the help of commands; `N` stands for a number there."""
    for line in re.findall(r"torchrun (--[^`\n|]*tinyaudio[^`\n|\"]*)", path.read_text()):
        words = ["2" if word == "N" else word for word in line.split() if word != "..."]
        parsed = get_args_parser().parse_args([*words, "--run", "name"])
        assert parsed.training_script_args[-2:] == ["--run", "name"], line


def test_a_rehearsal_prints_commands_and_runs_none(machine: Machine, tmp_path: Path) -> None:
    done = machine.run("run_stages.sh", WORK=str(tmp_path), DRY_RUN="1", REPO="me/tiny")
    assert done.returncode == 0
    assert machine.commands() == []
    assert [line.split()[2] for line in done.stderr.splitlines()] == ["extract", "train", "eval", "eval", "publish"]


def test_without_a_repository_nothing_is_published(machine: Machine, tmp_path: Path) -> None:
    done = machine.run("run_stages.sh", WORK=str(tmp_path), STAGES="publish")
    assert (done.returncode, machine.commands()) == (0, [])
    assert "nothing is published" in done.stderr


def test_an_unknown_stage_is_refused(machine: Machine) -> None:
    assert machine.run("run_stages.sh", STAGES="extract-all").returncode == 2


def test_term_reaches_the_stage_and_stops_the_rest(machine: Machine, tmp_path: Path) -> None:
    settings = machine.settings(WORK=str(tmp_path), STAGES="train eval", SLOW="tinyaudio")
    process = subprocess.Popen(["bash", str(REMOTE / "run_stages.sh")], env=settings, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not machine.calls() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert [command[1] for command in machine.commands()] == ["train"]


def test_slurm_gets_a_chain_of_jobs(machine: Machine, tmp_path: Path) -> None:
    done = machine.run("slurm.sh", WORK=str(tmp_path), RECIPE="loquacious-small", ARRAY="4", PARTITION="gpu")
    assert done.returncode == 0, done.stderr
    calls = machine.calls()
    assert [call["seen"]["STAGES"] for call in calls] == ["extract", "extract", "train", "eval", "publish"]
    dependencies = [re.findall(r"--dependency (\S+)", " ".join(call["arguments"])) for call in calls]
    assert dependencies == [[], ["afterany:100"], ["afterok:101"], ["afterok:102"], ["afterok:103"]]
    assert "--array 0-3" in " ".join(calls[0]["arguments"])
    assert all("--parsable" in call["arguments"] and "--partition" in call["arguments"] for call in calls)
    assert {call["seen"]["RUN"] for call in calls} == {"loquacious-small"}
    assert done.stdout == "extract 100, seal 101, train 102, eval 103, publish 104\n"


def test_slurm_is_asked_for_the_stages_and_gpus_that_were_named(machine: Machine, tmp_path: Path) -> None:
    done = machine.run("slurm.sh", WORK=str(tmp_path), STAGES="train eval", GPUS="4")
    assert done.returncode == 0, done.stderr
    calls = machine.calls()
    assert [(call["seen"]["STAGES"], call["seen"]["GPUS"]) for call in calls] == [("train", "4"), ("eval", "4")]
    assert [re.findall(r"--gres (\S+)", " ".join(call["arguments"])) for call in calls] == [["gpu:4"], ["gpu:1"]]
    assert "--dependency" not in calls[0]["arguments"]
    assert "afterok:100" in calls[1]["arguments"]
    assert machine.run("slurm.sh", WORK=str(tmp_path), STAGES="train evla").returncode == 2
    assert len(machine.calls()) == 2, "nothing is submitted of a chain that cannot be"


def test_a_slurm_array_job_extracts_its_own_shards(machine: Machine, tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_JOB_ID": "7"}
    done = machine.run(
        "slurm.sbatch", WORK=str(tmp_path), STAGES="extract", SCRIPT=str(REMOTE / "run_stages.sh"), **array
    )
    assert done.returncode == 0, done.stderr
    [command] = machine.commands()
    assert command[-2:] == ["--shard", "2/4"]


def test_a_slurm_job_that_runs_out_of_time_saves_and_queues_again(machine: Machine, tmp_path: Path) -> None:
    settings = machine.settings(
        WORK=str(tmp_path), STAGES="train", SCRIPT=str(REMOTE / "run_stages.sh"), SLURM_JOB_ID="7", SLOW="tinyaudio"
    )
    process = subprocess.Popen(["bash", str(REMOTE / "slurm.sbatch")], env=settings, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not machine.calls() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 0
    assert machine.commands()[-1] == ["scontrol", "requeue", "7"]


def test_the_skypilot_file_has_what_sky_needs_and_runs_the_stages() -> None:
    task = yaml.safe_load((REMOTE / "skypilot.yaml").read_text())
    # keys of SkyPilot's task schema (docs.skypilot.co, "Task YAML")
    known = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run", "volumes"}
    assert set(task) <= known
    assert {"resources", "file_mounts", "setup", "run"} <= set(task)
    assert task["secrets"] == {"HF_TOKEN": None}
    assert all(isinstance(value, str) for value in task["envs"].values())
    assert "remote/run_stages.sh" in task["run"]
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)


def test_the_hf_job_uses_options_of_the_real_client(machine: Machine) -> None:
    done = machine.run("hf-jobs.sh", BUCKET="me/work", SOURCE="git+https://example.org/x", REPO="me/tiny", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    [command] = machine.commands()
    assert command[:3] == ["hf", "jobs", "run"]
    client = Path(sys.executable).with_name("hf")
    printed = subprocess.run([client, "jobs", "run", "--help"], capture_output=True, text=True, check=True).stdout
    for option in (word for word in command if word.startswith("--")):
        assert re.search(rf"{option}\b", printed), option
    assert re.search(r"\ba100-large\b", printed)
    assert "hf://buckets/me/work:/work" in command
    assert "remote/run_stages.sh" in command[-1]


@pytest.mark.parametrize("name", ["RECIPE", "RUN", "REPO", "STAGES", "GPUS", "SHARD"])
def test_every_variable_reaches_the_stages_wherever_they_run(machine: Machine, tmp_path: Path, name: str) -> None:
    value = {"STAGES": "train", "GPUS": "2", "SHARD": "1/4"}.get(name, "given")
    machine.run("hf-jobs.sh", BUCKET="me/work", SOURCE="x", **{name: value})
    assert f"{name}={value}" in machine.commands()[-1]
    assert name in yaml.safe_load((REMOTE / "skypilot.yaml").read_text())["envs"]
    if name != "SHARD":  # the array sets it
        machine.run("slurm.sh", **{"WORK": str(tmp_path), "STAGES": "train", name: value})
        assert machine.calls()[-1]["seen"][name] == value
    assert re.search(rf"^    {name} ", (REMOTE / "README.md").read_text(), re.MULTILINE)


def test_the_hf_job_needs_a_bucket(machine: Machine) -> None:
    done = machine.run("hf-jobs.sh", SOURCE="x")
    assert done.returncode != 0
    assert "set BUCKET to owner/name" in done.stderr


def test_every_file_is_in_the_readme() -> None:
    readme = (REMOTE / "README.md").read_text()
    for path in REMOTE.iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in readme
