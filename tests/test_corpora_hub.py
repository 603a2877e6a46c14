"""Corpora on the hub, without one: what is fetched, tried again, waited for and blamed."""

import io
import os
import pickle
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from cache_stores import create
from corpus_files import audio_of, loquacious, two_files, wav, write_parquet
from hub_replica import CDN, DEMO, Fault, Hub, Request

from pipelines import retry
from pipelines.corpora import hub as hub_files
from pipelines.corpora import parquet as corpora_parquet
from pipelines.corpora.parquet import HubCorpus
from pipelines.errors import CorpusError, FetchError
from pipelines.extract import decode
from pipelines.extract.decode import Decoder, decode_piece
from pipelines.recipes.recipe import CorpusSection


@pytest.fixture
def parquet(tmp_path):
    return two_files(tmp_path)


def hub_corpus(monkeypatch, files: dict[str, list[str]], **settings: object) -> HubCorpus:
    monkeypatch.setattr(corpora_parquet, "resolve_dataset", lambda *_: files)
    return HubCorpus(CorpusSection(name="some/set", **settings))


@pytest.mark.parametrize("fetch", ["files", "ranges"])
def test_audio_is_fetched_as_the_recipe_says_and_metadata_always_by_ranges(parquet, monkeypatch, fetch):
    whole: list[tuple[str, ...]] = []
    ranged: list[tuple[str, ...]] = []

    def fetch_whole(*place: str, timeout_s: float) -> Path:
        whole.append(place)
        return parquet / place[1]

    def by_range(*place: str, timeout_s: float) -> io.BufferedReader:
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
    with pytest.raises(CorpusError, match="expected Parquet files"):
        hub_corpus(monkeypatch, {"train": ["hf://datasets/some/set@main/t.tar"]}).require("train")
    with pytest.raises(CorpusError, match="outside the hub"):
        corpus.open("https://example.org/t.parquet")


def test_what_passes_is_tried_again_and_what_does_not_is_not(monkeypatch):
    monkeypatch.setattr(retry.constants, "HF_HUB_OFFLINE", False)  # nothing here asks anybody
    monkeypatch.setattr(retry, "_wait_s", lambda *_: 0.01)
    answers = iter([ConnectionError("broken off"), TimeoutError("slow"), 7])

    def answer() -> int:
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    retry.resume()
    assert retry.retry_hub(answer, "a file", 5.0) == 7
    monkeypatch.setattr(retry, "_wait_s", lambda *_: 0.2)
    with pytest.raises(
        FetchError,
        match=r"a file: the hub cannot be reached \(ConnectionError: gone\); tried 1 times .*run the same command",
    ):
        retry.retry_hub(lambda: (_ for _ in ()).throw(ConnectionError("gone")), "a file", 0.1)
    with pytest.raises(KeyError, match="no"):
        retry.retry_hub(lambda: {}["no"], "a file", 5.0)
    monkeypatch.setattr(retry.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="at once"):
        retry.retry_hub(lambda: (_ for _ in ()).throw(ConnectionError("at once")), "a file", 5.0)


def test_waiting_follows_the_server_and_else_doubles_up_to_a_minute():
    asked = SimpleNamespace(response=SimpleNamespace(headers={"Retry-After": "7"}))
    assert retry._asked_s(asked) == 7
    assert retry._asked_s(ConnectionError()) is None
    assert retry._wait_s(7.0, 0) == 7
    assert 2 <= retry._wait_s(None, 2) <= 4
    assert 30 <= retry._wait_s(None, 50) <= 60


@pytest.mark.parametrize("headers", [{"Retry-After": "0"}, {"RateLimit": '"resolve";r=0;t=0'}, {}])
def test_no_server_can_make_us_ask_without_a_pause(headers):
    assert retry._wait_s(retry.retry_after_s(headers), 0) == retry.MIN_WAIT_S


def test_the_hubs_own_rate_limit_is_heeded():
    assert retry.retry_after_s({"Retry-After": "7"}) == 7
    assert retry.retry_after_s({"RateLimit": '"resolve";r=0;t=55'}) == 55


def test_a_stop_event_ends_a_wait_and_attempts_are_counted(monkeypatch):
    monkeypatch.setattr(retry, "MIN_WAIT_S", 0.01)
    stop, calls = threading.Event(), []

    def failing() -> None:
        calls.append(1)
        raise ConnectionError("gone")

    def wait_s(_: Exception) -> float:
        return 0.01

    with pytest.raises(ConnectionError, match="gone"):
        retry.retry(failing, lambda _: True, stop=stop, attempts=3, asked_s=wait_s)
    assert len(calls) == 3
    stop.set()
    with pytest.raises(retry.StoppedError) as stopped:
        retry.retry(failing, lambda _: True, stop=stop, asked_s=wait_s)
    assert isinstance(stopped.value.__cause__, ConnectionError)
    assert len(calls) == 4


def write_small(folder: Path) -> None:
    """Two files of two row groups."""
    for part in range(2):
        write_parquet(folder / f"train-0000{part}-of-00002.parquet", loquacious(4, first=4 * part), row_group_size=2)


