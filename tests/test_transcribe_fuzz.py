"""More than three hundred broken inputs: no traceback, no hang, bounded memory, the right exit code."""

import json
import subprocess
import sys

import fuzz_inputs
import pytest
import soundfile

from tinyaudio.cli.inputs import find_inputs
from tinyaudio.model.audio import load_audio
from tinyaudio.model.errors import AudioError

# The decoder always writes the same sound text, so an empty text means that it did not run.
SCRIPT = """
import os, resource, sys
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # as `main` does before imports
from tinyaudio.cli import main
import av, soundfile, torch, tinyaudio.transcribe
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration as Model
ids = torch.tensor([[int(i) for i in sys.argv.pop(1).split(",")]])
Model.generate = lambda self, num_frames, **_: ids.expand(len(num_frames), -1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    main()
finally:
    print("GREW", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file=sys.stderr)
"""


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


def test_broken_inputs_end_in_one_line_each_and_the_right_code(broken, checkpoint, tokenizer, spoken, tmp_path):
    """No text is invented: only the one file with speech gets a text."""
    said = "the cat sat on the mat"
    ids = [*tokenizer(said)["input_ids"], tokenizer.eos_token_id]
    soundfile.write(broken / "speech.wav", spoken[0][0], 16_000)
    inputs = find_inputs([str(broken)], recursive=True)
    assert len(inputs) >= 300
    readable = {str(item.path) for item in inputs if item.problem is None and is_readable(item.path)}
    assert 50 < len(readable) < len(inputs) - 50
    command = [sys.executable, "-c", SCRIPT, ",".join(map(str, ids))]
    command += ["transcribe", str(broken), "-r", "--json", "-m", str(checkpoint), "--batch-size", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(objects) == len(inputs)
    assert {o["source"] for o in objects if o["error"] is None} == readable
    spoke = {o["source"]: o["text"] for o in objects if o["text"] and not o["warnings"]}
    assert spoke == {str(broken / "speech.wav"): said}, "a text without a warning was invented"
    failures = [line for line in done.stderr.splitlines() if line.startswith("tinyaudio: ")]
    assert len(failures) >= len(inputs) - len(readable)
    libraries = ("Warning: Xing", "GREW ", "[src/", "Note: ")  # libmpg123 speaks from C
    assert [line for line in done.stderr.splitlines() if not line.startswith(("tinyaudio: ", *libraries))] == []
    grew_kb = int(done.stderr.split("GREW ")[-1])
    assert grew_kb < 600_000, f"memory grew by {grew_kb} kB"


@pytest.mark.parametrize("name", ["text.wav", "pipe.wav", "self.wav", "disk-error.wav", "new\nline.wav", "nowhere.wav"])
def test_one_input_alone_has_its_code_and_its_line(broken, checkpoint, name):
    from typer.testing import CliRunner

    from tinyaudio.cli.app import app

    if name == "disk-error.wav" and not (broken / name).exists():
        pytest.skip("needs /proc/self/mem, which cannot be read at its beginning")
    done = CliRunner().invoke(app, ["transcribe", "-m", str(checkpoint), str(broken / name)])
    assert done.exit_code == (0 if name == "new\nline.wav" else 1)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"tinyaudio: {str(broken / name)!r}" if done.exit_code else "tinyaudio: ")
    assert "\\n" in last or "\n" not in name
