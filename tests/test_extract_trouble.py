"""Full disks, interrupts and errors during extraction: every claim is returned, and the same command resumes."""

import errno
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from extractions import same_content, stage_one

from cache import FeatureStore, ShardWriter
from cache.errors import DiskFullError
from pipelines.errors import CorpusError
from pipelines.extract import shard_pipeline
from pipelines.extract.encode import CpuBatchEncoder
from pipelines.extract.stage import preparing
from pipelines.recipes import load_recipe
from pipelines.train.runs import Run
from pipelines.train.stage import train

ROOT = Path(__file__).parents[1]


def test_a_disk_nearly_full_stops_before_the_next_shard_and_resumes_with_free_space(
    recipe_file, store, tmp_path, monkeypatch
):
    usage, left = shutil.disk_usage(tmp_path), iter([True] * 2)
    nearly = type(usage)(usage.total, usage.used, 10)
    monkeypatch.setattr(shard_pipeline.shutil, "disk_usage", lambda _: usage if next(left, None) else nearly)
    with pytest.raises(DiskFullError, match="Free some space and run the same command"):
        stage_one(recipe_file, tmp_path / "full")
    assert FeatureStore.open(tmp_path / "full").committed_shards() == [0, 1]
    monkeypatch.undo()
    assert stage_one(recipe_file, tmp_path / "full").is_complete
    assert same_content(store, tmp_path / "full")


def test_extraction_waits_for_disk_space_and_resumes_by_itself(recipe_file, store, tmp_path, monkeypatch, caplog):
    usage, looks = shutil.disk_usage(tmp_path), iter([True] * 2)
    nearly = type(usage)(usage.total, usage.used, 10)

    def full_until_it_waits(_):
        return usage if next(looks, False) or "Waiting for disk space" in caplog.text else nearly

    monkeypatch.setattr(shard_pipeline.shutil, "disk_usage", full_until_it_waits)
    monkeypatch.setattr(shard_pipeline, "POLL_S", 0.01)
    assert stage_one(recipe_file, tmp_path / "full", "extract.disk_patience_s=3600").is_complete
    assert "Waiting for disk space" in caplog.text
    assert same_content(store, tmp_path / "full")


def test_a_disk_that_fills_up_in_the_middle_of_a_write_is_waited_for_too(recipe_file, store, tmp_path, monkeypatch):
    whole, writes = ShardWriter._commit, iter([True, False, True, False])

    def failing(self):
        if not next(writes, True):
            raise DiskFullError("no space left")
        whole(self)

    monkeypatch.setattr(ShardWriter, "_commit", failing)
    monkeypatch.setattr(shard_pipeline, "POLL_S", 0.01)
    with pytest.raises(DiskFullError):
        stage_one(recipe_file, tmp_path / "impatient")
    assert stage_one(recipe_file, tmp_path / "full", "extract.disk_patience_s=3600").is_complete
    assert same_content(store, tmp_path / "full")


def test_space_is_kept_for_shards_that_others_have_claimed(recipe_file, tmp_path, monkeypatch):
    stage_one(recipe_file, tmp_path / "store", part=(0, 3))
    recipe, opened = load_recipe(str(recipe_file)), FeatureStore.open(tmp_path / "store")
    shard_bytes = opened.rows_per_shard * opened.header.bytes_per_row
    usage = shutil.disk_usage(tmp_path)
    two_shards = type(usage)(usage.total, usage.used, 2 * shard_bytes)
    monkeypatch.setattr(shard_pipeline.shutil, "disk_usage", lambda _: two_shards)
    theirs = opened.write_shard(1)
    assert shard_pipeline.lack_of_space(recipe, opened, []) == ""
    others = opened.write_shard(2)
    assert "2 claimed by other processes" in shard_pipeline.lack_of_space(recipe, opened, [])
    assert "other" not in shard_pipeline.lack_of_space(recipe, opened, [1, 2])
    for writer in (theirs, others):
        writer.__exit__(RuntimeError, RuntimeError("interrupted"), None)


