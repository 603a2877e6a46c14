"""Kill extractions at random moments, on a bad network and a full disk, until N of them have died; then compare.

    python tests/kill_extractions.py 100 [SEED]

A parent imports once and forks an extraction per attempt (before any thread pool exists, so that forking is safe). Each
child gets SIGKILL after a random time, or a file size limit in the middle of a shard (a full disk); all of them meet a
replica of the hub that answers one request in twelve wrongly. A store that is finished early is verified and made anew.
Ends with one line of JSON and exit code 0 if every finished store verifies deeply and equals the undisturbed one.
"""

import contextlib
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
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARD_ROWS = 1024  # 20 s: a dozen shards of two minutes of speech each


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

    import pipelines.extract  # noqa: F401

    begun = time.monotonic()
    _child(folder / "undisturbed").wait_for()
    whole_s = time.monotonic() - begun
    expected, tally, store = _content(folder / "undisturbed"), {"kill": 0, "disk": 0, "end": 0}, folder / "store"
    while tally["kill"] + tally["disk"] < kills:
        is_disk = chance.random() < 0.2
        child = _child(store, chance.randrange(1_000, 60_000) if is_disk else None)
        outcome = child.wait_for() if is_disk else child.kill_after(chance.uniform(0.0, whole_s))
        tally[outcome] += 1
        if outcome == "end" and chance.random() < 0.9:
            _check(store, expected)
            shutil.rmtree(store)
    while not (store / "SEALED.json").exists():
        _child(store).wait_for()
    _check(store, expected)
    print(json.dumps({**tally, "utterances": len(expected), "is_equal": True}))


def _content(store: Path) -> dict[str, bytes]:
    from cache import FeatureReader, FeatureStore, store_verify

    faults = store_verify(FeatureStore.open(store), deep=True)
    assert not faults, faults
    reader = FeatureReader(store)
    return {i: reader.get(i).tobytes() for i in reader.index["utterance_id"].to_pylist()}


def _check(store: Path, expected: dict[str, bytes]) -> None:
    assert _content(store) == expected, f"{store} holds something else than the undisturbed store"
    assert not list((store / "claims").glob("[0-9]*")), "a claim outlived its extraction"


class _child:  # noqa: N801  (a function in all but its two ways of ending)
    """An extraction in a forked process, perhaps with a limit on the size of its files."""

    def __init__(self, store: Path, max_file_bytes: int | None = None) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        with contextlib.suppress(BaseException):
            with (store.parent / "children.log").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if max_file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
            from tinyaudio.cli import main as tinyaudio

            settings = ["--set", f"store.rows_per_shard={SHARD_ROWS}", "--set", "extract.disk_margin_gb=0"]
            sys.argv = ["tinyaudio", "extract", "--recipe", "loquacious-small", "--store", str(store), *settings]
            try:
                tinyaudio()
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
        os._exit(code)

    def wait_for(self) -> str:
        _, status = os.waitpid(self.pid, 0)
        return "end" if status == 0 else "disk"

    def kill_after(self, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                assert status == 0, f"an extraction failed by itself (status {status}); see children.log"
                return "end"
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return "kill"


if __name__ == "__main__":
    main()
