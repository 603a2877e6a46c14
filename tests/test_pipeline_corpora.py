"""Corpus readers: three layouts, one table; columns by name; metadata alone until audio is asked for."""

import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hub_replica import Fault, Hub

from pipelines import corpora_parquet, hub_files
from pipelines.corpora import SCAN_SCHEMA, FolderCorpus, HubCorpus, LocalParquetCorpus, open_corpus
from pipelines.corpora_parquet import read_footer
from pipelines.corpora_schema import chunked, duration_of
from pipelines.decoding import decode_piece
from pipelines.errors import CorpusError, FetchError, SourceError
from pipelines.planning import plan_corpus
from pipelines.recipes import Columns, CorpusSection, load_recipe

CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def wav(seconds: float, sampling_rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.sin(np.arange(int(seconds * sampling_rate)) / 9), sampling_rate, format="WAV")
    return buffer.getvalue()


def loquacious(count: int, first: int = 0) -> dict[str, pa.Array]:
    """Columns in LoquaciousSet's schema."""
    numbers = range(first, first + count)
    return {
        "ID": pa.array([f"u{i:03}" for i in numbers]),
        "duration": pa.array([1.0 + i / 10 for i in numbers], pa.float32()),
        "wav": pa.array([{"bytes": wav(1.0 + i / 10), "path": f"{i}.wav"} for i in numbers], CELL),
        "spk_id": pa.array([f"s{i % 3}" for i in numbers]),
        "sex": pa.array([("male", "female", None)[i % 3] for i in numbers]),
        "text": pa.array([f"Word {i}" for i in numbers]),
    }


def write_parquet(path: Path, columns: dict[str, pa.Array], row_group_size: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, compression="none")
    return path


def opened(root: Path, **settings: object):
    return open_corpus(CorpusSection(path=str(root), **settings))


def audio_of(corpus, split: str) -> dict[str, bytes]:
    table = corpus.scan(split)
    ids = dict(zip(table["source_id"].to_pylist(), table["utterance_id"].to_pylist(), strict=True))
    return {ids[source_id]: audio for source_id, audio in corpus.read_audio(ids)}


# ------------------------------------------------------------------------------------------- Parquet


@pytest.fixture
def parquet(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", loquacious(10))
    write_parquet(tmp_path / "train-00001-of-00002.parquet", loquacious(5, first=10))
    return tmp_path


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


def test_some_rows_are_read_without_the_others(parquet):
    found = dict(opened(parquet).read_audio(["train:1:0:2", "train:0:1:1"]))
    assert found == {"train:0:1:1": wav(1.5), "train:1:0:2": wav(2.2)}


def test_columns_are_found_by_the_names_of_the_recipe(tmp_path):
    told = loquacious(3)
    names = {"ID": "key", "duration": "length", "wav": "sound", "spk_id": "who", "sex": "gender", "text": "said"}
    columns = {names[key]: values for key, values in told.items()} | {"origin": pa.array(["a", "b", "c"])}
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
    with pytest.raises(CorpusError, match=r"has columns key, length.*expected also ID, wav, text.*corpus\.columns"):
        opened(tmp_path).scan("train")


def test_durations_that_nobody_states_come_from_headers_and_a_dead_row_has_none(tmp_path):
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


# ------------------------------------------------------------------------------------------- audiofolder


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
        ("metadata.csv", "path,text\na.wav,x\n", "a row without file_name.*expected file_name and text"),
        ("metadata.jsonl", '{"file_name": "a.wav"}\n{"file_na\n', "line 2 is not JSON"),
    ],
)
def test_metadata_that_says_nothing_is_named(tmp_path, name, content, message):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        opened(tmp_path).scan("train")


def test_folders_that_are_no_corpus_are_one_line(tmp_path):
    with pytest.raises(CorpusError, match=r"does not exist; set corpus\.path"):
        opened(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"neither Parquet files nor <split>/metadata\.csv"):
        opened(tmp_path)
    write_folder(tmp_path, "train", [{"file_name": "a.wav", "text": "x"}], "csv")
    with pytest.raises(CorpusError, match=r"no split 'dev' in .*found train"):
        opened(tmp_path).require("dev")


