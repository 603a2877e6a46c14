"""Kill writers of one feature store again and again, and check that no committed shard is wrong.

    python tests/kill_store_writers.py --kills 500

Two writers work side by side on one store, each filling one shard while it commits another, as `tinyaudio extract`
does. They are killed in turn with SIGKILL at a random moment and started again; when the store is finished, a new one
is begun. After every kill, every byte of each committed shard is checked. Prints one JSON object with the counts.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
from cache_stores import Features, create, fill

from cache import FeatureReader, FeatureStore, store_verify
from cache.claims import read_owner, sweep
from cache.files import temporaries
from cache.verify import check_shard

ROWS, DIM = 1024, 64  # 128 KiB a shard: nearly all of its time is the protocol, which is what is under test
LENGTHS = [200, 300, 500] * 120


@cache
def features() -> Features:
    """Make frames in which every row of every utterance is different."""
    rows = np.arange(ROWS * DIM, dtype=np.float32).reshape(ROWS, DIM) % 2039
    return {f"u{i}": rows[:length] + i for i, length in enumerate(LENGTHS)}


def open_store(path: Path) -> FeatureStore:
    return create(path, features(), dim=DIM, rows_per_shard=ROWS)


def write(path: Path, at_work: Connection, held: int) -> None:
    """Write shards until the store is finished, as one of several writers; `held` shards at a time, 1 or 2."""
    expected = features()
    store = open_store(path)
    with contextlib.suppress(BrokenPipeError):
        at_work.send(True)
    with ThreadPoolExecutor(1) as committing:
        while pending := store.pending_shards():
            random.shuffle(pending)
            before: Future[None] | None = None
            for shard in pending:
                writer = store.write_shard(shard)
                if writer is None:
                    continue
                for row in writer.plan.to_pylist():
                    frames = expected[row["utterance_id"]]
                    writer.append(row["utterance_id"], frames, num_samples=1, duration_s=1.0, transcript="")
                if before is not None:
                    before.result()
                before = committing.submit(writer.__exit__, None, None, None)
                if held == 1:
                    before.result()
            if before is not None:
                before.result()
            time.sleep(0.005)


def start(path: Path, held: int, patience_s: float = 60) -> ForkServerProcess:
    """Start a writer, and wait until it works, or until the time is over."""
    context = multiprocessing.get_context("forkserver")
    parent, child = context.Pipe(duplex=False)
    process = context.Process(target=write, args=(path, child, held))
    process.start()
    child.close()
    parent.poll(patience_s)
    parent.close()
    return process


def is_unfinished(path: Path) -> bool:
    return not (path / "zarr.json").exists() or bool(FeatureStore.open(path).pending_shards())


def committed_bad(store: FeatureStore) -> list[int]:
    """List committed shards with a fault."""
    return [shard for shard in store.committed_shards() if check_shard(store, shard, deep=True)]


def unfinished_of(store: FeatureStore, pid: int) -> list[str]:
    """List the shards that a killed writer leaves half done."""
    owners = {path.name: read_owner(path) for path in (store.path / "claims").glob("[0-9]*")}
    return [
        name
        for name, owner in owners.items()
        if owner is not None and owner.pid == pid and not store.layout.commit(int(name)).exists()
    ]


def finish(store: FeatureStore) -> dict[str, int]:
    """Finish a store and check that every utterance is stored and right, and that no temporary file is left."""
    expected = features()
    store = open_store(store.path)
    fill(store, expected)
    store.seal()
    reader = FeatureReader(store)
    ids = reader.index["utterance_id"].to_pylist()
    wrong = sum(
        not np.array_equal(frames, expected[utterance_id].astype(np.float16))
        for utterance_id, frames in zip(ids, reader.read(range(len(reader))), strict=True)
    )
    sweep(store.layout, store.header)
    litter = [
        path for folder in (store.path, *store.path.iterdir()) if folder.is_dir() for path, _ in temporaries(folder)
    ]
    return {
        "wrong_utterances": wrong,
        "missing_utterances": len(expected) - len(set(ids)),
        "faults_at_the_end": len(store_verify(store, deep=True)),
        "litter": len(litter),
    }


def run(kills: int, seed: int, folder: Path, held: int = 2) -> dict[str, Any]:
    """Kill writers until `kills` of them died at work.

    Args:
        held: shards a writer has begun at a time; 2 is one being filled and one being committed, as in an extraction.

    Returns:
        Counts, all of which should be zero but for kills, stores and `redone_per_kill`: how many kills left so many
        shards half done, at most those held.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the fork server imports for all: a writer starts in 0.1 s
    multiprocessing.get_context("forkserver").set_forkserver_preload(["cache", "cache_stores", "kill_store_writers"])
    rng = random.Random(seed)
    redone: Counter[int] = Counter()
    seen = dict.fromkeys(
        (
            "kills",
            "stores",
            "committed_bad",
            "more_than_held_redone",
            "wrong_utterances",
            "missing_utterances",
            "faults_at_the_end",
            "litter",
        ),
        0,
    )
    while seen["kills"] < kills:
        path = folder / f"store{seen['stores']}"
        writers = [start(path, held, patience_s=0), start(path, held)]
        while seen["kills"] < kills and is_unfinished(path):
            time.sleep(rng.uniform(0.0, 0.15))
            victim = rng.randrange(2)
            killed = writers[victim]
            killed.kill()
            killed.join()
            seen["kills"] += killed.exitcode == -9
            if (path / "zarr.json").exists():
                store = FeatureStore.open(path)
                lost = len(unfinished_of(store, killed.pid or 0))
                redone[lost] += killed.exitcode == -9
                seen["more_than_held_redone"] += lost > held
                seen["committed_bad"] += len(committed_bad(store))
            writers[victim] = start(path, held, patience_s=60 if rng.random() < 0.9 else rng.uniform(0.0, 0.5))
        for writer in writers:
            writer.join()
            assert writer.exitcode == 0, writer.exitcode
        for name, count in finish(open_store(path)).items():
            seen[name] += count
        seen["stores"] += 1
        shutil.rmtree(path)
    seen["litter"] += len(list(folder.iterdir()))
    return seen | {"redone_per_kill": {str(shards): redone[shards] for shards in sorted(redone)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="writers to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which they die")
    parser.add_argument("--held", type=int, choices=(1, 2), default=2, help="shards a writer has begun at a time")
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-store-") as folder:
        seen = run(options.kills, options.seed, Path(folder), options.held)
    print(json.dumps(seen | {"seconds": round(time.monotonic() - begun)}))


if __name__ == "__main__":
    main()
