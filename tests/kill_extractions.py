"""Kill extractions at random moments, on a bad network and a full disk, until N of them have died; then compare.

    python tests/kill_extractions.py 100 [SEED]

A parent imports once and forks an extraction per attempt. Each child gets SIGKILL after a random time, or a file size
limit in the middle of a shard (a full disk, which has to end in one line); all of them meet a replica of the hub that
answers one request in twelve wrongly. A store that is finished early is verified and made anew. Ends with one line of
JSON and exit code 0 if every finished store verifies deeply and equals the undisturbed one, features, transcripts and
index; with a child's last words if one fails or hangs.
"""

import faulthandler
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARD_ROWS = 1024  # 20 s: a dozen shards
PATIENCE_S = 300  # some ten times an undisturbed extraction on two busy cores
BUG = 70  # exit code of a child that met something else than what was done to it


def main() -> None:
    kills, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if "KILL_FOLDER" in os.environ:
        _attempts(Path(os.environ["KILL_FOLDER"]), kills, random.Random(seed))
        return
    from hub_replica import CORPUS, Fault, Hub, fill

    with tempfile.TemporaryDirectory() as name, fill(Hub(seed), Path(name) / "served", 120, 30) as hub:
        pattern = rf"{CORPUS}/resolve/.*parquet"
        for kind in ("disconnect", "short", 500, 429, "slow"):
            hub.faults.append(Fault(pattern, kind, times=-1, share=1 / 60))
        environment = {**hub.environment(Path(name) / "home"), "KILL_FOLDER": name}
        sys.exit(subprocess.run([sys.executable, __file__, str(kills), str(seed)], env=environment).returncode)


def _attempts(folder: Path, kills: int, chance: random.Random) -> None:
    import datasets  # noqa: F401  (imported once, for all children)
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import pipelines.extract.stage  # noqa: F401
    from pipelines import retry

    retry.MIN_WAIT_S = 0.05  # the replica's faults pass at once
    begun = time.monotonic()
    Child(folder, _extraction(folder / "undisturbed")).wait_for(0)
    whole_s = time.monotonic() - begun
    Child(folder, lambda: _check(folder / "undisturbed", folder / "expected")).wait_for(0)
    tally, store = {"kill": 0, "disk": 0, "end": 0, "redone": 0}, folder / "store"
    while tally["kill"] + tally["disk"] < kills:
        if chance.random() < 0.2:
            child = Child(folder, _extraction(store, chance.randrange(1_000, 60_000)))
            outcome = "disk" if child.wait_for(0, 1) else "end"
        else:
            child = Child(folder, _extraction(store))
            outcome = "kill" if child.is_killed_after(chance.uniform(0.0, whole_s)) else "end"
        tally[outcome] += 1
        tally["redone"] += len(list((store / "claims").glob("[0-9]*")))  # shards that had been begun
        if outcome == "end" and chance.random() < 0.9:
            Child(folder, lambda: _check(store, folder / "expected")).wait_for(0)
            shutil.rmtree(store)
    while not (store / "SEALED.json").exists():
        Child(folder, _extraction(store)).wait_for(0)
    Child(folder, lambda: _check(store, folder / "expected")).wait_for(0)
    print(json.dumps({**tally, "seconds": round(time.monotonic() - begun), "is_equal": True}))


def _extraction(store: Path, max_file_bytes: int | None = None) -> Callable[[], None]:
    """Give an extraction, perhaps with a limit on the size of its files."""

    def run() -> None:
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        from tinyaudio.cli import main as tinyaudio

        changed = (f"store.rows_per_shard={SHARD_ROWS}", "extract.disk_margin_gb=0", "extract.disk_patience_s=0")
        settings = [word for setting in changed for word in ("--set", setting)]
        sys.argv = ["tinyaudio", "extract", "--recipe", "loquacious-small", "--store", str(store), *settings]
        tinyaudio()

    return run


def _check(store: Path, expected: Path) -> None:
    """Compare a store's content, deeply verified, with what the first one held."""
    from cache import FeatureReader, FeatureStore, store_verify

    faults = store_verify(FeatureStore.open(store), deep=True)
    assert not faults, faults
    reader = FeatureReader(store)
    ids = sorted(reader.index["utterance_id"].to_pylist())
    rows = {row["utterance_id"]: row for row in reader.index.to_pylist()}
    content = "".join(
        f"{hashlib.sha256(reader.get(i).tobytes()).hexdigest()} {json.dumps(rows[i], sort_keys=True)}\n" for i in ids
    )
    assert ids
    if not expected.exists():
        expected.write_text(content)
    assert content == expected.read_text(), f"{store} holds something else than the undisturbed store"
    assert not list((store / "claims").glob("[0-9]*")), "a claim outlived its extraction"


class Child:
    """A forked process that talks to children.log; the parent starts no thread, so that forking is safe."""

    def __init__(self, folder: Path, work: Callable[[], None]) -> None:
        self.log = folder / "children.log"
        self.pid = os.fork()
        if self.pid:
            return
        code = BUG
        try:
            log = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.dump_traceback_later(PATIENCE_S, exit=True)  # a child that hangs says where
            work()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait_for(self, *codes: int) -> int:
        """Wait for the end, which has to be with one of these exit codes."""
        _, status = os.waitpid(self.pid, 0)
        return self._code(status, codes)

    def is_killed_after(self, seconds: float) -> bool:
        """Kill it after so long, unless it is done, and well done, before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code(status, (0,))
                return False
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return True

    def _code(self, status: int, codes: Sequence[int]) -> int:
        code = os.waitstatus_to_exitcode(status)
        if code not in codes:
            sys.exit(f"a child ended with {code}, expected {codes}:\n{self.log.read_text(errors='replace')[-20_000:]}")
        return code


if __name__ == "__main__":
    main()
