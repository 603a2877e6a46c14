"""`tinyaudio doctor`: every line says what is there, and what to do where something is not."""

import json
import sys

import pytest
from typer.testing import CliRunner

from tinyaudio import doctor
from tinyaudio.cli.app import app


@pytest.fixture(scope="module")
def findings():
    return {finding.name: finding for finding in doctor.examine()}


def test_everything_is_looked_at_and_nothing_here_is_bad(findings):
    assert {
        "Python",
        "torch",
        "device",
        "torchaudio",
        "torchcodec",
        "libsndfile",
        "FFmpeg libraries",
    } <= findings.keys()
    assert {"voice activity", "free disk", "hub", "default model", "HF_TOKEN"} <= findings.keys()
    assert [finding for finding in findings.values() if finding.state == "bad"] == []
    assert "MP3" in findings["libsndfile"].found


def test_whatever_is_not_ok_says_what_to_do(findings):
    assert all(finding.remedy for finding in findings.values() if finding.state != "ok")


def test_installed_but_broken_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "torchaudio.py").write_text("raise OSError('libtorch_cuda.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    finding = doctor._broken_or_absent("torchaudio")
    assert "installed but broken" in finding.found
    assert "libtorch_cuda.so" in finding.found
    assert finding.remedy


def test_keys_are_present_or_not_and_never_shown(monkeypatch):
    monkeypatch.setenv("ASSEMBLYAI_API_KEY", "sk-very-secret")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0
    assert "secret" not in done.stdout + done.stderr
    assert "ASSEMBLYAI_API_KEY" in done.stdout


def test_json_and_exit_code_tell_what_is_bad(monkeypatch):
    bad = doctor.Finding(name="torch", state="bad", found="none", remedy="pip install torch")
    monkeypatch.setattr(doctor, "examine", lambda: iter([bad]))
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout.splitlines()[-1])["findings"][0]["remedy"] == "pip install torch"


@pytest.mark.parametrize(("model", "state"), [("/nope", "bad"), ("owner/name", "note")])
def test_default_model_that_is_not_there_is_said(model, state, monkeypatch):
    monkeypatch.setenv("TINYAUDIO_MODEL", model)
    finding = doctor._default_model()
    assert finding.state == state
    assert finding.remedy
    assert model in finding.found


def test_half_a_download_is_not_in_the_cache(tmp_path, monkeypatch):
    files = {
        "config.json": "{}",
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "1.st", "b": "2.st"}}),
    }

    def look_up(_, name):
        return str(tmp_path / name) if (tmp_path / name).exists() else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", look_up)
    for name, text in {**files, "1.st": "", "2.st": ""}.items():
        assert doctor._frozen_part("owner/name").state == "note"
        (tmp_path / name).write_text(text)
    assert doctor._frozen_part("owner/name").state == "ok"


def test_token_of_a_login_counts_as_a_key(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    (finding,) = (finding for finding in doctor.examine() if finding.name == "HF_TOKEN")
    assert (finding.state, finding.found) == ("ok", "set")