# ------------------------------------------------------------------------------------------- from there to a plan


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
    assert chunked(["a", "b", "c"], 2) == [["a", "b"], ["c"]]


# ------------------------------------------------------------------------------------------- the hub, without one


def hub_corpus(monkeypatch, files: dict[str, list[str]], **settings: object) -> HubCorpus:
    monkeypatch.setattr(corpora_parquet, "resolve_dataset", lambda *_: files)
    return HubCorpus(CorpusSection(name="some/set", **settings))


@pytest.mark.parametrize("fetch", ["files", "ranges"])
def test_audio_is_fetched_as_the_recipe_says_and_metadata_always_by_ranges(parquet, monkeypatch, fetch):
    whole: list[tuple[str, ...]] = []
    ranged: list[tuple[str, ...]] = []

    def fetch_whole(*place: str, patience_s: float) -> Path:
        whole.append(place)
        return parquet / place[1]

    def by_range(*place: str, patience_s: float) -> io.BufferedReader:
        ranged.append(place)
        return (parquet / place[1]).open("rb")

    monkeypatch.setattr(corpora_parquet, "fetch_whole", fetch_whole)
    monkeypatch.setattr(corpora_parquet, "HubFile", by_range)
    commit = "c" * 40
    files = [f"hf://datasets/some/set@{commit}/train-0000{i}-of-00002.parquet" for i in range(2)]
    corpus = hub_corpus(monkeypatch, {"train": files}, fetch=fetch, revision=commit)
    assert len(corpus.scan("train")) == 15
    assert not whole
    assert {place[2] for place in ranged} == {commit}
    ranged.clear()
    assert dict(corpus.read_audio(["train:1:0:0"])) == {"train:1:0:0": wav(2.0)}
    place = ("some/set", "train-00001-of-00002.parquet", commit)
    assert (whole, ranged) == (([place], []) if fetch == "files" else ([], [place]))
    assert corpus.provenance("train")["revision"] == commit


def test_a_branch_is_what_its_files_say_and_other_files_are_refused(monkeypatch):
    commit = "d" * 40
    corpus = hub_corpus(monkeypatch, {"train": [f"hf://datasets/some/set@{commit}/t.parquet"]}, revision="main")
    assert corpus.provenance("train") == {
        "kind": "hub", "name": "some/set", "config": None, "split": "train", "revision": commit
    }  # fmt: skip
    with pytest.raises(CorpusError, match="no split 'dev' in 'some/set'; found train"):
        corpus.require("dev")
    with pytest.raises(CorpusError, match="is not Parquet"):
        hub_corpus(monkeypatch, {"train": ["hf://datasets/some/set@main/t.tar"]}).require("train")
    with pytest.raises(CorpusError, match="lies outside the hub"):
        corpus.open("https://example.org/t.parquet")


def test_what_passes_is_tried_again_and_what_does_not_is_not(monkeypatch):
    monkeypatch.setattr(hub_files.constants, "HF_HUB_OFFLINE", False)  # nothing here asks anybody
    monkeypatch.setattr(hub_files, "_wait_s", lambda *_: 0.01)
    answers = iter([ConnectionError("broken off"), TimeoutError("slow"), 7])

    def answer() -> int:
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    hub_files.resume()
    assert hub_files.patiently(answer, "a file", 5.0) == 7
    monkeypatch.setattr(hub_files, "_wait_s", lambda *_: 0.2)
    with pytest.raises(FetchError, match=r"a file: ConnectionError: gone; tried 1 times .*type the same again"):
        hub_files.patiently(lambda: (_ for _ in ()).throw(ConnectionError("gone")), "a file", 0.1)
    with pytest.raises(KeyError, match="no"):
        hub_files.patiently(lambda: {}["no"], "a file", 5.0)
    monkeypatch.setattr(hub_files.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="at once"):
        hub_files.patiently(lambda: (_ for _ in ()).throw(ConnectionError("at once")), "a file", 5.0)


