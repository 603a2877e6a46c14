"""Dockerfile and compose.yaml, without a daemon: their instructions are parsed, checked, and run as far as possible."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from servers import running
from typer.testing import CliRunner

from tinyaudio.cli.app import app as cli
from tinyaudio.transcribe import Transcriber

ROOT = Path(__file__).parent.parent
KNOWN = "ARG FROM ENV WORKDIR COPY RUN USER EXPOSE STOPSIGNAL HEALTHCHECK ENTRYPOINT".split()


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile: (word, rest), with continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def service():
    return yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["tinyaudio"]


def rest_of(instructions, word):
    return [rest for name, rest in instructions if name == word]


def test_every_instruction_is_known_and_in_order(instructions):
    names = [name for name, _ in instructions]
    assert set(names) <= set(KNOWN)
    assert names.index("FROM") == 1
    assert re.fullmatch(r"python:\$\{PYTHON\}-slim", rest_of(instructions, "FROM")[0])
    assert names.index("USER") < names.index("ENTRYPOINT")


def test_every_copied_file_exists_and_is_in_the_context(instructions):
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    for copy in rest_of(instructions, "COPY"):
        *sources, _ = copy.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignore, source


def test_the_server_runs_as_a_user_without_privileges(instructions):
    (user,) = rest_of(instructions, "USER")
    (made,) = [run for run in rest_of(instructions, "RUN") if run.startswith("useradd")]
    assert made.split()[-1] == user != "root"
    assert not [run for run in rest_of(instructions, "RUN") if "curl" in run or "apt-get" in run or "sudo" in run]


def test_pip_installs_pinned_packages_that_pyproject_lists(instructions):
    installs = [run for run in rest_of(instructions, "RUN") if run.startswith("pip install")]
    assert len(installs) == 2
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    for install in installs:
        assert "--constraint constraints.txt" in install
    assert "torch" in pinned
    import tomllib

    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["serve"]
    for requirement in extra:
        assert re.split(r"[><=]", requirement)[0].replace("-", "_") in {name.replace("-", "_") for name in pinned}


@pytest.mark.parametrize("index", ["", "https://example.org/cpu"])
def test_the_build_argument_is_expanded_by_a_plain_shell(instructions, index):
    install = next(run for run in rest_of(instructions, "RUN") if "TORCH_INDEX" in run)
    shown = subprocess.run(
        ["sh", "-c", install.replace("pip install", "printf '%s\\n'", 1)],
        env={"TORCH_INDEX": index, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    expected = ["-i", index] if index else []
    assert shown == ["--constraint", "constraints.txt", *expected, "torch"]


def test_the_entry_point_is_the_command_and_needs_a_key(instructions, monkeypatch):
    program, *arguments = json.loads(rest_of(instructions, "ENTRYPOINT")[0])
    assert program == "tinyaudio"
    assert CliRunner().invoke(cli, [*arguments, "--help"]).exit_code == 0
    monkeypatch.delenv("TINYAUDIO_API_KEY", raising=False)
    monkeypatch.setattr("tinyaudio.cli.serve.find_spec", lambda name: name)
    refused = CliRunner().invoke(cli, arguments)
    assert refused.exit_code == 2
    assert "TINYAUDIO_API_KEY" in refused.stderr


def test_the_health_check_passes_at_a_running_server_only(instructions, model, processor):
    (check,) = rest_of(instructions, "HEALTHCHECK")
    program, *arguments = json.loads(check.partition("CMD ")[2])
    assert program == "python"
    with running(Transcriber(model, processor), api_key="key") as server:
        here = [argument.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}") for argument in arguments]
        assert subprocess.run([sys.executable, *here], capture_output=True).returncode == 0
    assert subprocess.run([sys.executable, *here], capture_output=True).returncode != 0


def test_compose_publishes_to_this_machine_only_and_requires_a_key(instructions, service):
    (port,) = service["ports"]
    assert port == f"127.0.0.1:8000:{rest_of(instructions, 'EXPOSE')[0]}"
    assert service["environment"]["TINYAUDIO_API_KEY"].startswith("${TINYAUDIO_API_KEY:?")
    assert set(service["build"]["args"]) <= {argument.partition("=")[0] for argument in rest_of(instructions, "ARG")}
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]


def test_environment_variables_of_the_image_are_read_by_the_command(instructions):
    names = {pair.split("=")[0] for rest in rest_of(instructions, "ENV") for pair in shlex.split(rest)}
    assert "TINYAUDIO_MODEL" in names
