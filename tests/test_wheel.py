"""The wheel holds what the checkout holds, under exactly three names, and works from an empty folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("tinyaudio", "cache", "pipelines")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    return next(folder.glob("tinyaudio-*.whl"))


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name.split("/")[0] for name in inside} == set(PACKAGES)
    of_checkout = ("pipelines/demo/make/", "pipelines/real/")  # run by the Makefile, from a checkout
    assert inside == {name for name in tracked.stdout.split() if not name.startswith(of_checkout)}


@pytest.mark.slow
def test_installed_wheel_answers_from_an_empty_folder(wheel, tmp_path):
    target = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel], check=True)
    script = f"import sys; sys.path.insert(0, {str(target)!r}); sys.argv = ['tinyaudio', 'extract', '--plan']\n"
    script += "import tinyaudio.cli, pipelines\n"
    script += f"assert pipelines.__file__.startswith({str(target)!r}), pipelines.__file__\n"
    script += "tinyaudio.cli.main()"
    (tmp_path / "empty").mkdir()
    result = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path / "empty", capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "utterances" in result.stdout
