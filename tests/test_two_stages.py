"""From corpus to model on tiny random parts: extract, train, resume; cached equals live."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from extractions import same_content, stage_one
from trainings import stage_two

from cache import FeatureReader, FeatureStore
from pipelines.errors import CorpusError, RunError, TooManyBadError
from pipelines.extract.batching import cut_batches
from tinyaudio.model.audio import load_audio
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "model.safetensors")


def test_extraction_stores_every_utterance_and_seals(recipe_file, tmp_path):
    report = stage_one(recipe_file, tmp_path / "store")
    assert report.is_complete
    assert (report.utterances, sum(report.quarantined.values())) == (48, 0)
    store = FeatureStore.open(tmp_path / "store")
    assert store.is_sealed
    assert store.num_shards >= 3
    index = FeatureReader(store).index
    assert set(index["split"].to_pylist()) == {"train", "dev"}


def test_plain_zarr_opens_the_features(store):
    import zarr

    features = zarr.open_group(store, mode="r")["features"]
    index = FeatureReader(store).index
    for row in index.slice(0, 5).to_pylist():
        expected = FeatureReader(store).get(row["utterance_id"])
        assert np.array_equal(features[row["start"] : row["start"] + row["num_frames"]], expected)


def test_extracting_again_changes_nothing(recipe_file, store):
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    report = stage_one(recipe_file, store)
    assert report.shards_written == 0
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == before


def test_parts_extracted_apart_hold_the_same_rows(recipe_file, store, tmp_path):
    for i in range(3):
        stage_one(recipe_file, tmp_path / "parts", part=(i, 3))
    assert same_content(store, tmp_path / "parts")


def test_cached_loss_and_transcript_equal_the_live_ones(recipe_file, store, tmp_path, corpus_folder):
    stage_two(recipe_file, store, tmp_path / "run")
    model = TinyAudioForConditionalGeneration.from_pretrained(tmp_path / "run")
    processor = TinyAudioProcessor.from_pretrained(tmp_path / "run")
    reader = FeatureReader(store, split="train")
    labels = torch.tensor([[5, 6, 7, 0]])
    for row in reader.index.slice(0, 6).to_pylist():
        stored = torch.from_numpy(reader.get(row["utterance_id"]).astype(np.float32))[None]
        cached = {"features": stored, "num_frames": torch.tensor([stored.shape[1]])}
        live = processor(load_audio(corpus_folder / row["utterance_id"]))
        assert abs(model(**cached, labels=labels).loss - model(**live, labels=labels).loss) < 1e-3
        options = {"max_new_tokens": 6, "num_beams": 1}
        assert torch.equal(model.generate(**cached, **options), model.generate(**live, **options))


def test_every_bad_recording_is_quarantined_with_its_reason(recipe_file, corpus_folder, tmp_path, noise):
    import soundfile

    folder = corpus_folder / "train"
    (folder / "text.wav").write_text("this is not audio at all, whatever its name says")
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "short.wav", noise(0.01), 16_000)
    soundfile.write(folder / "silent-text.wav", noise(1.0), 16_000)
    soundfile.write(folder / "long.wav", noise(4.0), 16_000)
    soundfile.write(folder / "nan.wav", np.full(16_000, np.nan, np.float32), 16_000, subtype="FLOAT")
    with (folder / "metadata.csv").open("a") as file:
        for name in ("text.wav", "empty.wav", "short.wav", "long.wav", "nan.wav", "missing.wav", "000.wav"):
            file.write(f"{name},the cat\n")
        file.write("silent-text.wav,\n")
    report = stage_one(recipe_file, tmp_path / "store", "corpus.max_duration_s=3.0")
    assert dict(report.quarantined) == {"undecodable": 2, "no_audio": 2}
    assert report.planned_out == {"too_short": 1, "too_long": 1, "no_text": 1, "duplicate_id": 1}
    assert report.utterances == 48
    reasons = {}
    for path in (tmp_path / "store" / "quarantine").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            reasons.setdefault(entry["reason"], []).append(entry["utterance_id"])
    assert sorted(reasons["undecodable"]) == ["train/nan.wav", "train/text.wav"]
    assert sorted(reasons["no_audio"]) == ["train/empty.wav", "train/missing.wav"]


def test_too_many_bad_recordings_stop_extraction_with_the_reasons(recipe_file, corpus_folder, tmp_path):
    for path in sorted((corpus_folder / "train").glob("*.wav"))[:15]:
        path.write_bytes(b"no audio")
    with pytest.raises(TooManyBadError, match=r"15 undecodable.*at most 1 %"):
        stage_one(recipe_file, tmp_path / "store")
    report = stage_one(recipe_file, tmp_path / "store", "extract.max_bad=0.5")
    assert report.is_complete
    assert report.utterances + report.shards_written >= 1


def test_batches_depend_on_lengths_and_ids_only():
    lengths = {"c": 3 * 16_000, "a": 16_000, "b": 16_000, "d": 9 * 16_000}
    assert list(cut_batches(lengths, 4.0)) == [["a", "b"], ["c"], ["d"]]
    assert list(cut_batches(dict(reversed(lengths.items())), 4.0)) == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize("num_commits", [0, 2])
def test_killed_extraction_resumes_to_the_same_store(recipe_file, store, tmp_path, num_commits):
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "tinyaudio", "extract", "--recipe", str(recipe_file), "--store", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if killed.exists() and len(list((killed / "commits").glob("*.json"))) >= num_commits:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    report = stage_one(recipe_file, killed)
    assert report.is_complete
    assert same_content(store, killed)


def test_training_leaves_a_loadable_model_and_metrics(recipe_file, store, tmp_path):
    report = stage_two(recipe_file, store, tmp_path / "run")
    assert (report.is_finished, report.steps) == (True, 6)
    assert report.parameters == sum(w.numel() for w in weights(tmp_path / "run").values())
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {key for entry in entries for key in entry}
    assert {"loss", "learning_rate", "grad_norm", "projected_rms", "num_tokens", "dev_wer"} <= logged
    assert (tmp_path / "run" / "log.txt").read_text().count("    ref ") >= 8
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_training_a_finished_run_again_changes_nothing(recipe_file, store, tmp_path):
    stage_two(recipe_file, store, tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    lines: list[str] = []
    stage_two(recipe_file, store, tmp_path / "run", lines=lines)
    assert "is finished; nothing to do" in lines[0]
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before


def test_store_of_another_encoder_is_refused(recipe_file, store, tmp_path, feature_extractor):
    from conftest import tiny_hubert_config
    from transformers import HubertModel

    torch.manual_seed(5)
    HubertModel(tiny_hubert_config()).save_pretrained(tmp_path / "other")
    feature_extractor.save_pretrained(tmp_path / "other")
    with pytest.raises(RunError, match="made by another encoder"):
        stage_two(recipe_file, store, tmp_path / "run", f"encoder.id={tmp_path / 'other'}")


def test_missing_corpus_or_split_is_one_line(recipe_file, tmp_path):
    with pytest.raises(CorpusError, match="does not exist"):
        stage_one(recipe_file, tmp_path / "store", f"corpus.path={tmp_path / 'nowhere'}")
    with pytest.raises(CorpusError, match=r"no split 'nope'.*found dev, test, train"):
        stage_one(recipe_file, tmp_path / "store", split="nope")


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_a_quantised_store_trains_and_names_its_calibration(recipe_file, tmp_path, encoding):
    stage_one(recipe_file, tmp_path / "store", f"store.encoding={encoding}")
    stage_two(recipe_file, tmp_path / "store", tmp_path / "run", f"store.encoding={encoding}")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["calibration_id"] == FeatureStore.open(tmp_path / "store").calibration.id