def write_speech(folder: Path, group_rows: int = 40) -> None:
    """Two files of six row groups of 40 rows, 16 minutes of the bundled speech."""
    table = pq.read_table(DEMO / "corpus" / "train-00000-of-00001.parquet")
    for part in range(2):
        path = folder / f"train-0000{part}-of-00002.parquet"
        pq.write_table(table.slice(240 * part, 240), path, row_group_size=group_rows)


def write_small_groups(folder: Path) -> None:
    """The same in 48 row groups of ten."""
    write_speech(folder, 10)


@pytest.fixture
def near_hub(request, monkeypatch, tmp_path):
    """A corpus on a hub in this process."""
    getattr(request, "param", write_small)(tmp_path)
    monkeypatch.setattr(hub_files, "_known", {})
    with Hub() as hub:
        files = {path.name: path for path in sorted(tmp_path.glob("*.parquet"))}
        commit = hub.add("datasets", "some/set", files).commit
        monkeypatch.setattr(hub_files, "hf_hub_url", lambda repo, path, *, repo_type, revision: (
            f"{hub.endpoint}/{repo_type}s/{repo}/resolve/{revision}/{path}"
        ))  # fmt: skip
        monkeypatch.setattr(retry, "MIN_WAIT_S", 0.05)
        monkeypatch.setattr(retry.constants, "HF_HUB_OFFLINE", False)
        retry.resume()
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
    corpus.timeout_s = 20.0
    monkeypatch.setattr(hub_files, "TIMEOUT_S", 0.2)
    hub.faults.append(Fault("resolve/", "slow", times=1, slow_s=1.0))
    assert len(corpus.scan("train")) == 8
    assert hub.faults[0].hits == 1


def test_a_copy_for_another_process_knows_the_files_already(monkeypatch):
    """Seven ranks with eight decoding workers each would list the data set 56 times."""
    asked = []
    monkeypatch.setattr(
        "pipelines.corpora.parquet.resolve_dataset", lambda *_: asked.append(1) or {"train": ["hf://a/b@c/d.parquet"]}
    )
    corpus = HubCorpus(CorpusSection(name="some/set"))
    copies = [pickle.loads(pickle.dumps(corpus)) for _ in range(3)]
    assert [copy.files("train") for copy in copies] == [["hf://a/b@c/d.parquet"]] * 3
    assert asked == [1]


def to_hub(log: list[Request]) -> list[Request]:
    """The requests for files that count against the hub's limit."""
    return [request for request in log if "/resolve/" in request.path and not request.path.startswith(CDN)]


def plan_shards(source_ids: list[str], size: int = 60) -> list[list[str]]:
    """Cut utterances into shards as a plan does: each leaves a long one, which fits no block, to the next."""
    cuts = range(size, len(source_ids), size)
    moved = {cut: source_ids[cut - 7] for cut in cuts}
    shards = [source_ids[first : first + size] for first in (0, *cuts)]
    for shard, before, source_id in zip(shards[1:], shards, moved.values(), strict=False):
        before.remove(source_id)
        shard.insert(0, source_id)
    return shards


@pytest.mark.parametrize("near_hub", [write_speech], indirect=True)
@pytest.mark.parametrize("num_processes", [0, 2])
def test_shards_that_divide_row_groups_fetch_each_once_and_ask_the_hub_once_a_file(
    near_hub, monkeypatch, num_processes
):
    """Before addresses, footers and readings were kept: 28 and 48 requests to the hub, 96 in all for the audio, 1.79
    times its bytes."""
    hub, corpus = near_hub
    hub.redirects = True
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)  # of the decoding processes
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    source_ids = corpus.scan("train")["source_id"].to_pylist()
    assert len(to_hub(hub.log)) == 2
    del hub.log[:]
    with Decoder(corpus, num_processes, 30.0, is_hub=True) as decoder:
        futures = [decoder.submit(shard) for shard in plan_shards(source_ids)]
        decoded = [one for shard in futures for one in decoder.collect(shard)[0]]
    assert sorted(source_id for source_id, _ in decoded) == sorted(source_ids)
    assert not [outcome for _, outcome in decoded if isinstance(outcome, str)]
    assert len(to_hub(hub.log)) <= 2 * num_processes  # a process begins with an empty memory
    assert len(to_hub(hub.log)) * 4 <= 48
    assert len([request for request in hub.log if "/resolve/" in request.path]) * 4 <= 96
    audio = [request for request in hub.log if request.num_bytes > 40_000]
    assert len(audio) == 12
    assert sum(request.num_bytes for request in audio) <= 1.03 * corpus.audio_bytes("train")


