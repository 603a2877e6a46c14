"""From corpus to model on tiny random parts: extract, train, resume; cached equals live."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from extractions import same_content, stage_one
from trainings import stage_two

from cache import FeatureReader, FeatureStore
from pipelines.errors import CorpusError, RunError
from tinyaudio.model.audio import load_audio
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor


def test_extraction_stores_every_utterance_and_seals(recipe_file, tmp_path):
    report = stage_one(recipe_file, tmp_path / "store")
    assert report.is_complete
    assert (report.utterances, sum(report.quarantined.values())) == (48, 0)
    store = FeatureStore.open(tmp_path / "store")
    assert store.is_sealed
    assert store.num_shards >= 3
    index = FeatureReader(store).index
    assert set(index["split"].to_pylist()) == {"train", "dev"}


def test_extracting_again_changes_nothing(recipe_file, store):
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    report = stage_one(recipe_file, store)
    assert report.shards_written == 0
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == before


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
