"""Several workers on one store: nothing lost, nothing twice, the same rows from any worker."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from cache_stores import create, make_features
from extractions import INT8, same_content, spoil, stage_one
from safetensors.numpy import load_file, save_file

from cache import store_merge
from cache.errors import StoreMismatchError
from cache.owners import Owner
from pipelines.errors import PipelineError
from pipelines.extract.shard_pipeline import begin_elsewhere
from pipelines.extract.stage import join
from pipelines.processes import Place
from pipelines.recipes import load_recipe

ROOT = Path(__file__).parents[1]


def test_decoding_processes_store_what_threads_store(recipe_file, store, tmp_path):
    stage_one(recipe_file, tmp_path / "processes", "extract.decode_workers=2")
    assert same_content(store, tmp_path / "processes")


def test_parts_write_disjoint_shards_of_one_plan_and_the_last_one_seals(recipe_file, store, tmp_path):
    reports = [stage_one(recipe_file, tmp_path / "parts", part=(i, 3)) for i in range(3)]
    assert [report.is_complete for report in reports] == [False, False, True]
    assert sum(report.shards_written for report in reports) == reports[0].shards_total
    assert same_content(store, tmp_path / "parts")


def test_processes_without_parts_make_runs_of_neighbouring_shards(tmp_path):
    """Most row groups are divided by two shards; a process that made every other shard would fetch both parts."""
    store = create(tmp_path / "store", make_features([60] * 64))
    waiting, maker = [deque(store.pending_shards()) for _ in range(3)], {}
    turns = [rank for _ in range(64) for rank in (0, 0, 1, 2)]  # the first is twice as fast
    for rank in turns:
        while waiting[rank]:
            shard = waiting[rank].popleft()
            writer = store.write_shard(shard)
            if writer is not None:
                with writer:
                    maker[shard] = rank
                    frames = np.zeros((60, 8), np.float32)
                    writer.append(f"u{shard}", frames, num_samples=19_280, duration_s=1.2, transcript="")
                break
            waiting[rank].rotate(-begin_elsewhere(store, waiting[rank]))
    assert sorted(maker) == list(range(64))
    assert sum(maker[shard] != maker[shard - 1] for shard in range(1, 64)) <= 8
    assert {rank: list(maker.values()).count(rank) for rank in range(3)} == {0: 32, 1: 16, 2: 16}


def test_helping_others_reports_shares_that_are_shares(recipe_file, tmp_path):
    report = stage_one(recipe_file, tmp_path / "store", group=Place(0, 2))
    assert report.is_complete
    assert report.shards_written == report.shards_total
    assert 0 < report.encoder_busy <= 1.01


def test_only_the_first_of_a_group_prepares_and_the_others_join(recipe_file, store, tmp_path, monkeypatch):
    stage_one(recipe_file, tmp_path / "group", part=(0, 3))
    for what in ("prepare", "store_repair", "plan_corpus"):
        monkeypatch.setattr(
            f"pipelines.extract.stage.{what}", lambda *_, **__: pytest.fail("that is the first one's work")
        )
    assert stage_one(recipe_file, tmp_path / "group", group=Place(1, 2)).is_complete
    assert same_content(store, tmp_path / "group")


def test_joining_with_another_encoder_is_refused(recipe_file, store, tmp_path, encoder_folder):
    other = shutil.copytree(encoder_folder, tmp_path / "other" / encoder_folder.name)
    weights = load_file(other / "model.safetensors")
    save_file({**weights, min(weights): weights[min(weights)] + 1}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(StoreMismatchError, match="weights"):
        join(load_recipe(str(recipe_file), [f"encoder.id={other}"]), store)


@pytest.mark.slow  # two interpreters with torch each, half a minute
def test_torchrun_with_two_processes_stores_what_one_stores(recipe_file, store, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    arguments = ["-m", "tinyaudio", "extract", "--recipe", recipe_file, "--store", tmp_path / "group", "--json"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launcher, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            timeout=300,
        )

    done = run()
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == 1
    assert reports[0]["is_complete"]
    assert reports[0]["utterances"] == 48
    assert same_content(store, tmp_path / "group")
    again = run()
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("stored ") == 1, "every process spoke, or none"


@pytest.fixture(scope="module")
def ray_extract():
    pytest.importorskip("ray", reason="the optional extra `ray` is not installed")
    from pipelines.extract.ray_cluster import ray_extract

    return ray_extract


@pytest.mark.slow  # a Ray cluster of this machine, half a minute
def test_ray_with_two_actors_stores_what_one_process_stores(ray_extract, recipe_file, store, tmp_path):
    recipe = load_recipe(str(recipe_file))
    report = ray_extract(recipe, tmp_path / "ray", splits=["train", "dev"], num_actors=2)
    assert report.is_complete
    assert report.shards_written == report.shards_total
    assert same_content(store, tmp_path / "ray")


@pytest.mark.slow
def test_ray_goes_on_after_an_actor_was_lost(ray_extract, recipe_file, store, tmp_path):
    """The process behind the first claim is killed, as a spot machine is taken away."""
    killed = []

    def kill_who_claims() -> None:
        while not killed:
            time.sleep(0.001)
            for claim in (tmp_path / "ray" / "claims").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    killed.append(Owner.parse(claim.read_text()).pid)
                    os.kill(killed[0], signal.SIGKILL)
                    return

    killer = threading.Thread(target=kill_who_claims, daemon=True)
    killer.start()
    report = ray_extract(load_recipe(str(recipe_file)), tmp_path / "ray", splits=["train", "dev"], num_actors=1)
    assert killed
    assert report.is_complete
    assert same_content(store, tmp_path / "ray")


@pytest.mark.slow
def test_what_fails_in_an_actor_is_one_line(ray_extract, recipe_file, corpus_folder, tmp_path):
    spoil(corpus_folder, 20)
    with pytest.raises(PipelineError, match=r"^[^\n]* of 48 utterances are bad so far: [^\n]* undecodable[^\n]*$"):
        ray_extract(load_recipe(str(recipe_file)), tmp_path / "ray", splits=["train", "dev"], num_actors=1, max_bad=0.1)


def test_ray_hands_out_devices_itself(recipe_file, tmp_path):
    pytest.importorskip("ray", reason="the optional extra `ray` is not installed")
    from pipelines.extract.ray_cluster import ray_extract

    with pytest.raises(PipelineError, match="expected auto, cpu, cuda"):
        ray_extract(load_recipe(str(recipe_file)), tmp_path, splits=["train"], num_actors=1, device="cuda:1")


def test_ray_absent_is_one_line(recipe_file, tmp_path, monkeypatch):
    from pipelines.extract.ray_cluster import ray_extract

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PipelineError, match=r"tinyaudio\[ray\]"):
        ray_extract(load_recipe(str(recipe_file)), tmp_path / "ray", splits=["train"], num_actors=2)


def test_machines_without_a_common_disk_share_a_calibration_and_merge(recipe_file, tmp_path):
    stage_one(recipe_file, tmp_path / "one", INT8)
    stage_one(recipe_file, tmp_path / "a", INT8, part=(0, 2))
    stage_one(recipe_file, tmp_path / "b", INT8, f"store.calibration={tmp_path / 'a'}", part=(1, 2))
    merged = store_merge(tmp_path / "merged", [tmp_path / "a", tmp_path / "b"])
    assert not merged.pending
    assert same_content(tmp_path / "one", tmp_path / "merged")
