"""Bad rows, files and recordings of a corpus: named one by one, and within one budget."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audio_files import speech, with_av, with_soundfile
from extractions import content, spoil, stage_one
from tiny_encoders import save_encoder

from cache import FeatureStore
from pipelines.errors import CorpusError, RunError, TooManyBadError
from pipelines.extract import decode as decoding
from pipelines.extract import encode as encode_module
from pipelines.recipes import load_recipe
from pipelines.train.runs import Run
from pipelines.train.stage import train


def wav(samples: np.ndarray, subtype: str = "PCM_16") -> bytes:
    return with_soundfile(samples, subtype=subtype)


def parquet_row(name: str, audio: bytes | None, duration: float | None, text: str | None) -> dict[str, object]:
    cell = None if audio is None else {"bytes": audio, "path": f"{name}.wav"}
    return {"ID": name, "duration": duration, "wav": cell, "spk_id": None, "sex": None, "text": text}


def write_parquet(path: Path, rows: list[dict[str, object]]) -> None:
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = {"ID": pa.string(), "duration": pa.float32(), "wav": cell, "spk_id": pa.string(), "sex": pa.string()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([*names.items(), ("text", pa.string())])), path)


def quarantine_of(store: Path) -> dict[str, str]:
    lines = [line for path in sorted((store / "quarantine").glob("*.jsonl")) for line in path.read_text().splitlines()]
    return {entry["utterance_id"]: entry["reason"] for entry in map(json.loads, lines)}


def test_a_corpus_of_bad_rows_is_quarantined_row_by_row(recipe_file, tmp_path, noise):
    """Parquet as of LoquaciousSet with every kind of bad row between good ones."""
    rows = [parquet_row(f"good-{i}", wav(noise(1.0)), 1.0, "the cat") for i in range(20)]
    bad = {
        "dead": (None, 1.0, "the cat", "no_audio"),
        "text-not-audio": (b"this is no audio", 1.0, "the cat", "undecodable"),
        "cut-header": (wav(noise(1.0))[:30], 1.0, "the cat", "undecodable"),
        "lies-long": (wav(noise(0.5)), 3.0, "the cat", "other_duration"),
        "lies-short": (wav(noise(3.0)), 1.0, "the cat", "other_duration"),
        "nan": (wav(np.full(16_000, np.nan, np.float32), "FLOAT"), 1.0, "the cat", "undecodable"),
        "empty-text": (wav(noise(1.0)), 1.0, " ", "no_text"),
        "null-text": (wav(noise(1.0)), 1.0, None, "no_text"),
        "novel": (wav(noise(1.0)), 1.0, "word " * 400, "text_too_long"),
        "long": (wav(noise(6.0)), 6.0, "the cat", "too_long"),
        "short": (wav(noise(0.05)), 0.05, "the cat", "too_short"),
        "unstated-short": (wav(noise(0.05)), None, "the cat", "too_short"),
        "good-3": (wav(noise(1.0)), 1.0, "the cat", "duplicate_id"),
    }
    rows += [parquet_row(name, audio, duration, text) for name, (audio, duration, text, _) in bad.items()]
    write_parquet(tmp_path / "bad" / "train-00000-of-00001.parquet", rows[::-1])
    report = stage_one(
        recipe_file, tmp_path / "store", f"corpus.path={tmp_path / 'bad'}", "corpus.max_duration_s=5.0", max_bad=0.4
    )
    assert report.is_complete
    assert report.utterances == 20
    assert quarantine_of(tmp_path / "store") == {name: reason for name, (_, _, _, reason) in bad.items()}
    assert {f"good-{i}" for i in range(20)} == set(content(tmp_path / "store"))
    assert sum(report.quarantined.values()) + sum(report.planned_out.values()) == len(bad)


def test_recordings_beyond_what_the_encoder_hears_are_left_out_or_quarantined(recipe_file, tmp_path, noise):
    """By the stated duration before anything is decoded, and by the decoded one where the stated one was wrong."""
    whisper = save_encoder("whisper", tmp_path / "whisper", max_s=2)
    rows = [parquet_row(f"good-{i}", wav(noise(1.0 + i / 20)), 1.0 + i / 20, "the cat") for i in range(21)]
    rows += [parquet_row("long", wav(noise(2.01)), 2.01, "the cat")]
    rows += [parquet_row("lies", wav(noise(2.2)), 1.9, "the cat")]
    write_parquet(tmp_path / "speech" / "train-00000-of-00001.parquet", rows)
    settings = f"corpus.path={tmp_path / 'speech'}", f"encoder.id={whisper}"
    report = stage_one(recipe_file, tmp_path / "store", *settings)
    assert (report.utterances, report.planned_out, dict(report.quarantined)) == (
        21,
        {"beyond_encoder": 1},
        {"beyond_encoder": 1},
    )
    lines = "".join(path.read_text() for path in (tmp_path / "store" / "quarantine").glob("*.jsonl"))
    assert "2.20 s when decoded, the encoder takes 2 s" in lines


def test_features_that_are_not_finite_are_quarantined(recipe_file, corpus_folder, tmp_path, monkeypatch):
    whole = encode_module.encode

    def poisoned(*arguments, **settings):
        features, num_frames = whole(*arguments, **settings)
        features[0, 0, 0] = np.nan
        return features, num_frames

    monkeypatch.setattr(encode_module, "encode", poisoned)
    report = stage_one(recipe_file, tmp_path / "store", max_bad=1.0)
    assert set(report.quarantined) == {"non_finite"}
    assert report.utterances + report.quarantined["non_finite"] == 48


def test_a_handful_of_bad_recordings_stops_nothing_unless_max_bad_says_so(recipe_file, corpus_folder, tmp_path):
    spoil(corpus_folder, 3)
    with pytest.raises(TooManyBadError, match=r"3 of 48 .*3 undecodable; expected at most 5 %"):
        stage_one(recipe_file, tmp_path / "strict", max_bad=0.05)
    assert stage_one(recipe_file, tmp_path / "store").quarantined == {"undecodable": 3}
    assert stage_one(recipe_file, tmp_path / "exact", max_bad=3 / 48).is_complete
    spoil(corpus_folder, 15)
    with pytest.raises(TooManyBadError, match=r"15 undecodable.*at most 1 %"):
        stage_one(recipe_file, tmp_path / "many")
    assert stage_one(recipe_file, tmp_path / "many", "extract.max_bad=0.5").is_complete


def test_bad_files_of_a_folder_are_quarantined_with_their_reasons(recipe_file, corpus_folder, tmp_path, noise):
    folder = corpus_folder / "train"
    files = {"short.wav": wav(noise(0.01)), "long.wav": wav(noise(4.0)), "silent-text.wav": wav(noise(1.0))}
    files |= {"text.wav": b"this is not audio at all, whatever its name says", "empty.wav": b""}
    files["nan.wav"] = wav(np.full(16_000, np.nan, np.float32), "FLOAT")
    with (folder / "metadata.csv").open("a") as file:
        for name in (*files, "missing.wav", "000.wav"):
            file.write(f"{name},{'' if name == 'silent-text.wav' else 'the cat'}\n")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    report = stage_one(recipe_file, tmp_path / "store", "corpus.max_duration_s=3.0")
    assert report.utterances == 48
    assert report.planned_out == {"too_short": 1, "too_long": 1, "no_text": 1, "duplicate_id": 1}
    assert report.quarantined == {"undecodable": 2, "no_audio": 2}
    reasons = quarantine_of(tmp_path / "store")
    assert {reasons[f"train/{name}.wav"] for name in ("nan", "text")} == {"undecodable"}
    assert {reasons[f"train/{name}.wav"] for name in ("empty", "missing")} == {"no_audio"}


def test_a_corpus_of_which_nothing_can_be_stored_is_an_error(recipe_file, corpus_folder, tmp_path):
    """Ten bad rows are tolerated, but not if there are no others, as where every path is wrong."""
    for split in ("train", "dev"):
        for name in ("gone.wav", "clips\\1.wav", " 1.wav"):
            (corpus_folder / split / "metadata.csv").write_text(f"file_name,text\n{name},the cat\n")
            with pytest.raises(TooManyBadError, match="1 of 1 utterances are bad so far: 1 no_audio"):
                stage_one(recipe_file, tmp_path / split / name.strip(), split=split)


def test_training_on_a_split_without_utterances_is_one_line(recipe_file, corpus_folder, tmp_path):
    (corpus_folder / "train" / "metadata.csv").write_text("file_name,text\ngone.wav,the cat\nlost.wav,the dog\n")
    assert stage_one(recipe_file, tmp_path / "store").quarantined == {"no_audio": 2}
    with pytest.raises(
        RunError, match=r"store': expected utterances of split 'train', found none\. See its quarantine"
    ):
        train(load_recipe(str(recipe_file)), tmp_path / "store", Run(tmp_path / "run"), device="cpu")
    assert not (tmp_path / "run").exists()


def test_parts_share_one_budget_of_bad_rows_and_running_again_adds_none(recipe_file, corpus_folder, tmp_path):
    """Every part alone has at most 12 of 48; together they have more, in any order and however often they run."""
    spoil(corpus_folder, 20)
    failed = 0
    for part in [(0, 3), (1, 3), (2, 3)] * 2:
        try:
            stage_one(recipe_file, tmp_path / "store", part=part, max_bad=12 / 48)
        except TooManyBadError:
            failed += 1
    assert failed >= 4
    with pytest.raises(TooManyBadError, match="undecodable"):
        stage_one(recipe_file, tmp_path / "store", max_bad=12 / 48)
    assert not FeatureStore.open(tmp_path / "store").is_sealed
    assert stage_one(recipe_file, tmp_path / "store", max_bad=20 / 48).is_complete


def test_bad_rows_that_the_plan_finds_are_of_the_same_budget_and_filtered_ones_are_not(recipe_file, tmp_path, noise):
    rows = [parquet_row(f"u{i}", wav(noise(1.0)), 1.0, "" if i < 4 else "the cat") for i in range(16)]
    rows += [parquet_row(f"long-{i}", wav(noise(1.0)), 99.0, "the cat") for i in range(4)]
    write_parquet(tmp_path / "c" / "train-00000-of-00001.parquet", rows)
    corpus = f"corpus.path={tmp_path / 'c'}"
    with pytest.raises(TooManyBadError, match="4 of 16 utterances are bad so far: 4 no_text"):
        stage_one(recipe_file, tmp_path / "store", corpus, max_bad=3 / 16)
    assert FeatureStore.open(tmp_path / "store").committed_shards() == []
    assert stage_one(recipe_file, tmp_path / "store", corpus, max_bad=4 / 16).is_complete


def test_a_recording_without_end_is_given_up_at_the_limit(monkeypatch):
    given = []

    def endless(_: bytes, **__):
        while True:
            given.append(1)
            yield np.zeros(160_000, np.float32)

    monkeypatch.setattr(decoding, "iter_audio", endless)
    assert decoding._decode(b"audio", 30.0) == "too_long: more than 30 s when decoded"
    assert len(given) == 4


def test_recordings_longer_than_their_corpus_says_are_stored_while_there_is_room(recipe_file, tmp_path, noise):
    """Half a second more than stated is accepted, but the plan gave the next rows to another utterance."""
    rows = [parquet_row(f"u{i:02}", wav(noise(1.4 if i % 2 else 1.0)), 1.0, "the cat") for i in range(20)]
    write_parquet(tmp_path / "c" / "train-00000-of-00001.parquet", rows)
    report = stage_one(recipe_file, tmp_path / "store", f"corpus.path={tmp_path / 'c'}", max_bad=1.0)
    assert set(report.quarantined) == {"longer_than_planned"}
    assert report.utterances >= 10
    assert report.utterances + report.quarantined["longer_than_planned"] == 20


def test_a_damaged_source_file_costs_its_own_rows_only(recipe_file, tmp_path, noise):
    rows = [parquet_row(f"u{i:03}", wav(noise(1.0)), 1.0, "the cat") for i in range(20)]
    whole, cut = tmp_path / "c" / "train-00000-of-00002.parquet", tmp_path / "c" / "train-00001-of-00002.parquet"
    write_parquet(whole, rows[:10])
    write_parquet(cut, rows[10:])
    data = bytearray(cut.read_bytes())
    footer = pq.read_metadata(cut).row_group(0)
    start = next(footer.column(c).data_page_offset for c in range(6) if footer.column(c).path_in_schema == "wav.bytes")
    data[start : start + 40] = b"\xff" * 40
    cut.write_bytes(data)
    report = stage_one(recipe_file, tmp_path / "store", f"corpus.path={tmp_path / 'c'}")
    assert report.quarantined == {"unreadable": 10}
    assert set(content(tmp_path / "store")) == {f"u{i:03}" for i in range(10)}


def test_a_truncated_source_file_is_named(recipe_file, tmp_path, noise):
    path = tmp_path / "c" / "train-00000-of-00001.parquet"
    write_parquet(path, [parquet_row("u", wav(noise(1.0)), 1.0, "the cat")])
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CorpusError, match=r"train-00000-of-00001.*cut short"):
        stage_one(recipe_file, tmp_path / "store", f"corpus.path={tmp_path / 'c'}")


def test_part_of_an_utterance_is_never_stored_under_its_whole_text(recipe_file, tmp_path):
    """Of MP3s without a Xing header a third was stored, and nothing was in quarantine."""
    samples = speech(3.0, 44_100)
    samples[:66_150] *= 0.001
    whole = {
        "mp3": with_soundfile(samples, 44_100, "MP3"),
        "no-header": with_av("mp3", "mp3", samples, rate=44_100, options={"write_xing": "0"}),
        "flac": with_soundfile(samples, 44_100, "FLAC"),
        "opus": with_soundfile(speech(3.0), format="OGG", subtype="OPUS"),
        "wav": with_soundfile(speech(3.0)),
        "m4a": with_av("mp4", "aac", samples, rate=44_100, options={"movflags": "frag_keyframe+empty_moov"}),
    }
    unknown = bytearray(whole["flac"])
    unknown[21:26] = bytes([unknown[21] & 0xF0, 0, 0, 0, 0])
    # Without a header, an MP3 does not say that the encoder's delay of 50 ms is no sound.
    lengths = {name: 3.05 if name == "no-header" else 3.0 for name in (*whole, "stream")}
    rows = [parquet_row(name, {**whole, "stream": bytes(unknown)}[name], lengths[name], "the cat") for name in lengths]
    rows += [parquet_row(f"cut-{name}", data[: len(data) * 96 // 100], 3.0, "the cat") for name, data in whole.items()]
    write_parquet(tmp_path / "c" / "train-00000-of-00001.parquet", rows)
    report = stage_one(recipe_file, tmp_path / "store", f"corpus.path={tmp_path / 'c'}", max_bad=1.0)
    stored = content(tmp_path / "store")
    assert set(stored) == {*whole, "stream"}
    assert report.quarantined == {"incomplete": len(whole)}
