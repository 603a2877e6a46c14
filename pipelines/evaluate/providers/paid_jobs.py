"""What a paid provider needs: a ledger of jobs on the disk, patience with errors, and prices.

The ledger is the memory that keeps anyone from paying twice. Before a job is created its intention is written down
(with the upload's address, which is the job's alone), and its id as soon as it is known; both are on the disk before
anything else happens. An intention without an id is looked up at the provider before it is tried again. Whoever asks
or pays holds the evaluation's folder, and reads the ledger again first: another process may have paid meanwhile.
"""

import json
import os
import threading
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")
PRICES = Path(__file__).parent / "prices.toml"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One clip's way through a provider: `upload` once intended, `job_id` once accepted."""

    upload: str | None = None
    job_id: str | None = None


class Ledger:
    """Jobs by utterance, in a file of JSON lines that only grows; safe among threads of one process."""

    def __init__(self, path: Path) -> None:
        """Open or begin a ledger."""
        self._path, self._lock = path, threading.Lock()
        self.read_again()

    def read_again(self) -> None:
        """Read what is on the disk now; a last line torn by a kill does not count, and is cut off by the next note."""
        content = self._path.read_bytes() if self._path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self._torn_at = len(whole) if len(whole) < len(content) else None
        self._jobs: dict[str, Job] = {}
        for line in whole.decode().splitlines():
            entry = json.loads(line)
            self._jobs[entry["utterance_id"]] = Job(upload=entry["upload"], job_id=entry["job_id"])

    def job(self, utterance_id: str) -> Job:
        """Return what is known of a clip's job; an empty `Job` if nothing."""
        return self._jobs.get(utterance_id, Job())

    def note(self, utterance_id: str, job: Job) -> None:
        """Write a step down; it is on the disk when this returns. An empty `Job` forgets a job that came to nothing."""
        entry = {"utterance_id": utterance_id, "upload": job.upload, "job_id": job.job_id}
        with self._lock:
            self._jobs[utterance_id] = job
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as stream:
                if self._torn_at is not None:
                    stream.truncate(self._torn_at)
                    self._torn_at = None
                stream.write(json.dumps(entry) + "\n")
                stream.flush()
                os.fsync(stream.fileno())


class StoppedError(Exception):
    """Another thread met something fatal, or the user interrupted; this one gives up its clip."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How to wait.

    Args:
        first_s, most_s: the first pause after an error and the longest; each is twice the one before.
        attempts: tries of one request before it counts as failed.
        poll_first_s, poll_most_s: pauses between questions whether a job is done, growing by half.
        give_up_s: how long to wait for one job; it can be fetched later by its id.
    """

    first_s: float = 1.0
    most_s: float = 60.0
    attempts: int = 8
    poll_first_s: float = 3.0
    poll_most_s: float = 15.0
    give_up_s: float = 1_800.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do about an exception: try again (after at least so many seconds, if the server said so), or not."""

    is_transient: bool
    retry_after_s: float = 0.0


class Waiter:
    """Runs requests with patience; `stop` ends all pauses at once."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def pause(self, seconds: float) -> None:
        """Wait.

        Raises:
            StoppedError: somebody called `stop`.
        """
        if self._stopped.wait(seconds):
            raise StoppedError

    def persist(self, request: Callable[[], ResultT], judge: Callable[[Exception], Verdict]) -> ResultT:
        """Try a request until it succeeds, fails for good, or `attempts` are used up; then its error is raised."""
        pause_s = self.patience.first_s
        for attempt in range(1, self.patience.attempts + 1):
            self.pause(0.0)
            try:
                return request()
            except Exception as error:
                verdict = judge(error)
                if not verdict.is_transient or attempt == self.patience.attempts:
                    raise
                self.pause(max(pause_s, verdict.retry_after_s))
                pause_s = min(2 * pause_s, self.patience.most_s)
        raise AssertionError("unreachable")


@dataclass(frozen=True, kw_only=True)
class Quote:
    """What an evaluation will cost, before it starts; `usd` is None for a model without a known price."""

    clips: int
    hours: float
    usd: float | None
    as_of: str

    def __str__(self) -> str:
        cost = "at an unknown price" if self.usd is None else f"about ${self.usd:.2f} (list price of {self.as_of})"
        return f"{self.clips:,} clips, {self.hours:.2f} h: {cost}"


def _prices(provider: str) -> dict[str, Any]:
    return dict(tomllib.loads(PRICES.read_text())[provider])


def model_names(provider: str) -> list[str]:
    """List the models that a provider takes, by `prices.toml`."""
    return list(_prices(provider)["models"])


def quote(provider: str, model: str, durations_s: list[float]) -> Quote:
    """Compute a price from `prices.toml`."""
    prices = _prices(provider)
    hours = sum(durations_s) / 3600
    per_hour = prices["usd_per_hour"].get(model)
    usd = None if per_hour is None else hours * per_hour
    return Quote(clips=len(durations_s), hours=hours, usd=usd, as_of=prices["as_of"])