def test_waiting_follows_the_server_and_else_doubles_up_to_a_minute():
    asked = SimpleNamespace(response=SimpleNamespace(headers={"Retry-After": "7"}))
    assert hub_files._wait_s(asked, 0) == 7
    assert 2 <= hub_files._wait_s(ConnectionError(), 2) <= 4
    assert 30 <= hub_files._wait_s(ConnectionError(), 50) <= 60


@pytest.mark.parametrize("headers", [{"Retry-After": "0"}, {"RateLimit": '"resolve";r=0;t=0'}, {}])
def test_no_server_can_make_us_ask_without_a_pause(headers):
    assert hub_files._wait_s(SimpleNamespace(response=SimpleNamespace(headers=headers)), 0) == hub_files.MIN_WAIT_S


def test_the_hubs_own_rate_limit_is_heeded():
    headers = {"RateLimit": '"resolve";r=0;t=55'}
    assert hub_files._wait_s(SimpleNamespace(response=SimpleNamespace(headers=headers)), 0) == 55


@pytest.fixture
def near_hub(monkeypatch, tmp_path):
    """A corpus on a hub in this process, with two files of two row groups."""
    for part in range(2):
        write_parquet(tmp_path / f"train-0000{part}-of-00002.parquet", loquacious(4, first=4 * part), row_group_size=2)
    with Hub() as hub:
        files = {path.name: path for path in sorted(tmp_path.glob("*.parquet"))}
        commit = hub.add("datasets", "some/set", files).commit
        monkeypatch.setattr(hub_files, "hf_hub_url", lambda repo, path, *, repo_type, revision: (
            f"{hub.endpoint}/{repo_type}s/{repo}/resolve/{revision}/{path}"
        ))  # fmt: skip
        monkeypatch.setattr(hub_files, "MIN_WAIT_S", 0.05)
        monkeypatch.setattr(hub_files.constants, "HF_HUB_OFFLINE", False)
        hub_files.resume()
        listed = {"train": [f"hf://datasets/some/set@{commit}/{name}" for name in files]}
        yield hub, hub_corpus(monkeypatch, listed, revision=commit, fetch_patience_s=1.0)


def test_audio_behind_a_redirect_is_read_by_ranges_too(near_hub):
    hub, corpus = near_hub
    hub.redirects = True
    assert len(audio_of(corpus, "train")) == 8
    assert {request.status for request in hub.log} == {302, 206}


@pytest.mark.parametrize("kind", [401, 503])
def test_a_hub_that_refuses_audio_blames_no_row(near_hub, kind):
    """A refused key and an outage are nothing that the data have done: it has been planned, so the rows are there."""
    hub, corpus = near_hub
    source_ids = corpus.scan("train")["source_id"].to_pylist()
    hub.faults.append(Fault("resolve/", kind, times=-1, min_bytes=20_000))
    with pytest.raises(FetchError, match=f"train-00000.*{kind}"):
        decode_piece(corpus, source_ids[:2], 30.0)
    assert hub.faults[0].hits


def test_a_hub_that_refuses_metadata_blames_no_file(near_hub):
    hub, corpus = near_hub
    corpus.scan_threads = 1
    hub.take_fault = lambda *_: Fault("", 503) if len(hub.log) >= 2 else None  # after the end of a file and its footer
    with pytest.raises(FetchError, match=r"train-00000.*503"):
        corpus.scan("train")


def test_a_file_is_opened_once_to_be_planned(near_hub):
    """Its last bytes, which say its size, the footer, and the metadata columns of two row groups around their audio."""
    hub, corpus = near_hub
    corpus.scan("train")
    num_requests = len(hub.log)
    assert num_requests == 2 * (2 + 2 * 2)
    assert corpus.audio_bytes("train") > 0
    assert len(hub.log) == num_requests


def test_a_host_that_stops_talking_is_asked_again(near_hub, monkeypatch):
    hub, corpus = near_hub
    corpus.patience_s = 20.0
    monkeypatch.setattr(hub_files, "TIMEOUT_S", 0.2)
    hub.faults.append(Fault("resolve/", "slow", times=1, slow_s=1.0))
    assert len(corpus.scan("train")) == 8
    assert hub.faults[0].hits == 1
