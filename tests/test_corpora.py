"""Corpus readers: three layouts, one table; columns by name; metadata alone until audio is asked for."""

import gc
import io
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from corpus_files import CELL, audio_of, loquacious, opened, two_files, wav, write_parquet

from pipelines.corpora import open_corpus
from pipelines.corpora.corpus import SCAN_SCHEMA, chunked, duration_of
from pipelines.corpora.folder import FolderCorpus
from pipelines.corpora.parquet import LocalParquetCorpus, read_footer
from pipelines.errors import CorpusError, SourceError
from pipelines.extract.plan import plan_corpus
from pipelines.recipes import load_recipe
from pipelines.recipes.recipe import Columns


@pytest.fixture
def parquet(tmp_path):
    return two_files(tmp_path)


def test_parquet_is_scanned_in_file_order_and_read_by_row_group(parquet):
    corpus = opened(parquet)
    assert isinstance(corpus, LocalParquetCorpus)
    table = corpus.scan("train")
    assert table.schema == SCAN_SCHEMA
    assert table["utterance_id"].to_pylist() == [f"u{i:03}" for i in range(15)]
    assert table["source_id"].to_pylist()[::5] == ["train:0:0:0", "train:0:1:1", "train:1:0:0"]
    assert table["sex"].to_pylist()[:3] == ["male", "female", None]
    assert table["source"].null_count == 15
    assert [len(piece) for piece in corpus.pieces(table["source_id"].to_pylist()[::-1])] == [4, 4, 2, 4, 1]
    audio = audio_of(corpus, "train")
    assert all(audio[f"u{i:03}"] == wav(1.0 + i / 10) for i in range(15))


def test_a_row_group_that_is_read_in_part_leaves_nothing_in_memory(tmp_path):
    """Two shards divide most row groups. The buffers of each part are freed at once, without the cycle collector."""
    corpus = opened(write_parquet(tmp_path / "train-00000-of-00001.parquet", loquacious(200), 200).parent)
    gc.collect()
    gc.disable()
    try:
        before = pa.total_allocated_bytes()
        for _ in range(3):
            assert dict(corpus.read_audio(["train:0:0:1"]))["train:0:0:1"] == wav(1.1)
        assert pa.total_allocated_bytes() == before
    finally:
        gc.enable()


def test_some_rows_are_read_without_the_others(parquet):
    found = dict(opened(parquet).read_audio(["train:1:0:2", "train:0:1:1"]))
    assert found == {"train:0:1:1": wav(1.5), "train:1:0:2": wav(2.2)}


def test_columns_are_found_by_the_names_of_the_recipe(tmp_path):
    original = loquacious(3)
    names = {"ID": "key", "duration": "length", "wav": "sound", "spk_id": "who", "sex": "gender", "text": "said"}
    columns = {names[key]: values for key, values in original.items()} | {"origin": pa.array(["a", "b", "c"])}
    write_parquet(tmp_path / "train" / "part.parquet", columns)
    roles = Columns(
        id="key", audio="sound", text="said", duration="length", speaker="who", sex="gender", source="origin"
    )
    corpus = opened(tmp_path, columns=roles)
    table = corpus.scan("train")
    assert table["transcript"].to_pylist() == ["Word 0", "Word 1", "Word 2"]
    assert table["speaker"].to_pylist() == ["s0", "s1", "s2"]
    assert table["source"].to_pylist() == ["a", "b", "c"]
    assert table["duration_s"].to_pylist() == pytest.approx([1.0, 1.1, 1.2])
    assert audio_of(corpus, "train")["u001"] == wav(1.1)
    with pytest.raises(CorpusError, match=r"expected columns ID, wav, text too, found key, length.*corpus\.columns"):
        opened(tmp_path).scan("train")