def test_whole_files_need_space_in_the_hub_clients_cache_too(recipe_file, store, tmp_path, monkeypatch):
    usage, cache = shutil.disk_usage(tmp_path), tmp_path / "home"
    cache.mkdir()
    full = type(usage)(usage.total, usage.used, 10)
    monkeypatch.setattr(shard_pipeline.constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(shard_pipeline.shutil, "disk_usage", lambda path: full if path == cache else usage)
    settings = ["corpus.name=some/set", "extract.disk_margin_gb=0.001"]
    for fetch, lack in (("ranges", False), ("files", True)):
        recipe = load_recipe(str(recipe_file), [*settings, f"corpus.fetch={fetch}"])
        assert (str(cache) in shard_pipeline.lack_of_space(recipe, FeatureStore.open(store), [])) == lack


def test_raw_errors_of_a_full_disk_are_one_line(tinyaudio, recipe_file, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "recipe.toml")

    monkeypatch.setattr("pipelines.extract.request.write_text", full)
    done = tinyaudio("extract", "--recipe", recipe_file, "--store", "store", "--device", "cpu")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "recipe.toml" in last
    assert "No space left on device" in last


def test_a_store_that_another_process_finishes_is_not_reported_as_complete(tinyaudio, recipe_file, tmp_path):
    stage_one(recipe_file, tmp_path / "store", part=(0, 3))
    theirs = FeatureStore.open(tmp_path / "store").write_shard(1)
    done = tinyaudio("extract", "--recipe", recipe_file, "--store", "store", "--device", "cpu")
    assert done.returncode == 1
    assert "is incomplete: other processes" in done.stderr
    theirs.__exit__(RuntimeError, RuntimeError("interrupted"), None)


def test_training_on_a_store_that_is_not_complete_is_warned_of(recipe_file, tmp_path, monkeypatch):
    stage_one(recipe_file, tmp_path / "store", part=(0, 3))
    monkeypatch.setattr("pipelines.train.stage.build_model", lambda *_: sys.exit("far enough"))
    said = []
    with pytest.raises(SystemExit, match="far enough"):
        train(load_recipe(str(recipe_file)), tmp_path / "store", Run(tmp_path / "run"), device="cpu", say=said.append)
    assert said[0].startswith("WARNING: 2 of 3 shards")


def test_an_interrupt_ends_at_once_although_a_worker_waits_for_the_network(tmp_path):
    script = (
        "import os, signal, threading, time\n"
        "from pipelines.extract.decode import Decoder\n"
        "class Slow:\n"
        "    def pieces(self, source_ids): return [list(source_ids)]\n"
        "    def read_audio(self, source_ids): time.sleep(600); yield\n"
        "if __name__ == '__main__':\n"
        "    with Decoder(Slow(), 1, 30.0) as decoder:\n"
        "        decoder.warm_up()\n"
        "        pieces = decoder.submit(['u'])\n"
        "        threading.Timer(0.5, os.killpg, (0, signal.SIGINT)).start()\n"
        "        decoder.collect(pieces)\n"
    )
    (tmp_path / "waiting.py").write_text(script)
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, tmp_path / "waiting.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        timeout=120,
    )
    assert done.stderr.strip().endswith("KeyboardInterrupt")
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert time.monotonic() - begun < 60


def test_an_error_under_way_gives_every_claim_back(recipe_file, tmp_path, monkeypatch):
    whole, calls = CpuBatchEncoder.encode, iter(range(100))

    def failing(self, inputs):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, inputs)

    monkeypatch.setattr(CpuBatchEncoder, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        stage_one(recipe_file, tmp_path / "store")
    assert not list((tmp_path / "store" / "claims").glob("[0-9]*"))
    monkeypatch.undo()
    assert stage_one(recipe_file, tmp_path / "store").is_complete


def test_decoding_processes_end_when_their_parent_is_killed(recipe_file, tmp_path):
    script = (
        "import multiprocessing, os, time\n"
        "from pipelines.corpora import open_corpus\n"
        "from pipelines.extract.decode import Decoder\n"
        "from pipelines.recipes import load_recipe\n"
        "if __name__ == '__main__':\n"
        f"    corpus = open_corpus(load_recipe({str(recipe_file)!r}).corpus)\n"
        "    decoder = Decoder(corpus, 1, 30.0)\n"
        "    decoder.collect(decoder.submit(corpus.scan('dev')['source_id'].to_pylist()))\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    (tmp_path / "parent.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "parent.py"], capture_output=True, text=True, env=environment)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -9, done.stderr
    assert pids
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a decoding process outlived its parent"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_at_a_time_prepares_a_store_and_no_lock_is_left(tmp_path):
    inside, most = [], []

    def enter(number: int) -> None:
        for _ in range(20):
            with preparing(tmp_path / "store"):
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.remove(number)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(enter, range(8)))
    assert len(most) == 160
    assert max(most) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_extraction_that_fails_before_there_is_a_store_leaves_nothing_beside_it(recipe_file, tmp_path):
    with pytest.raises(CorpusError, match="nothing to store"):
        stage_one(recipe_file, tmp_path / "store", "corpus.max_duration_s=0.2")
    assert not list(tmp_path.glob(".store*"))
