"""A hundred kills, bad answers and full disks leave the store of an undisturbed extraction."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_extractions.py")


@pytest.mark.slow  # half an hour: a hundred extractions are begun
def test_a_hundred_kills_through_the_hub_leave_the_undisturbed_store():
    done = subprocess.run([sys.executable, SCRIPT, "100"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["is_equal"]