def test_durations_that_are_not_stated_come_from_headers_and_a_dead_row_has_none(tmp_path):
    columns = loquacious(4)
    del columns["duration"], columns["sex"]
    cells = columns["wav"].to_pylist()
    columns["wav"] = pa.array([cells[0], None, {"bytes": b"no audio", "path": "x"}, cells[3]], CELL)
    write_parquet(tmp_path / "train.parquet", columns)
    table = opened(tmp_path, columns=Columns(duration=None)).scan("train")
    assert table["duration_s"].to_pylist() == [1.0, None, None, pytest.approx(1.3)]
    assert table["sex"].null_count == 4


def test_planning_opens_no_audio(parquet, monkeypatch):
    monkeypatch.setattr(LocalParquetCorpus, "_iter_group", lambda *_: pytest.fail("audio was read"))
    corpus = opened(parquet)
    assert len(corpus.scan("train")) == 15
    assert corpus.audio_bytes("train") == pytest.approx(sum(len(wav(1.0 + i / 10)) for i in range(15)), rel=0.05)


@pytest.mark.parametrize("name", ["{s}-0-of-1.parquet", "{s}.parquet", "{s}/0.parquet", "data/{s}-0.parquet"])
def test_every_usual_place_of_a_split_is_found(tmp_path, name):
    for split, count in (("train", 3), ("dev", 2)):
        write_parquet(tmp_path / name.format(s=split), loquacious(count))
    corpus = opened(tmp_path)
    assert [len(corpus.scan(split)) for split in ("train", "dev")] == [3, 2]
    with pytest.raises(CorpusError, match="no split 'test'"):
        corpus.require("test")


def test_a_config_is_a_folder_and_other_splits_may_lie_beside_it(tmp_path):
    """As LoquaciousSet has it: small/train-*, medium/train-*, and one dev for all."""
    write_parquet(tmp_path / "small" / "train-0.parquet", loquacious(3))
    write_parquet(tmp_path / "medium" / "train-0.parquet", loquacious(6))
    write_parquet(tmp_path / "dev" / "dev-0.parquet", loquacious(2))
    assert [len(opened(tmp_path, config=c).scan("train")) for c in ("small", "medium")] == [3, 6]
    assert len(opened(tmp_path, config="small").scan("dev")) == 2


def test_another_corpus_has_another_provenance(parquet):
    before = opened(parquet).provenance("train")
    assert opened(parquet).provenance("train") == before
    write_parquet(parquet / "train-00001-of-00002.parquet", loquacious(5, first=11))
    assert opened(parquet).provenance("train") != before


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(SourceError, match=r"train\.parquet.*is not readable as Parquet"):
        opened(tmp_path).scan("train")
    for content in (b"", b"PAR1", b"PAR1" + b"\xff" * 8 + b"PAR1"):
        with pytest.raises(ValueError, match=r"bytes|does not end like a Parquet file"):
            read_footer(io.BytesIO(content))


