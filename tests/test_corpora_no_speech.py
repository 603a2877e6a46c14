"""Items without speech: the same everywhere, at the levels they name, and stored with empty transcripts."""

import hashlib

import numpy as np
import pytest
from extractions import stage_one

from cache import FeatureReader
from pipelines.corpora.no_speech import KINDS, LEVELS_DB, is_no_speech, no_speech_rows, no_speech_samples

ROWS = no_speech_rows([1.0 + 0.1 * i for i in range(24)]).to_pylist()


def test_samples_are_a_function_of_the_name_alone():
    digests = [hashlib.sha256(no_speech_samples(row["source_id"]).tobytes()).hexdigest() for row in ROWS]
    assert digests == [hashlib.sha256(no_speech_samples(row["source_id"]).tobytes()).hexdigest() for row in ROWS]
    assert len(set(digests)) == len({row["source_id"] for row in ROWS})


def test_every_kind_comes_at_every_level_and_silence_is_digital():
    pairs = {tuple(row["source_id"].split(":")[1:3]) for row in ROWS}
    assert len(pairs) == len(KINDS) * len(LEVELS_DB)
    for row in ROWS:
        samples = no_speech_samples(row["source_id"])
        kind, level_db = row["source_id"].split(":")[1:3]
        assert samples.dtype == np.float32
        assert len(samples) == round(row["duration_s"] * 16_000)
        assert np.abs(samples).max() <= 1
        if kind == "silence":
            assert not samples.any()
        else:
            level = 10 * np.log10(np.mean(np.square(samples.astype(np.float64))))
            assert level == pytest.approx(float(level_db), abs=2.0)


def test_they_are_stored_with_empty_transcripts_and_say_so(recipe_file, tmp_path):
    report = stage_one(recipe_file, tmp_path / "store", "corpus.no_speech=0.1")
    assert report.is_complete
    assert (report.utterances, report.no_speech) == (52, 4)
    rows = [row for row in FeatureReader(tmp_path / "store").index.to_pylist() if row["source"] == "no-speech"]
    assert [row["transcript"] for row in rows] == [""] * 4
    assert {row["split"] for row in rows} == {"train"}
    assert not any(is_no_speech(row["utterance_id"]) for row in rows)
