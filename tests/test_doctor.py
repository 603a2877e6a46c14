"""`tinyaudio doctor`: every line says what was found, and what to do if something is missing."""

import json
import sys

import pytest
from typer.testing import CliRunner

from tinyaudio import doctor
from tinyaudio.cli.app import app


@pytest.fixture(scope="module")
def findings():
    return {finding.name: finding for finding in doctor.examine()}


def test_everything_is_examined_and_nothing_here_is_bad(findings):
    assert list(findings) == [
        "Python",
        "torch",
        "libsndfile",
        "FFmpeg libraries",
        "voice activity",
        "device",
        "free disk",
        "default model",
    ]
    assert [finding for finding in findings.values() if finding.state == "bad"] == []
    assert "MP3" in findings["libsndfile"].found


def test_every_finding_that_is_not_ok_has_a_remedy(findings):
    assert all(finding.remedy for finding in findings.values() if finding.state != "ok")


def test_broken_package_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "av.py").write_text("raise OSError('libavcodec.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "av", raising=False)
    (finding,) = (finding for finding in doctor.examine() if finding.name == "FFmpeg libraries")
    assert finding.state == "bad"
    assert "libavcodec.so" in finding.found
    assert finding.remedy


def test_json_and_exit_code_tell_what_is_bad(monkeypatch):
    bad = doctor.Finding(name="torch", state="bad", found="none", remedy="pip install torch")
    monkeypatch.setattr(doctor, "examine", lambda: iter([bad]))
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout.splitlines()[-1])["findings"][0]["remedy"] == "pip install torch"


@pytest.mark.parametrize(("model", "state"), [("/nope", "bad"), ("owner/name", "note")])
def test_missing_default_model_is_a_finding(model, state, monkeypatch):
    monkeypatch.setenv("TINYAUDIO_MODEL", model)
    finding = doctor._default_model()
    assert finding.state == state
    assert finding.remedy
    assert model in finding.found


def test_half_a_download_is_not_in_the_cache(tmp_path, monkeypatch):
    def look_up(_, name):
        return str(tmp_path / name) if (tmp_path / name).exists() else None

    monkeypatch.setenv("TINYAUDIO_MODEL", "owner/name")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", look_up)
    for name in ("config.json", "model.safetensors"):
        assert doctor._default_model().state == "note"
        (tmp_path / name).touch()
    assert doctor._default_model().state == "ok"