@pytest.mark.parametrize("near_hub", [write_speech], indirect=True)
def test_shards_decoded_at_once_read_a_row_group_in_their_order(near_hub, monkeypatch):
    """The second shard's part of a row group is ready to be read while the first one's is not."""
    hub, corpus = near_hub
    source_ids = corpus.scan("train")["source_id"].to_pylist()
    del hub.log[:]
    read_audio = HubCorpus.read_audio

    def slow_at_first(self, wanted):
        time.sleep(0.3 if source_ids[0] in wanted else 0.0)
        return read_audio(self, wanted)

    monkeypatch.setattr(HubCorpus, "read_audio", slow_at_first)
    with Decoder(corpus, 0, 30.0, is_hub=True) as decoder:
        futures = [decoder.submit(source_ids[first : first + 10]) for first in range(0, 40, 10)]
        assert [len(decoder.collect(shard)[0]) for shard in futures] == [10] * 4
    assert len([request for request in hub.log if request.num_bytes > 40_000]) == 1


@pytest.mark.parametrize("near_hub", [write_small_groups], indirect=True)
def test_processes_that_divide_a_corpus_fetch_hardly_more_than_one(near_hub, tmp_path):
    """Every shard divides a row group. When each process made every other shard, both parts were fetched: 1.99 times
    the audio."""
    hub, corpus = near_hub
    source_ids = corpus.scan("train")["source_id"].to_pylist()
    shards = plan_shards(source_ids, 15)
    ids = [f"u{i}" for i in range(len(shards))]
    store = create(tmp_path / "store", {name: np.zeros((60, 8), np.float32) for name in ids})
    assert store.num_shards == len(shards)
    copies = [pickle.loads(pickle.dumps(corpus)) for _ in range(2)]
    del hub.log[:]
    for rank, copy in enumerate(copies):
        with Decoder(copy, 0, 30.0, is_hub=True) as decoder:
            mine = [decoder.submit(shards[number]) for number in store.pending_shards((rank, 2))]
            assert all(decoder.collect(shard)[0] for shard in mine)
    audio = [request.num_bytes for request in hub.log if 8 < request.num_bytes < 100_000]  # the rest are footers
    assert len(audio) == 49  # the row group that the two divide, and 47 others
    assert sum(audio) <= 1.03 * corpus.audio_bytes("train")


@pytest.mark.parametrize("near_hub", [write_speech], indirect=True)
def test_a_row_group_can_be_read_again_from_its_beginning(near_hub):
    _, corpus = near_hub
    source_ids = corpus.scan("train")["source_id"].to_pylist()
    whole = dict(corpus.read_audio(source_ids[:40]))
    parts = (slice(10), slice(10, 30), slice(5, 12), slice(30, 40), slice(40), slice(8, 40, 2), slice(9, 40, 2))
    for chosen in (source_ids[part] for part in parts):
        assert dict(corpus.read_audio(chosen)) == {source_id: whole[source_id] for source_id in chosen}
    rows = corpus.read_audio(source_ids[:10])
    next(rows)
    rows.close()  # a reader that stops in the middle
    assert dict(corpus.read_audio(source_ids[:40])) == whole


def test_a_signed_address_is_used_until_it_is_refused_and_then_the_hub_is_asked_once(near_hub):
    hub, corpus = near_hub
    hub.redirects, hub.signature = True, 1
    source_ids = corpus.scan("train")["source_id"].to_pylist()
    assert [request.status for request in to_hub(hub.log)] == [302, 302]
    del hub.log[:]
    hub.signature = 2
    assert len(dict(corpus.read_audio(source_ids))) == 8
    assert sorted(request.status for request in hub.log) == [206] * 4 + [302] * 2 + [403] * 2


def test_a_storage_that_refuses_a_fresh_address_ends_with_its_answer(near_hub):
    hub, corpus = near_hub
    hub.redirects = True
    hub.faults.append(Fault(f"^{CDN}", 403, times=-1))
    with pytest.raises(FetchError, match=r"train-0000.*403.*Check HF_TOKEN"):
        corpus.scan("train")
    assert len(hub.log) <= 4  # each file: the hub, its storage


def test_the_token_goes_to_the_hub_and_never_to_where_it_redirects(near_hub, monkeypatch):
    hub, corpus = near_hub
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirects, hub.signature = True, 1
    source_ids = corpus.scan("train")["source_id"].to_pylist()
    hub.signature = 2
    dict(corpus.read_audio(source_ids))
    assert {(request.path.startswith(CDN), request.has_token) for request in hub.log} == {(False, True), (True, False)}


def test_a_corpus_on_the_hub_is_decoded_by_more_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(32))
    assert decode.default_workers(is_gpu=True, is_hub=True) == 16
    assert decode.default_workers(is_gpu=True) == 8
    assert decode.default_workers(is_gpu=False, is_hub=True) == 0


@pytest.mark.parametrize(("token", "is_named"), [("", True), ("hf_secret", False)])
def test_too_many_requests_without_a_token_name_it(near_hub, monkeypatch, caplog, token, is_named):
    hub, corpus = near_hub
    monkeypatch.setenv("HF_TOKEN", token)
    hub.faults.append(Fault("resolve/", 429, times=1))
    corpus.scan("train")
    assert "429" in caplog.text
    assert ("HF_TOKEN is not set" in caplog.text) == is_named
