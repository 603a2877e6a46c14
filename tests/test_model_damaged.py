"""Weights and settings on disk that are a Git LFS pointer or half a file: one line with the file and what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import HubertModel

from tinyaudio.model.encoder import load_encoder
from tinyaudio.model.errors import ModelError
from tinyaudio.model.frozen import check_files, load_decoder, naming_damage
from tinyaudio.transcribe import Transcriber

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"
FAULTS = {
    "pointer": (lambda data: POINTER, "is a Git LFS pointer.*git lfs pull"),
    "half": (lambda data: data[: len(data) // 2], "is damaged: .*again"),
    "one byte less": (lambda data: data[:-1], "is damaged: .*again"),
    "empty": (lambda data: b"", "is damaged: .*again"),
    "five bytes": (lambda data: data[:5], "is damaged: .*again"),
    "a page of the web": (lambda data: b"<!DOCTYPE html><html><body>404</body></html>", "is damaged: .*again"),
    "another kind of JSON": (lambda data: b"[]", "is damaged: .*again"),
    "zeros": (lambda data: bytes(len(data)), "is damaged: .*again"),
}


def refused(path: Path, load) -> None:
    """Check that every fault of a file is one line with its name."""
    whole = path.read_bytes()
    for spoil, message in FAULTS.values():
        spoiled = spoil(whole)
        if path.suffix == ".json" and spoiled == whole[:-1]:
            continue  # a file of JSON may lack its last line end
        path.write_bytes(spoiled)
        with pytest.raises(ModelError, match=message) as raised:
            load()
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
    path.write_bytes(whole)


def test_a_checkpoint_names_the_damaged_file(checkpoint):
    for name in (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "processor_config.json",
        "tokenizer_config.json",
    ):
        refused(checkpoint / name, lambda: Transcriber.load(checkpoint, device="cpu"))
    assert Transcriber.load(checkpoint, device="cpu")


def test_frozen_parts_name_the_damaged_file(encoder_folder, decoder_folder, tmp_path):
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    shutil.copytree(decoder_folder, tmp_path / "decoder")
    for name in ("model.safetensors", "config.json"):
        refused(tmp_path / "encoder" / name, lambda: load_encoder(str(tmp_path / "encoder")))
        refused(tmp_path / "decoder" / name, lambda: load_decoder(str(tmp_path / "decoder"), None, torch.float32))
    assert load_encoder(str(tmp_path / "encoder"))


def without(path: Path, *names: str) -> None:
    """Rewrite weights without those whose names begin so."""
    save_file({key: value for key, value in load_file(path).items() if not key.startswith(names)}, path)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_weights_that_are_not_there_are_never_made_up(encoder_folder, decoder_folder, tmp_path, part):
    """transformers draws random ones, and only logs it."""
    source = {"encoder": encoder_folder, "decoder": decoder_folder}[part]

    def load() -> object:
        if part == "encoder":
            return load_encoder(str(tmp_path / "part"))
        return load_decoder(str(tmp_path / "part"), None, torch.float32)

    keys = sorted(load_file(source / "model.safetensors"))
    assert keys
    for lost in (keys[:1], keys[len(keys) // 2 :][:1], keys[-1:], keys[:2], keys):
        shutil.rmtree(tmp_path / "part", ignore_errors=True)
        shutil.copytree(source, tmp_path / "part")
        without(tmp_path / "part" / "model.safetensors", *lost)
        if all("masked_spec_embed" in key or key.startswith("lm_head") for key in lost):
            continue
        with pytest.raises(ModelError, match=r"part' lacks \d+ of its weights \(.*\)\. Download or copy it again"):
            load()


def test_settings_that_do_not_fit_the_weights_are_one_line(checkpoint, encoder_folder, decoder_folder, tmp_path):
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    shutil.copytree(decoder_folder, tmp_path / "decoder")
    loads = {
        tmp_path / "encoder": lambda: load_encoder(str(tmp_path / "encoder")),
        tmp_path / "decoder": lambda: load_decoder(str(tmp_path / "decoder"), None, torch.float32),
        checkpoint: lambda: Transcriber.load(checkpoint, device="cpu"),
    }
    for folder, load in loads.items():
        whole = (folder / "config.json").read_text()
        for content in ({}, {"hidden_size": "many", "projector_hidden_size": "many"}, {"hidden_size": 24}):
            if folder == checkpoint and "projector_hidden_size" in content:
                content = {"projector_hidden_size": "many"}
            elif folder == checkpoint and content:
                content = {"projector_hidden_size": 24}
            settings = {**json.loads(whole), **content} if content else {}
            (folder / "config.json").write_text(json.dumps(settings))
            with pytest.raises(ModelError) as raised:
                load()
            assert str(folder) in str(raised.value) or "projector sizes" in str(raised.value)
        (folder / "config.json").write_text(whole)
        assert load()


def test_weights_of_torch_are_checked_in_both_formats(encoder_folder, tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(encoder_folder, folder)
    weights = HubertModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load_encoder(str(folder))
    refused(folder / "pytorch_model.bin", lambda: load_encoder(str(folder)))
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    whole = (folder / "pytorch_model.bin").read_bytes()
    for length in (len(whole) // 2, 40):
        (folder / "pytorch_model.bin").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"encoder' has damaged weights .*again"):
            load_encoder(str(folder))


def test_every_shard_of_weights_is_checked(tmp_path):
    files = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for key, name in files.items():
        save_file({key: torch.zeros(1000)}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    check_files(tmp_path)
    refused(tmp_path / "model-2.safetensors", lambda: check_files(tmp_path))


def test_files_that_are_not_read_may_be_pointers(checkpoint):
    for name in ("pytorch_model.bin", "tf_model.h5", "README.md", "metrics.jsonl", "demo.json"):
        (checkpoint / name).write_bytes(POINTER)
    assert Transcriber.load(checkpoint, device="cpu")


def test_the_state_of_a_training_is_checked(tmp_path):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"a": torch.zeros(1000)}, tmp_path / name)
        check_files(tmp_path)
        refused(tmp_path / name, lambda: check_files(tmp_path))


def test_other_errors_are_not_called_damage():
    with pytest.raises(RuntimeError, match="out of memory"), naming_damage("x"):
        raise RuntimeError("out of memory")


def test_weights_under_their_older_names_are_no_missing_ones(encoder_folder, tmp_path):
    """HuBERT's published files name the two parts of a normalised weight as torch did before 2.1."""
    older = Path(shutil.copytree(encoder_folder, tmp_path / "older"))
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    weights = load_file(older / "model.safetensors")
    for new, old in names.items():
        weights = {name.replace(new, old): value for name, value in weights.items()}
    assert sum(name.endswith(("weight_g", "weight_v")) for name in weights) == 2
    save_file(weights, older / "model.safetensors", metadata={"format": "pt"})
    expected, found = (load_encoder(str(folder)).state_dict() for folder in (encoder_folder, older))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