def write_folder(root: Path, split: str, rows: list[dict[str, object]], kind: str) -> None:
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        target = folder / str(row["file_name"])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(wav(1.0 + i))
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        return
    names = list(rows[0])
    lines = [",".join(names), *(",".join(f'"{row[name]}"' for name in names) for row in rows)]
    (folder / "metadata.csv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_audiofolder_is_read_whatever_lists_it(tmp_path, kind):
    rows = [
        {"file_name": "a.wav", "text": "one, two", "speaker": "x"},
        {"file_name": "deep/b.wav", "text": "three", "speaker": "y"},
    ]
    write_folder(tmp_path, "train", rows, kind)
    write_folder(tmp_path, "dev", rows[:1], kind)
    corpus = opened(tmp_path)
    assert isinstance(corpus, FolderCorpus)
    table = corpus.scan("train")
    assert table.schema == SCAN_SCHEMA
    assert table["utterance_id"].to_pylist() == ["train/a.wav", "train/deep/b.wav"]
    assert table["transcript"].to_pylist() == ["one, two", "three"]
    assert table["duration_s"].to_pylist() == [1.0, 2.0]
    assert table["speaker"].to_pylist() == ["x", "y"]
    assert audio_of(corpus, "train") == {"train/a.wav": wav(1.0), "train/deep/b.wav": wav(2.0)}
    assert corpus.audio_bytes("train") == len(wav(1.0)) + len(wav(2.0))
    assert len(corpus.scan("dev")) == 1


def test_further_columns_of_an_audiofolder_count(tmp_path):
    row = {
        "file_name": "a.wav",
        "transcription": "hello",
        "id": "mine",
        "duration": 9.5,
        "sex": "female",
        "source": "s",
    }
    write_folder(tmp_path, "train", [row], "jsonl")
    (found,) = opened(tmp_path).scan("train").to_pylist()
    assert (found["utterance_id"], found["transcript"], found["duration_s"]) == ("mine", "hello", 9.5)
    assert (found["sex"], found["source"], found["source_id"]) == ("female", "s", "train/a.wav")


def test_a_listed_file_that_is_missing_is_a_row_without_duration_and_without_audio(tmp_path):
    write_folder(tmp_path, "train", [{"file_name": "a.wav", "text": "x"}], "csv")
    (tmp_path / "train" / "a.wav").unlink()
    corpus = opened(tmp_path)
    assert corpus.scan("train")["duration_s"].to_pylist() == [None]
    assert dict(corpus.read_audio(["train/a.wav"])) == {"train/a.wav": b""}
    assert corpus.audio_bytes("train") == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "path,text\na.wav,x\n", "line 1: expected the columns file_name and text"),
        ("metadata.jsonl", '{"file_name": "a.wav", "text": "x"}\n{"file_na\n', "line 2: expected a JSON object"),
    ],
)
def test_metadata_that_says_nothing_is_named(tmp_path, name, content, message):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        opened(tmp_path).scan("train")


def test_folders_that_are_no_corpus_are_one_line(tmp_path):
    with pytest.raises(CorpusError, match=r"does not exist. Set corpus\.path"):
        opened(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"expected Parquet files or <split>/metadata\.csv"):
        opened(tmp_path)
    write_folder(tmp_path, "train", [{"file_name": "a.wav", "text": "x"}], "csv")
    with pytest.raises(CorpusError, match=r"no split 'dev' in .*found train"):
        opened(tmp_path).require("dev")


def test_filters_text_policy_and_duplicates_apply_to_what_a_corpus_gives(tmp_path):
    columns = loquacious(6)
    columns["ID"] = pa.array(["a", "b", "b", "c", "d", None])
    columns["text"] = pa.array(["It's FINE!", "Twice", "Twice.", "", "Long enough", "No id"])
    columns["duration"] = pa.array([1.0, 1.1, 1.2, 1.3, 99.0, None], pa.float32())
    write_parquet(tmp_path / "train.parquet", columns)
    policy = ["corpus.text_case=lower", "corpus.text_punctuation=remove", "corpus.max_duration_s=30"]
    recipe = load_recipe("demo", [f"corpus.path={tmp_path}", *policy])
    plan = plan_corpus(recipe, open_corpus(recipe.corpus), ["train"])
    assert plan.accepted["transcript"].to_pylist() == ["it's fine", "twice", "no id"]
    assert plan.accepted["utterance_id"].to_pylist() == ["a", "b", "train/train:0:1:1"]
    assert plan.rejected() == {"duplicate_id": 1, "no_text": 1, "too_long": 1}


def test_a_corpus_travels_to_decoding_processes(parquet):
    corpus = pickle.loads(pickle.dumps(opened(parquet)))
    assert dict(corpus.read_audio(["train:1:0:0"])) == {"train:1:0:0": wav(2.0)}


def test_durations_are_those_of_any_rate_and_none_of_what_is_no_audio(tmp_path):
    assert duration_of(wav(0.5, 44_100)) == pytest.approx(0.5)
    (tmp_path / "x.wav").write_bytes(b"nothing")
    assert duration_of(tmp_path / "x.wav") is None
    assert duration_of(b"") is None


def test_chunks_keep_the_order():
    assert list(chunked(["a", "b", "c"], 2)) == [["a", "b"], ["c"]]
