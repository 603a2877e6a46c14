"""Audio cells of Parquet files in every form that `datasets` and others write, and ids that are row numbers."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from corpus_files import audio_of, loquacious, opened, wav, write_parquet

from pipelines.corpora import open_corpus
from pipelines.errors import CorpusError
from pipelines.extract.plan import plan_corpus
from pipelines.recipes import load_recipe
from pipelines.recipes.recipe import Columns
from tinyaudio.model.audio import load_audio

TONE = (0.1 * np.sin(np.arange(24_000) / 9)).astype(np.float32)
STEREO = np.stack([TONE, TONE * 0.5])


def heard(folder: Path, cells: pa.Array) -> list[np.ndarray | None]:
    """What a corpus of these cells gives to the decoder."""
    columns = loquacious(len(cells))
    write_parquet(folder / "train-0.parquet", {**columns, "wav": cells})
    audio = audio_of(opened(folder), "train")
    return [load_audio(audio[f"u{i:03}"]) if audio[f"u{i:03}"] else None for i in range(len(cells))]


FORMS = {
    "binary": pa.array([wav(1.5)] * 3),
    "large binary": pa.array([wav(1.5)] * 3, pa.large_binary()),
    "bytes alone": pa.array([{"bytes": wav(1.5)}] * 3),
    "bytes and path": pa.array([{"bytes": wav(1.5), "path": "gone.wav"}] * 3),
    "floats": pa.array([TONE.tolist()] * 3, pa.list_(pa.float32())),
    "doubles": pa.array([TONE.tolist()] * 3, pa.large_list(pa.float64())),
    "of fixed size": pa.array([TONE] * 3, pa.list_(pa.float32(), len(TONE))),
    "array": pa.array([{"array": TONE.tolist(), "sampling_rate": 16_000, "path": None}] * 3),
    "16-bit": pa.array([(TONE * 32_768).astype(np.int16)] * 3, pa.list_(pa.int16())),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_cell_gives_its_samples(tmp_path, form):
    expected = load_audio(wav(1.5))
    for samples in heard(tmp_path, FORMS[form]):
        np.testing.assert_allclose(samples, expected, atol=1.01 / 32_768)


def test_samples_keep_their_rate_and_channels_become_one(tmp_path):
    kind = pa.struct([("array", pa.list_(pa.list_(pa.float32()))), ("sampling_rate", pa.int64())])
    cells = [{"array": STEREO.tolist(), "sampling_rate": rate} for rate in (16_000, 48_000)]
    cells += [{"array": STEREO.T.tolist(), "sampling_rate": 8_000}]
    same, third, double = heard(tmp_path, pa.array(cells, kind))
    np.testing.assert_allclose(same, TONE * 0.75, atol=1e-6)
    assert (len(third), len(double)) == (8_000, 48_000)


@pytest.mark.parametrize("is_struct", [False, True])
def test_paths_are_read_wherever_they_begin(tmp_path, is_struct):
    for path in ("c/clips/a.wav", "c/train/b.wav", "elsewhere.wav"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(wav(1.5))
    from_root, beside, absolute = "clips/a.wav", "b.wav", str(tmp_path / "elsewhere.wav")
    paths = [from_root, beside, absolute, "missing.wav", "clips", None]
    cells = [{"bytes": None, "path": path} for path in paths] if is_struct else paths
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if is_struct else pa.string()
    write_parquet(tmp_path / "c" / "train" / "0.parquet", {**loquacious(6), "wav": pa.array(cells, kind)})
    audio = audio_of(opened(tmp_path / "c"), "train")
    assert [audio[f"u{i:03}"] for i in range(6)] == [wav(1.5)] * 3 + [b""] * 3


def test_cells_that_hold_no_recording_are_empty(tmp_path):
    kind = pa.struct([("array", pa.list_(pa.float32())), ("sampling_rate", pa.int32())])
    cells = [None, {"array": None, "sampling_rate": 16_000}, {"array": [], "sampling_rate": 16_000}]
    cells += [{"array": [0.1] * 800, "sampling_rate": rate} for rate in (None, 0, -1)]
    assert heard(tmp_path, pa.array(cells, kind)) == [None] * 6


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([1, 2, 3]),
        pa.array([[1, 2], [3], [4]]),  # 64-bit integers have no full scale
        pa.array([{"array": [0.5]}] * 3),  # no sampling rate
        pa.array([{"key": "x"}] * 3),
        pa.array([True, False, True]),
    ],
)
def test_a_column_that_cannot_hold_audio_is_named_before_anything_is_stored(tmp_path, cells):
    write_parquet(tmp_path / "train-0.parquet", {**loquacious(3), "wav": cells})
    with pytest.raises(CorpusError, match=r"train-0\.parquet'.*expected binary, a path.*in column 'wav', found"):
        opened(tmp_path).scan("train")


def test_durations_that_are_no_numbers_are_named(tmp_path):
    for durations in (["1.8s"] * 3, ["a", "b", "c"], [[1.0]] * 3):
        write_parquet(tmp_path / "train-0.parquet", {**loquacious(3), "duration": pa.array(durations)})
        with pytest.raises(CorpusError, match=r"train-0\.parquet' row group 0: expected .* seconds"):
            opened(tmp_path).scan("train")


def test_a_duration_that_is_no_length_is_one_that_is_not_stated(tmp_path):
    """0 among others, which many tools write for "unknown"."""
    durations = [0.0, None, -1.0, float("nan"), float("inf"), 1.5]
    for split in ("train", "dev"):
        write_parquet(tmp_path / f"{split}-0.parquet", {**loquacious(6), "duration": pa.array(durations, pa.float64())})
    recipe = load_recipe("demo", [f"corpus.path={tmp_path}", "corpus.no_speech=0"])
    plan = plan_corpus(recipe, open_corpus(recipe.corpus), ["train"])
    assert plan.rejected() == {}
    assert plan.accepted["duration_s"].drop_null().to_pylist() == [1.5]


def test_lengths_of_cells_without_stated_durations_are_measured(tmp_path):
    columns = loquacious(3)
    del columns["duration"]
    write_parquet(tmp_path / "train-0.parquet", {**columns, "wav": FORMS["array"]})
    assert opened(tmp_path, columns=Columns(duration=None)).scan("train")["duration_s"].to_pylist() == [1.5] * 3


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.string()])
def test_row_numbers_that_begin_at_0_in_each_split_are_told_apart(tmp_path, kind):
    for split, count in (("train", 5), ("dev", 3)):
        numbers = pa.array(range(count), pa.int64()).cast(kind)
        write_parquet(tmp_path / f"{split}-0.parquet", {**loquacious(count), "ID": numbers})
    recipe = load_recipe("demo", [f"corpus.path={tmp_path}", "corpus.no_speech=0"])
    plan = plan_corpus(recipe, open_corpus(recipe.corpus), ["train", "dev"])
    assert plan.rejected() == {}
    found = set(plan.accepted["utterance_id"].to_pylist())
    assert found == {"0", "1", "2", "3", "4", "dev/0", "dev/1", "dev/2"}


def test_a_recording_in_two_splits_is_still_a_duplicate(tmp_path):
    for split in ("train", "dev"):
        write_parquet(tmp_path / f"{split}-0.parquet", loquacious(4 if split == "train" else 5))
    recipe = load_recipe("demo", [f"corpus.path={tmp_path}", "corpus.no_speech=0"])
    plan = plan_corpus(recipe, open_corpus(recipe.corpus), ["train", "dev"])
    assert plan.rejected() == {"duplicate_id": 4}


def test_a_wav_made_of_samples_is_exact(tmp_path):
    columns = {**loquacious(1), "wav": pa.array([TONE], pa.list_(pa.float32()))}
    write_parquet(tmp_path / "train-0.parquet", columns)
    (audio,) = audio_of(opened(tmp_path), "train").values()
    assert np.array_equal(soundfile.read(io.BytesIO(audio), dtype="float32")[0], TONE)
