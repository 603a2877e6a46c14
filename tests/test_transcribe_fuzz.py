"""Over three hundred broken inputs: no traceback, no hang, bounded memory, the right exit code."""

import json
import subprocess
import sys

import fuzz_inputs
import pytest

from tinyaudio.audio import load_audio
from tinyaudio.errors import AudioError
from tinyaudio.inputs import find_inputs

SCRIPT = (
    "import resource, sys\nfrom tinyaudio.cli import main\nimport torch, transformers, av, soundfile\n"
    "import tinyaudio.transcribe\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    "try:\n    main()\nfinally:\n"
    "    print('GREW', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file=sys.stderr)\n"
)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    fuzz_inputs.write_all(folder)
    return folder


def is_readable(path):
    problem = None
    try:
        load_audio(path)
    except AudioError as error:
        problem = str(error)
    assert problem is None or (problem and "\n" not in problem)
    return problem is None


def test_broken_inputs_end_in_one_line_each_and_the_right_code(broken, checkpoint, tmp_path):
    inputs = find_inputs([str(broken)], recursive=True)
    assert len(inputs) >= 300
    readable = {str(item.path) for item in inputs if item.problem is None and is_readable(item.path)}
    assert 50 < len(readable) < len(inputs) - 50
    command = [sys.executable, "-c", SCRIPT, "transcribe", str(broken), "-r", "--json", "-m", str(checkpoint)]
    command += ["--num-beams", "1", "--max-new-tokens", "2", "--batch-size", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(objects) == len(inputs)
    assert {o["source"] for o in objects if o["error"] is None} == readable
    assert all(o["text"] == "" or o["warnings"] for o in objects), "a text without a warning was invented"
    grew_kb = int(done.stderr.split("GREW ")[-1])
    assert grew_kb < 600_000, f"memory grew by {grew_kb} kB"


def test_one_broken_input_alone_leaves_with_1(broken, checkpoint):
    from typer.testing import CliRunner

    from tinyaudio.cli import app

    done = CliRunner().invoke(app, ["transcribe", "-m", str(checkpoint), str(broken / "text.wav")])
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith(f"tinyaudio: {str(broken / 'text.wav')!r}")
